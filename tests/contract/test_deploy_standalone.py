"""`nnunet-ext deploy --standalone`: a folder that predicts what nnU-Net does, without nnU-Net and PyTorch."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from atexit import register
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_ext import api
from nnunet_ext.cli import main
from nnunet_ext.deploy.model import TrainedModel
from nnunet_ext.deploy.standalone import predict
from nnunet_ext.deploy.standalone.description import postprocessing
from tests.contract.test_deploy import store, trained, write_images
from tests.contract.test_trainers import TRAINERS
from tests.contract.variants import slow_variants

pytest.importorskip("onnxruntime")


def standalone(model: Path, output: Path, *arguments: str) -> int:
    return main(["deploy", "-m", str(model), "-o", str(output), "--standalone", *arguments])


def smooth(model: Path, folds: int = 1) -> Path:
    """Give the heads of an untrained network biases apart, so that few voxels lie between two labels."""
    import torch

    for fold in range(folds):
        path = model / f"fold_{fold}" / "checkpoint_final.pth"
        weights = torch.load(path, weights_only=False)["network_weights"]
        for name, value in weights.items():
            if "seg_layers" in name and name.endswith("bias"):
                value.copy_(torch.linspace(0, 0.3, len(value)))
        store(model, fold, network_weights=weights)
    return model


@pytest.mark.parametrize("name", slow_variants(TRAINERS))
def test_every_trainer_can_be_exported(
    name: str, dataset: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained(name, dataset("labels"), tmp_path / "model")
    assert standalone(model, tmp_path / "out") == 0
    assert "onnxruntime: not compared with nnU-Net: give images by -i." in capsys.readouterr().out
    content = predict.read_model(tmp_path / "out")
    (fold,) = content["networks"]
    network = predict.load_network(tmp_path / "out" / fold["file"])
    report = json.loads((tmp_path / "out" / "deployment.json").read_text())
    assert report["differences"]["0"][0]["relative"] <= 1e-4
    batch = 3 if fold["any_batch"] else 1
    x = np.random.default_rng(0).normal(size=(batch, 2, *content["patch_size"])).astype(np.float32)
    together = network(x)
    assert together.shape == (batch, 3, *content["patch_size"])
    np.testing.assert_allclose(together[-1:], network(x[-1:]), atol=1e-4 * np.abs(together).max())


@pytest.fixture
def exported(dataset: Callable[[str], int], tmp_path: Path) -> Path:
    """Two folds of regions, compared with nnU-Net on one image, which lies in "images"."""
    first = export_once(dataset("regions"))
    shutil.copytree(first / "out", tmp_path / "out")
    shutil.copytree(first / "images", tmp_path / "images")
    return tmp_path / "out"


@cache
def export_once(identifier: int) -> Path:
    folder = Path(mkdtemp())
    register(shutil.rmtree, folder, ignore_errors=True)
    model = smooth(trained("nnUNetTrainerHalfWidthBN", identifier, folder / "model", (0, 1)), 2)
    rules = {
        "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"],
        "postprocessing_kwargs": [{"labels_or_regions": [[1, 2], 2]}],
    }
    (model / "crossval_results_folds_0_1").mkdir()
    (model / "crossval_results_folds_0_1" / "postprocessing.json").write_text(json.dumps(rules))
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert standalone(model, folder / "out", "-i", str(write_images(model, folder))) == 0
    (folder / "images" / "printed.txt").write_text(printed.getvalue())
    return folder


def alone(folder: Path, images: Path, output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run predict.py where neither this package nor torch nor nnU-Net can be imported."""
    blocker = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {sysconfig.get_paths()['purelib']!r})\n"
        "for name in ('torch', 'nnunetv2', 'nnunet_ext', 'batchgenerators', 'skimage', 'pandas'):\n"
        "    sys.modules[name] = None\n"
        f"sys.argv = {['predict.py', '-i', str(images), '-o', str(output), *arguments]!r}\n"
        f"runpy.run_path({str(folder / 'predict.py')!r}, run_name='__main__')\n"
    )
    return subprocess.run([sys.executable, "-S", "-c", blocker], capture_output=True, text=True, cwd=folder.parent)


def test_files_are_predicted_as_by_nnunet_and_without_torch(exported: Path, tmp_path: Path) -> None:
    printed = (tmp_path / "images" / "printed.txt").read_text()
    report = json.loads((exported / "deployment.json").read_text())
    (case,) = report["cases"]
    assert case["case"] == "patient_7"
    assert case["voxels"] == 20 * 40 * 24
    assert case["different"] <= 1e-4 * case["voxels"]
    assert "of all voxels have nnU-Net's label" in printed
    assert f"patient_7: 100.0000% of {case['voxels']:,} voxels" in printed
    assert "of the labels [1, 2] the largest component stays" in printed
    done = alone(exported, tmp_path / "images", tmp_path / "predicted")
    assert done.returncode == 0, done.stderr
    labels = predict.channels_of(predict.read_file(tmp_path / "predicted" / "patient_7.nii.gz"))
    assert labels.any()
    assert f"1 of 1  {tmp_path / 'predicted' / 'patient_7.nii.gz'}" in done.stdout
    assert [path.name for path in (tmp_path / "predicted").iterdir()] == ["patient_7.nii.gz"]


def test_a_fold_can_be_chosen_and_cases_that_are_there_are_left_out(exported: Path, tmp_path: Path) -> None:
    images, output = tmp_path / "images", tmp_path / "predicted"
    for channel in (0, 1):
        shutil.copy(images / f"patient_7_{channel:04d}.nii.gz", images / f"patient_8_{channel:04d}.nii.gz")
    output.mkdir()
    (output / "patient_7.nii.gz").write_text("mine")
    done = alone(exported, images, output, "-f", "1", "--continue_prediction", "--disable_tta", "-step_size", "1")
    assert done.returncode == 0, done.stderr
    assert (output / "patient_7.nii.gz").read_text() == "mine"
    assert predict.read_file(output / "patient_8.nii.gz").GetSize() == (24, 40, 20)


def remove_channel(folder: Path, images: Path) -> None:
    (images / "patient_7_0001.nii.gz").unlink()


def spoil_image(folder: Path, images: Path) -> None:
    path = images / "patient_7_0000.nii.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def skip_channel(folder: Path, images: Path) -> None:
    (images / "patient_7_0001.nii.gz").rename(images / "patient_7_0002.nii.gz")


def forget_a_file(folder: Path, images: Path) -> None:
    path = folder / "SHA256SUMS"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if "fold_1.onnx" not in line))


def plant_int8(folder: Path, images: Path) -> None:
    (folder / "fold_0.int8.xml").write_text("<net/>")


def climb(folder: Path, images: Path) -> None:
    path = folder / "SHA256SUMS"
    path.write_text(path.read_text() + f"{'0' * 64}  ../x\n")


def move_grid(folder: Path, images: Path) -> None:
    path = str(images / "patient_7_0001.nii.gz")
    image = sitk.ReadImage(path)
    image.SetSpacing((2.0, 1.0, 1.0))
    sitk.WriteImage(image, path)


def cut_network(folder: Path, images: Path) -> None:
    path = folder / "fold_1.onnx"
    path.write_bytes(path.read_bytes()[:-100])


def exchange_networks(folder: Path, images: Path) -> None:
    (folder / "fold_0.onnx").rename(folder / "x")
    (folder / "fold_1.onnx").rename(folder / "fold_0.onnx")
    (folder / "x").rename(folder / "fold_1.onnx")


def change_model(folder: Path, images: Path) -> None:
    path = folder / "model.json"
    path.write_text(path.read_text().replace('"step_size"', '"steps"'))


BAD: dict[str, tuple[Callable[[Path, Path], Any], list[str], str]] = {
    "missing channel": (remove_channel, [], "must be a 2D or 3D image with the channels T1, T2"),
    "cut off image": (spoil_image, [], "must be a complete image"),
    "channel left out": (skip_channel, [], "Channels of a case are numbered from 0000 on"),
    "file that is not listed": (forget_a_file, [], "must list fold_1.onnx"),
    "network that was not exported": (plant_int8, [], "must list fold_0.int8.xml"),
    "file elsewhere": (climb, [], "must list files of the folder itself, got '../x'"),
    "another grid": (move_grid, [], "All channels of a case need one grid"),
    "cut off network": (cut_network, [], "fold_1.onnx must be the file that was exported"),
    "exchanged networks": (exchange_networks, [], "fold_0.onnx must be the file that was exported"),
    "changed numbers": (change_model, [], "model.json must be the file that was exported"),
    "no checksums": (
        lambda folder, _: (folder / "SHA256SUMS").unlink(),
        [],
        "-m needs the folder of an exported model",
    ),
    "no images": (lambda _, images: shutil.rmtree(images), [], "-i needs a folder of images CASE_0000.nii.gz"),
    "no such fold": (lambda *_: None, ["-f", "3"], "-f needs exported folds, 3 is none: choose among 0 1"),
    "step of nothing": (lambda *_: None, ["-step_size", "0"], "-step_size must be from 0.01 to 1"),
    "fewer threads than none": (lambda *_: None, ["--threads", "-1"], "--threads must be 0, all processors, or more"),
    "no such device": (lambda *_: None, ["-device", "cuda"], "-device cuda needs an ONNX Runtime that has it"),
}


def test_bad_input_is_one_sentence(exported: Path, tmp_path: Path) -> None:
    failures = []
    for name, (spoil, arguments, message) in BAD.items():
        folder, images = tmp_path / name / "model", tmp_path / name / "images"
        shutil.copytree(exported, folder)
        shutil.copytree(tmp_path / "images", images)
        spoil(folder, images)
        output = tmp_path / name / "output"
        done = alone(folder, images, output, *arguments)
        told = done.stderr.strip().splitlines()
        good = done.returncode == 1 and len(told) == 1 and told[0].startswith("error: ") and message in told[0]
        if not good or (output.is_dir() and list(output.iterdir())):
            failures.append((name, done.returncode, done.stderr[-500:]))
    assert failures == []


def test_an_output_that_can_not_be_made_is_told(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = alone(exported, tmp_path / "images", tmp_path / "file" / "x")
    assert done.returncode == 1
    assert done.stderr.startswith("error: -o needs a folder that can be made")


def test_no_file_beside_the_program_is_imported(exported: Path, tmp_path: Path) -> None:
    (exported / "scipy.py").write_text("raise SystemExit('planted')")
    command = [sys.executable, str(exported / "predict.py"), "-i", str(tmp_path / "images"), "-o", str(tmp_path / "o")]
    done = subprocess.run([*command, "--disable_tta", "-f", "0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_references_on_another_grid_are_told(
    dataset: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = smooth(trained("nnUNetTrainerHalfWidth", dataset("labels"), tmp_path / "model"))
    images, labels = write_images(model, tmp_path), tmp_path / "labels"
    labels.mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((20, 40, 25), np.uint8)), str(labels / "patient_7.nii.gz"))
    assert standalone(model, tmp_path / "out", "-i", str(images), "-ref", str(labels)) == 2
    assert "-ref needs segmentations on the grid of the images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_case_that_fails_leaves_the_others_predicted(exported: Path, tmp_path: Path) -> None:
    images, output = tmp_path / "images", tmp_path / "predicted"
    shutil.copy(images / "patient_7_0000.nii.gz", images / "patient_1_0000.nii.gz")
    done = alone(exported, images, output, "--disable_tta", "-f", "0", "-step_size", "1")
    assert done.returncode == 1
    assert "error: patient_1: " in done.stderr
    assert (output / "patient_7.nii.gz").is_file()


def test_an_export_that_predicts_something_else_is_not_shipped(
    dataset: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder's program turns its labels over; only a whole prediction shows it."""
    model = trained("nnUNetTrainerHalfWidth", dataset("labels"), tmp_path / "model")
    wrong = tmp_path / "predict.py"
    source = Path(predict.__file__).read_text()
    wrong.write_text(source.replace("return labels.transpose(", "return labels[::-1].transpose("))
    assert wrong.read_text() != source
    monkeypatch.setattr(predict, "__file__", str(wrong))
    assert standalone(model, tmp_path / "out", "-i", str(write_images(model, tmp_path))) == 2
    assert "must predict what nnU-Net does" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


PLANS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "reader": (lambda plans: plans.update(image_reader_writer="Tiff3DIO"), "knows the readers"),
    "resampling": (
        lambda plans: plans["configurations"]["3d_fullres"].update(resampling_fn_data="no_resampling_hack"),
        "the plans resample data of 3d_fullres by no_resampling_hack",
    ),
    "cascade": (
        lambda plans: plans["configurations"]["3d_fullres"].update(previous_stage="3d_lowres"),
        "also takes the prediction of 3d_lowres",
    ),
}


@pytest.mark.parametrize("what", PLANS)
def test_what_predict_py_does_not_know_is_refused(
    what: str, dataset: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained("nnUNetTrainerHalfWidth", dataset("labels"), tmp_path / "model")
    change, message = PLANS[what]
    plans = json.loads((model / "plans.json").read_text())
    change(plans)
    (model / "plans.json").write_text(json.dumps(plans))
    assert standalone(model, tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert "ship it without --standalone" in error
    assert not (tmp_path / "out").exists()


def test_a_small_label_that_vanishes_is_seen(
    dataset: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight of a million voxels, and all of one label."""
    from nnunet_ext.deploy.standalone import parity

    model = smooth(trained("nnUNetTrainerHalfWidth", dataset("labels"), tmp_path / "model"))
    rare = {"engine": "onnxruntime", "case": "a", "voxels": 10**6, "nnunet_seconds": 1.0, "seconds": 1.0}
    found = parity.CaseParity(**rare, different=8, dice=0.0)
    monkeypatch.setattr(parity, "compare", lambda *_, **__: (found,))
    assert standalone(model, tmp_path / "out", "-i", str(write_images(model, tmp_path))) == 2
    assert "one label overlaps by a Dice of 0.000" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_postprocessing_of_another_kind_is_refused(
    dataset: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained("nnUNetTrainerHalfWidth", dataset("labels"), tmp_path / "model")
    (model / "crossval_results_folds_0").mkdir()
    rules = {"postprocessing_fns": ["fill_holes"], "postprocessing_kwargs": [{}]}
    (model / "crossval_results_folds_0" / "postprocessing.json").write_text(json.dumps(rules))
    assert standalone(model, tmp_path / "out") == 2
    assert "knows the postprocessing remove_all_but_largest" in capsys.readouterr().err


def test_nothing_that_is_slow_to_import_is_imported() -> None:
    names = ("torch", "nnunetv2", "pandas", "skimage", "matplotlib")
    code = f"import runpy, sys; runpy.run_path({predict.__file__!r}); print([n for n in {names!r} if n in sys.modules])"
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]", done.stderr


ENGINES = [engine for engine in predict.ENGINES if engine != "onnxruntime"]


def lacks(engine: str) -> bool:
    """Whether this CPU has no instructions for the engine."""
    openvino = pytest.importorskip("openvino")
    instructions, _ = predict.ENGINES[engine] or ("", "")
    return instructions not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_engines_are_told_with_parity_and_dice(
    dataset: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nncf")
    model = smooth(trained("nnUNetTrainerHalfWidth", dataset("labels"), tmp_path / "model"))
    images, labels = write_images(model, tmp_path), tmp_path / "labels"
    labels.mkdir()
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((20, 40, 24), np.uint8)), str(labels / "patient_7.nii.gz"))
    engines = ["onnxruntime", *(engine for engine in ENGINES if not lacks(engine))]
    arguments = ["-i", str(images), "-ref", str(labels), "--engines", *engines]
    assert standalone(model, tmp_path / "out", *arguments) == 0
    report = json.loads((tmp_path / "out" / "deployment.json").read_text())["cases"]
    assert [case["engine"] for case in report] == engines
    assert {case["voxels"] for case in report} == {20 * 40 * 24}
    for case in report:
        exact = case["engine"] in ("onnxruntime", "openvino")
        assert case["different"] <= (1e-3 if exact else 0.05) * case["voxels"], case
    for case in report:
        assert 0 < case["accuracy"] <= 1
        assert case["accuracy"] == pytest.approx(case["nnunet_accuracy"], abs=0.05)
    printed = capsys.readouterr().out
    assert all(f"{engine}: " in printed for engine in engines)
    assert f", Dice {report[0]['accuracy']:.4f}, nnU-Net {report[0]['nnunet_accuracy']:.4f}" in printed
    requirements = (tmp_path / "out" / "requirements.txt").read_text()
    assert "openvino" in requirements
    assert "onnxruntime" in requirements
    if "openvino-int8" in engines:
        assert (tmp_path / "out" / "fold_0.int8.bin").is_file()
        assert "fold_0.int8.bin" in (tmp_path / "out" / "SHA256SUMS").read_text()


@pytest.mark.parametrize("engine", ["openvino-bfloat16", "openvino-int8"])
def test_instructions_that_the_cpu_lacks_are_told(
    engine: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openvino = pytest.importorskip("openvino")
    monkeypatch.setattr(openvino, "Core", lambda: SimpleNamespace(get_property=lambda *_: ["FP32"]))
    with pytest.raises(predict.PredictionError, match=f"--engine {engine} needs a CPU with instructions for"):
        predict.load_network(exported / "fold_0.onnx", engine)


@pytest.mark.parametrize(("engine", "package"), [("onnxruntime", "onnxruntime"), ("openvino", "openvino")])
def test_an_engine_that_is_not_installed_is_told(
    engine: str, package: str, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(predict.PredictionError, match=f"--engine {engine} needs .*: pip install {package}"):
        predict.load_network(exported / "fold_0.onnx", engine)


def test_int8_that_was_not_exported_is_told(exported: Path) -> None:
    if lacks("openvino-int8"):
        pytest.skip("this CPU has no instructions for int8")
    with pytest.raises(predict.PredictionError, match=r"needs fold_0.int8.xml: export with --engines openvino-int8"):
        predict.load_network(exported / "fold_0.onnx", "openvino-int8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--standalone", "--engines", "openvino-int8"], "needs scans that calibrate it"),
        (["--stock", "--calibrate", "images"], "--calibrate is an option of --standalone and --report"),
        (["--report", "-i", "nowhere"], "-i needs a folder of images CASE_0000.nii.gz"),
        (["--standalone", "-ref", "labels"], "-ref needs the images that it is of"),
        (["-ref", "labels"], "-ref is an option of --standalone and --report"),
        (["--stock", "--engines", "openvino"], "--engines is an option of --standalone and --report"),
        (["--standalone", "--stock"], "not allowed with argument"),
        (["--report"], "--report needs scans to predict"),
        (["--student", "model"], "--student is an option of --report"),
        (["--standalone", "-i", "images", "-ref", "nowhere"], "-ref needs a segmentation of each image"),
    ],
)
def test_options_that_lack_another_are_told(
    arguments: list[str],
    message: str,
    dataset: Callable[[str], int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = trained("nnUNetTrainerHalfWidth", dataset("labels"), tmp_path / "model")
    write_images(model, tmp_path)
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["deploy", "-m", str(model), "-o", "out", *arguments])
    except SystemExit as ended:
        status = int(ended.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rules_belong_to_the_folds_in_whatever_order(dataset: Callable[[str], int], tmp_path: Path) -> None:
    model = trained("nnUNetTrainerHalfWidth", dataset("labels"), tmp_path / "model", (0, 1))
    (model / "crossval_results_folds_0_1").mkdir()
    rules = {
        "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"],
        "postprocessing_kwargs": [{"labels_or_regions": 2}],
    }
    (model / "crossval_results_folds_0_1" / "postprocessing.json").write_text(json.dumps(rules))
    read = TrainedModel.read(model, ["1", "0"], "checkpoint_final.pth")
    assert postprocessing(read) == [{"labels": [2], "background": 0}]


def test_python_takes_names_of_folders(dataset: Callable[[str], int], tmp_path: Path) -> None:
    model = smooth(trained("nnUNetTrainerHalfWidth", dataset("labels"), tmp_path / "model"))
    images = write_images(model, tmp_path)
    found = api.deploy_standalone(str(model), str(tmp_path / "out"), images=str(images))
    assert found.equal("onnxruntime") >= 0.999
    stocked = api.deploy_stock(str(model), str(tmp_path / "stock"), images=str(images))
    assert list(stocked) == ["0"]
