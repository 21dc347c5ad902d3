"""`nnunet-ext deploy` for every registered trainer: nnU-Net predicts the same with what it writes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nnunet_ext.cli import main
from nnunet_ext.deploy.model import TrainedModel
from tests.contract.test_trainers import CPU, TRAINERS, trainer_of


def trained(name: str, identifier: int, folder: Path, folds: tuple[int, ...] = (0,)) -> Path:
    """Write what a training leaves; the norms have seen something."""
    for fold in folds:
        torch.manual_seed(fold)
        trainer = trainer_of(name, identifier)
        trainer.initialize()
        for module in trainer.network.modules():
            if isinstance(module, _BatchNorm):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.3, 2)
        (folder / f"fold_{fold}").mkdir(parents=True)
        trainer.save_checkpoint(str(folder / f"fold_{fold}" / "checkpoint_final.pth"))
    (folder / "plans.json").write_text(json.dumps(trainer.plans_manager.plans))
    (folder / "dataset.json").write_text(json.dumps(trainer.dataset_json))
    return folder


def logits_of(folder: Path, folds: tuple[int, ...] = (0,)) -> torch.Tensor:
    """Predict with nnU-Net's own predictor; trained networks without fusing themselves."""
    predictor = nnUNetPredictor(use_mirroring=True, device=CPU, perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(folder), folds, "checkpoint_final.pth")
    return predictor.predict_logits_from_preprocessed_data(
        torch.randn(2, 30, 26, 24, generator=torch.Generator().manual_seed(0))
    ).float()


@pytest.mark.parametrize("name", TRAINERS)
def test_deployed_models_predict_the_same_or_the_reason_is_one_sentence(
    name: str, dataset: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained(f"{name}_2epochs_1iters", dataset("labels"), tmp_path / "model")
    output = tmp_path / "shipped"
    status = main(["deploy", "-m", str(model), "-o", str(output)])
    printed = capsys.readouterr()
    if status:
        assert "has no block to fuse and no batch norm after a convolution" in printed.err
        assert not output.exists()
        return
    wanted, found = logits_of(model), logits_of(output)
    # nnU-Net sums what windows predict in float16.
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().max()))
    stored = torch.load(output / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert stored["trainer_name"] == "nnUNetTrainerDeployed"
    small = (output / "fold_0" / "checkpoint_final.pth").stat().st_size
    assert small < (model / "fold_0" / "checkpoint_final.pth").stat().st_size
    assert "0 of" in printed.out


@pytest.fixture
def model(dataset: Callable[[str], int], tmp_path: Path) -> Path:
    return trained("nnUNetTrainerFasterFusionBN", dataset("regions"), tmp_path / "model", (0, 1))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_folds_are_shipped_in_the_precision_that_was_asked_for(
    dtype: str, model: Path, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(model, tmp_path)
    arguments = ["deploy", "-m", str(model), "-o", str(tmp_path / "o t"), "--dtype", dtype, "-i", str(images)]
    assert main(arguments) == 0
    (tmp_path / "o t").rename(tmp_path / "out")
    stored = torch.load(tmp_path / "out" / "fold_1" / "checkpoint_final.pth", weights_only=True)
    assert {t.dtype for t in stored["network_weights"].values()} == {getattr(torch, dtype)}
    wanted, found = logits_of(model, (0, 1)), logits_of(tmp_path / "out", (0, 1))
    # At the image's border nnU-Net divides small sums of float16.
    assert (found - wanted).abs().mean() <= 0.01 * wanted.abs().max()
    report = json.loads((tmp_path / "out" / "deployment.json").read_text())
    assert report["dtype"] == dtype
    assert report["images"] == ["patient_7", "random"]
    assert [d["image"] for d in report["folds"]["1"]["differences"]] == ["random", "patient_7"]
    assert set(report["folds"]["1"]["training"]) == {"curves", "epochs", "iterations", "machine", "augmentation"}
    printed = capsys.readouterr().out
    assert "image patient_7: logits differ by up to" in printed
    assert f"-m '{tmp_path / 'o t'}' -i IN -o OUT -f 0 1" in printed


def write_images(model: Path, folder: Path) -> Path:
    import numpy as np
    import SimpleITK as sitk

    images = folder / "images"
    images.mkdir()
    for channel in (0, 1):
        noise = np.random.default_rng(channel).normal(size=(20, 40, 24)).astype(np.float32)
        sitk.WriteImage(sitk.GetImageFromArray(noise), str(images / f"patient_7_{channel:04d}.nii.gz"))
    return images


def test_onnx_runtime_predicts_the_same(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    images = write_images(model, tmp_path)
    output = tmp_path / "out"
    assert main(["deploy", "-m", str(model), "-o", str(output), "--folds", "1", "--onnx", "-i", str(images)]) == 0
    assert (output / "fold_1" / "model.onnx").is_file()
    assert not (output / "fold_0").exists()
    report = json.loads((output / "deployment.json").read_text())["folds"]["1"]["onnx_differences"]
    assert [d["image"] for d in report] == ["random", "patient_7"]
    assert all(d["relative"] <= 1e-4 for d in report)
    assert "ONNX Runtime, image patient_7" in capsys.readouterr().out


def store(model: Path, fold: int = 0, **changes: Any) -> None:
    """Change what a fold's checkpoint holds; None: take it away."""
    path = model / f"fold_{fold}" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False) | changes
    torch.save({key: value for key, value in content.items() if value is not None}, path)


def change_weights(model: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weights = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    store(model, network_weights={k: change(v) if v.dim() > 1 else v for k, v in weights.items()})


def cut_off(model: Path) -> None:
    path = model / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:1000])


BREAK: dict[str, Callable[[Path], Any]] = {
    "no folder": shutil.rmtree,
    "no checkpoint": lambda model: [path.unlink() for path in model.glob("fold_*/*")],
    "cut off": cut_off,
    "foreign trainer": lambda model: store(model, trainer_name="nnUNetTrainerOfSomebody"),
    "two trainers": lambda model: store(model, 1, trainer_name="nnUNetTrainer"),
    "other weights": lambda model: change_weights(model, lambda w: w[..., :1]),
    "no weights": lambda model: store(model, init_args=None, network_weights=None),
    "code": lambda model: store(model, logging=Path("x")),
    "no plans": lambda model: (model / "plans.json").unlink(),
    "output exists": lambda model: (model.parent / "out").mkdir(),
    "too large for float16": lambda model: change_weights(model, lambda w: w * 1e4),
}
ARGUMENTS = {
    "no images": ["-i", "nowhere"],
    "fold missing": ["--folds", "0", "4"],
    "no such name": ["-chk", "x.pth"],
    "too large for float16": ["--dtype", "float16"],
}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no folder", "-m needs an existing folder"),
        ("no checkpoint", "must hold fold_*/checkpoint_final.pth, there is none"),
        ("no such name", "must hold fold_*/x.pth, there is none"),
        ("fold missing", "fold 4 has not: choose among 0 1"),
        ("cut off", "is not a complete checkpoint of nnU-Net"),
        ("foreign trainer", "got nnUNetTrainerOfSomebody"),
        ("two trainers", "All folds must be of one trainer"),
        ("other weights", "don't fit the network that nnUNetTrainerFasterFusionBN builds"),
        ("no weights", "it lacks init_args, network_weights"),
        ("code", "is not a complete checkpoint of nnU-Net"),
        ("no plans", "plans.json is missing"),
        ("output exists", "-o needs a folder that does not exist"),
        ("no images", "-i needs a folder of images CASE_0000.nii.gz"),
        ("too large for float16", "float16 holds numbers up to 65504"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    how: str, message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = model.parent / "out"
    BREAK.get(how, lambda model: None)(model)
    status = main(["deploy", "-m", str(model), "-o", str(output), *ARGUMENTS.get(how, [])])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2
    assert message in error
    assert not output.exists() or (how == "output exists" and not list(output.iterdir()))
    assert not [path for path in model.parent.iterdir() if ".partial-" in path.name]


def test_an_image_that_was_cut_off_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(model, tmp_path)
    path = images / "patient_7_0000.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (images / "._patient_7_0000.nii.gz").write_bytes(b"Mac")
    assert main(["deploy", "-m", str(model), "-o", str(tmp_path / "out"), "-i", str(images)]) == 2
    assert f"patient_7: {path} can't be read: it is cut off" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
@pytest.mark.parametrize("limit", [0, 3000, 50_000])
def test_full_disk_is_one_sentence_and_leaves_nothing(
    limit: int, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import resource

    before = sorted(model.parent.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # real writes fail beyond it
    try:
        status = main(["deploy", "-m", str(model), "-o", str(model.parent / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert f"can't write {model.parent / 'out'}: File too large" in lines[-1]
    assert not [line for line in lines if "Traceback" in line]
    assert sorted(model.parent.iterdir()) == before


def test_a_deployed_model_is_not_deployed_again_and_not_trained(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: Callable[[str], int]
) -> None:
    assert main(["deploy", "-m", str(model), "-o", str(tmp_path / "out"), "--folds", "0"]) == 0
    assert main(["deploy", "-m", str(tmp_path / "out"), "-o", str(tmp_path / "again")]) == 2
    assert "is deployed already" in capsys.readouterr().err
    trainer = trainer_of("nnUNetTrainerDeployed", dataset("labels"))
    with pytest.raises(NotImplementedError, match="only predicts"):
        trainer.initialize()
    arguments = (trainer.plans_manager, trainer.configuration_manager, 2, 3)
    with pytest.raises(ValueError, match='needs plans that hold "deployed"'):
        type(trainer).build_network_architecture(*arguments)


def test_a_network_that_fuses_wrongly_is_not_shipped(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunet_ext.architectures.faster_fusion_unet import FasterFusionUNet

    fuse = FasterFusionUNet.fuse

    def wrong(self: FasterFusionUNet, form: Any = "hybrid") -> FasterFusionUNet:
        fused = fuse(self, form)
        nn.init.zeros_(fused.decoder.seg_layers[-1].bias)
        nn.init.normal_(fused.decoder.seg_layers[-1].weight)
        return fused

    monkeypatch.setattr(FasterFusionUNet, "fuse", wrong)
    assert main(["deploy", "-m", str(model), "-o", str(tmp_path / "out")]) == 2
    assert "must predict what the trained one does" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fold_all_is_shipped_when_it_is_named_or_alone(dataset: Callable[[str], int], tmp_path: Path) -> None:
    model = trained("nnUNetTrainer", dataset("labels"), tmp_path / "model", (0, 1))
    (model / "fold_1").rename(model / "fold_all")
    read = partial(TrainedModel.read, model, checkpoint_name="checkpoint_final.pth")
    assert list(read(folds=None).checkpoints) == ["0"]
    assert list(read(folds=["0", "all"]).checkpoints) == ["0", "all"]
    shutil.rmtree(model / "fold_0")
    assert list(read(folds=None).checkpoints) == ["all"]
