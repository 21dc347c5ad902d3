"""`nnunet-ext deploy --stock` for every registered trainer: a model of nnU-Net's own, or the reason in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

from nnunet_ext.cli import main
from nnunet_ext.deploy.model import TrainedModel
from nnunet_ext.deploy.standalone.predict import channels_of, read_file, sha256
from tests.contract.test_deploy import logits_of, store, trained, write_images
from tests.contract.test_trainers import TRAINERS, trainer_of
from tests.contract.variants import slow_variants


def stock(model: Path, output: Path, *arguments: str) -> int:
    return main(["deploy", "-m", str(model), "-o", str(output), "--stock", *arguments])


def is_of_nnunet(trainer: str, identifier: int) -> bool:
    """Whether the network is nnU-Net's, or computes what it does in another way."""
    made = trainer_of(trainer, identifier)
    made.initialize()
    return isinstance(made.network, (PlainConvUNet, ResidualEncoderUNet))


@pytest.mark.parametrize("name", slow_variants(["nnUNetTrainer", *TRAINERS]))
def test_predicts_as_a_model_of_nnunet_or_says_why_not(
    name: str, dataset: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    identifier = dataset("labels")
    model = trained(name, identifier, tmp_path / "model")
    output = tmp_path / "shipped"
    status = stock(model, output)
    printed = capsys.readouterr()
    assert status == (0 if is_of_nnunet(name, identifier) else 2)
    if status:
        assert "--stock needs a network of dynamic_network_architectures" in printed.err
        assert "use --standalone" in printed.err
        assert not output.exists()
        return
    stored = torch.load(output / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert stored["trainer_name"] == "nnUNetTrainer"
    assert "nnunet_ext" not in (output / "plans.json").read_text()
    folded = "BN" in name
    assert ("batch norms folded" in printed.out) == folded
    wanted, found = logits_of(model), logits_of(output)
    if folded:  # the only rounding; nnU-Net sums what windows predict in float16
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().max()))
        assert not [key for key in stored["network_weights"] if "norm" in key]
    else:
        assert torch.equal(found, wanted)


def test_residual_networks_keep_norms_without_which_nnunet_can_not_build_them(
    dataset: Callable[[str], int], tmp_path: Path
) -> None:
    model = trained("nnUNetTrainerHalfWidthBN", dataset("labels"), tmp_path / "model")
    plans = json.loads((model / "plans.json").read_text())
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    architecture["arch_kwargs"]["n_blocks_per_stage"] = architecture["arch_kwargs"].pop("n_conv_per_stage")
    (model / "plans.json").write_text(json.dumps(plans))
    network = TrainedModel.read(model, None, "checkpoint_final.pth").network()
    store(model, network_weights=network.state_dict())
    assert stock(model, tmp_path / "out") == 0
    stored = torch.load(tmp_path / "out" / "fold_0" / "checkpoint_final.pth", weights_only=True)["network_weights"]
    assert [key for key in stored if key.endswith("running_mean")]
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(model))


def test_every_file_has_its_checksum_and_the_card_lies_beside(dataset: Callable[[str], int], tmp_path: Path) -> None:
    model = trained("nnUNetTrainerHalfWidth", dataset("regions"), tmp_path / "model", (0, 1))
    assert stock(model, tmp_path / "out") == 0
    sums = dict(reversed(line.split("  ")) for line in (tmp_path / "out" / "SHA256SUMS").read_text().splitlines())
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(sums) == files - {"SHA256SUMS"}
    assert all(sha256(tmp_path / "out" / name) == value for name, value in sums.items())
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert "nnUNetTrainerHalfWidth, nnUNetPlans, 3d_fullres" in card
    assert "Not known: the folds have no validation." in card


def test_where_this_package_is_not_installed_nnunet_predicts_the_same(
    dataset: Callable[[str], int], tmp_path: Path
) -> None:
    model = trained("nnUNetTrainerHalfWidthBN", dataset("regions"), tmp_path / "model", (0, 1))
    assert stock(model, tmp_path / "out", "-i", str(write_images(model, tmp_path))) == 0
    assert main(["deploy", "-m", str(model), "-o", str(tmp_path / "fused")]) == 0  # with this package: folded as well
    for folder in ("out", "fused"):
        predict(tmp_path / folder, tmp_path / "images", tmp_path / f"{folder}-predicted", alone=folder == "out")
    predicted = (read_file(tmp_path / f"{folder}-predicted" / "patient_7.nii.gz") for folder in ("out", "fused"))
    ours, theirs = (channels_of(image) for image in predicted)
    assert theirs.any()
    assert (ours == theirs).all()


PREDICT = """
import importlib.util, sys
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
assert (importlib.util.find_spec("nnunet_ext") is None) == (sys.argv[4] == "True"), "installed after all"
predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
predictor.initialize_from_trained_model_folder(sys.argv[1], (0, 1), "checkpoint_final.pth")
predictor.predict_from_files_sequential(sys.argv[2], sys.argv[3])
"""


def predict(model: Path, images: Path, output: Path, alone: bool) -> None:
    """Run nnU-Net's predictor in a process that sees the packages of this environment; alone: all but ours."""
    output.mkdir()
    packages = sysconfig.get_paths()["purelib"]
    script = f"import sys; sys.path.insert(0, {packages!r})\n{PREDICT}" if alone else PREDICT
    # -S: no .pth file leads to this package, and torch must not look for the hook that its metadata still names.
    options, environment = (["-S"], {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}) if alone else ([], None)
    command = [sys.executable, *options, "-c", script, *map(str, (model, images, output, alone))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=model.parent, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_options_of_other_forms_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--dtype", "float16"], ["--onnx"], ["--form", "t"]):
        assert stock(tmp_path, tmp_path / "out", *option) == 2
        assert f"{option[0]} has no meaning there: omit it" in capsys.readouterr().err


def test_a_network_that_computes_something_else_is_not_shipped(
    dataset: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subclass of nnU-Net's network with the same weights and another forward pass."""
    from nnunet_ext.architectures.checkpointed.unet import CheckpointedPlainConvUNet

    model = trained("nnUNetTrainerActivationCheckpointing", dataset("labels"), tmp_path / "model")
    monkeypatch.setattr(CheckpointedPlainConvUNet, "forward", lambda self, x: PlainConvUNet.forward(self, x) + 1e-3)
    assert stock(model, tmp_path / "out") == 2
    assert "it computes something else" in capsys.readouterr().err
