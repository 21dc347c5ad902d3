"""The report is self-contained, strict, the same on every call, and never leaves half a file."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from nnunet_ext import files, style
from nnunet_ext.comparison import compare, report, selection, tables
from nnunet_ext.comparison.compare import Comparison
from nnunet_ext.comparison.selection import Selection
from nnunet_ext.errors import UsageError
from tests.comparison.conftest import DATASET, MakeRun, dice_counts, random_folds, write_run

COMMAND = "nnunet-ext compare <x>"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    root = tmp_path_factory.mktemp("runs")
    folders = [write_run(root, f"nnUNetTrainer{x}", random_folds(i, 0.02 * i)) for i, x in enumerate(("", "B", "<C|>"))]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            patch.delenv(f"nnUNet_{name}", raising=False)
        return compare.compare(selection.request(Selection(folders=folders, processes=1)))


@pytest.fixture(scope="module")
def written(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of its report; tests read it."""
    return report.write(comparison, tmp_path_factory.mktemp("report"), COMMAND).parent


class Sources(HTMLParser):
    """Everything that a page would load, and its open tags."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.images = 0
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.loaded += [str(values[name]) for name in ("src", "href", "srcset", "data") if name in values]
        self.images += tag == "img" and str(values.get("alt", "")) != ""
        if tag not in ("meta", "img", "source", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_loads_nothing_and_is_well_formed(written: Path) -> None:
    page = (written / "report.html").read_text()
    sources = Sources()
    sources.feed(page)
    assert sources.open == []
    assert all(s.startswith(("data:image/svg+xml;base64,", "data:image/png;base64,", "#")) for s in sources.loaded)
    assert sources.images == len(list((written / "figures").glob("*.png"))) >= 5
    assert not re.search(r"https?://|@import|url\(", page)
    for picture in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page):
        svg = base64.b64decode(picture).decode()
        assert set(re.findall(r"(?:href|src)=\"(.)", svg)) <= {"#", "d"}  # its own parts, data
        assert not re.search(r"url\([^#]|@import|<script", svg)
    assert 'name="viewport"' in page


def test_names_with_markup_are_escaped(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert "nnUNetTrainer&lt;C|&gt;" in page
    assert "<C|>" not in page
    assert "compare &lt;x&gt;" in page
    markdown = (written / "report.md").read_text()
    assert "nnUNetTrainer&#60;C\\|>" in markdown
    widths = [line.replace("\\|", "").count("|") for line in markdown.splitlines() if line.startswith("|")]
    assert min(widths) >= 3


def test_markdown_shows_every_figure_and_each_is_there_for_print(written: Path) -> None:
    shown = re.findall(r"!\[.*?\]\((.*?)\)", (written / "report.md").read_text())
    assert sorted(shown) == sorted(f"figures/{path.name}" for path in (written / "figures").glob("*.png"))
    for name in shown:
        figure = written / name
        assert b"</svg>" in figure.with_suffix(".svg").read_bytes()
        pdf = figure.with_suffix(".pdf").read_bytes()
        assert pdf.startswith(b"%PDF")
        assert b"/Type3" not in pdf.replace(b" ", b"")  # which journals refuse
    assert {path.suffix for path in (written / "figures").iterdir()} == {".png", ".svg", ".pdf"}


def test_tables_are_there_for_latex_with_a_cell_for_each_column(written: Path) -> None:
    names = {path.name for path in (written / "tables").iterdir()}
    assert names >= {"cross-validation-dice.tex", "summary.tex", "cost.tex"}
    for path in (written / "tables").iterdir():
        text = path.read_text()
        columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
        rows = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert columns is not None
        assert len(rows) > 1
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(columns[1])}
        assert [text.count(rf"\{rule}rule") for rule in ("top", "mid", "bottom")] == [1, 1, 1]
        assert rf"\label{{tab:{path.stem}}}" in text


@pytest.mark.usefixtures("undrawn")
def test_figures_alone_stand_in_the_folder_itself(comparison: Comparison, tmp_path: Path) -> None:
    assert report.write(comparison, tmp_path, only_figures=True) == tmp_path
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {f"cross-validation-dice.{kind}" for kind in ("png", "svg", "pdf")}
    assert {Path(name).suffix for name in names} == {".png", ".svg", ".pdf"}


def test_figures_name_neither_the_software_nor_the_day(written: Path) -> None:
    for path in (written / "figures").iterdir():
        content = path.read_bytes()
        assert not re.search(rb"CreationDate|Producer|dc:date|Software", content), path.name


def test_wide_figures_have_a_drawing_for_phones(written: Path) -> None:
    page = (written / "report.html").read_text()
    figures = re.findall(r"--inches: ([\d.]+)\">(.*?)</figure>", page, re.DOTALL)
    assert figures
    for inches, content in figures:
        assert float(inches) <= style.PAGE
        assert ("<source" in content) == (float(inches) > style.COLUMN)


def test_page_has_rules_for_paper(written: Path) -> None:
    page = (written / "report.html").read_text()
    paper = page[page.index("@media print") : page.index("</style>")]
    assert "@page" in page
    for rule in (".scroll { overflow: visible", "break-inside: avoid", "tbody .number { overflow-wrap: normal"):
        assert rule in paper


def test_same_input_gives_the_same_bytes(comparison: Comparison, written: Path, tmp_path: Path) -> None:
    report.write(comparison, tmp_path, COMMAND)
    contents = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (written, tmp_path)
    ]
    assert contents[0] == contents[1]


@pytest.mark.usefixtures("undrawn")
def test_json_is_strict_and_holds_what_was_computed(make_run: MakeRun, tmp_path: Path) -> None:
    folds = {"0": {"a": [dice_counts(0.8), (0, 0, 0)]}}  # no interval, no p, a structure without any value
    folders = [make_run(name, folds) for name in ("nnUNetTrainer", "nnUNetTrainerB")]
    found = compare.compare(selection.request(Selection(folders=folders, processes=1)))
    report.write(found, tmp_path / "out")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=refuse)
    (evaluation,) = content["evaluations"]
    lesion = next(d for d in evaluation["differences"] if (d["metric"], d["structure"]) == ("Dice", "lesion"))
    assert (lesion["n"], lesion["mean"], lesion["low"], lesion["p"]) == (0, None, None, None)
    organ = next(m for m in evaluation["means"] if (m["metric"], m["structure"]) == ("Dice", "organ"))
    assert (organ["mean"], organ["n"]) == (pytest.approx(0.8), 1)
    assert content["runs"][0]["cost"]["parameters"] == 2159


@pytest.mark.usefixtures("undrawn")
def test_cases_are_all_there_with_whether_they_were_compared(make_run: MakeRun, tmp_path: Path) -> None:
    folds = random_folds(1)
    folders = [make_run("nnUNetTrainer", folds), make_run("nnUNetTrainerB", {"0": folds["0"]})]
    report.write(compare.compare(selection.request(Selection(folders=folders, processes=1))), tmp_path / "out")
    table = pd.read_csv(StringIO((tmp_path / "out" / "cases.csv").read_text()))
    assert len(table) == 2 * (12 + 6)
    assert table.groupby("run")["compared"].sum().tolist() == [12, 12]


@pytest.mark.usefixtures("undrawn")
def test_full_disk_leaves_the_old_report(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.write(comparison, tmp_path)
    before = (tmp_path / "report.html").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UsageError, match="No space left on device"):
        report.write(comparison, tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(files.PARTIAL)]


@pytest.mark.usefixtures("undrawn")
def test_figures_of_an_earlier_report_are_removed_and_other_files_left(comparison: Comparison, tmp_path: Path) -> None:
    report.write(comparison, tmp_path)
    for name in ("figures/old.png", "figures/old.pdf", "tables/old.tex"):
        note_file(tmp_path, name, b"old")
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / "figures" / "mine.png").touch()
    (tmp_path / "notes.txt").touch()
    report.write(comparison, tmp_path)
    names = {path.stem for name in ("figures", "tables") for path in (tmp_path / name).iterdir()}
    assert "mine" in names
    assert "old" not in names
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize(
    "name",
    ["figures/mine.png", "figures/../mine.png", "mine.png", "../mine.png", "{outside}", "", "figures/..", "figures/\0"],
)
def test_received_report_can_not_have_files_deleted(name: str, tmp_path: Path) -> None:
    figures = tmp_path / "out" / "figures"
    figures.mkdir(parents=True)
    for path in (tmp_path / "mine.png", figures.parent / "mine.png", figures / "mine.png", figures / ".png"):
        path.write_bytes(b"mine")
    name = name.format(outside=tmp_path / "mine.png")
    (figures.parent / "report.json").write_text(json.dumps({"figures": [name], "files_sha256": {}}))
    # Only somebody who knows the content of a figure in the folder could name it.
    note_file(figures.parent, name, b"other" if name == "figures/mine.png" else b"mine")
    assert report._old_files(figures.parent) == set()


@pytest.mark.parametrize("content", ["[]", '{"files_sha256": ["a"]}', '{"files_sha256": {"figures/a": 1}}', "{", ""])
def test_report_of_another_shape_names_no_figures(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a.png").touch()
    assert report._old_files(tmp_path) == set()


@pytest.mark.usefixtures("undrawn")
def test_a_link_in_the_place_of_the_figures_leads_to_no_other_files(comparison: Comparison, tmp_path: Path) -> None:
    mine, out = tmp_path / "mine", tmp_path / "out"
    report.write(comparison, out)
    (out / "figures").rename(mine)
    (mine / "photo.png").write_bytes(b"photo")
    note_file(out, "figures/photo.png", b"photo")
    (out / "figures").symlink_to(mine)
    before = {path: path.stat() for path in mine.iterdir()}
    report.write(comparison, out)
    assert {path: path.stat() for path in mine.iterdir()} == before
    assert {path.name for path in (out / "figures").iterdir()} == {path.name for path in mine.iterdir()} - {"photo.png"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_in_the_place_of_a_report_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "report.json")
    assert report._old_files(tmp_path) == set()


def note_file(folder: Path, name: str, file: bytes) -> None:
    content = json.loads((folder / "report.json").read_text())
    content["files_sha256"][name] = hashlib.sha256(file).hexdigest()
    (folder / "report.json").write_text(json.dumps(content))


@pytest.mark.usefixtures("undrawn")
def test_single_run_has_a_report_without_differences(make_run: MakeRun, tmp_path: Path) -> None:
    found = compare.compare(
        selection.request(Selection(folders=[make_run("nnUNetTrainer", random_folds(1))], processes=1))
    )
    page = report.write(found, tmp_path / "out").read_text()
    assert "0.69" in page
    assert "95 % interval" not in page


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


@pytest.fixture
def predictions(tmp_path: Path) -> tuple[list[Path], Path]:
    """Two folders of predictions with references; A misses a slice of every box, B none but of case 2 all."""
    random = np.random.default_rng(0)
    for i in range(3):
        truth = np.zeros((12, 20, 20), dtype=np.uint8)
        truth[3:9, 4:14, 4 + i : 14] = 1
        truth[5:7, 6:9, 9:12] = 2
        a, b = truth.copy(), truth.copy()
        a[3] = 0
        b[:] = 0 if i == 2 else b
        write_image(tmp_path / "ref" / f"c{i}.nii.gz", truth)
        write_image(tmp_path / "A" / f"c{i}.nii.gz", a)
        write_image(tmp_path / "B" / f"c{i}.nii.gz", b)
        write_image(tmp_path / "images" / f"c{i}_0000.nii.gz", random.normal(size=truth.shape).astype(np.float32))
    (tmp_path / "A" / "dataset.json").write_text(json.dumps(DATASET))
    return [tmp_path / "A", tmp_path / "B"], tmp_path / "ref"


def test_plain_folders_are_compared_and_the_worst_case_is_drawn(
    predictions: tuple[list[Path], Path], tmp_path: Path
) -> None:
    folders, references = predictions
    chosen = Selection(
        predictions=folders, references=references, images=tmp_path / "images", tolerance=1.0, processes=1
    )
    found = compare.compare(selection.request(chosen))
    (evaluation,) = found.evaluations
    assert evaluation.mean("B", structure="organ").mean == pytest.approx(2 / 3)
    assert evaluation.mean("B", structure="organ").missed == 1
    assert evaluation.mean("B", "NSD", "organ").mean == pytest.approx(2 / 3)
    assert (evaluation.mean("B", "HD95", "organ").n, evaluation.mean("B", "HD95", "organ").mean) == (2, 0.0)
    assert evaluation.worst["B"][0] == ("c2", 0.0)
    report.write(found, tmp_path / "out")
    drawn = {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"held-out-worst-1", "held-out-nsd", "held-out-hd95", "held-out-differences"} <= drawn


@pytest.mark.usefixtures("undrawn")
def test_missing_images_and_missing_predictions_are_warned_of(
    predictions: tuple[list[Path], Path], tmp_path: Path
) -> None:
    folders, references = predictions
    (folders[1] / "c1.nii.gz").unlink()
    write_image(folders[0] / "extra.nii.gz", np.zeros((4, 4, 4), dtype=np.uint8))
    found = compare.compare(selection.request(Selection(predictions=folders, references=references, processes=1)))
    report.write(found, tmp_path / "out")
    warnings = json.loads((tmp_path / "out" / "report.json").read_text())["warnings"]
    assert any(": 1 reference (" in w and "B: without a prediction in" in w and "c1" in w for w in warnings)
    assert any("A: without a reference: 1 prediction in" in w and "extra" in w for w in warnings)
    assert any(
        "No picture of worst cases (c2): its image is missing (set nnUNet_raw or give --images)" in w for w in warnings
    )
    assert found.evaluations[0].cases == ("c0", "c2")


def test_predictions_without_a_dataset_json_ask_for_it(predictions: tuple[list[Path], Path]) -> None:
    folders, references = predictions
    (folders[0] / "dataset.json").unlink()
    with pytest.raises(UsageError, match=r"dataset.json is missing: name nnU-Net's dataset.json .* by -djfile"):
        selection.request(Selection(predictions=folders, references=references, processes=1))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (None, "\N{EN DASH}"), (float("nan"), "\N{EN DASH}"), (-1.5, "\N{MINUS SIGN}1.500")],
)
def test_numbers_are_text(value: float | None, text: str) -> None:
    assert tables.number(value) == text


@pytest.mark.parametrize(("p", "text"), [(0.0004, "< 0.001"), (0.0314, "0.031"), (float("nan"), "\N{EN DASH}")])
def test_small_p_values_are_bounded(p: float, text: str) -> None:
    assert tables.p_value(p) == text
