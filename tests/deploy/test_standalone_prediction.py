"""`predict.py` beside nnU-Net, from file to file: the same voxels for whatever plans ask for."""

from __future__ import annotations

import copy
import gzip
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import Tensor, nn

from nnunet_ext.deploy.model import TrainedModel
from nnunet_ext.deploy.standalone import parity, predict
from nnunet_ext.deploy.standalone.description import describe
from nnunet_ext.deploy.standalone.export import REQUIREMENTS
from nnunet_ext.nnunet.setting import Setting
from tests.settings import tiny

CT = {"mean": 30.0, "std": 55.0, "percentile_00_5": -90.0, "percentile_99_5": 180.0}
TORCH = ("resample_torch_fornnunet", {"is_seg": False, "force_separate_z": False, "memefficient_seg_resampling": False})
REGIONS = {"labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": 3}, "regions_class_order": [1, 2, 3]}


class Smooth(nn.Module):
    """A network whose labels are large pieces of space: two convolutions with fixed random weights."""

    def __init__(self, channels: int, outputs: int, dim: int) -> None:
        super().__init__()
        conv = nn.Conv3d if dim == 3 else nn.Conv2d
        self.layers = nn.Sequential(conv(channels, 8, 5, padding=2), nn.Tanh(), conv(8, outputs, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def write_image(folder: Path, channel: int, shape: tuple[int, ...], **options: Any) -> None:
    """Noise that is smooth, and zero near the border."""
    from scipy import ndimage

    random = np.random.default_rng(channel + 10 * len(shape))
    image = ndimage.gaussian_filter(random.normal(size=shape), 1.5) * 400 + 40
    image[tuple(slice(0, 3) for _ in shape)] = 0
    border = options.get("border", 2)
    image[:border], image[image.shape[0] - border :] = 0, 0
    image = image.clip(0, 255).astype(np.uint8) if options["ending"] == ".png" else image.astype(np.float32)
    written = sitk.GetImageFromArray(image)
    written.SetSpacing(options["spacing"])
    if "direction" in options:
        written.SetDirection(options["direction"])
        written.SetOrigin((3.0, -20.0, 7.5))
    sitk.WriteImage(written, str(folder / f"case_a_{channel:04d}{options['ending']}"))


# What differs from: 3D, one channel, spacing of 1 mm, z-score, three labels, no mirroring, SimpleITK.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "mirrored, two folds": {"axes": (0, 1, 2), "folds": 2},
    "coarser": {"spacing": (0.7, 0.8, 0.9)},
    "finer": {"spacing": (1.4, 1.6, 2.1), "shape": (14, 18, 20)},
    "anisotropic image": {"spacing": (0.8, 0.8, 4.0), "shape": (7, 30, 28)},
    "anisotropic model": {"spacing": (0.9, 0.9, 1.1), "model_spacing": [4.0, 1.0, 1.0], "patch": (8, 16, 16)},
    "two coarse axes": {"spacing": (0.3, 1.3, 1.3)},
    "torch resampling": {"spacing": (0.7, 1.3, 0.9), "resampling": TORCH},
    "torch resampling, anisotropic": {
        "spacing": (0.8, 0.8, 4.0),
        "shape": (7, 30, 28),
        "resampling": (TORCH[0], {"is_seg": False}),
    },
    "torch resampling, another pair of sizes": {
        "spacing": (0.8, 0.8, 4.0),
        "shape": (14, 30, 28),
        "model_spacing": [4.0 * 14 / 23, 0.8, 0.8],
        "resampling": (TORCH[0], {"is_seg": False}),
    },
    "linear": {
        "spacing": (0.7, 1.3, 0.9),
        "resampling": (
            "resample_data_or_seg_to_shape",
            {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
        ),
    },
    "transposed": {
        "spacing": (0.8, 1.1, 0.9),
        "shape": (20, 26, 30),
        "transpose": ([2, 0, 1], [1, 2, 0]),
        "axes": (0, 2),
    },
    "smaller than the patch": {"shape": (9, 21, 11)},
    "brain mask": {"use_mask": True, "channels": 2},
    "CT": {"scheme": "CTNormalization"},
    "no normalisation": {"scheme": "NoNormalization"},
    "from 0 to 1": {"scheme": "RescaleTo01Normalization"},
    "regions": {"dataset": REGIONS, "channels": 2},
    "ignore label": {"dataset": {"labels": {"background": 0, "one": 1, "two": 2, "ignore": 3}}},
    "many labels": {"dataset": {"labels": {"background": 0, **{f"n{i}": i for i in range(1, 7)}}}},
    "largest component": {"rules": [{"labels": [1, 2], "background": 0}, {"labels": [2], "background": 0}]},
    "another step": {"step_size": 0.7, "shape": (40, 33, 29)},
    "slices of a volume": {"patch": (16, 24), "spacing": (0.8, 1.1, 2.0), "axes": (0, 1)},
    "2D images": {"patch": (16, 24), "shape": (40, 37), "spacing": (0.9, 1.2)},
    "photographs": {
        "patch": (16, 24),
        "shape": (40, 37),
        "spacing": (1.0, 1.0),
        "ending": ".png",
        "reader": "NaturalImage2DIO",
        "scheme": "RGBTo01Normalization",
    },
    "Nibabel": {"reader": "NibabelIO", "spacing": (0.8, 1.1, 0.9)},
    "reoriented": {
        "reader": "SimpleITKIOWithReorient",
        "spacing": (0.8, 1.1, 0.9),
        "direction": (0, 0, 1, -1, 0, 0, 0, 1, 0),
    },
    "reoriented by Nibabel": {
        "reader": "NibabelIOWithReorient",
        "spacing": (0.8, 1.1, 0.9),
        "direction": (0, 0, 1, -1, 0, 0, 0, 1, 0),
    },
    "turned, not reoriented": {"spacing": (0.8, 1.1, 0.9), "direction": (0, 0, 1, -1, 0, 0, 0, 1, 0)},
    "NRRD": {"ending": ".nrrd"},
}


def setting_of(case: dict[str, Any]) -> Setting:
    """Plans that ask for what the case does."""
    channels, patch = case.get("channels", 1), case.get("patch", (16, 16, 16))
    planned = tiny(patch)
    plans = copy.deepcopy(dict(planned.plans))
    plans["image_reader_writer"] = case.get("reader", "SimpleITKIO")
    plans["transpose_forward"], plans["transpose_backward"] = case.get("transpose", ([0, 1, 2], [0, 1, 2]))
    plans["foreground_intensity_properties_per_channel"] = {str(i): CT for i in range(channels)}
    configuration = plans["configurations"][planned.configuration]
    configuration["preprocessor_name"] = "DefaultPreprocessor"
    configuration["spacing"] = case.get("model_spacing", [1.0] * len(patch))
    configuration["normalization_schemes"] = [case.get("scheme", "ZScoreNormalization")] * channels
    configuration["use_mask_for_norm"] = [case.get("use_mask", False)] * channels
    for kind, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        default = {"is_seg": kind == "seg", "order": order, "order_z": 0, "force_separate_z": None}
        function, options = case.get("resampling", ("resample_data_or_seg_to_shape", default))
        configuration[f"resampling_fn_{kind}"], configuration[f"resampling_fn_{kind}_kwargs"] = function, options
    dataset = {
        "channel_names": {str(i): f"channel {i}" for i in range(channels)},
        "file_ending": case.get("ending", ".nii.gz"),
        "numTraining": 1,
        **case.get("dataset", {"labels": {"background": 0, "one": 1, "two": 2}}),
    }
    return Setting(plans=plans, dataset=dataset, configuration=planned.configuration)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> SimpleNamespace:
    """Images, nnU-Net's predictor and the model of `predict.py`, with the same networks."""
    options = CASES[request.param]
    setting = setting_of(options)
    for channel in range(options.get("channels", 1)):
        write_image(
            tmp_path,
            channel,
            options.get("shape", (22, 30, 26)),
            spacing=options.get("spacing", (1.0, 1.0, 1.0)),
            ending=options.get("ending", ".nii.gz"),
            **{key: options[key] for key in ("direction",) if key in options},
        )
    torch.manual_seed(0)
    dim = len(setting.patch_size)
    folds = [Smooth(setting.input_channels, setting.num_classes, dim) for _ in range(options.get("folds", 1))]
    axes = options.get("axes")
    checkpoints = {str(i): tmp_path / "none" for i in range(len(folds))}
    trained = TrainedModel(tmp_path, "nnUNetTrainer", setting, checkpoints, axes)
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(
        tile_step_size=options.get("step_size", 0.5),
        device=torch.device("cpu"),
        perform_everything_on_device=False,
        allow_tqdm=False,
    )
    predictor.manual_initialization(
        Smooth(setting.input_channels, setting.num_classes, dim),
        setting.plans_manager,
        setting.configuration_manager,
        [fold.state_dict() for fold in folds],
        dict(setting.dataset),
        "nnUNetTrainer",
        axes,
    )
    rules = options.get("rules", [])
    model = describe(trained, [], rules)
    return SimpleNamespace(
        folder=tmp_path, predictor=predictor, model=json.loads(json.dumps(model)), folds=folds, options=options
    )


def run(network: nn.Module) -> predict.Network:
    def predicted(x: Any) -> Any:
        with torch.inference_mode():
            return network(torch.from_numpy(x)).numpy()

    return predicted


def test_labels_and_geometry_are_nnunets(case: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "SLAB", 500)  # voxels: small images are resampled in many pieces too
    ending = case.model["file_ending"]
    files = predict.find_cases(case.folder, ending)["case_a"]
    expected, found = case.folder / f"theirs{ending}", case.folder / f"ours{ending}"
    parity.write_nnunet_prediction(case.predictor, files, expected, case.model["postprocessing"])
    options = predict.Options(step_size=case.options.get("step_size", 0.5))
    labels, image = predict.predict_case([run(fold) for fold in case.folds], files, case.model, options)
    predict.write_segmentation(labels, image, found)
    theirs, ours = sitk.ReadImage(str(expected)), sitk.ReadImage(str(found))
    assert ours.GetSize() == theirs.GetSize()
    for geometry in ("GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(ours, geometry)(), getattr(theirs, geometry)(), atol=1e-5)
    theirs, ours = sitk.GetArrayFromImage(theirs), sitk.GetArrayFromImage(ours)
    assert len(np.unique(theirs)) > 1  # there is something to compare
    # Resampling in float32 instead of float64 may move a voxel on the border between two labels.
    assert (theirs != ours).mean() <= 1e-4


def test_what_the_network_sees_is_what_nnunet_shows_it(case: SimpleNamespace) -> None:
    files = predict.find_cases(case.folder, case.model["file_ending"])["case_a"]
    predictor = case.predictor
    expected, _, properties = predictor.configuration_manager.preprocessor_class(verbose=False).run_case(
        [str(file) for file in files],
        None,
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.dataset_json,
    )
    found = predict.prepare(predict.read_image(files, case.model["channels"], case.model["reader"]), case.model)
    assert found.shape == properties["shape_before_cropping"]
    np.testing.assert_allclose(found.data, expected, atol=2e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize(("n", "size"), [(14, 23), (12, 37), (23, 14), (59, 10)])
def test_nearest_slices_are_those_of_torch(n: int, size: int) -> None:
    slices = torch.arange(n, dtype=torch.float32)[None, None]
    expected = torch.nn.functional.interpolate(slices, size, mode="nearest-exact")[0, 0]
    assert (predict.weights(n, size, "nearest-exact") @ np.arange(n) == expected.numpy()).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_first_of_logits_that_are_equal_when_rounded_wins(dtype: str) -> None:
    random = np.random.default_rng(3)
    logits = (random.integers(-3, 4, (5, 9, 8, 7)) + random.normal(0, 1e-4, (5, 9, 8, 7))).astype(np.float32)
    expected = logits.astype(dtype).argmax(0)
    assert (expected != logits.argmax(0)).any() == (dtype == "float16")
    turned = (np.asfortranarray(channel) for channel in logits)
    assert (predict.first_of_largest(turned, dtype) == expected).all()


def test_a_region_begins_where_nnunets_sigmoid_does() -> None:
    logits = np.array([-1, 0, 2**-24, 2**-23, 1], np.float16).reshape(1, 1, 1, 5)
    box, one = (slice(0, 1), slice(0, 1), slice(0, 5)), (1.0, 1.0, 1.0)
    case = predict.Prepared(data=logits, spacing=one, original_spacing=one, shape=(1, 1, 5), box=box)
    how = {"function": TORCH[0], "order": 1, "order_z": 0, "dtype": "float16", "force_separate_z": False}
    resampling = {"probabilities": {**how, "separate_z_anisotropy_threshold": 3}}
    model = {"resampling": resampling, "regions_class_order": [1], "transpose_backward": [0, 1, 2]}
    expected = torch.sigmoid(torch.from_numpy(logits[0]).float()) > 0.5
    assert (predict.segment(logits, case, model) == expected.numpy()).all()


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha", ".gipl"])
def test_images_that_were_cut_off_are_refused(ending: str, tmp_path: Path) -> None:
    write_image(tmp_path, 0, (22, 30, 26), spacing=(1.0, 1.0, 1.0), ending=ending)
    path = tmp_path / f"case_a_0000{ending}"
    assert predict.read_image([path], ["MRI"], "SimpleITKIO").data.shape == (1, 22, 30, 26)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(predict.PredictionError, match="must be a complete image"):
        predict.read_image([path], ["MRI"], "SimpleITKIO")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_header_that_promises_too_much_is_refused_before_itk_makes_room_for_it(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path, 0, (8, 9, 10), spacing=(1.0, 1.0, 1.0), ending=".nii")
    plain = tmp_path / "case_a_0000.nii"
    content = bytearray(plain.read_bytes())
    content[42:48] = struct.pack("<3h", 900, 900, 900)
    path = tmp_path / f"case_b_0000{ending}"
    path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    monkeypatch.setattr(sitk, "ReadImage", lambda *_: pytest.fail("ITK reads it"))
    with pytest.raises(predict.PredictionError, match="must be a complete image"):
        predict.read_image([path], ["MRI"], "SimpleITKIO")


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    image = np.zeros((4, 5, 6), np.float32)
    image[1, 2, 3] = np.nan
    path = tmp_path / "case_a_0000.nrrd"
    sitk.WriteImage(sitk.GetImageFromArray(image), str(path))
    with pytest.raises(predict.PredictionError, match="must hold finite numbers"):
        predict.read_image([path], ["MRI"], "SimpleITKIO")


def test_spacings_that_differ_by_rounding_are_one_grid(tmp_path: Path) -> None:
    for channel, spacing in enumerate((0.9375, 0.9375001)):
        write_image(tmp_path, channel, (8, 9, 10), spacing=(spacing, 1.0, 1.0), ending=".nrrd")
    files = [tmp_path / f"case_a_{channel:04d}.nrrd" for channel in (0, 1)]
    assert predict.read_image(files, ["T1", "T2"], "SimpleITKIO").data.shape == (2, 8, 9, 10)


def test_the_package_without_torch_asks_for_what_exported_folders_ask_for() -> None:
    text = (Path(__file__).parents[2] / "standalone" / "pyproject.toml").read_text()
    assert all(f'"{requirement}"' in text for requirement in (*REQUIREMENTS, "onnxruntime>=1.20", "openvino>=2024.4"))


def spoil_header(path: Path) -> None:
    """A NIfTI file that does not say how the body lies in it."""
    image = nibabel.load(path)
    image.set_qform(None, 0)
    image.set_sform(None, 0)
    nibabel.save(image, path)


@pytest.mark.parametrize("reader", ["NibabelIO", "NibabelIOWithReorient"])
def test_images_that_nibabel_and_itk_turn_differently_are_refused(reader: str, tmp_path: Path) -> None:
    write_image(tmp_path, 0, (8, 9, 10), spacing=(1.0, 1.0, 1.0), ending=".nii.gz")
    path = tmp_path / "case_a_0000.nii.gz"
    assert predict.read_image([path], ["MRI"], reader).data.shape == (1, 8, 9, 10)
    spoil_header(path)
    with pytest.raises(predict.PredictionError, match="both qform_code and sform_code are 0"):
        predict.read_image([path], ["MRI"], reader)


def test_an_image_of_less_than_a_voxel_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path, 0, (1, 9, 10), spacing=(1.0, 1.0, 0.3), ending=".nii.gz", border=0)
    model = json.loads(json.dumps(describe(model_of(tmp_path), [], [])))
    image = predict.read_image([tmp_path / "case_a_0000.nii.gz"], ["MRI"], "SimpleITKIO")
    with pytest.raises(predict.PredictionError, match="need at least one voxel"):
        predict.prepare(image, model)


def model_of(folder: Path) -> TrainedModel:
    return TrainedModel(folder, "nnUNetTrainer", setting_of({}), {}, None)


def test_pictures_of_one_bit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "case_a_0000.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (8).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0]))
    with pytest.raises(predict.PredictionError, match="must have 8 or 16 bits per channel, it has 1"):
        predict.read_image([path], ["grey"], "NaturalImage2DIO")
