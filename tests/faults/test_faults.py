"""A few faults of each class; `make test-faults` injects hundreds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.outcome import KINDS, Outcome, write

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks at processes in /proc")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the short suite came to."""
    output = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-m", "tests.faults", "--short", "--seed", "0", "--output", str(output)]
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert (output / "faults.json").is_file(), done.stdout + done.stderr
    found: dict[str, Any] = json.loads((output / "faults.json").read_text(encoding="utf-8"))["classes"]
    return found


def test_every_class_injects_faults(classes: dict[str, Any]) -> None:
    assert len(classes) >= 5
    assert all(sum(found["injected"].values()) for found in classes.values())


@pytest.mark.parametrize("kind", KINDS)
def test_no_fault_ends_otherwise_than_it_must(kind: str, classes: dict[str, Any]) -> None:
    assert {name: found["problems"][kind] for name, found in classes.items() if found["problems"][kind]} == {}


def test_report_counts_and_names_each_problem(tmp_path: Path) -> None:
    outcome = Outcome()
    outcome.injected["cut off"] += 3
    outcome.problem("hung", "cut off at byte 7")
    text = write({"some class": outcome, "another": Outcome()}, tmp_path, {"seed": 5})
    assert "| some class | 3 | 0 | 0 | 0 | 0 | 1 | 0 | 0 | 0 |" in text
    assert "| some class | hung | cut off at byte 7 |" in text
    assert json.loads((tmp_path / "faults.json").read_text())["classes"]["some class"]["problems"]["hung"]
    assert not outcome.is_clean
    assert Outcome().is_clean
