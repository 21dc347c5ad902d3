"""``nnunet-ext list``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from nnunet_ext import cli, registry
from nnunet_ext.cli.list import SCHEDULES

if TYPE_CHECKING:
    from tests.conftest import Install


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["list", *arguments]) == 0
    return capsys.readouterr().out


def test_text_holds_every_registered_name(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("acme", 'class nnUNetTrainerAcme:\n    """Trains Acme."""\n', trainers=["nnUNetTrainerAcme"])
    lines = output(capsys).splitlines()
    for kind in registry.KINDS:
        for name in registry.names(kind):
            assert [line for line in lines if line.split()[:1] == [name]], name
    assert [line.split() for line in lines if "nnUNetTrainerAcme" in line] == [
        ["nnUNetTrainerAcme", "acme", "1.0", "Trains", "Acme."]
    ]


def test_escapes_of_others_do_not_reach_the_terminal(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("acme", 'class AcmeNet:\n    """A \x1b[2Jnet\u202e\x9b."""\n', architectures=["AcmeNet", "X\x1b[2J"])
    for arguments in ([], ["--json"]):
        assert all(line.isprintable() for line in output(capsys, *arguments).split("\n"))
    assert "A \\x1b[2Jnet\\u202e\\x9b." in output(capsys)


def test_text_explains_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    assert "[_<N>epochs][_<M>iters][_NoMirroring]" in output(capsys)


def test_example_of_a_schedule_is_one() -> None:
    example = SCHEDULES.partition("-tr ")[2].partition(":")[0]
    assert registry.parse_schedule(example) is not None


def test_refused_names_are_listed_with_the_reason(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
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
