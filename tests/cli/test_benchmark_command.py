"""``nnunet-ext benchmark``: what it prints, its exit status, and its mistakes in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nnunet_ext import cli
from nnunet_ext.benchmark import run as benchmark_run
from nnunet_ext.benchmark.records import Report
from nnunet_ext.benchmark.request import BenchmarkRequest
from nnunet_ext.nnunet import patch_plans
from tests.benchmark.test_report import REPORT

if TYPE_CHECKING:
    from tests.conftest import RunPython

PATCH = ["--patch", "16", "16", "16"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[BenchmarkRequest]:
    """Requests that reach the runner, which answers with a ready report."""
    requests: list[BenchmarkRequest] = []

    def run(request: BenchmarkRequest, on_progress: Callable[[int, int, str], None]) -> Report:
        requests.append(request)
        print("printed by a network")
        on_progress(0, 1, "nnUNetTrainer: counting")
        return REPORT

    monkeypatch.setattr(benchmark_run, "run", run)
    monkeypatch.setenv("COLUMNS", "80")
    return requests


def test_arguments_reach_the_runner(asked: list[BenchmarkRequest]) -> None:
    line = "--channels 2 --classes 4 --batch 3 --device cpu --precision mixed --repeats 7 --time-patch 8 8 8"
    trainers = "-tr nnUNetTrainerReversible nnUNetTrainerAdam --depth 1 2 --compiled --budget 0.3"
    assert cli.main(["benchmark", *PATCH, *line.split(), *trainers.split()]) == 0
    (request,) = asked
    setting = request.setting
    assert (setting.input_channels, setting.num_classes, setting.batch_size) == (2, 4, 3)
    assert (request.machine.kind, request.machine.precision) == ("cpu", "mixed")
    assert request.names == ("nnUNetTrainer", "nnUNetTrainerReversible", "nnUNetTrainerAdam")
    assert (request.repeats, request.timed_patch, request.depths) == (7, (8, 8, 8), (1, 2))
    assert request.times_compiled
    assert request.shares == (0.3,)


def test_table_fits_80_columns(asked: list[BenchmarkRequest], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["benchmark", *PATCH]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for text in ("[s]", "[GB]", "(0.25x)", "1.50-2.50", "nnUNetTrainerLost: No 3D. Use 2d."):
        assert text in out
    assert "…" not in out


def test_only_the_result_goes_to_the_standard_output(
    asked: list[BenchmarkRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["benchmark", *PATCH, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["command"] == "nnunet-ext benchmark --patch 16 16 16 --json"
    assert printed.err == "printed by a network\n"


def test_progress_is_shown_on_a_terminal_only(
    asked: list[BenchmarkRequest], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    cli.main(["benchmark", *PATCH])
    assert "counting" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.main(["benchmark", *PATCH])
    assert "counting" in capsys.readouterr().err


def test_files_are_written_on_request_only(
    asked: list[BenchmarkRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main(["benchmark", *PATCH])
    assert list(tmp_path.iterdir()) == []
    cli.main(["benchmark", *PATCH, "-o", "out"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "benchmark.json",
        "benchmark.md",
        "benchmark.png",
        "depth.png",
    }
    assert "Written: out/benchmark.png" in capsys.readouterr().out.replace("\\", "/")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of -d, --plans and --patch is needed, got none: give one."),
        ([*PATCH, "-d", "4"], "got -d and --patch: give one."),
        (["--patch", "16"], "--patch needs two or three numbers, got 16"),
        (["--patch", "4", "4", "4"], "at least 8 voxels per axis, got 4 4 4"),
        ([*PATCH, "--repeats", "-1"], "--repeats must be 0 or more, got -1"),
        ([*PATCH, "--depth", "0"], "--depth needs numbers of 1 or more, got 0"),
        ([*PATCH, "--budget", "50"], "--budget needs shares between 0 and 1, got 50: use for example 0.5."),
        ([*PATCH, "--time-patch", "9", "8", "8"], "must be divisible by 4 4 4"),
        ([*PATCH, "-tr", "nnUNetTrainerNobody"], "got nnUNetTrainerNobody: correct it"),
        ([*PATCH, "--device", "cuda"], "--device cuda needs an NVIDIA GPU"),
        (["--plans", "nowhere.json"], "nowhere.json is missing"),
        (["-d", "998", "-c", "2d"], "there is none: run nnUNetv2_plan_and_preprocess -d 998 first."),
    ],
)
def test_mistake_is_one_line_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["benchmark", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    line = printed.err.splitlines()[-1]
    assert line.startswith("nnunet-ext benchmark: ")
    assert message in line


def test_unset_variable_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    assert cli.main(["benchmark", "-d", "4", "-c", "2d"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs the environment variable nnUNet_preprocessed, which is not set" in line


def test_wrong_choice_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["benchmark", *PATCH, "--precision", "int8"])
    assert left.value.code == 2
    assert "usage: nnunet-ext benchmark" in capsys.readouterr().err


def test_real_run_prints_strict_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(patch_plans, "FEATURES", 4)

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    line = "--batch 1 --device cpu --repeats 1 -tr nnUNetTrainerReversible --depth 1 --json"
    assert cli.main(["benchmark", *PATCH, *line.split()]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert [method["status"] for method in found["methods"]] == ["ok", "ok"]
    assert found["methods"][1]["ratios"]["held_bytes"] < 1
    assert found["methods"][0]["step_seconds"]["median"] > 0
    assert [point["depth"] for point in found["depth"]] == [1, 1]


def test_help_needs_no_torch(run_python: RunPython) -> None:
    run_python(
        "import sys\n"
        "from nnunet_ext.cli import main\n"
        "try:\n"
        "    main(['benchmark', '--help'])\n"
        "except SystemExit as error:\n"
        "    assert not error.code\n"
        "assert not {'torch', 'nnunetv2', 'numpy'} & set(sys.modules)\n"
    )
