"""``nnunet-ext estimate``: what it prints, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from nnunet_ext import cli
from nnunet_ext.memory.count import TrainingMemory
from nnunet_ext.memory.estimate import Estimate
from nnunet_ext.memory.gpu import GpuStepMemory
from nnunet_ext.memory.tracker import GIB
from tests.settings import tiny

if TYPE_CHECKING:
    from tests.conftest import RunPython


def test_parts_add_up_and_gpus_are_named(planned_dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "-d", "7", "-c", "3d_half", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["trainer"], found["patch_size"], found["batch_size"]) == ("nnUNetTrainer", [16] * 3, 1)
    size = found["bytes"]
    assert size["expected"] == size["peak"] + size["allowance"]
    assert found["smallest_common_gpu_GB"] == 4
    assert cli.main(["estimate", "-d", "7", "-c", "2d", "-tr", "nnUNetTrainerReversible_4epochs"]) == 0
    out = capsys.readouterr().out
    for text in (
        "patch 16x16, batch 12",
        "float16 autocast",
        "  held ",
        "  peak ",
        "optimiser",
        "allowance",
        "  expected ",
    ):
        assert text in out.replace("\n", " ")
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(("size", "verdict"), [(24, "This GPU has it"), (8, "This GPU does not have it")])
def test_says_whether_this_gpu_has_it(size: int, verdict: str) -> None:
    memory = TrainingMemory(parameters=0, gradients=0, optimizer=0, held=0, peak=10 * GIB, workspace=0)
    found = Estimate(tiny(), "nnUNetTrainer", memory, ("Acme", size * GIB))
    text = "\n".join(found.lines())
    assert verdict in text
    assert found.enough == 11
    assert (
        Estimate(
            tiny(),
            "nnUNetTrainer",
            TrainingMemory(parameters=0, gradients=0, optimizer=0, held=0, peak=999 * GIB, workspace=0),
        ).enough
        is None
    )


def test_measured_memory_stands_beside_what_it_can_be_compared_with() -> None:
    memory = TrainingMemory(
        parameters=0, gradients=0, optimizer=0, held=6 * GIB, peak=10 * GIB, workspace=2 * GIB
    )  # 13 GB expected with the allowance
    measured = GpuStepMemory(held=5 * GIB, peak=15 * GIB, reserved=16 * GIB, outside=4 * GIB)
    found = Estimate(tiny(), "nnUNetTrainer", memory, ("Acme", 24 * GIB), measured)
    text = "\n".join(found.lines())
    assert "Measured held: 5.00 GB; held as counted: 6.00 GB (+20.0%)" in text
    assert "Measured peak, with workspaces: 15.00 GB; peak + workspaces as counted: 12.00 GB (-20.0%)" in text
    assert "Measured reserved and outside: 20.00 GB; expected as counted: 13.00 GB (-35.0%)" in text
    assert "Reserved by PyTorch: 16.00 GB." in text
    assert "Outside of it (context, libraries, other programs): 4.00 GB." in text
    sizes = found.as_dict()
    for key, size in (("held", 5), ("peak", 15), ("reserved", 16), ("outside", 4)):
        assert sizes[f"measured_{key}_bytes"] == size * GIB
    assert Estimate(tiny(), "nnUNetTrainer", memory).as_dict()["measured_outside_bytes"] is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("-d 7 -c 3d_fulres", "have the configurations 3d_fullres, 2d, 3d_half, got 3d_fulres"),
        ("-d 7 -c 2d -p Nothing", "Nothing.json is missing"),
        ("-d 8 -c 2d", "got 8: there is Dataset007_Tiny"),
        ("-d 7 -c 2d -tr Nobody", "got Nobody"),
        ("-d 7 -c 2d -tr nnUNetTrainerDeployed", "only predicts"),
        ("-d 7 -c 2d --batch 0", "at least 1, got 0"),
        ("-d 7 -c 2d --measure", "needs an NVIDIA GPU"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: str, text: str, planned_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--measure" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cli.main(["estimate", *arguments.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("nnunet-ext estimate: ")
    assert text in error


def test_help_needs_no_torch(run_python: RunPython) -> None:
    run_python(
        "import sys\nfrom nnunet_ext import cli\n"
        "try:\n    cli.main(['estimate', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
