"""What `make test-versions` promises of its environments, without making one."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from nnunet_ext.doctor.requirements import KNOWN_BAD
from tests.install.lock import METADATA, Target, pins, pythons
from tests.install.versions import table
from tests.install.versions.__main__ import main
from tests.install.versions.environment import CommandError, Environment
from tests.install.versions.matrix import LOWEST, ROWS, STEPS, Row, Step
from tests.install.versions.pythons import output_of, python
from tests.install.versions.run import product, run

INSTALLED = [row for row in ROWS if not row.refused]


def bounds() -> dict[str, Requirement]:
    """Each dependency of pyproject.toml, those of the extras `report` and `onnx` too."""
    text = METADATA.read_text(encoding="utf-8")
    lists = re.findall(r"^(?:dependencies|report|onnx) = (\[.*?\])$", text, re.DOTALL | re.MULTILINE)
    return {r.name.lower(): r for part in lists for r in map(Requirement, ast.literal_eval(part))}


# --- The matrix


def test_lowest_versions_are_the_bounds_of_the_metadata() -> None:
    lowest = pins(Target(python=pythons()[0]), LOWEST)
    bound = {name: next(s.version for s in r.specifier if s.operator == ">=") for name, r in bounds().items()}
    assert lowest.keys() == bound.keys()
    differing = {n: (lowest[n], b) for n, b in bound.items() if lowest[n] != b and not lowest[n].startswith(f"{b}.")}
    assert differing == {}


def test_every_python_both_forms_and_both_ends_of_the_versions_are_there() -> None:
    assert {row.python for row in INSTALLED} == {*pythons()}
    assert {row.form for row in INSTALLED} == {"wheel", "editable"}
    (lowest,) = (row for row in INSTALLED if row.constraints)
    assert (lowest.constraints, lowest.python) == (LOWEST, pythons()[0])
    free = {row.python for row in INSTALLED if not row.pins and not row.constraints}
    assert {pythons()[0], pythons()[-1]} <= free
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", [row for row in ROWS if row.pins], ids=lambda row: row.name)
def test_pins_lie_within_our_bounds_and_refused_are_those_that_the_doctor_warns_of(row: Row) -> None:
    for name, version in ((r.name, next(iter(r.specifier)).version) for r in map(Requirement, row.pins)):
        assert bounds()[name].specifier.contains(version)
        known = any(bad == name and Requirement(name + spec).specifier.contains(version) for bad, spec in KNOWN_BAD)
        assert known == row.refused


def test_pytorch_before_and_after_the_excluded_one_is_tried() -> None:
    tried = {r.specifier for row in INSTALLED for r in map(Requirement, row.pins) if r.name == "torch"}
    versions = [Version(next(iter(specifier)).version) for specifier in tried]
    (bad,) = (spec for name, spec in KNOWN_BAD if name == "torch")
    excluded = Version(bad.removeprefix("==").removesuffix(".*"))
    assert min(versions) < excluded < max(versions)


# --- A row, in an environment that only notes what it is asked for


@dataclass
class Noted:
    """Stands for an environment: commands that it knows fail or say something, all others say nothing."""

    folder: Path
    says: dict[str, str] = field(default_factory=dict)
    fails: set[str] = field(default_factory=set)
    ran: list[str] = field(default_factory=list)
    kept: bool = False
    uv = ""
    log = Path("log.txt")

    def run(self, *command: str, minutes: float) -> str:
        self.ran.append(" ".join(command))
        if command[0] in self.fails:
            raise CommandError(f"status 1\n{command[0]} failed")
        return self.says.get(command[0], "")

    def exists(self) -> bool:
        return self.kept

    def copy(self, row: Row) -> None:
        self.run("copy", minutes=1)

    def create(self, row: Row) -> None:
        self.run("create", minutes=1)

    create_empty = create

    def resolve(self, row: Row) -> None:
        if "resolve" in self.says:
            raise CommandError(self.says["resolve"])

    def versions(self) -> dict[str, str]:
        return {"torch": "2.8.0", "nnunetv2": "2.8.1", "numpy": "2.0.0"}


ROW = Row(name="row", python="3.12", why="reasons", pins=("torch==2.8.0",))
TWO = (Step(name="one", command=("one",)), Step(name="two", command=("two",)))


def call(environment: Noted, steps: Any = TWO, row: Row = ROW, fingerprint: str = "a") -> dict[str, Any]:
    environment.ran.clear()
    return run(row, steps, cast(Environment, environment), fingerprint, lambda text: None)


def statuses(result: dict[str, Any]) -> dict[str, str]:
    return {name: step["status"] for name, step in result["steps"].items()}


def test_second_call_runs_only_what_has_not_passed(tmp_path: Path) -> None:
    environment = Noted(tmp_path / "row", fails={"two"})
    assert statuses(call(environment)) == {"install": "passed", "one": "passed", "two": "failed"}
    environment.fails.clear()
    assert statuses(call(environment)) == {"install": "passed", "one": "passed", "two": "passed"}
    assert environment.ran == ["create", "two"]
    call(environment)
    assert environment.ran == []


def test_environment_that_was_kept_is_used_again_for_the_same_product_alone(tmp_path: Path) -> None:
    environment = Noted(tmp_path / "row", fails={"two"}, kept=True)
    call(environment)
    assert environment.ran == ["create", "one", "two"]
    call(environment)
    assert environment.ran == ["copy", "two"]
    call(environment, fingerprint="b")
    assert environment.ran == ["create", "one", "two"]


def test_step_that_is_new_is_run_and_other_product_or_pins_begin_anew(tmp_path: Path) -> None:
    environment = Noted(tmp_path / "row")
    call(environment, TWO[:1])
    call(environment)
    assert environment.ran == ["create", "two"]
    call(environment, fingerprint="b")
    assert environment.ran == ["create", "one", "two"]
    call(environment, row=Row(name="row", python="3.12", why="others", pins=("torch==2.8.1",)), fingerprint="b")
    assert environment.ran == ["create", "one", "two"]


def test_step_after_a_failed_one_runs_and_nothing_does_without_an_environment(tmp_path: Path) -> None:
    assert statuses(call(Noted(tmp_path / "a", fails={"one"})))["two"] == "passed"
    assert statuses(call(Noted(tmp_path / "b", fails={"create"}))) == {"install": "failed"}


def test_step_that_the_product_does_not_offer_is_left_out(tmp_path: Path) -> None:
    step = Step(name="new", command=("doctor", "--new"), offered=(("help",), "--new"))
    environment = Noted(tmp_path / "row", says={"help": "--old"})
    assert statuses(call(environment, [step]))["new"] == "left out"
    assert environment.ran == ["create", "help"]
    environment.says["help"] = "--old --new"
    assert statuses(call(environment, [step]))["new"] == "passed"


def test_counts_of_pytest_are_kept(tmp_path: Path) -> None:
    environment = Noted(tmp_path / "row", says={"one": "....\n4 passed, 1 skipped in 3.50s\n"})
    assert call(environment)["steps"]["one"]["said"] == "4 passed, 1 skipped"


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (
            "The conflict is caused by:\n    The user requested torch==2.9.1\n    x depends on torch!=2.9.*\n\n",
            "passed",
        ),
        ("The conflict is caused by:\n    The user requested numpy==1\n    x depends on numpy>1\n\n", "failed"),
        ("ERROR: no space left", "failed"),
        (None, "failed"),
    ],
)
def test_row_to_refuse_passes_only_where_pip_names_the_conflict(said: str | None, status: str, tmp_path: Path) -> None:
    row = Row(name="row", python="3.12", why="", pins=("torch==2.9.1",), refused=True)
    environment = Noted(tmp_path / "row", says={} if said is None else {"resolve": said})
    assert statuses(call(environment, row=row)) == {"install": status}


def test_fingerprint_is_that_of_the_files_that_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_nnunet_ext_hook.py", "LICENSE", "pyproject.toml", "nnunet_ext/a.py", "tests/b.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr("tests.install.versions.run.REPOSITORY", tmp_path)
    first = product()
    (tmp_path / "tests" / "b.py").write_text("1")
    assert product() == first
    (tmp_path / "nnunet_ext" / "a.py").write_text("1")
    assert product() != first


# --- Its table


def test_table_shows_versions_counts_failures_and_refusals(tmp_path: Path) -> None:
    environment = Noted(tmp_path / "row", says={"one": "4 passed, 9 deselected in 1.00s"}, fails={"two"})
    refused = Row(name="no", python="3.12", why="", pins=("torch==2.9.1",), refused=True)
    conflict = "The conflict is caused by:\n    The user requested torch==2.9.1\n    x wants none\n"
    results = [call(Noted(tmp_path / "no", says={"resolve": conflict}), row=refused), call(environment)]
    table.write(results, (ROW, refused), TWO, tmp_path / "out")
    text = (tmp_path / "out" / "versions.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith("| row"))
    assert "| 3.12 | 2.8.0 | 2.8.1 | 2.0.0 | wheel | 0 s | 4 passed, 0 s | FAILED |" in line
    assert "two failed" in text
    assert "x wants none" in text
    assert [result["name"] for result in json.loads((tmp_path / "out" / "versions.json").read_text())] == ["row", "no"]


def test_steps_have_names_of_their_own_and_limits() -> None:
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert all(step.minutes <= 60 for step in STEPS)


# --- What environments are made of


def environment_of(folder: Path) -> Environment:
    environment = Environment(folder=folder, base=Path(sys.executable))
    environment.tree.mkdir(parents=True)
    return environment


def test_command_that_fails_or_does_not_end_says_so_and_is_logged(tmp_path: Path) -> None:
    environment = environment_of(tmp_path)
    assert environment.run(sys.executable, "-c", "print('well')", minutes=1) == "well\n"
    with pytest.raises(CommandError, match=r"status 3\nbad"):
        environment.run(sys.executable, "-c", "print('bad'); raise SystemExit(3)", minutes=1)
    with pytest.raises(CommandError, match="none within"):
        environment.run(sys.executable, "-c", "import time; time.sleep(60)", minutes=0.01)
    assert "well" in environment.log.read_text(encoding="utf-8")


def test_commands_do_not_see_the_working_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "here")
    monkeypatch.setenv("nnUNet_raw", "here")
    found = environment_of(tmp_path).run(sys.executable, "-c", "import os; print(sorted(os.environ))", minutes=1)
    assert "PYTHONPATH" not in found
    assert "nnUNet_raw" not in found


@pytest.mark.parametrize("row", INSTALLED, ids=lambda row: row.name)
def test_tests_stand_where_they_find_only_what_is_installed(row: Row, tmp_path: Path) -> None:
    environment = environment_of(tmp_path)
    environment.copy(row)
    assert (environment.tree / "tests" / "conftest.py").is_file()
    assert not (environment.tree / "nnunet_ext").exists()
    assert (environment.source / "nnunet_ext" / "registry.py").is_file() == (row.form == "editable")


def test_all_but_the_log_is_deleted(tmp_path: Path) -> None:
    environment = environment_of(tmp_path)
    environment.run(sys.executable, "-c", "", minutes=1)
    (tmp_path / "environment").mkdir()
    environment.delete()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt"]


def test_this_python_is_found_by_its_version() -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = python(version) or Path(sys.executable)
    assert output_of(str(found), "-c", "import sys; print(sys.version_info[1])") == version.partition(".")[2]
    assert python("3.99") is None


def test_python_on_the_path_that_refuses_to_run_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shim = tmp_path / "python3.98"
    shim.write_text("#!/bin/sh\nexit 127\n", encoding="utf-8")
    shim.chmod(0o755)
    kept = tmp_path / "root" / "versions" / "3.98.1" / "bin" / "python"
    kept.parent.mkdir(parents=True)
    kept.write_text("#!/bin/sh\necho 3.98\n", encoding="utf-8")
    kept.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "root"))
    assert python("3.98") == kept


# --- The command


@pytest.mark.parametrize(("options", "left"), [([], False), (["--keep"], True)])
def test_environments_are_deleted_unless_kept(
    options: list[str], left: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def install(environment: Environment, row: Row) -> None:
        environment.python.parent.mkdir(parents=True)
        environment.python.touch()

    monkeypatch.setattr(Environment, "create", install)
    monkeypatch.setattr(Environment, "versions", lambda self: {"torch": "2.8.0", "nnunetv2": "2.8.1", "numpy": "2"})
    monkeypatch.setattr(Environment, "run", lambda self, *command, minutes: "")
    monkeypatch.setattr("tests.install.versions.__main__.python", lambda version: Path(sys.executable))
    asked = ["--only", INSTALLED[0].name, "--work", str(tmp_path), "--steps", "pip check", *options]
    assert main(asked) == 0
    assert (tmp_path / INSTALLED[0].name / "environment").exists() == left
    assert "passed" in (tmp_path / "versions.json").read_text(encoding="utf-8")


def test_missing_python_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.install.versions.__main__.python", lambda version: None)
    assert main(["--only", INSTALLED[0].name, "--work", str(tmp_path)]) == 1
