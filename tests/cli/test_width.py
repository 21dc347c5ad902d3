"""Everything on a terminal of 80 columns: no line is wider, no word or name is broken."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator

import pytest

from nnunet_ext import cli, registry
from nnunet_ext.cli.terminal import print_table
from tests.conftest import Install

COMMANDS = ("", *cli.COMMANDS)


@pytest.fixture(autouse=True)
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        cli.main([*filter(None, [command]), "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def too_wide(text: str, most: int = 80) -> list[str]:
    return [line for line in text.split("\n") if len(line) > most]


def texts(command: str) -> Iterator[str]:
    """What a command says of itself and of its options."""
    if not command:
        yield from cli.COMMANDS.values()
        return
    module = importlib.import_module(f"nnunet_ext.cli.{command.replace('-', '_')}")
    parser = argparse.ArgumentParser(prog=f"nnunet-ext {command}")
    module.add_arguments(parser)
    yield module.__doc__ or ""
    for action in parser._actions:
        yield (action.help or "") % {**vars(action), "prog": parser.prog}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert too_wide(help_of(command, capsys)) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_keeps_words_whole(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = set(help_of(command, capsys).split())
    assert [word for text in texts(command) for word in text.split() if word not in shown] == []


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_examples_are_whole_lines_of_a_shell(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(command, capsys).replace(" \\\n   ", "")
    said = importlib.import_module(f"nnunet_ext.cli.{command.replace('-', '_')}").__doc__ or ""
    examples = said[said.rindex("example") :].partition(":")[2].strip().split("\n")
    assert [line for line in map(str.strip, examples) if f"  {line}\n" not in shown] == []


def test_list_fits_and_keeps_names_whole(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("acme", 'class nnUNetTrainerAcme:\n    """' + "Trains Acme. " * 9 + '"""\n', trainers=["nnUNetTrainerAcme"])
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    assert too_wide(text) == []
    assert {name for kind in registry.KINDS for name in registry.names(kind)} <= set(text.split())


def test_list_uses_a_wider_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    assert too_wide(text)
    assert too_wide(text, 200) == []


@pytest.mark.parametrize("names", [registry.names("trainers"), ["nnUNetTrainer"], [f"a__b__{'c' * 90}"]])
def test_table_fits_and_keeps_names_and_figures_whole(names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    header = ["trainer", *(f"float{n}\nexpected\n[GB]" for n in range(9))]
    figures = [f"{n}.25 (1.25x)\n1.0-1.5" for n in range(9)]
    print_table("Memory", header, [[name, *figures] for name in names])
    text = capsys.readouterr().out
    for number in range(9):  # each figure once per name, never on two lines
        assert text.count(f"{number}.25 (1.25x)") == len(names)
        assert text.count(f"float{number}") == 1
    assert set(names) <= set(text.split())
    longest = max(len(name) for name in names) + 14
    assert too_wide(text, max(80, longest)) == []


def test_table_that_fits_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("Memory", ["trainer", "held", "peak"], [["a", "1", "2"]])
    assert capsys.readouterr().out.count("trainer") == 1
