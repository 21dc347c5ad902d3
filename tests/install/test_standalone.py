"""`pip install ./standalone` in a new environment: predicts what was exported, without PyTorch and nnU-Net."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from nnunet_ext.deploy import onnx
from nnunet_ext.deploy.folder import write_json, write_sums
from nnunet_ext.deploy.model import TrainedModel
from nnunet_ext.deploy.standalone import predict
from nnunet_ext.deploy.standalone.description import describe
from tests.deploy.test_standalone_prediction import Smooth, run, setting_of, write_image

pytestmark = pytest.mark.install
REPOSITORY = Path(__file__).parents[2]


def test_predicts_where_torch_is_not_installed(tmp_path: Path) -> None:
    python = tmp_path / "environment" / "bin" / "python"
    venv.create(tmp_path / "environment", with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "-q", str(REPOSITORY / "standalone")], check=True)
    listed = subprocess.run([*pip, "list"], capture_output=True, text=True, check=True).stdout.lower()
    assert "torch" not in listed
    assert "nnunetv2" not in listed
    setting, folder = setting_of({}), tmp_path / "model"
    folder.mkdir()
    torch.manual_seed(0)
    network = Smooth(1, setting.num_classes, 3).eval()
    assert onnx.export_any_batch(network, torch.zeros(1, 1, *setting.patch_size), folder / "fold_0.onnx")
    model = TrainedModel(tmp_path, "nnUNetTrainer", setting, {}, (0, 1))
    networks = [{"fold": "0", "file": "fold_0.onnx", "any_batch": True}]
    content = {**describe(model, networks, []), "engines": ["onnxruntime"]}
    write_json(folder / "model.json", content)
    write_sums(folder)
    (tmp_path / "images").mkdir()
    write_image(tmp_path / "images", 0, (22, 30, 26), spacing=(0.8, 0.9, 1.0), ending=".nii.gz")
    arguments = ["-m", str(folder), "-i", str(tmp_path / "images"), "-o", str(tmp_path / "predicted")]
    subprocess.run([str(python.with_name("nnunet-ext-predict")), *arguments], check=True)
    found = predict.channels_of(predict.read_file(tmp_path / "predicted" / "case_a.nii.gz"))[0]
    files = [tmp_path / "images" / "case_a_0000.nii.gz"]
    expected, _ = predict.predict_case([run(network)], files, content, predict.Options())
    assert found.any()
    assert (found != expected).mean() <= 1e-4
