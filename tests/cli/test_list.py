"""``nnunet-ext list``, and the README's table that it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nnunet_ext import cli, methods, registry
from nnunet_ext.cli.list import SCHEDULES

if TYPE_CHECKING:
    from tests.conftest import Install

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["list", *arguments]) == 0
    return capsys.readouterr().out


def test_table_of_the_readme_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    readme = README.read_text(encoding="utf-8")
    assert readme.count(BEGIN) == readme.count(END) == 1, f"{README} needs one {BEGIN} and one {END}"
    table = readme.partition(BEGIN)[2].partition(END)[0]
    assert table.strip() == output(capsys, "--markdown").strip()


def test_text_holds_every_registered_name(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("acme", 'class nnUNetTrainerAcme:\n    """Trains Acme."""\n', trainers=["nnUNetTrainerAcme"])
    lines = output(capsys).splitlines()
    for kind in registry.KINDS:
        for name in registry.names(kind):
            assert [line for line in lines if line.split()[:1] == [name]], name
    assert [line.split() for line in lines if "nnUNetTrainerAcme" in line] == [
        ["nnUNetTrainerAcme", "acme", "1.0", "Trains", "Acme."]
    ]


def test_escapes_of_others_do_not_reach_the_terminal(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(
        "acme", 'class AcmeNet:\n    """A \x1b[2Jnet\u202e\x9b."""\n', architectures=["AcmeNet", "X\x1b[2J"]
    )
    for arguments in ([], ["--json"], ["--markdown"]):
        assert all(line.isprintable() for line in output(capsys, *arguments).split("\n"))
    assert "A \\x1b[2Jnet\\u202e\\x9b." in output(capsys)


def test_text_explains_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    assert "[_<N>epochs][_<M>iters][_NoMirroring]" in output(capsys)


def test_example_of_a_schedule_is_one() -> None:
    example = SCHEDULES.partition("-tr ")[2].partition(":")[0]
    assert registry.parse_schedule(example) is not None


def test_refused_names_are_listed_with_the_reason(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("acme", "", trainers=["nnUNetTrainerAdam"])
    above, _, refused = output(capsys).partition("\nrefused\n")
    assert "nnU-Net itself has nnUNetTrainerAdam" in refused
    assert "nnUNetTrainerAdam" not in above


def test_broken_plugin_is_listed(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("broken", "syntax error", trainers=["nnUNetTrainerBroken"])
    assert ["nnUNetTrainerBroken", "broken", "1.0"] in [line.split() for line in output(capsys).splitlines()]


def test_json_holds_the_records(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("acme", 'class AcmeNet:\n    """A network."""\n', architectures=["AcmeNet", "Acme-Net"])
    records = json.loads(output(capsys, "--json"))
    assert {record["kind"] for record in records} <= set(registry.KINDS)
    assert {
        "kind": "architectures",
        "name": "AcmeNet",
        "value": "acme:AcmeNet",
        "distribution": "acme 1.0",
        "refused": "",
        "summary": "A network.",
    } in records
    assert [record["refused"] != "" for record in records if record["name"] == "Acme-Net"] == [True]


def test_markdown_has_one_row_for_each_architecture_of_this_package(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("acme", "class AcmeNet: pass", architectures=["AcmeNet"])
    header, line, *rows = output(capsys, "--markdown").splitlines()
    ours = [e.name for e in registry.entries("architectures") if e.distribution.startswith("nnunet-ext ")]
    assert [row.split(" | ")[1] for row in rows] == [f"`{name}`" for name in ours]
    assert {row.count("|") for row in (header, line, *rows)} == {9}


def test_markdown_prints_ratios_and_a_dash_for_what_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (name, *_) = registry.names("architectures")
    numbers = {name: methods.Measured(parameters=0.5, peak=1 / 3)}
    monkeypatch.setattr(methods, "measured", lambda: numbers)
    row = next(row for row in output(capsys, "--markdown").splitlines() if f"`{name}`" in row)
    assert row.split(" | ")[4:] == ["0.50×", "–", "0.33×", "– |"]  # noqa: RUF001
