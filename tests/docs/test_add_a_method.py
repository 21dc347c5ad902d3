"""The example of docs/how-to/add-a-method.md works as it is printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nnunet_ext import registry

if TYPE_CHECKING:
    from tests.conftest import Install, RunPython

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "add-a-method.md"

# Plans one configuration of a made-up dataset, builds the trainer's network from it and runs it.
USE = """
import json, os, torch, nnunetv2
from pathlib import Path
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

def search(folder, name):
    package = "nnunetv2." + folder.replace("/", ".")
    return find(os.path.join(nnunetv2.__path__[0], folder), name, package)

raw, preprocessed = Path(os.environ["nnUNet_raw"]), Path(os.environ["nnUNet_preprocessed"])
for folder in (raw, preprocessed):
    (folder / "Dataset004_Made").mkdir(parents=True)
    for part in ("imagesTr", "labelsTr"):
        (folder / "Dataset004_Made" / part).mkdir()
labels = {"background": 0, "one": 1}
dataset = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 0, "file_ending": ".x"}
(raw / "Dataset004_Made" / "dataset.json").write_text(json.dumps(dataset))
(preprocessed / "Dataset004_Made" / "dataset_fingerprint.json").write_text("{}")

planner = search("experiment_planning", "SlimUNetPlanner")("Dataset004_Made")
planner.determine_normalization_scheme_and_whether_mask_is_used_for_norm = lambda: (["CT"], [False])
plan = planner.get_plans_for_configuration([1.0, 1.0], [64, 64, 64], "data", 1e6, {})
assert plan["architecture"]["network_class_name"] == "slim_nnunet.SlimUNet", plan

plans = PlansManager({"plans_name": planner.plans_identifier, "configurations": {"2d": plan}})
assert plans.plans_name == "nnUNetSlimPlans"
trainer = search("training/nnUNetTrainer", "nnUNetTrainerSlim")
assert search("training/nnUNetTrainer", "nnUNetTrainerSlim_20epochs_50iters").__base__ is trainer
network = trainer.build_network_architecture(plans, plans.get_configuration("2d"), 1, 2, True)
assert type(network).__name__ == "SlimUNet"
assert network.encoder.output_channels[0] == planner.UNet_base_num_features // 2
x = torch.zeros(1, 1, 64, 64)
assert network(x)[0].shape == (1, 2, 64, 64)
network.decoder.deep_supervision = False
assert network(x).shape == (1, 2, 64, 64)

from nnunet_ext.check.phantom import CASES, workspace
from nnunet_ext.check.trainer import check_case
with workspace():
    rows = list(check_case("nnUNetTrainerSlim", CASES[0]))
assert {row.level for row in rows} == {"ok"}, rows
"""


def files() -> dict[str, str]:
    """The files that the page prints."""
    text = PAGE.read_text(encoding="utf-8")
    return dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))


@pytest.fixture
def example(install: Install) -> None:
    """The page's package, installed."""
    printed = files()
    assert set(printed) == {"pyproject.toml", "slim_nnunet.py"}
    info = install("slim_nnunet", printed["slim_nnunet.py"])
    tables = re.findall(r'^\[project\.entry-points\."(.+?)"\]\n(.+)$', printed["pyproject.toml"], flags=re.MULTILINE)
    lines = [f"[{group}]\n{entry.replace(chr(34), '')}" for group, entry in tables]
    (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.usefixtures("example")
def test_example_registers_one_name_of_each_kind() -> None:
    for kind in registry.KINDS:
        (entry,) = [entry for entry in registry.entries(kind) if entry.module == "slim_nnunet"]
        assert registry.summary(entry)


@pytest.mark.usefixtures("example")
def test_example_plans_and_builds_its_network_through_nnunets_search(run_python: RunPython, tmp_path: Path) -> None:
    run_python(USE, env={f"nnUNet_{name}": str(tmp_path / name) for name in ("raw", "preprocessed", "results")})
