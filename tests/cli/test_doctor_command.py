"""``nnunet-ext doctor``: what it prints, and its exit status."""

from __future__ import annotations

import json

import pytest

from nnunet_ext import cli, doctor
from nnunet_ext.doctor import gradients
from nnunet_ext.doctor.finding import Finding, failure, ok, warning

GOOD, DOUBTFUL, BAD = (
    ok("a", "is there"),
    warning("bb", "isn't set", "set it"),
    failure("c", "is broken", "repair it"),
)


def run(
    findings: list[Finding], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    status = cli.main(["doctor", *arguments])
    return status, capsys.readouterr().out


@pytest.mark.parametrize(
    ("findings", "status"), [([GOOD], 0), ([GOOD, DOUBTFUL], 0), ([BAD], 1), ([BAD, DOUBTFUL, GOOD], 1)]
)
def test_status_is_1_only_where_something_fails(
    findings: list[Finding], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(findings, monkeypatch, capsys)[0] == status
    assert run(findings, monkeypatch, capsys, "--json")[0] == status


def test_text_has_a_line_for_each_finding_and_each_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([GOOD, DOUBTFUL, BAD], monkeypatch, capsys)[1].splitlines() == [
        "ok       a   is there",
        "warning  bb  isn't set",
        "             -> set it",
        "FAILURE  c   is broken",
        "             -> repair it",
        "",
        "failures: 1, warnings: 1",
    ]


def test_json_holds_the_records(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(run([DOUBTFUL], monkeypatch, capsys, "--json")[1]) == [
        {"level": "warning", "subject": "bb", "detail": "isn't set", "cure": "set it"}
    ]


@pytest.mark.parametrize(
    ("findings", "lines"),
    [
        ([GOOD, DOUBTFUL], []),
        ([GOOD, DOUBTFUL, BAD], ["FAILURE  c  is broken", "            -> repair it", "", "failures: 1, warnings: 0"]),
    ],
)
def test_quiet_prints_failures_only(
    findings: list[Finding], lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed = run(findings, monkeypatch, capsys, "--quiet")
    assert printed.splitlines() == lines
    assert status == int(bool(lines))
    assert len(json.loads(run(findings, monkeypatch, capsys, "--quiet", "--json")[1])) == int(bool(lines))


@pytest.mark.parametrize(("arguments", "backend"), [([], "aot_eager"), (["inductor"], "inductor")])
def test_gradients_are_compared_instead_and_asked_for_by_backend(
    arguments: list[str], backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(gradients, "examine", lambda given: asked.append(given) or [GOOD, BAD])
    status, printed = run([], monkeypatch, capsys, "--gradients", *arguments, "--quiet", "--json")
    assert asked == [backend]
    assert status == 1
    assert [record["subject"] for record in json.loads(printed)] == ["c"]


def test_gradients_and_a_dataset_are_refused_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--gradients", "--dataset", "4"]) == 2
    assert "call the doctor twice" in capsys.readouterr().err
