"""``nnunet-ext check``: faults planted in trainers of another package are found, and said in one line with a cure."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from nnunetv2.paths import nnUNet_preprocessed

from nnunet_ext import cli
from nnunet_ext.check.phantom import CASES, DataKind, workspace, write
from nnunet_ext.check.steps import STEPS
from nnunet_ext.check.trainer import check, check_case
from nnunet_ext.doctor.finding import Finding
from tests.conftest import Install

BY_TITLE = {case.title: case for case in CASES}
PLAIN = BY_TITLE["3d"]

HEAD = """
import numpy as np
import torch
from torch import nn
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

def changed(change):
    def build_network_architecture(plans_manager, configuration_manager, num_input_channels, num_output_channels,
                                   enable_deep_supervision=True):
        return change(nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        ))
    return staticmethod(build_network_architecture)

def on_output(function):
    def change(network):
        network.register_forward_hook(lambda module, inputs, output: function(output))
        return network
    return changed(change)

def with_module(name, make):
    def change(network):
        network.add_module(name, make())
        return network
    return change

class Counting(nn.Module):
    # Adds the number of training steps, which its state_dict does not hold.
    steps = 0.0
    def forward(self, x):
        self.steps += self.training
        return x + self.steps

class Noting(nn.Module):
    # Notes the number of training steps in what is no tensor, and does not take it from a checkpoint.
    steps = 0
    def forward(self, x):
        self.steps += self.training
        return x
    def get_extra_state(self):
        return {"steps": np.array([self.steps])}
    def set_extra_state(self, state):
        pass

class Broken(nn.Module):
    # The gradient is no number.
    def forward(self, x):
        return torch.sqrt(x * 0) * 0 + x if self.training else x

def then(network, module):
    network.add_module("then", module)
    network.register_forward_hook(lambda owner, _, out: [owner.then(o) for o in out]
                                  if isinstance(out, list) else owner.then(out))
    return network

class nnUNetTrainerAcme(nnUNetTrainer):
"""

# fault -> body of the class, case, step that fails, words of its row and of the cure
FAULTS: dict[str, tuple[str, str, str, str, str]] = {
    "predicts half of the patch": (
        "build_network_architecture = on_output(lambda o: o if isinstance(o, list) else o[..., ::2])",
        "3d",
        "output",
        "returns (1, 3, 16, 16, 8), nnU-Net needs one tensor of shape (1, 3, 16, 16, 16)",
        "logits of the patch's size",
    ),
    "ignores deep supervision": (
        "build_network_architecture = on_output(lambda o: o[0] if isinstance(o, list) else o)",
        "3d",
        "output",
        "with deep supervision the network returns (1, 3, 16, 16, 16), nnU-Net's loss needs a list",
        "enable_deep_supervision = False",
    ),
    "gives fewer levels than the loss weighs": (
        "build_network_architecture = on_output(lambda o: o[:1] if isinstance(o, list) else o)",
        "2d",
        "output",
        "with deep supervision the network returns [(1, 3, 16, 16)]",
        "one tensor for each level",
    ),
    "has a weight that nothing uses": (
        "build_network_architecture = changed(with_module('spare', lambda: nn.Linear(2, 2)))",
        "3d",
        "training step",
        "no gradient for spare.weight, spare.bias",
        "freeze it",
    ),
    "has a gradient that is no number": (
        "build_network_architecture = changed(lambda network: then(network, Broken()))",
        "3d",
        "training step",
        "the gradient is not finite for",
        "division",
    ),
    "has weights that the optimizer lacks": (
        "def configure_optimizers(self):\n"
        "        optimizer, scheduler = super().configure_optimizers()\n"
        "        del optimizer.param_groups[0]['params'][-1]\n"
        "        return optimizer, scheduler",
        "3d",
        "training step",
        "the optimizer does not have decoder.seg_layers",
        "configure_optimizers",
    ),
    "never steps": (
        "def train_step(self, batch):\n        return {'loss': self.validation_step(batch)['loss']}",
        "3d",
        "training step",
        "never steps the optimizer",
        "optimizer.step()",
    ),
    "loses state in the checkpoint": (
        "build_network_architecture = changed(lambda network: then(network, Counting()))",
        "3d",
        "checkpoint",
        "the loaded network predicts differently, by up to 2",
        "parameters or buffers",
    ),
    "loses the optimizer's state": (
        "def load_checkpoint(self, path):\n"
        "        self.initialize()\n"
        "        stored = torch.load(path, weights_only=False)\n"
        "        self.network.load_state_dict(stored['network_weights'])",
        "3d",
        "checkpoint",
        "does not restore the optimizer's state",
        "nnU-Net's own",
    ),
    "loads no weights": (
        "def load_checkpoint(self, path):\n        self.initialize()",
        "3d",
        "checkpoint",
        "loading does not restore encoder.",
        "nnU-Net's own",
    ),
    "loads no state that is no tensor": (
        "build_network_architecture = changed(lambda network: then(network, Noting()))",
        "3d",
        "checkpoint",
        "loading does not restore then._extra_state",
        "nnU-Net's own",
    ),
    "lacks a part after loading": (
        "build_network_architecture = changed(with_module('spare', lambda: nn.BatchNorm1d(2, affine=False)))\n"
        "    def load_checkpoint(self, path):\n"
        "        super().load_checkpoint(path)\n"
        "        del self.network.spare",
        "3d",
        "checkpoint",
        "loading does not restore spare.running_mean",
        "nnU-Net's own",
    ),
    "predicts at random": (
        "build_network_architecture = on_output(lambda o: [x + torch.rand_like(x) for x in o]"
        " if isinstance(o, list) else o + torch.rand_like(o))",
        "3d",
        "checkpoint",
        "differs from call to call",
        "dropout",
    ),
    "adds a layer after the network is built": (
        "def initialize(self):\n"
        "        super().initialize()\n"
        "        then(self.network, nn.Conv3d(3, 3, 1))\n"
        "        self.optimizer, self.lr_scheduler = self.configure_optimizers()",
        "3d",
        "prediction",
        "Unexpected key(s) in state_dict",
        "let build_network_architecture return",
    ),
    "changes the network after it is built": (
        "def initialize(self):\n        super().initialize()\n        then(self.network, nn.Softplus())",
        "3d",
        "prediction",
        "predicts differently from the network that was trained",
        "let build_network_architecture return",
    ),
    "takes the ignore label for a class": (
        "def _build_loss(self):\n"
        "        ignored, self.label_manager._ignore_label = self.label_manager._ignore_label, None\n"
        "        loss = super()._build_loss()\n"
        "        self.label_manager._ignore_label = ignored\n"
        "        return loss",
        "ignore label",
        "training step",
        "index 3 is out of bounds",
        "self.label_manager.ignore_label",
    ),
    "takes ignored voxels for background": (
        "def _build_loss(self):\n"
        "        loss = super()._build_loss()\n"
        "        inner, ignored = loss.loss.forward, self.label_manager.ignore_label\n"
        "        loss.loss.ignore_label = None\n"
        "        loss.loss.forward = lambda output, target: inner(output, target * (target != ignored))\n"
        "        return loss",
        "ignore label",
        "validation step",
        "loss depends on voxels with the ignore label",
        "ignore_label",
    ),
    "fails in many lines": (
        "def initialize(self):\n        raise ValueError('no\\ngood\\x1b[31m')",
        "3d",
        "build",
        "ValueError at acme.py:",
        "--verbose",
    ),
    "leaves": (
        "def initialize(self):\n        raise SystemExit(3)",
        "3d",
        "build",
        "SystemExit at acme.py:",
        "--verbose",
    ),
    "has a layer without forward": (
        "build_network_architecture = changed(lambda network: then(network, nn.Module()))",
        "3d",
        "output",
        "NotImplementedError at acme.py:",
        "--verbose",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _workspace() -> Iterator[None]:
    with workspace():
        yield


def findings(install: Install, body: str, case: DataKind = PLAIN) -> list[Finding]:
    install("acme", f"{HEAD}    {body}\n", trainers=["nnUNetTrainerAcme"])
    return list(check_case("nnUNetTrainerAcme", case))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_where_it_lies(fault: str, install: Install) -> None:
    body, case, step, words, cure = FAULTS[fault]
    rows = findings(install, body, BY_TITLE[case])
    first = next(row for row in rows if row.level != "ok")
    assert first.level == "failure"
    assert first.subject == f"{case}: {step}"
    assert words in first.detail
    assert cure in first.cure
    assert "\n" not in first.detail + first.cure


def test_a_sound_trainer_passes_every_step_of_every_case(install: Install) -> None:
    install("acme", f"{HEAD}    pass\n", trainers=["nnUNetTrainerAcme"])
    rows = list(check("nnUNetTrainerAcme_3epochs_NoMirroring"))
    assert len(rows) == len(STEPS) * len(CASES)
    assert {row.level for row in rows} == {"ok"}


def test_what_a_sentence_refuses_is_a_warning_with_the_sentence(install: Install) -> None:
    body = (
        "def _build_loss(self):\n"
        "        if self.label_manager.has_ignore_label:\n"
        "            raise NotImplementedError('No ignore label here: use nnUNetTrainer.')\n"
        "        return super()._build_loss()"
    )
    *_, row = findings(install, body, BY_TITLE["ignore label"])
    assert (row.level, row.detail) == ("warning", "not supported: No ignore label here: use nnUNetTrainer.")
    assert {row.level for row in check_case("nnUNetTrainerAcme", PLAIN)} == {"ok"}


@pytest.mark.parametrize(
    ("title", "network", "words"),
    [
        ("ignore label", "network.forward", "; ignored voxels not checked: no call of self.network"),
        ("regions and ignore label", "network", ", the same whatever the ignored voxels hold"),
    ],
)
def test_ignored_voxels_are_said_not_to_matter_only_where_their_logits_were_changed(
    title: str, network: str, words: str, install: Install
) -> None:
    body = (
        "def validation_step(self, batch):\n"
        "        network = self.network\n"
        f"        self.network = lambda x: {network}(x)\n"
        "        result = super().validation_step(batch)\n"
        "        self.network = network\n"
        "        return result"
    )
    (row,) = [row for row in findings(install, body, BY_TITLE[title]) if "validation" in row.subject]
    assert row.level == "ok"
    assert words in row.detail


def test_steps_after_a_failure_run_where_they_can(install: Install) -> None:
    rows = findings(install, "def load_checkpoint(self, path):\n        self.initialize()")
    assert [row.level for row in rows] == ["ok"] * 4 + ["failure", "ok"]


@pytest.mark.parametrize("source", ["raise SystemExit(4)", "import no_such_module", "class Other: pass"])
def test_a_package_that_cannot_be_imported_is_one_row(source: str, install: Install) -> None:
    install("acme", source, trainers=["nnUNetTrainerAcme"])
    (row,) = check("nnUNetTrainerAcme")
    assert row.level == "failure"
    assert "acme:nnUNetTrainerAcme" in row.detail


def test_data_are_those_of_the_case_also_where_another_has_its_title() -> None:
    for case in (DataKind(title="mine"), DataKind(title="mine", channels=2, spacing=(3.0, 1.0, 2.0))):
        folder = Path(str(nnUNet_preprocessed), write(case))
        assert json.loads((folder / "dataset.json").read_text()) == case.dataset
        assert pickle.loads((folder / "data" / "first.pkl").read_bytes())["spacing"] == [*case.spacing]


def test_data_that_cannot_be_written_are_a_row_and_no_half_of_them_is_used(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("nnunet_ext.check.phantom._write_case", full_disk)
        (row,) = findings(install, "pass", replace(PLAIN, title="full"))
    assert (row.level, row.subject) == ("failure", "full: build")
    assert "No space left on device" in row.detail
    assert "TMPDIR" in row.cure
    assert {row.level for row in check_case("nnUNetTrainerAcme", replace(PLAIN, title="full"))} == {"ok"}


def test_environment_is_as_before_after_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_compile")
    before = dict(os.environ)
    with workspace() as folder:
        assert str(folder / "raw") in os.environ.values()
    assert dict(os.environ) == before


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["check", *arguments])
    return status, *capfd.readouterr()


@pytest.fixture
def one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnunet_ext.check.trainer.CASES", (PLAIN,))


@pytest.mark.usefixtures("one_case")
def test_status_is_1_and_nothing_but_rows_is_printed(install: Install, capfd: pytest.CaptureFixture[str]) -> None:
    body = "def initialize(self):\n        print('x')\n        raise ValueError('a\\nb\\x1b[31m')"
    install("acme", f"{HEAD}    {body}\n", trainers=["nnUNetTrainerAcme"])
    status, out, err = run(capfd, "nnUNetTrainerAcme")
    assert (status, err) == (1, "")
    row, cure, _, total = out.splitlines()
    assert row.startswith("FAILURE  3d: build ")
    assert row.endswith("a b\\x1b[31m")
    assert "->" in cure
    assert total == "failures: 1, warnings: 0"
    _, out, err = run(capfd, "nnUNetTrainerAcme", "--verbose")
    assert "Traceback" in err
    assert "Traceback" not in out


@pytest.mark.usefixtures("one_case")
def test_json_holds_the_records_and_status_is_0(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capfd, "nnUNetTrainer", "--json")
    assert status == 0
    assert [record["subject"] for record in json.loads(out)] == [f"3d: {title}" for title, *_ in STEPS]


@pytest.mark.parametrize("name", ["nnUNetTrainerReversibel", "ReversibleUNetPlanner", "ReversibleUNet"])
def test_what_is_no_trainer_is_one_line(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capfd, name)
    assert (status, out) == (2, "")
    assert "trainer" in err
    assert len(err.splitlines()) == 1
