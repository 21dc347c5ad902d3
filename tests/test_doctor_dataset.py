"""What `nnunet-ext doctor --dataset` finds in a raw data set: every fault, each with its cure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from multiprocessing.dummy import Pool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from skimage import io

from nnunet_ext import cli
from nnunet_ext.doctor import raw_dataset
from nnunet_ext.doctor.files import of_folder
from nnunet_ext.doctor.finding import Finding

DESCRIPTION = {
    "channel_names": {"0": "T1", "1": "T2"},
    "labels": {"background": 0, "a": 1, "b": 2},
    "numTraining": 5,
    "file_ending": ".nii.gz",
}
Spoil = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net starts twelve processes to list files."""
    monkeypatch.setattr("nnunetv2.utilities.utils.Pool", Pool)


def save(path: Path, values: Any, spacing: Any = (1.0, 1.0, 2.0), **place: Any) -> None:
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(spacing)
    if "origin" in place:
        image.SetOrigin(place["origin"])
    if "direction" in place:
        image.SetDirection(place["direction"])
    sitk.WriteImage(image, str(path))


def label_map(shape: tuple[int, ...] = (6, 8, 10)) -> np.ndarray:
    labels = np.zeros(shape, dtype=np.uint8)
    labels[..., 2:5, 2:5], labels[..., 5:7, 5:7] = 1, 2
    return labels


def scan(seed: int, shape: tuple[int, ...] = (6, 8, 10)) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in which nothing is wrong; names with dots."""
    folder = tmp_path / "raw" / "Dataset1234_Toy.v2"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for i in range(5):
        for channel in (0, 1):
            save(folder / "imagesTr" / f"v1.{i}_{channel:04d}.nii.gz", scan(10 * i + channel))
        save(folder / "labelsTr" / f"v1.{i}.nii.gz", label_map())
    describe(folder)
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return folder


def describe(folder: Path, **changes: Any) -> None:
    content = {**DESCRIPTION, **changes}
    (folder / "dataset.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def examine(folder: Path) -> list[Finding]:
    return raw_dataset.examine(folder, 1, lambda done, total: None)


def faults(folder: Path) -> list[Finding]:
    return [found for found in examine(folder) if found.level != "ok"]


def test_nothing_is_found_where_nothing_is_wrong(folder: Path) -> None:
    (found,) = examine(folder)
    assert (found.level, found.detail) == ("ok", "5 cases read")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_values(name: str, values: np.ndarray) -> Spoil:
    return lambda folder: save(folder / name, values)


def with_nan(folder: Path) -> None:
    values = scan(0)
    values[0, 0, :3] = np.nan, np.inf, -np.inf
    save(folder / "imagesTr" / "v1.0_0000.nii.gz", values)


def label_with(*values: float) -> Spoil:
    labels = label_map().astype(np.float32)
    labels[0, 0, : len(values)] = values
    return with_values("labelsTr/v1.0.nii.gz", labels)


def copied(source: str, target: str) -> Spoil:
    return lambda folder: shutil.copy(folder / source, folder / target)


def placed(name: str, **place: Any) -> Spoil:
    values = label_map() if name.startswith("labels") else scan(0)
    return lambda folder: save(folder / name, values, **place)


IMAGE, LABEL = "imagesTr/v1.0_0000.nii.gz", "labelsTr/v1.0.nii.gz"
FLIPPED = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)

CASES: dict[str, tuple[Spoil, str, str, str]] = {
    "image cut": (lambda f: cut(f / IMAGE), "failure", "v1.0", "v1.0_0000.nii.gz can't be read: it is cut off"),
    "label cut": (lambda f: cut(f / LABEL), "failure", "v1.0", "v1.0.nii.gz can't be read: it is cut off"),
    "empty file": (lambda f: (f / IMAGE).write_bytes(b""), "failure", "v1.0", "it is empty"),
    "no image": (lambda f: (f / LABEL).write_bytes(b"text"), "failure", "v1.0", "can't be read"),
    "nan": (with_nan, "failure", "v1.0", "holds NaN or infinity in 3 of 480 voxels"),
    "unknown label": (label_with(3, 7), "failure", "v1.0", "holds the labels 3, 7, dataset.json has 0, 1, 2"),
    "negative label": (label_with(-1), "failure", "v1.0", "holds the labels -1, "),
    "fraction": (label_with(0.5), "failure", "v1.0", "must hold whole numbers, it holds 0.5"),
    "nan in label": (label_with(np.nan), "failure", "v1.0", "v1.0.nii.gz holds NaN or infinity"),
    "channel's shape": (with_values("imagesTr/v1.0_0001.nii.gz", scan(0, (6, 8, 9))), "failure", "v1.0", "shape 6x8x9"),
    "label's shape": (with_values(LABEL, label_map((5, 8, 10))), "failure", "v1.0", "has the shape 5x8x10"),
    "spacing": (placed(LABEL, spacing=(1.0, 1.0, 2.5)), "failure", "v1.0", "has the spacing 2.5x1x1"),
    "origin": (placed(LABEL, origin=(0.0, 0.0, 1.0)), "warning", "v1.0", "lies up to 1 voxels away from"),
    "direction": (placed(LABEL, direction=FLIPPED), "warning", "v1.0", "other origin or direction"),
    "channel's origin": (placed("imagesTr/v1.0_0001.nii.gz", origin=(9.0, 0.0, 0.0)), "warning", "v1.0", "9 voxels"),
    "empty case": (
        with_values(LABEL, np.zeros((6, 8, 10), np.uint8)),
        "warning",
        "v1.0",
        "holds no foreground, only 0",
    ),
    "constant": (with_values(IMAGE, np.full((6, 8, 10), 7.0)), "warning", "v1.0", "same value, 7, everywhere"),
    "hidden": (copied(IMAGE, "imagesTr/._v1.0_0000.nii.gz"), "failure", "imagesTr", "takes for cases: ._v1.0_0000"),
    "ds store": (lambda f: (f / "labelsTr/.DS_Store").touch(), "warning", "labelsTr", "hidden files: .DS_Store"),
    "unnumbered": (
        copied(IMAGE, "imagesTr/new.nii.gz"),
        "failure",
        "imagesTr",
        "not called CASE_0000.nii.gz: new.nii.gz",
    ),
    "other ending": (
        copied(IMAGE, "imagesTr/new_0000.NII.GZ"),
        "warning",
        "imagesTr",
        "nnU-Net ignores: new_0000.NII.GZ",
    ),
    "dead link": (
        lambda f: (f / "imagesTr/x_0000.nii.gz").symlink_to("nowhere"),
        "failure",
        "imagesTr",
        "gone: x_0000",
    ),
    "link in a circle": (
        lambda f: [(f / IMAGE).unlink(), (f / IMAGE).symlink_to(Path(IMAGE).name)],
        "failure",
        "data set",
        "can't be listed: [Errno 40]",
    ),
    "vectors": (
        with_values(IMAGE, np.zeros((6, 8, 10, 3), np.float32)),
        "failure",
        "v1.0",
        "is read as an array of 6x8x10x3 with 2 spacings",
    ),
    "pages of a tif": (
        lambda f: [
            describe(f, file_ending=".tif"),
            *(tifffile.imwrite(f / f"imagesTr/t_000{c}.tif", scan(c)) for c in (0, 1)),
            tifffile.imwrite(f / "labelsTr/t.tif", label_map(), compression="zlib"),
            cut(f / "labelsTr/t.tif"),
        ],
        "failure",
        "t",
        "t.tif can't be read: it is cut off",
    ),
    "missing channel": (
        lambda f: (f / "imagesTr/v1.0_0001.nii.gz").unlink(),
        "failure",
        "v1.0",
        "has 1 channel in v1.0_0000.nii.gz",
    ),
    "missing label": (lambda f: (f / LABEL).unlink(), "failure", "v1.0", "v1.0.nii.gz is missing"),
    "label alone": (copied(LABEL, "labelsTr/x.nii.gz"), "warning", "labelsTr", "x.nii.gz belongs to no image"),
    "same scan": (
        lambda f: [shutil.copy(f / f"imagesTr/v1.0_000{c}.nii.gz", f / f"imagesTr/v1.3_000{c}.nii.gz") for c in (0, 1)],
        "warning",
        "v1.3",
        "has the same image as v1.0",
    ),
    "numTraining": (lambda f: describe(f, numTraining=4), "failure", "dataset.json", "is 4, the data set has 5 cases"),
    "no numTraining": (lambda f: describe(f, numTraining=None), "failure", "dataset.json", "has no numTraining"),
    "no channel names": (lambda f: describe(f, channel_names=None), "failure", "dataset.json", "lacks channel_names"),
    "old name": (
        lambda f: describe(f, channel_names=None, modality={"0": "T1", "1": "T2"}),
        "warning",
        "dataset.json",
        "the old",
    ),
    "no background": (
        lambda f: describe(f, labels={"a": 1}),
        "failure",
        "dataset.json",
        "Background label not declared",
    ),
    "label gap": (
        lambda f: describe(f, labels={"background": 0, "a": 1, "b": 3}),
        "failure",
        "dataset.json",
        "must be consecutive",
    ),
    "ignore in between": (
        lambda f: describe(f, labels={"background": 0, "a": 1, "b": 3, "ignore": 2}),
        "failure",
        "dataset.json",
        "ignore label it must have the highest",
    ),
    "no class order": (
        lambda f: describe(f, labels={"background": 0, "a": [1, 2], "b": [2]}),
        "failure",
        "dataset.json",
        "refuses labels",
    ),
    "wrong class order": (
        lambda f: describe(f, labels={"background": 0, "b": 2, "a": [1, 2]}, regions_class_order=[2, 1]),
        "warning",
        "dataset.json",
        "writes voxels of label 2 as 1, which lies in other regions",
    ),
    "label that no case holds": (
        lambda f: describe(f, labels={"background": 0, "a": 1, "b": 2, "c": 3}),
        "warning",
        "data set",
        "no case holds label 3",
    ),
    "label twice": (
        lambda f: describe(f, labels={"background": 0, "a": 1, "b": 2, "c": 2}),
        "warning",
        "dataset.json",
        "several names",
    ),
    "file ending": (
        lambda f: describe(f, file_ending="nii.gz"),
        "failure",
        "dataset.json",
        "no reader of nnU-Net takes",
    ),
    "dataset.json cut": (lambda f: cut(f / "dataset.json"), "failure", "dataset.json", "can't be read"),
    "no labelsTr": (lambda f: shutil.rmtree(f / "labelsTr"), "failure", "data set", "has no folder labelsTr"),
    "case of letters": (
        lambda f: [
            shutil.copy(f / "imagesTr" / f"v1.0_000{c}.nii.gz", f / "imagesTr" / f"V1.0_000{c}.nii.gz") for c in (0, 1)
        ],
        "failure",
        "v1.0",
        "differs from V1.0 in case only",
    ),
    "same number": (
        lambda f: (f.parents[1] / "results" / "Dataset1234_Old").mkdir(parents=True),
        "failure",
        "data set",
        "number 1234",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fault_is_found_with_its_cure(name: str, folder: Path) -> None:
    spoil, level, subject, detail = CASES[name]
    spoil(folder)
    found = faults(folder)
    assert any(
        (fault.level, fault.subject) == (level, subject) and detail in fault.detail and fault.cure for fault in found
    ), found


def test_all_faults_are_found_at_once(folder: Path) -> None:
    cut(folder / IMAGE)
    (folder / "labelsTr" / "v1.1.nii.gz").unlink()
    save(folder / "labelsTr" / "v1.2.nii.gz", np.full((6, 8, 10), 9, np.uint8))
    describe(folder, numTraining=17)
    assert {fault.subject for fault in faults(folder)} == {"v1.0", "v1.1", "v1.2", "dataset.json"}


def test_rounding_in_headers_is_no_fault(folder: Path) -> None:
    save(folder / LABEL, label_map(), origin=(1e-5, 0.0, 0.0))
    assert faults(folder) == []


@pytest.mark.parametrize("kind", ["regions", "ignore"])
def test_regions_and_ignore_label_are_right_by_nnunets_rules(kind: str, folder: Path) -> None:
    if kind == "regions":
        describe(folder, labels={"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 2])
    else:
        describe(folder, labels={"background": 0, "a": 1, "b": 2, "ignore": 3})
        label_with(3)(folder)
    assert faults(folder) == []


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_axis_of_one_voxel_is_right_where_nnunet_takes_it_for_2d(axis: int, folder: Path) -> None:
    shape = [12, 12, 12]
    shape[axis] = 1
    for largest in (True, False):
        spacing = [1.0, 1.0, 1.0]
        spacing[2 - axis] = 9.0 if largest else 0.5
        for i in range(5):
            for channel in (0, 1):
                save(
                    folder / "imagesTr" / f"v1.{i}_{channel:04d}.nii.gz", scan(10 * i + channel, tuple(shape)), spacing
                )
            labels = (np.arange(144) % 3).astype(np.uint8).reshape(shape)
            save(folder / "labelsTr" / f"v1.{i}.nii.gz", labels, spacing)
        found = faults(folder)
        assert bool(found) is not largest
        assert largest or f"one voxel along axis {axis} of" in found[0].detail


def test_one_flat_case_among_others_is_found(folder: Path) -> None:
    for channel in (0, 1):
        save(folder / "imagesTr" / f"v1.0_{channel:04d}.nii.gz", scan(channel, (1, 8, 10)))
    save(folder / LABEL, label_map((1, 8, 10)))
    (found,) = faults(folder)
    assert (found.level, found.subject) == ("warning", "v1.0")
    assert "one voxel along axis 0, shape 1x8x10; the others have more" in found.detail


def test_several_channels_of_one_png_are_counted_by_its_reader(folder: Path) -> None:
    for part in ("imagesTr", "labelsTr"):
        shutil.rmtree(folder / part)
        (folder / part).mkdir()
    describe(folder, file_ending=".png", channel_names={"0": "R", "1": "G", "2": "B"})
    for i in range(5):
        colours = np.random.default_rng(i).integers(0, 255, (8, 10, 3)).astype(np.uint8)
        io.imsave(folder / "imagesTr" / f"c{i}_0000.png", colours, check_contrast=False)
        io.imsave(folder / "labelsTr" / f"c{i}.png", label_map((8, 10)), check_contrast=False)
    assert faults(folder) == []
    cut(folder / "imagesTr" / "c1_0000.png")
    (found,) = faults(folder)
    assert "c1_0000.png can't be read" in found.detail


def test_volumes_of_tif_are_read_by_their_reader_with_spacing_beside(folder: Path) -> None:
    for part in ("imagesTr", "labelsTr"):
        shutil.rmtree(folder / part)
        (folder / part).mkdir()
    describe(folder, file_ending=".tif", channel_names={"0": "EM"})
    for i in range(5):
        tifffile.imwrite(folder / "imagesTr" / f"c{i}_0000.tif", scan(i))
        tifffile.imwrite(folder / "labelsTr" / f"c{i}.tif", label_map())
        for part in ("imagesTr", "labelsTr"):
            (folder / part / f"c{i}.json").write_text('{"spacing": [2, 1, 1]}')
    assert faults(folder) == []
    (folder / "labelsTr" / "c2.json").unlink()
    (found,) = faults(folder)
    assert found.detail.endswith("has the spacing 1x1x1, " + str(folder / "imagesTr" / "c2_0000.tif") + " 2x1x1")


def test_cases_that_dataset_json_lists_are_read_where_they_lie(folder: Path) -> None:
    (folder / "imagesTr").rename(folder / "elsewhere")
    listed = {
        f"case {i}": {
            "images": [f"elsewhere/v1.{i}_000{channel}.nii.gz" for channel in (0, 1)],
            "label": f"labelsTr/v1.{i}.nii.gz",
        }
        for i in range(5)
    }
    describe(folder, dataset=listed)
    assert faults(folder) == []
    (folder / "elsewhere" / "v1.3_0001.nii.gz").unlink()
    assert [fault.subject for fault in faults(folder)] == ["case 3"]


@pytest.mark.parametrize("name", ["1234", "Dataset1234_Toy.v2", "path"])
def test_the_command_takes_number_name_or_folder(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--dataset", str(folder) if name == "path" else name, "-np", "1"]) == 0
    assert "5 cases read" in capsys.readouterr().out
    cut(folder / IMAGE)
    assert cli.main(["doctor", "--dataset", str(folder), "-np", "1", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [row["level"] for row in found] == ["failure", "ok"]


def test_an_unknown_data_set_is_refused_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--dataset", "8"]) == 2
    assert "got 8: there is Dataset1234_Toy.v2: give its number, full name or path" in capsys.readouterr().err


def test_processes_find_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(folder / IMAGE)
    monkeypatch.setattr(raw_dataset, "_FEW", 1)
    assert raw_dataset.examine(folder, 2, lambda done, total: None) == examine(folder)


def test_commands_to_copy_are_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "images; touch ran"
    folder.mkdir()
    (folder / "._a_0000.nii.gz").touch()
    found = list(of_folder(folder, ".nii.gz", has_channels=True))
    assert f"find '{folder}' -name" in found[0].cure
