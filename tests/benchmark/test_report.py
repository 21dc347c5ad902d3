"""Tables, figures and JSON of a report that is made by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from nnunet_ext.benchmark import figures, table
from nnunet_ext.benchmark.records import QUANTITIES, DepthPoint, Method, Report, Spread
from nnunet_ext.benchmark.report import to_json, write
from nnunet_ext.errors import UsageError
from nnunet_ext.memory.tracker import GIB

BASELINE = Method(
    trainer="nnUNetTrainer",
    network="PlainConvUNet",
    parameters=31_200_000,
    parameters_deployed=31_200_000,
    macs=477_000_000_000,
    held_bytes=int(3.64 * GIB),
    peak_bytes=int(4.68 * GIB),
    expected_bytes=int(6.16 * GIB),
    float32_held_bytes=int(6.93 * GIB),
    float32_peak_bytes=int(8.97 * GIB),
    inference_peak_bytes=int(1.65 * GIB),
    step_seconds=Spread(median=2.0, min=1.5, max=2.5),
    patch_seconds=Spread(median=0.5, min=0.4, max=0.6),
    case_seconds=4.0,
    case_seconds_mirrored=32.0,
)
OURS = replace(BASELINE, trainer="nnUNetTrainerAcme", network="Acme", held_bytes=int(0.91 * GIB))
LOST = Method(trainer="nnUNetTrainerLost", status="failed", reason="No 3D. Use 2d")
POINTS = tuple(
    DepthPoint(
        trainer=name,
        network="Net",
        depth=depth,
        parameters=10**6 * depth,
        held_bytes=depth * size,
        peak_bytes=depth * size + GIB,
    )
    for name, size in (("nnUNetTrainer", 4 * GIB), ("nnUNetTrainerAcme", GIB))
    for depth in (1, 2, 4)
)
REPORT = Report(
    device="CPU, threads: 2",
    torch="2.5",
    nnunetv2="2.7",
    precision="float32",
    plans="nnUNetPlans",
    configuration="3d_fullres",
    patch_size=(128, 128, 96),
    batch_size=2,
    input_channels=1,
    num_classes=3,
    time_patch_size=(128, 128, 96),
    repeats=5,
    tiles_per_case=8,
    passes_mirrored=8,
    methods=tuple(method.compared(BASELINE) for method in (BASELINE, OURS, LOST)),
    depth=POINTS,
)
BUDGET = replace(BASELINE, budget=0.5, peak_bytes=None, expected_bytes=None, held_bytes=int(2.06 * GIB))
COMMAND = "nnunet-ext benchmark -d 4 -c 3d_fullres"


def cells(report: Report, number: int) -> dict[str, dict[str, table.Cell]]:
    found = table.tables(report)[number]
    titles = [" ".join(cell).partition(" [")[0] for cell in found.header]
    return {"".join(row[0]): dict(zip(titles, row, strict=True)) for row in found.rows}


def test_figures_stand_above_their_ratios() -> None:
    memory = cells(REPORT, 0)
    assert memory["nnUNetTrainerAcme"]["float16 held"] == ("0.910", "(0.25x)")
    assert memory["nnUNetTrainer"]["float16 peak"] == ("4.68", "(1.00x)")
    sizes = cells(REPORT, 1)
    assert sizes["nnUNetTrainer"]["weights"] == ("31.2", "(1.00x)")
    assert sizes["nnUNetTrainer"]["operations"] == ("477", "(1.00x)")
    times = cells(REPORT, 2)
    assert times["nnUNetTrainerAcme"]["training step"] == ("2.00 (1.00x)", "1.50-2.50")
    assert times["nnUNetTrainerAcme"]["mirrored"] == ("32.0",)


def test_float16_stands_before_float32_in_the_first_table() -> None:
    titles = [" ".join(cell) for cell in table.tables(REPORT)[0].header]
    assert titles == [
        "trainer",
        "float16 held [GB]",
        "float16 peak [GB]",
        "float16 expected [GB]",
        "float32 held [GB]",
        "float32 peak [GB]",
    ]


def test_row_with_a_budget_says_where_its_peak_is_known() -> None:
    report = replace(REPORT, methods=(BASELINE, BUDGET.compared(BASELINE)))
    row = cells(report, 0)["nnUNetTrainer (compiled, budget 0.5)"]
    assert row["float16 held"] == ("2.06", "(0.57x)")
    assert row["float16 peak"] == (table.MISSING,)
    assert [note for note in table.notes(report) if note.endswith("measured on a GPU only.")]
    known = replace(report, methods=(BASELINE, replace(BUDGET, compiled_peak_bytes=GIB)))
    assert not [note for note in table.notes(known) if "GPU only" in note]


def test_what_is_missing_is_a_dash_and_its_reason_a_note() -> None:
    row = cells(REPORT, 0)["nnUNetTrainerLost"]
    assert {cell for title, cell in row.items() if title != "trainer"} == {(table.MISSING,)}
    assert "nnUNetTrainerLost: No 3D. Use 2d." in table.notes(REPORT)


def test_columns_that_say_nothing_are_left_out() -> None:
    assert "deployed" not in cells(REPORT, 1)["nnUNetTrainer"]
    assert "inference measured" not in cells(REPORT, 1)["nnUNetTrainer"]
    fused = replace(OURS, parameters_deployed=1_000_000)
    assert cells(replace(REPORT, methods=(BASELINE, fused)), 1)["nnUNetTrainerAcme"]["deployed"] == ("1.00",)
    uncased = replace(BASELINE, case_seconds=None, case_seconds_mirrored=None)
    assert "case" not in cells(replace(REPORT, methods=(uncased,)), 2)["nnUNetTrainer"]


def test_measured_memory_has_a_table_of_its_own() -> None:
    measured = replace(
        OURS, measured_held_bytes=GIB, measured_peak_bytes=2 * GIB, measured_reserved_bytes=3 * GIB,
        compiled_peak_bytes=4 * GIB, measured_inference_peak_bytes=5 * GIB,
    )  # fmt: skip
    report = replace(REPORT, device="H100", precision="mixed", methods=(BASELINE, measured))
    assert table.tables(report)[1].title.endswith("measured: patch 128x128x96, batch 2, mixed, H100")
    row = cells(report, 1)["nnUNetTrainerAcme"]
    assert {key: cell[0] for key, cell in row.items() if key != "trainer"} == {
        "held": "1.00",
        "peak": "2.00",
        "reserved": "3.00",
        "compiled peak": "4.00",
    }
    assert cells(report, 2)["nnUNetTrainerAcme"]["inference measured"] == ("5.00",)
    assert [note for note in table.notes(report) if note.startswith("Measured: ")]
    assert not [note for note in table.notes(REPORT) if note.startswith("Measured: ")]


def test_without_repeats_there_is_no_table_of_times() -> None:
    report = replace(
        REPORT,
        repeats=0,
        depth=(),
        methods=(
            replace(BASELINE, step_seconds=None, patch_seconds=None, case_seconds=None, case_seconds_mirrored=None),
        ),
    )
    titles = [found.title.partition(":")[0] for found in table.tables(report)]
    assert titles == ["Memory of a training step, counted", "Size, and memory of inference in float16"]
    assert not [note for note in table.notes(report) if "imes" in note]


def test_case_times_are_said_to_be_computed() -> None:
    (note,) = (note for note in table.notes(REPORT) if "case" in note)
    assert note.startswith("Times of a case are computed, not measured: 8 tiles")
    assert note.endswith("mirrored 8 times that.")


def test_smaller_patch_of_the_times_is_told() -> None:
    report = replace(REPORT, time_patch_size=(64, 64, 64))
    assert "patch 64x64x64" in table.tables(report)[2].title
    assert "patch 128x128x96" in table.tables(report)[0].title
    assert [note for note in table.notes(report) if "smaller patch" in note]


def test_words_and_unit_are_said() -> None:
    text = " ".join(table.notes(REPORT))
    for word in ("Held: ", "Peak: ", "Expected: ", "1 GB is 2**30 bytes", "float16 autocast"):
        assert word in text


def test_ratios_say_what_to() -> None:
    assert "In parentheses: ratio to default nnU-Net, the first row." in table.notes(REPORT)
    other = replace(REPORT, methods=(replace(BASELINE, network="ReversibleUNet"),))
    assert "In parentheses: ratio to nnUNetTrainer with these plans, the first row." in table.notes(other)


def test_plans_for_another_network_are_told() -> None:
    report = replace(REPORT, methods=(replace(BASELINE, network="ReversibleUNet"),))
    assert [note for note in table.notes(report) if note.startswith("These plans are for ReversibleUNet")]
    assert not [note for note in table.notes(REPORT) if note.startswith("These plans")]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.0123"), (1.0, "1.00"), (99.94, "99.9"), (123.4, "123"), (12345.6, "12346"), (0.0, "0.00")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert table.number(value) == text


def test_markdown_tables_have_as_many_cells_in_every_line() -> None:
    text = table.markdown(REPORT, COMMAND)
    blocks = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 4
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1
    assert "| nnUNetTrainerAcme | 0.910 (0.25x) | 4.68 (1.00x) | 6.16 (1.00x) |" in text
    assert f"```bash\n{COMMAND}\n```" in text


def test_json_has_the_documented_keys_and_no_nan() -> None:
    found = json.loads(to_json(REPORT, COMMAND))
    documented = (Path(__file__).parents[2] / "docs" / "reference" / "benchmark.md").read_text(encoding="utf-8")
    keys = {*found, *found["methods"][0], *found["depth"][0], *found["methods"][0]["step_seconds"]}
    assert [key for key in sorted(keys) if f"`{key}`" not in documented] == []
    assert found["command"] == COMMAND
    assert set(found["methods"][0]["ratios"]) == set(QUANTITIES)
    assert found["methods"][2]["ratios"]["macs"] is None
    with pytest.raises(ValueError, match="Out of range float"):
        to_json(replace(REPORT, methods=(replace(BASELINE, case_seconds=math.nan),)), COMMAND)


def test_folder_holds_whole_files_only(tmp_path: Path) -> None:
    written = write(REPORT, COMMAND, tmp_path / "new" / "out")
    names = ["benchmark.json", "benchmark.md", "benchmark.png", "depth.png"]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == names
    assert json.loads(written[0].read_text(encoding="utf-8"))["device"] == "CPU, threads: 2"


def test_no_figure_of_depths_that_were_not_asked_for(tmp_path: Path) -> None:
    names = [path.name for path in write(replace(REPORT, depth=()), COMMAND, tmp_path)]
    assert "depth.png" not in names


def test_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write(REPORT, COMMAND, tmp_path / name) for name in "ab")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match=r"can't write .*file"):
        write(REPORT, COMMAND, tmp_path / "file" / "out")


def picture(content: bytes) -> Any:
    return imread(BytesIO(content))


@pytest.mark.parametrize("methods", [(BASELINE,), (LOST,), (BASELINE, OURS, LOST), (BASELINE, *[OURS] * 12)])
def test_bars_are_drawn_for_any_methods(methods: tuple[Method, ...]) -> None:
    report = replace(REPORT, methods=tuple(method.compared(methods[0]) for method in methods))
    image = picture(figures.ratio_bars(report))
    assert image.shape[1] == 1440
    assert np.ptp(image[..., :3]) > 0.5


def test_bars_show_the_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "rendered", lambda figure, kind: drawn.append(figure) or b"")
    figures.ratio_bars(REPORT)
    panels = {axis.get_title(): axis for axis in drawn[0].axes}
    assert set(panels) == {title for key, title in figures.PANELS.items() if getattr(BASELINE, key) is not None}
    held = panels["Memory held, float16"]
    widths = [bar.get_width() for bar in held.patches]
    assert widths == pytest.approx([1.0, 0.91 / 3.64, 0.0], rel=1e-6)
    assert [text.get_text() for text in held.texts] == ["1.00", "0.25", "not known"]
    assert len({bar.get_hatch() for bar in held.patches}) == 3
    assert drawn[0].get_supxlabel() == "ratio to default nnU-Net"


def test_curves_of_depth_differ_in_marker_and_line(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "rendered", lambda figure, kind: drawn.append(figure) or b"")
    figures.depth_curves(REPORT)
    held, peak = drawn[0].axes
    assert [list(line.get_ydata()) for line in held.lines] == [[4, 8, 16], [1, 2, 4]]
    assert [list(line.get_ydata()) for line in peak.lines] == [[5, 9, 17], [2, 3, 5]]
    assert [list(line.get_xdata()) for line in held.lines] == [[1, 2, 4]] * 2
    assert len({(line.get_marker(), line.get_linestyle()) for line in held.lines}) == 2
