"""Findings of the comparison: versions, wrong gradients and their cures, processes that end."""

from __future__ import annotations

import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from nnunet_ext import doctor
from nnunet_ext.doctor import gradients, requirements
from nnunet_ext.doctor.finding import Finding, ok
from nnunet_ext.doctor.gradients import probe, tiny
from nnunet_ext.doctor.gradients.compare import Difference
from nnunet_ext.doctor.gradients.gate import Gate, Measured
from nnunet_ext.doctor.gradients.planted import Planted
from nnunet_ext.doctor.gradients.step import Source
from nnunet_ext.doctor.gradients.subjects import Subject
from nnunet_ext.errors import UsageError


def measured(value: float, backend: str | None = None) -> Measured:
    difference = Difference(name="encoder.weight", value=value, limit=1e-9)
    return Measured(case="ordinary", precision="float64", backend=backend, difference=difference)


@pytest.fixture
def recomputing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "recomputes", lambda step: True)


def compared(monkeypatch: pytest.MonkeyPatch, eager: float, compiled: float) -> Finding | None:
    monkeypatch.setattr(Gate, "eager", lambda *_: iter([measured(0.0), measured(eager)]))
    monkeypatch.setattr(Gate, "compiled", lambda *_: iter([measured(compiled, "aot_eager")]))
    compilation = probe.Compilation(backend="aot_eager", only=frozenset({"new"}), with_autocast=True)
    return probe._compared("nnUNetTrainer", "2d", "cpu", compilation)


@pytest.mark.usefixtures("recomputing")
def test_wrong_gradient_is_named_with_what_it_is_off_by(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(monkeypatch, 0.5, 0.0)
    assert found is not None
    assert (found.level, found.subject) == ("failure", "nnUNetTrainer 2d")
    assert found.detail == "gradient of encoder.weight is off by 5.0e-01, allowed 1e-09 (ordinary, float64)"
    assert "nnUNet_compile" not in found.cure


@pytest.mark.usefixtures("recomputing")
def test_gradient_that_is_wrong_only_when_compiled_is_cured_without_compilation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = compared(monkeypatch, 0.0, 0.5)
    assert found is not None
    assert found.level == "failure"
    assert found.detail.endswith("(ordinary, float64, compiled by aot_eager)")
    assert found.cure.startswith("export nnUNet_compile=f")


@pytest.mark.usefixtures("recomputing")
def test_right_gradients_are_said_with_the_largest_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(monkeypatch, 2e-15, 1e-15)
    assert found == ok("nnUNetTrainer 2d", "2e-15 in float64; compiled by aot_eager too")


def test_step_of_plain_autograd_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compared(monkeypatch, 0.5, 0.5) is None


@pytest.mark.parametrize(
    ("asked", "bad", "level", "words"),
    [
        ("", "", "ok", "on the CPU"),
        ("torch!=2.9.*", "is slow", "warning", "excluded by nnU-Net, which asks for torch!=2.9.*; is slow"),
        ("torch!=2.9.*", "", "warning", "which asks for torch!=2.9.*"),
        ("", "is slow", "warning", "is slow"),
    ],
)
def test_version_that_nnunet_excludes_or_that_is_bad_is_a_warning_with_the_command(
    asked: str, bad: str, level: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "refused_by", lambda *_: asked)
    monkeypatch.setattr(requirements, "known_bad", lambda *_: bad)
    found = probe._pytorch("cpu")
    assert found.level == level
    assert found.detail.endswith(words)
    assert found.cure.startswith("pip install" if level == "warning" else "")


def test_excluded_version_is_told_by_the_line_that_excludes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Metadata:
        requires = ("torch!=2.9.*,>=2.1.2", "numpy>=1.24", 'torch<2 ; extra == "old"')

    monkeypatch.setattr(requirements, "distribution", lambda name: Metadata())
    for version, line in (("2.9.1+cu128", Metadata.requires[0]), ("2.8.0", ""), ("2.14.1", "")):
        monkeypatch.setattr(requirements, "version", lambda name, found=version: found)
        found = requirements.refused_by("nnunetv2", "torch")
        assert (found == "") == (line == "")
        assert not line or "!=2.9.*" in found


def test_process_that_ends_is_a_failure_and_error_a_row() -> None:
    jobs: list[tuple[str, Future[Finding | None]]] = [(name, Future()) for name in ("a", "b", "c", "d")]
    jobs[0][1].set_result(ok("a", "right"))
    jobs[1][1].set_exception(ValueError("no kernel"))
    jobs[2][1].set_result(None)
    jobs[3][1].set_exception(BrokenProcessPool())
    first, second, third = probe._results(jobs)
    assert first.level == "ok"
    assert (second.level, second.detail) == ("failure", "can't be compared: ValueError: no kernel")
    assert (third.level, third.subject) == ("failure", "d")


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(UsageError, match="one of aot_eager, inductor, got eager"):
        gradients.examine("eager")


def test_what_was_found_before_the_process_ended_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = '{"level": "ok", "subject": "torch", "detail": "2.14.1", "cure": ""}'
    script = f"import os, sys; open(sys.argv[1], 'w').write({line!r} + chr(10)); os._exit(3)"
    monkeypatch.setattr(gradients, "_PROBE", script)
    monkeypatch.setattr(doctor, "interpreter", lambda script: ([sys.executable], ok("command", "")))
    _, kept, died = gradients.examine()
    assert kept == ok("torch", "2.14.1")
    assert (died.level, "status 3" in died.detail) == ("failure", True)


@pytest.mark.slow
def test_whole_comparison_finds_nothing_here() -> None:
    found = gradients.examine()
    assert [finding for finding in found if finding.level == "failure"] == []
    assert len(found) > 10


def test_each_kind_is_compiled_once_and_under_autocast_each_set_of_classes() -> None:
    def subject(configuration: str, *kinds: str) -> Subject:
        source = Source(build=lambda _: Planted(None), form=lambda network: network, shape=(1,))
        empty: frozenset[str] = frozenset()
        return Subject(trainer="X", configuration=configuration, source=source, parts=empty, kinds=frozenset(kinds))

    plan = probe._Plan()
    found = [
        plan.of(subject(*given), "aot_eager")
        for given in (
            (tiny.VOLUME, "A; x"),
            (tiny.VOLUME, "A; x", "A; y"),
            (tiny.VOLUME, "A; y", "B; "),
            (tiny.VOLUME, "A; y", "B; "),
            (tiny.PLANE, "C; "),
            (tiny.CASCADE, "A; z", "C; "),
        )
    ]
    assert [set(entry.only) for entry in found] == [{"A; x"}, {"A; y"}, {"B; "}, set(), set(), {"C; "}]
    assert [entry.with_autocast for entry in found if entry.only] == [True, False, True, True]
