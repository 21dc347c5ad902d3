"""The lock holds what the metadata asks for, and an audit that could ask nobody does not pass."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nnunet_ext.installation import DISTRIBUTION
from tests.install import audit
from tests.install.lock import METADATA, REPOSITORY, SYSTEMS, Target, pins, pythons

TARGETS = [Target(python=python, system=system) for python in pythons() for system in SYSTEMS]
HERE = Target(python=".".join(map(str, sys.version_info[:2])))


def asked_for() -> list[Requirement]:
    """What the metadata and its extras ask for, but for the package itself."""
    text = METADATA.read_text(encoding="utf-8")
    lists = re.findall(r"^dependencies = (\[.*?\n\])$", text, re.MULTILINE | re.DOTALL)
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    lists += re.findall(r"^\w+ = (\[.*\])$", extras, re.MULTILINE)
    found = [Requirement(line) for part in lists for line in ast.literal_eval(part)]
    return [requirement for requirement in found if requirement.name != DISTRIBUTION]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.python}-{target.system}")
def test_lock_holds_all_that_the_extras_ask_for_within_their_bounds(target: Target) -> None:
    locked = pins(target)
    asked = {canonicalize_name(requirement.name): requirement for requirement in asked_for()}
    assert {"torch", "nnunetv2", "onnx", "openvino", "submitit", "pytest", "mypy", "pip-audit"} <= asked.keys()
    assert asked.keys() - locked.keys() == set()
    outside = [f"{name} {locked[name]}" for name, r in asked.items() if not r.specifier.contains(locked[name])]
    assert outside == []


def test_lock_holds_what_these_packages_ask_for_in_turn() -> None:
    """Of what is installed here, as far as it is the version of the lock."""
    locked, seen = pins(HERE), set()
    names = [(canonicalize_name(requirement.name), requirement.extras) for requirement in asked_for()]
    while names:
        name, extras = names.pop()
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        if name in seen or found.version.partition("+")[0] != locked.get(name):
            continue
        seen.add(name)
        for requirement in map(Requirement, found.requires or []):
            if any(HERE.takes(requirement, extra) for extra in ("", *extras)):
                names.append((canonicalize_name(requirement.name), requirement.extras))
                assert names[-1][0] in {*locked, "pip"}, f"{name} asks for {requirement}"
    if "nnunetv2" not in seen:
        pytest.skip("other versions than those of the lock are installed")


def test_make_installs_the_versions_of_the_lock() -> None:
    rule = re.search(
        r"^\$\(VENV\)/\.installed: (.*)\n((?:\t.*\n)+)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE
    )
    assert rule is not None
    assert "tests/lock.txt" in rule[1].split()
    assert re.search(r"pip install .*-e .* -c tests/lock\.txt", rule[2])


@pytest.mark.parametrize(
    ("text", "message"),
    [("torch>=2.5\n", "NAME==VERSION"), ("torch==2.5.*\n", "NAME==VERSION"), ("a==1\na==2\n", "two versions of a")],
)
def test_line_that_leaves_a_choice_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "lock.txt").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        pins(Target(python="3.11"), tmp_path / "lock.txt")


# --- The audit. Answers have the form of pip-audit's JSON.

WANTED = {"a": "1.0", "b": "2.0"}


def answer(**holes: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Give JSON with the holes of each package; None for one that the service does not know."""
    return {
        "dependencies": [
            {"name": name, "skip_reason": "not found on PyPI"}
            if found is None
            else {"name": name, "version": WANTED[name], "vulns": found}
            for name, found in holes.items()
        ]
    }


@pytest.mark.parametrize("silent", [answer(a=None, b=None), {"dependencies": []}, answer(a=[])])
def test_audit_that_could_not_ask_about_a_package_does_not_pass_and_says_so(silent: dict[str, Any]) -> None:
    found = audit.read([(WANTED, silent)])
    assert found.status == 2
    assert "NOT AUDITED" in "\n".join(found.lines())
    assert "b 2.0" in found.unknown


def test_audit_names_the_finding_and_the_version_that_mends_it() -> None:
    hole = {"id": "CVE-1", "fix_versions": ["1.1"], "aliases": [], "description": ""}
    found = audit.read([(WANTED, answer(a=[hole], b=[]))])
    assert found.status == 1
    assert "a 1.0: CVE-1 (mended in 1.1)" in found.lines()


def test_audit_passes_where_all_were_asked_about_and_nothing_is_known() -> None:
    found = audit.read([(WANTED, answer(a=[], b=[])), ({"a": "1.0"}, answer(a=[]))])
    assert (found.status, found.lines()) == (0, ["2 of 2 packages audited, 0 with findings"])
