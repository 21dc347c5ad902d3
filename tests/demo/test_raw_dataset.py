"""`--raw`: what is refused and how, what is linked, and that the user's data set stays as it is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunet_ext.demo import dataset
from nnunet_ext.demo.dataset import link, read_raw
from nnunet_ext.errors import UsageError

DESCRIPTION = {
    "channel_names": {"0": "CT", "1": "PET"},
    "labels": {"background": 0, "organ": 1},
    "numTraining": 8,
    "file_ending": ".nii.gz",
}


def make(
    folder: Path, n_training: int = 8, n_test: int = 0, n_test_labels: int = 0, description: Any = DESCRIPTION
) -> Path:
    """Write a data set of empty files with two channels, whose case names hold dots and numbers."""
    for part, n_images, n_labels in (("Tr", n_training, n_training), ("Ts", n_test, n_test_labels)):
        if not n_images:
            continue
        for kind in ("images", "labels"):
            (folder / f"{kind}{part}").mkdir(parents=True)
        for index in range(n_images):
            for channel in ("0000", "0001"):
                (folder / f"images{part}" / f"{part}_v1.{index:04d}_{channel}.nii.gz").write_text(channel)
        for index in range(n_labels):
            (folder / f"labels{part}" / f"{part}_v1.{index:04d}.nii.gz").write_text("label")
    folder.mkdir(exist_ok=True)
    if description is not None:
        (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def listing(folder: Path) -> dict[str, list[str]]:
    return {part.name: sorted(os.listdir(part)) for part in folder.iterdir() if part.is_dir()}


def without_labels(folder: Path) -> None:
    for path in (folder / "labelsTr").iterdir():
        path.unlink()
    (folder / "labelsTr").rmdir()


def without_one_label(folder: Path) -> None:
    (folder / "labelsTr" / "Tr_v1.0003.nii.gz").unlink()


def with_broken_json(folder: Path) -> None:
    (folder / "dataset.json").write_text("{")


@pytest.mark.parametrize(
    ("name", "arguments", "spoil", "message"),
    [
        ("Hippocampus", {}, None, r"DatasetXXX_Name.*got .*/Hippocampus: rename it"),
        ("Dataset4_Hippocampus", {}, None, r"DatasetXXX_Name.*got .*/Dataset4_Hippocampus"),
        ("Dataset004_Gone", None, None, r"existing folder, got .*Dataset004_Gone"),
        ("Dataset004_X", {"description": None}, None, r"Dataset004_X/dataset\.json is missing: .*add it"),
        ("Dataset004_X", {}, with_broken_json, r"dataset\.json can't be read .*repair"),
        ("Dataset004_X", {"description": {"labels": {}}}, None, r"it lacks channel_names and file_ending"),
        ("Dataset004_X", {"description": [1]}, None, r"must hold a JSON dict, got a list"),
        ("Dataset004_X", {"n_training": 0}, None, r"has no folder imagesTr: make"),
        ("Dataset004_X", {}, without_labels, r"has no folder labelsTr: make"),
        ("Dataset004_X", {}, without_one_label, r"has no Tr_v1\.0003\.nii\.gz \(1 missing\)"),
        ("Dataset004_X", {"n_training": 6}, None, r"at least 7 training cases \(nnU-Net .*has 6: add some"),
        ("Dataset004_X", {"n_training": 4, "n_test": 2, "n_test_labels": 2}, None, r"at least 5 .*has 4"),
    ],
)
def test_wrong_data_set_is_refused_in_one_sentence(
    tmp_path: Path, name: str, arguments: dict[str, Any] | None, spoil: Callable[[Path], None] | None, message: str
) -> None:
    folder = tmp_path / name
    if arguments is not None:
        make(folder, **arguments)
    if spoil is not None:
        spoil(folder)
    with pytest.raises(UsageError, match=message) as caught:
        read_raw(folder)
    assert str(caught.value).startswith("--raw needs")
    assert "\n" not in str(caught.value)


def test_without_labelled_test_scans_the_last_two_cases_are_held_out(tmp_path: Path) -> None:
    raw = read_raw(make(tmp_path / "Dataset004_X", n_training=7, n_test=3))
    link(raw, tmp_path / "own" / "Dataset004_X")
    files = listing(tmp_path / "own" / "Dataset004_X")
    assert files["labelsTr"] == [f"Tr_v1.{i:04d}.nii.gz" for i in range(5)]
    assert files["labelsTs"] == ["Tr_v1.0005.nii.gz", "Tr_v1.0006.nii.gz"]
    assert files["imagesTs"] == [f"Tr_v1.{i:04d}_{c}.nii.gz" for i in (5, 6) for c in ("0000", "0001")]
    assert len(files["imagesTr"]) == 10
    written = json.loads((tmp_path / "own" / "Dataset004_X" / "dataset.json").read_text())
    assert written == {**DESCRIPTION, "numTraining": 5}


def test_two_labelled_test_scans_are_predicted_and_all_cases_trained(tmp_path: Path) -> None:
    raw = read_raw(make(tmp_path / "Dataset004_X", n_training=5, n_test=4, n_test_labels=3))
    link(raw, tmp_path / "own" / "Dataset004_X")
    files = listing(tmp_path / "own" / "Dataset004_X")
    assert len(files["labelsTr"]) == 5
    assert files["labelsTs"] == ["Ts_v1.0000.nii.gz", "Ts_v1.0001.nii.gz"]
    assert len(files["imagesTs"]) == 4


def test_cases_whose_names_begin_alike_are_kept_apart(tmp_path: Path) -> None:
    folder = make(tmp_path / "Dataset004_X", n_training=7)
    for name in ("imagesTr/a_0000", "imagesTr/a_0001", "labelsTr/a", "labelsTr/a_0001"):
        (folder / f"{name}.nii.gz").write_text("x")
    for channel in ("0000", "0001"):
        (folder / "imagesTr" / f"a_0001_{channel}.nii.gz").write_text("x")
    raw = read_raw(folder)
    target = tmp_path / "own" / "Dataset004_X"
    cases = {case.name: case for case in (*raw.training, *raw.unseen)}
    link(
        dataset.RawDataset(folder=folder, description=DESCRIPTION, training=(cases["a"],), unseen=(cases["a_0001"],)),
        target,
    )
    assert listing(target) == {
        "imagesTr": ["a_0000.nii.gz", "a_0001.nii.gz"],
        "labelsTr": ["a.nii.gz"],
        "imagesTs": ["a_0001_0000.nii.gz", "a_0001_0001.nii.gz"],
        "labelsTs": ["a_0001.nii.gz"],
    }


def test_json_beside_tif_is_linked(tmp_path: Path) -> None:
    folder = tmp_path / "Dataset004_X"
    for index in range(7):
        for name in (f"imagesTr/c{index}_0000.tif", f"imagesTr/c{index}.json", f"labelsTr/c{index}.tif"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x")
    (folder / "dataset.json").write_text(json.dumps({**DESCRIPTION, "file_ending": ".tif"}))
    link(read_raw(folder), tmp_path / "own")
    assert listing(tmp_path / "own")["imagesTs"] == ["c5.json", "c5_0000.tif", "c6.json", "c6_0000.tif"]


@pytest.mark.parametrize("links_allowed", [True, False])
def test_user_data_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links_allowed: bool) -> None:
    folder = make(tmp_path / "Dataset004_X")
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}

    def refuse(*_: object) -> None:
        raise OSError("A required privilege is not held by the client")

    if not links_allowed:
        monkeypatch.setattr(Path, "symlink_to", refuse)
    link(read_raw(folder), tmp_path / "own" / "Dataset004_X")
    files = [p for p in (tmp_path / "own").rglob("*.nii.gz")]
    assert len(files) == 24
    assert all(p.is_symlink() is links_allowed and p.read_text() for p in files)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before} == before


def test_links_hold_when_the_data_set_was_given_by_a_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "Dataset004_X")
    monkeypatch.chdir(tmp_path)
    link(read_raw(Path("Dataset004_X")), tmp_path / "own")
    assert all(re.fullmatch(r"label|000\d", p.read_text()) for p in (tmp_path / "own").rglob("*.nii.gz"))


@pytest.mark.parametrize("name", ["Dataset1234_X", "Dataset004", "Dataset004_X.v2"])
def test_names_that_nnunet_takes_are_taken(tmp_path: Path, name: str) -> None:
    assert read_raw(make(tmp_path / name)).folder.name == name


def test_cases_that_dataset_json_lists_are_linked_where_nnunet_finds_them_unlisted(tmp_path: Path) -> None:
    folder = make(tmp_path / "Dataset004_X", n_training=7)
    (folder / "imagesTr").rename(folder / "elsewhere")
    listed = {
        f"c{i}": {
            "images": [f"elsewhere/Tr_v1.{i:04d}_{channel:04d}.nii.gz" for channel in (0, 1)],
            "label": f"labelsTr/Tr_v1.{i:04d}.nii.gz",
        }
        for i in range(7)
    }
    (folder / "dataset.json").write_text(json.dumps({**DESCRIPTION, "dataset": listed}))
    link(read_raw(folder), tmp_path / "own")
    assert listing(tmp_path / "own")["imagesTs"] == [f"c{i}_000{channel}.nii.gz" for i in (5, 6) for channel in (0, 1)]
    assert (tmp_path / "own" / "imagesTs" / "c6_0001.nii.gz").resolve() == folder / "elsewhere/Tr_v1.0006_0001.nii.gz"
    assert "dataset" not in json.loads((tmp_path / "own" / "dataset.json").read_text())
