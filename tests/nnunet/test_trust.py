"""Models from elsewhere: no command that reads them runs code that their files name or hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunet_ext import cli, registry
from nnunet_ext.deploy.model import TrainedModel
from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.trust import check_host_names, check_network
from tests.comparison.conftest import CONFIGURATION, DATASET, dice_counts, write_fold

LAYERS = ("conv_op", "norm_op", "dropout_op", "nonlin")
NETWORK = "network_class_name"
EVIL = [
    "os.system",
    "builtins.exec",
    "subprocess.Popen",
    "torch.hub.load",
    "torch.nn.modules.module.OrderedDict",
    "torch.nn.modules.module.torch.hub.load",
    "torch.nn.functional.relu",
    "torch.nn",
    "torch.jit.load",
    "dynamic_network_architectures.building_blocks.helper.torch.hub.load",
    "dynamic_network_architectures.building_blocks.helper.get_matching_batchnorm",
    "nnunet_ext.architectures.deployed.fused",
    "nnunet_ext.cli.main",
    "nnunetv2.run.run_training.run_training",
    "torch.nn.Conv3d\n",
    "torch.nn..Conv3d",
    ".torch.nn.Conv3d",
    "torch.nnevil.Net",
    "torch.nn.NoSuchLayer",
    "Conv3d",
    "",
    7,
    ["torch.nn.Conv3d"],
]


def naming(key: str, value: Any, **arguments: Any) -> dict[str, Any]:
    """A configuration whose network, or layer, has this dotted path."""
    configuration: dict[str, Any] = deepcopy(CONFIGURATION)
    architecture = configuration["architecture"]
    architecture["arch_kwargs"].update(arguments)
    (architecture if key == NETWORK else architecture["arch_kwargs"])[key] = value
    return configuration


@pytest.mark.parametrize("key", [NETWORK, "nonlin"])
@pytest.mark.parametrize("path", EVIL)
def test_what_is_no_network_or_layer_of_known_packages_is_refused(key: str, path: Any) -> None:
    with pytest.raises(UsageError, match=f"got {key} .*: install the package .* or give --trust") as raised:
        check_network(naming(key, path))
    assert "\n" not in str(raised.value)


ADMITTED = [
    "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet",  # of old plans; it has moved
    *(entry.value.replace(":", ".") for entry in registry.entries("architectures")),
]


@pytest.mark.parametrize("path", ADMITTED)
def test_networks_of_nnunet_and_registered_ones_are_admitted(path: str) -> None:
    check_network(naming(NETWORK, path))


@pytest.mark.parametrize(
    "path",
    [
        None,
        "torch.nn.LeakyReLU",
        "torch.nn.modules.batchnorm.BatchNorm3d",
        "dynamic_network_architectures.building_blocks.residual.BottleneckD",
    ],
)
def test_layers_are_admitted(path: str | None) -> None:
    check_network(naming("norm_op", path))


def test_another_packages_network_is_admitted_once_registered(install: Callable[..., Path]) -> None:
    source = "from torch import nn\nclass AcmeNet(nn.Module): pass\nclass AcmeNorm(nn.Module): pass\ndef make(): pass\n"
    with pytest.raises(UsageError, match="give --trust"):
        check_network(naming(NETWORK, "acme_nets.AcmeNet"))
    install("acme_nets", source, architectures=["AcmeNet"])
    check_network(naming(NETWORK, "acme_nets.AcmeNet"))
    check_network(naming("norm_op", "acme_nets.AcmeNorm"))
    with pytest.raises(UsageError, match="give --trust"):
        check_network(naming(NETWORK, "acme_nets.make"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_reader_writer", "np"),
        ("label_manager", "recursive_find_python_class"),
        ("preprocessor_name", "Path"),
        ("normalization_schemes", ["ZScoreNormalization", "ABC"]),
        ("resampling_fn_data", "recursive_find_python_class"),
        ("resampling_fn_seg", "os.system"),
        ("overwrite_image_reader_writer", 3),
    ],
)
def test_what_nnunets_modules_only_import_is_no_name_of_theirs(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"got {key} "):
        check_host_names({key: value})


def test_names_that_nnunet_writes_are_admitted() -> None:
    check_host_names(
        {
            "image_reader_writer": "SimpleITKIO",
            "label_manager": "LabelManager",
            "preprocessor_name": "DefaultPreprocessor",
            "normalization_schemes": ["CTNormalization", "ZScoreNormalization"],
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_probabilities": "resample_torch_fornnunet",
            "overwrite_image_reader_writer": "None",
        }
    )


class Attack:
    """A module that leaves a mark when it is imported, and a model whose plans name it."""

    def __init__(self, site: Path) -> None:
        self.mark = site / "ran"
        (site / "evil.py").write_text(
            f"from pathlib import Path\nPath({str(self.mark)!r}).touch()\nfrom torch import nn\n"
            "from dynamic_network_architectures.architectures.unet import PlainConvUNet as Net\n"
            "Conv3d, Norm, Drop, ReLU = nn.Conv3d, nn.InstanceNorm3d, nn.Dropout3d, nn.LeakyReLU\n"
        )
        (site / "hubconf.py").write_text("from evil import Net as net\n")


@pytest.fixture
def attack(site: Path) -> Attack:
    import sys

    sys.modules.pop("evil", None)
    return Attack(site)


class Reduce:
    """Unpickled, it runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import evil",)


def write_model(folder: Path, configurations: dict[str, dict[str, Any]], name: str, content: dict[str, Any]) -> Path:
    """What a training leaves, of nnU-Net's trainer."""
    model = folder / f"nnUNetTrainer__nnUNetPlans__{name}"
    write_fold(model / "fold_0", {"case": [dice_counts(0.8), dice_counts(0.7)]})
    plans = {
        "dataset_name": "Dataset007_Toy",
        "plans_name": "nnUNetPlans",
        "configurations": configurations,
        "label_manager": "LabelManager",
        "image_reader_writer": "SimpleITKIO",
    }
    (model / "plans.json").write_text(json.dumps(plans))
    (model / "dataset.json").write_text(json.dumps(DATASET))
    checkpoint = {
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": name},
        "network_weights": {},
        **content,
    }
    torch.save(checkpoint, model / "fold_0" / "checkpoint_final.pth")
    return model


def commands(folder: Path, configuration: dict[str, Any], **checkpoint: Any) -> dict[str, list[str]]:
    """Every command that builds a network, called with a model of this configuration."""
    cascade = {"first": dict(configuration, next_stage="second"), "second": dict(configuration, previous_stage="first")}
    results = folder / "results" / "Dataset007_Toy"
    for name in cascade:
        write_model(results, cascade, name, checkpoint)
    model = write_model(folder, {"3d_fullres": configuration}, "3d_fullres", checkpoint)
    plans = ["--plans", str(model / "plans.json")]
    (folder / "in").mkdir()
    (folder / "in" / "new_0000.nii.gz").touch()
    cascade_of = ["-d", "7", "-p", "nnUNetPlans", "-tr", "nnUNetTrainer", "-c", "second", "-f", "0", "-device", "cpu"]
    return {
        "estimate": ["estimate", *plans],
        "benchmark": ["benchmark", *plans, "-tr", "nnUNetTrainer", "--repeats", "0"],
        "compare": ["compare", "-m", str(model), "-np", "1", "-o", str(folder / "report")],
        "deploy": ["deploy", "-m", str(model), "-o", str(folder / "shipped")],
        "cascade-predict": [
            "cascade-predict", "-i", str(folder / "in"), "-o", str(folder / "out"), *cascade_of
        ],
    }  # fmt: skip


COMMANDS = ("estimate", "benchmark", "compare", "deploy", "cascade-predict")
ATTACKS = {
    "network": naming(NETWORK, "evil.Net"),
    "conv_op": naming("conv_op", "evil.Conv3d"),
    "norm_op": naming("norm_op", "evil.Norm"),
    "dropout_op": naming("dropout_op", "evil.Drop", dropout_op_kwargs={}),
    "nonlin": naming("nonlin", "evil.ReLU"),
    "hub": naming(NETWORK, "torch.hub.load", repo_or_dir="HERE", model="net", source="local", skip_validation=True),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    for name in ("raw", "preprocessed"):
        monkeypatch.delenv(f"nnUNet_{name}", raising=False)


@pytest.mark.parametrize(
    ("command", "kind"),
    [("estimate", kind) for kind in ATTACKS]
    + [(command, kind) for command in COMMANDS[1:] for kind in ("network", "hub", "nonlin")],
)
def test_no_command_runs_what_plans_name(
    command: str, kind: str, attack: Attack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = json.dumps(ATTACKS[kind]).replace("HERE", str(attack.mark.parent))
    status = cli.main(commands(tmp_path, json.loads(text))[command])
    error = capsys.readouterr().err
    assert status == (0 if command == "compare" else 2)
    assert len([line for line in error.splitlines() if "give --trust" in line]) == 1
    assert not attack.mark.exists()


@pytest.mark.parametrize("trainer", ["nnUNetTrainerBN", "nnUNetTrainerHalfWidthBN"])
def test_what_a_trainer_imports_is_judged_though_plans_do_not_list_it(
    trainer: str, attack: Attack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configuration = naming("conv_op", "evil.Conv3d")
    configuration["architecture"]["_kw_requires_import"] = []
    assert cli.main(commands(tmp_path, configuration, trainer_name=trainer)["deploy"]) == 2
    assert "got conv_op 'evil.Conv3d'" in capsys.readouterr().err
    assert not attack.mark.exists()


@pytest.mark.parametrize("command", ["estimate", "benchmark", "compare", "deploy"])
def test_trusted_models_may_name_anything(
    command: str, attack: Attack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main([*commands(tmp_path, ATTACKS["nonlin"])[command], "--trust"])
    assert "give --trust" not in capsys.readouterr().err
    assert attack.mark.exists()


@pytest.mark.parametrize("command", ["compare", "deploy", "cascade-predict"])
def test_no_command_unpickles_objects_of_checkpoints(
    command: str, attack: Attack, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(commands(tmp_path, CONFIGURATION, optimizer_state=Reduce())[command])
    error = capsys.readouterr().err
    assert status == (0 if command == "compare" else 2)
    assert len([line for line in error.splitlines() if "is not a complete checkpoint of nnU-Net" in line]) == 1
    assert not attack.mark.exists()


@pytest.mark.parametrize("name", ["torch", "join", "os", "a.b", "../nnUNetTrainer", ""])
@pytest.mark.parametrize("command", ["deploy", "cascade-predict"])
def test_a_checkpoints_trainer_is_a_trainer(
    command: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(commands(tmp_path, CONFIGURATION, trainer_name=name)[command]) == 2
    assert f"a trainer must be known to nnU-Net or registered, got {name}:" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["0; touch ran", "0\x1b[2J", "x", "0 1", "\N{SUPERSCRIPT TWO}"])
def test_folders_that_are_no_folds_of_nnunet_are_not_deployed(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, {"3d_fullres": CONFIGURATION}, "3d_fullres", {})
    shutil.copytree(model / "fold_0", model / f"fold_{name}")
    assert list(TrainedModel.read(model, None, "checkpoint_final.pth").checkpoints) == ["0"]
    with pytest.raises(UsageError, match="choose among 0"):
        TrainedModel.read(model, [name], "checkpoint_final.pth")
