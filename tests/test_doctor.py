"""What the doctor finds in whole and in broken environments, and the cures that it names."""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

import _nnunet_ext_hook as hook
from nnunet_ext import doctor, installation, registry
from nnunet_ext.doctor import environment, gpu, owners, probe, requirements
from nnunet_ext.doctor.finding import Finding, failure, ok
from tests.conftest import write_distribution

if TYPE_CHECKING:
    from tests.conftest import Install, RunPython

ACME = """
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
class nnUNetTrainerAcme(nnUNetTrainer): pass
class AcmePlanner(ExperimentPlanner): pass
class AcmeNet(nn.Module): pass
"""
ACME_NAMES = {"trainers": ["nnUNetTrainerAcme"], "planners": ["AcmePlanner"], "architectures": ["AcmeNet"]}


def about(findings: list[Finding], subject: str) -> Finding:
    found = [finding for finding in findings if finding.subject == subject]
    assert len(found) == 1, [finding.subject for finding in findings]
    return found[0]


def failures(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "failure"]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.FOLDERS:
        monkeypatch.setenv(name, str(tmp_path))


@pytest.fixture
def own_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """No nnU-Net command on PATH: the doctor takes this Python."""
    monkeypatch.setattr(doctor, "COMMAND", "no_such_command")


# --- The whole examination, in a fresh process


BROKEN = {  # what is broken -> words of the row and of its cure
    "trainer nnUNetTrainerBroken": ("no_such_module", "repair or uninstall broken 1.0"),
    "planner BrokenPlanner": ("no_such_module", "repair or uninstall broken 1.0"),
    "trainer nnUNetTrainerWrong": ("must inherit from 'nnUNetTrainer'", "repair or uninstall wrong 1.0"),
    "trainer nnUNetTrainerAdam": ("nnU-Net itself has nnUNetTrainerAdam", "comes from shadow 1.0"),
    "architecture ExitNet": ("SystemExit", "repair or uninstall exits 1.0"),
    "architecture InterruptNet": ("KeyboardInterrupt", "repair or uninstall interrupts 1.0"),
    "trainer nnUNetTrainerVictim": ("no_helper_here", "repair or uninstall helper 1.0"),
    "shadow": ("yacs of yacs", "rename or uninstall thief 1.0"),
    "metadata": ("latin-1.0.dist-info can't be read", "repair or uninstall that distribution"),
    "collision": ("rival 1.0 installs our modules", "uninstall it, then pip install"),
}


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], list[Finding]]:
    """Registered names, and what the doctor finds where a whole distribution and `BROKEN` are installed."""
    site = tmp_path_factory.mktemp("site")
    install = partial(write_distribution, site)
    install("acme", ACME, **ACME_NAMES)
    install("broken", "import no_such_module", trainers=["nnUNetTrainerBroken"], planners=["BrokenPlanner"])
    install("wrong", "class nnUNetTrainerWrong: pass", trainers=["nnUNetTrainerWrong"])
    install("shadow", "class nnUNetTrainerAdam: pass", trainers=["nnUNetTrainerAdam"])
    install("exits", "import sys; sys.exit(0)", architectures=["ExitNet"])
    install("interrupts", "raise KeyboardInterrupt", architectures=["InterruptNet"])
    install("victim", "from helper import nothing", trainers=["nnUNetTrainerVictim"])
    (install("helper", "import no_helper_here") / "RECORD").write_text("helper.py,,\n", encoding="utf-8")
    thief = install("thief", "")
    (thief / "RECORD").write_text("yacs/__init__.py,,\n", encoding="utf-8")
    (site / "yacs").mkdir()
    (site / "yacs" / "__init__.py").touch()
    (install("latin", "") / "METADATA").write_bytes("Name: latin\nAuthor: M\xfcller\n".encode("latin-1"))
    info = install("rival", "")
    (info / "RECORD").write_text("rival.py,,\nnnunet_ext/__init__.py,,\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        patch.setattr(doctor, "COMMAND", "no_such_command")
        for name in environment.FOLDERS:
            patch.setenv(name, str(site))
        names = {f"{kind[:-1]} {name}" for kind in registry.KINDS for name in registry.names(kind)}
        return names, doctor.examine()


def test_whole_names_are_found(examined: tuple[set[str], list[Finding]]) -> None:
    names, findings = examined
    for name in names - set(BROKEN):
        assert "found as" in about(findings, name).detail
    assert about(findings, "trainer nnUNetTrainerAcme") == ok(
        "trainer nnUNetTrainerAcme", "found as acme.nnUNetTrainerAcme"
    )
    for subject in ("schedule", "spawned process"):
        assert about(findings, subject).detail.split(":")[0].endswith(probe.SCHEDULE)
    for name in ("python", "nnunet-ext", *requirements.REPORTED, *environment.FOLDERS):
        assert about(findings, name).level == "ok"
    assert str(hook.__file__) in about(findings, "hook").detail


def test_everything_broken_is_a_row_with_a_cure_and_nothing_else_is(examined: tuple[set[str], list[Finding]]) -> None:
    _, findings = examined
    for subject, (detail, cure) in BROKEN.items():
        found = about(findings, subject)
        assert found.level == "failure"
        assert detail in found.detail
        assert cure in found.cure
    assert {finding.subject for finding in failures(findings)} == set(BROKEN)
    for finding in findings:
        assert "\n" not in finding.detail + finding.cure
        assert bool(finding.cure) == (finding.level != "ok")


def test_class_that_ended_an_earlier_process_is_said_and_not_looked_up_again(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("quits", "import os; os._exit(0)", planners=["QuitPlanner"])
    asked, noted = tmp_path / "asked", {}

    def look_up(kind: str, name: str) -> probe.Looked:
        noted[name] = asked.read_text(encoding="utf-8") if asked.exists() else ""
        return probe.Looked(True, "found")

    monkeypatch.setattr(probe, "look_up", look_up)
    monkeypatch.setattr(probe, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    findings = list(probe.lookups(asked, {"planner QuitPlanner": "ends the process, status 0"}))
    (found,) = failures(findings)
    assert (found.subject, found.detail) == ("planner QuitPlanner", "importing it ends the process, status 0")
    assert found.cure == "repair or uninstall quits 1.0"
    assert "QuitPlanner" not in noted
    assert noted["ReversibleUNetPlanner"] == "planner ReversibleUNetPlanner"


def test_spawned_process_starts_before_the_names_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Pool(ThreadPoolExecutor):
        def submit(self, *_: object, **__: object) -> Future[probe.Looked]:  # type: ignore[override]
            done.append("spawned")
            return super().submit(lambda: probe.Looked(True, "found"))

    def look_up(kind: str, name: str) -> probe.Looked:
        done.append(name)
        return probe.Looked(True, "found")

    monkeypatch.setattr(probe, "look_up", look_up)
    monkeypatch.setattr(probe, "ProcessPoolExecutor", lambda *_, **__: Pool(1))
    list(probe.lookups(tmp_path / "asked", {}))
    assert done[0] == "spawned"  # both import nnU-Net, for seconds
    assert len(done) > 2


@pytest.mark.slow
@pytest.mark.usefixtures("own_interpreter")
def test_switched_off_autoload_is_a_failure_with_the_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.AUTOLOAD, "0")
    for name in environment.FOLDERS:
        monkeypatch.delenv(name, raising=False)
    findings = doctor.examine()
    found = about(findings, "hook")
    assert found.level == "failure"
    assert "nnunet-ext run nnUNetv2_train" in found.cure
    assert about(findings, "spawned process").level == "failure"
    assert about(findings, "schedule").cure == "repair the hook first, see there"
    for name in environment.FOLDERS:
        assert about(findings, name).level == "warning"
        assert f"export {name}=" in about(findings, name).cure


@pytest.mark.usefixtures("own_interpreter")
def test_torch_that_can_not_be_imported_is_a_row(site: Path) -> None:
    (site / "torch.py").write_text("raise ImportError('libcuda is missing')", encoding="utf-8")
    found = about(doctor.examine()[-1:], "torch")
    assert "libcuda is missing" in found.detail
    assert "repair torch" in found.cure


def test_python_that_has_no_nnunet_ext_is_a_failure_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "nnUNetv2_train"
    script.write_text(f"#!{sys.executable} -IS\n", encoding="utf-8")  # without site-packages
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    command, missing = doctor.examine()
    assert command.level == "ok"
    assert (missing.subject, missing.level) == ("nnunet-ext", "failure")
    assert missing.cure == f"{sys.executable} -m pip install {installation.origin()}"


# --- The interpreter


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("#!/env/bin/python\nimport sys", ["/env/bin/python"]),
        ("#!/env/bin/python3.11\n", ["/env/bin/python3.11"]),
        ("#!/env/bin/python -sE\n", ["/env/bin/python", "-sE"]),
        ("#! /usr/bin/env python3\n", ["python3"]),
        ('#!"/with space/python"\n', ["/with space/python"]),
        ("#!/bin/sh\n'''exec' \"/with space/python\" \"$0\" \"$@\"\n' '''\n", ["/with space/python"]),
        ("#!/bin/sh\n'''exec' /very/long/python3 \"$0\" \"$@\"\n' '''\n", ["/very/long/python3"]),
        ("#!/bin/sh\n'''exec' '/quoted/python3' \"$0\" \"$@\"\n' '''\n", ["/quoted/python3"]),
        ("#!/usr/bin/env bash\nexec pyenv exec\n", []),
        ("#!/bin/sh\nexec python\n", []),
        ("#!/bin/'unbalanced\n", []),
        ("import sys\n", []),
        ("MZ\x90\x00\x03", []),
        ("", []),
    ],
)
def test_shebang_is_read(text: str, command: list[str], tmp_path: Path) -> None:
    script = tmp_path / "nnUNetv2_train"
    script.write_bytes(text.encode("latin-1"))
    assert doctor.shebang(str(script)) == command


def test_command_that_is_not_on_path_is_a_warning() -> None:
    python, finding = doctor.interpreter(None)
    assert python == [sys.executable]
    assert finding.level == "warning"
    assert sys.executable in finding.detail


def test_script_that_says_no_python_is_said(tmp_path: Path) -> None:
    (tmp_path / "nnUNetv2_train.exe").write_bytes(b"MZ")
    python, finding = doctor.interpreter(str(tmp_path / "nnUNetv2_train.exe"))
    assert python == [sys.executable]
    assert f"checked {sys.executable}" in finding.detail


def test_python_that_is_gone_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "nnUNetv2_train"
    script.write_text("#!/no/such/python\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (finding,) = doctor.examine()
    assert finding.level == "failure"
    assert "/no/such/python, which doesn't exist" in finding.detail


@pytest.mark.parametrize(
    ("code", "detail"), [("import os; os.abort()", "ended with status"), ("import no_such_module", "no_such_module")]
)
def test_process_that_dies_is_a_row(code: str, detail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE", code)
    monkeypatch.setattr(doctor, "COMMAND", "no_such_command")
    (_, died) = doctor.examine()
    assert (died.subject, died.level) == ("checks", "failure")
    assert detail in died.detail


def test_process_that_hangs_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "COMMAND", "no_such_command")
    monkeypatch.setattr(doctor, "TIMEOUT", 0.5)
    assert "timed out after 0.5 seconds" in doctor.examine()[1].detail


@pytest.mark.parametrize(
    ("end", "fate"), [("time.sleep(60)", "takes longer than 5 s"), ("os._exit(0)", "ends the process, status 0")]
)
def test_class_whose_import_hangs_or_ends_the_process_is_left_out_and_named(
    end: str, fate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"""
import json, os, pathlib, sys, time
result, asked, fatal = *map(pathlib.Path, sys.argv[1:3]), json.loads(sys.argv[3])
asked.write_text("trainer Bad")
if not fatal:
    {end}
result.write_text(json.dumps([{{"level": "failure", "subject": "x", "detail": json.dumps(fatal), "cure": ""}}]))
"""
    monkeypatch.setattr(doctor, "_PROBE", code)
    monkeypatch.setattr(doctor, "COMMAND", "no_such_command")
    monkeypatch.setattr(doctor, "TIMEOUT", 5.0)
    assert doctor.examine()[1].detail == f'{{"trainer Bad": "{fate}"}}'


def test_check_that_fails_is_a_row_after_what_it_found() -> None:
    def check() -> Iterator[Finding]:
        yield ok("one", "fine")
        raise ValueError("broken")

    assert [finding.detail for finding in probe.guarded("folders", check)] == [
        "fine",
        "can't be checked: ValueError: broken",
    ]


# --- Single checks


@pytest.mark.parametrize(
    ("version", "requirement", "satisfied"),
    [
        ("2.7", "nnunetv2<3,>=2.7", True),
        ("2.7.0", "nnunetv2<3,>=2.7", True),
        ("2.10.1", "nnunetv2<3,>=2.7", True),
        ("2.7", "nnunetv2>=2.7.0", True),
        ("2.6.2", "nnunetv2<3,>=2.7", False),
        ("3.0", "nnunetv2<3,>=2.7", False),
        ("3.0.0", "nnunetv2<3,>=2.7", False),
        ("2.5.0", "torch>=2.5", True),
        ("2.5.1+cu121", "torch>=2.5", True),
        ("2.5.0a0+e000abc", "torch>=2.5", True),
        ("2.4.1", "torch>=2.5", False),
        ("2.8.0", "nnunetv2>=2.7,!=2.8.0", False),
        ("0.4.0", "dynamic-network-architectures<0.5,>=0.4.1", False),
        ("1.0", "anything", True),
    ],
)
def test_versions_are_compared_by_their_bounds(version: str, requirement: str, satisfied: bool) -> None:
    assert requirements.satisfies(version, requirement) is satisfied


def test_old_version_and_missing_distribution_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "dynamic-network-architectures":
            raise PackageNotFoundError(name)
        return {"torch": "2.4.1"}.get(name, "2.8")

    monkeypatch.setattr(requirements, "version", version)
    findings = list(requirements.versions())
    assert about(findings, "torch").cure.startswith('pip install "torch>=2.5')
    assert about(findings, "dynamic-network-architectures").detail == "isn't installed"
    assert {finding.subject for finding in failures(findings)} == {"torch", "dynamic-network-architectures"}


@pytest.mark.parametrize(("version", "level"), [("2.8.0", "ok"), ("2.9.1+cu128", "warning"), ("2.10.0", "ok")])
def test_torch_that_is_known_to_be_slow_is_a_warning(version: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "version", lambda name: {"torch": version}.get(name, "2.8"))
    found = about(list(requirements.versions()), "torch")
    assert found.level == level
    assert ("four times slower" in found.detail) == (level == "warning")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("acme_base!=1.0", "acme 1.0 asks for acme_base!=1.0, but acme-base 1.0 is installed"),
        ("acme-base>=2; python_version > '3'", "acme 1.0 asks for acme-base>=2, but acme-base 1.0 is installed"),
        ("no-such-thing", "acme 1.0 asks for no-such-thing, which isn't installed"),
        ("acme-base>=1", None),
        ("acme-base>=2; python_version < '3'", None),
        ("acme-base>=2; extra == 'more'", None),
        ("not a requirement", None),
    ],
)
def test_version_that_a_distribution_excludes_is_a_warning_that_names_both(
    line: str, found: str | None, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = install("acme", "")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme\nVersion: 1.0\nRequires-Dist: {line}\n", "utf-8")
    base = install("acme_base", "")
    (base / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-base\nVersion: 1.0\n", encoding="utf-8")
    monkeypatch.setattr(requirements, "REPORTED", ("acme",))
    monkeypatch.setattr(requirements, "DISTRIBUTION", "no-such-distribution")
    findings = list(requirements.conflicts())
    assert [(finding.level, finding.detail) for finding in findings] == ([("warning", found)] if found else [])


def test_versions_of_this_environment_agree() -> None:
    assert list(requirements.conflicts()) == []


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("raise ValueError", "helper 1.0"),
        ("import no_such_module", "helper 1.0"),
        ("x = 1", "helper 1.0"),  # and lacks the name
    ],
)
def test_distribution_that_breaks_the_import_of_another_is_named(source: str, named: str, install: Install) -> None:
    (install("helper", source) / "RECORD").write_text("helper.py,,\n", encoding="utf-8")
    install("victim", "from helper import nothing")
    with pytest.raises((ImportError, ValueError)) as caught:
        importlib.import_module("victim")
    assert owners.culprit(caught.value) == named


def test_file_of_no_distribution_that_stands_in_the_way_is_named(site: Path, install: Install) -> None:
    (site / "yacs_like.py").write_text("", encoding="utf-8")
    install("victim", "import yacs_like.config")
    with pytest.raises(ImportError) as caught:
        importlib.import_module("victim")
    sys.modules.pop("yacs_like", None)
    assert owners.culprit(caught.value) == str(site / "yacs_like.py")


def test_errors_of_python_and_of_the_host_name_nobody() -> None:
    for code in ("import json; json.loads('{')", "import torch; torch.ones(2) @ torch.ones(3)"):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            exec(code)
        assert owners.culprit(caught.value) == ""


@pytest.mark.usefixtures("own_interpreter")
@pytest.mark.parametrize(("code", "detail"), [("1 / 0", "division by zero"), ("os._exit(3)", "ends the process")])
def test_distribution_that_breaks_the_import_of_torch_is_named(code: str, detail: str, install: Install) -> None:
    source = f"import os\ndef load():\n    {code}\n"
    (install("evil", source) / "entry_points.txt").write_text("[torch.backends]\nevil = evil:load\n", encoding="utf-8")
    found = about(doctor.examine()[-1:], "torch")
    assert detail in found.detail
    assert "uninstall evil 1.0" in found.cure


def test_checks_that_lack_packaging_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("packaging", "packaging.requirements", "packaging.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    for subject, check in (("versions", requirements.versions), ("collision", environment.collisions)):
        (found,) = probe.guarded(subject, check)
        assert (found.level, found.subject) == ("failure", subject)
        assert "packaging" in found.detail


def test_leftover_folder_of_nnunet_is_a_failure_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.machinery.ModuleSpec("nnunetv2", None, is_package=True)
    spec.submodule_search_locations = ["/env/nnunetv2"]
    monkeypatch.setattr(environment, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: spec)))
    found = environment.host()
    assert found.level == "failure"
    assert "/env/nnunetv2" in found.detail
    assert "delete" in found.cure


def test_leftover_folder_is_what_python_finds_then(tmp_path: Path, run_python: RunPython) -> None:
    (tmp_path / "nnunetv2" / "training").mkdir(parents=True)
    (tmp_path / "nnunet_ext").symlink_to(Path(registry.__file__).parent)  # nnU-Net may be installed beside it
    run_python(
        f"import sys; sys.path.append({str(tmp_path)!r})\n"
        "from nnunet_ext.doctor import environment\n"
        "found = environment.host()\n"
        "assert found.level == 'failure', found\n"
        "assert 'is a folder without its __init__.py' in found.detail, found\n",
        "-I",
        "-S",
    )


def test_missing_nnunet_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    assert environment.host() == failure("nnunetv2", "can't be imported", "pip install nnunetv2")


@pytest.mark.parametrize(
    ("message", "cure"),
    [
        ("Failed to load the backend extension: torch_npu. You can", "what registers torch_npu in torch.backends"),
        ("Failed to load the backend extension: nnunet_ext. You can", installation.reinstall()),
        ("libcudart.so.12: cannot open shared object file", "repair torch"),
    ],
)
def test_torch_that_fails_is_cured_where_it_is_broken(message: str, cure: str) -> None:
    assert cure in environment.torch_cure(RuntimeError(message))


def test_hook_that_pytorch_did_not_install_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, hook.Finder)])
    (found,) = environment.hook()
    assert found.level == "failure"
    assert found.cure == installation.reinstall()
    assert environment.lookup_cure("acme 1.0") == "repair the hook first, see there"


def test_errors_that_the_hook_kept_are_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [hook.Finder(), *sys.meta_path])
    monkeypatch.setattr(hook, "errors", ["one", "two", "one"])
    monkeypatch.setattr(hook, "bypassed", lambda: ["three"])
    state, *errors = environment.hook()
    assert state.level == "ok"
    assert {error.level for error in errors} == {"failure"}
    assert [error.detail for error in errors] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("RECORD", "nnunet_ext/registry.py,sha256=0,1"),
        ("RECORD", "_nnunet_ext_hook.py,,"),
        ("top_level.txt", "other\nnnunet_ext\n"),
    ],
)
def test_distribution_with_our_modules_is_a_collision(install: Install, file: str, line: str) -> None:
    (install("rival", "") / file).write_text(line, encoding="utf-8")
    assert "rival 1.0" in about(list(environment.collisions()), "collision").detail


@pytest.mark.parametrize("file", ["METADATA", "RECORD", "top_level.txt"])
def test_collision_is_found_beside_metadata_that_is_no_utf_8(install: Install, file: str) -> None:
    (install("latin", "") / file).write_bytes(b"Name: \xff\n")
    (install("rival", "") / "RECORD").write_text("nnunet_ext/registry.py,,\n", encoding="utf-8")
    assert "rival 1.0" in about(list(environment.collisions()), "collision").detail


def test_distribution_with_similar_modules_is_no_collision(install: Install) -> None:
    (install("nnunet_extra", "") / "RECORD").write_text("nnunet_extra/a.py,,\na/nnunet_ext/b.py,,\n", "utf-8")
    assert list(environment.collisions()) == []


def test_second_copy_on_the_path_is_a_collision(site: Path) -> None:
    (site / "_nnunet_ext_hook.py").write_text("", encoding="utf-8")
    found = about(list(environment.collisions()), "collision")
    assert str(site) in found.detail
    assert str(Path(hook.__file__).parent) in found.detail


def test_folder_that_does_not_exist_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nothing"))
    found = about(list(environment.folders()), "nnUNet_raw")
    assert found.level == "failure"
    assert found.cure.startswith(f"mkdir -p {tmp_path}")


@pytest.mark.usefixtures("folders")
def test_read_only_folder_is_a_failure_where_nnunet_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    levels = {finding.subject: finding.level for finding in environment.folders()}
    assert levels == {"nnUNet_raw": "warning", "nnUNet_preprocessed": "failure", "nnUNet_results": "failure"}


@pytest.mark.parametrize("value", ["false", "0", "f", "F"])
def test_switched_off_compilation_is_said(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu.COMPILE, value)
    assert gpu._compilation() == ok("torch.compile", f"not used: nnUNet_compile={value}")


def test_compilation_without_triton_is_a_failure_with_the_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gpu.COMPILE, raising=False)
    monkeypatch.setattr(gpu, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    found = gpu._compilation()
    assert (found.level, found.detail) == ("failure", "triton isn't installed")
    assert "export nnUNet_compile=f" in found.cure


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a GPU, its nodes in dev, its PCI bus in pci, its commands in bin; PyTorch is built for CUDA."""
    import torch

    for name in ("dev", "pci", "bin"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(gpu, "NODES", tmp_path / "dev")
    monkeypatch.setattr(gpu, "PCI", tmp_path / "pci")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv(gpu.VISIBLE, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return tmp_path


def add_card(node: Path, vendor: str = "0x10de", kind: str = "0x030200") -> None:
    card = node / "pci" / "0000:3b:00.0"
    card.mkdir()
    (card / "vendor").write_text(f"{vendor}\n", encoding="utf-8")
    (card / "class").write_text(f"{kind}\n", encoding="utf-8")


def add_command(node: Path, lines: str) -> None:
    command = node / "bin" / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{lines}\n", encoding="utf-8")
    command.chmod(0o755)


def no_driver() -> None:
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nUpdate it")


def test_missing_gpu_is_a_warning_and_nothing_is_compiled(node: Path) -> None:
    cuda, compilation = gpu.device()
    assert (cuda.level, compilation.level) == ("warning", "ok")
    assert "-device cpu" in cuda.cure
    assert "not used" in compilation.detail


@pytest.mark.skipif(sys.platform == "win32", reason="device nodes and shell scripts")
@pytest.mark.parametrize("sign", ["/dev/nvidia0", "PCI 0000:3b:00.0", "nvidia-smi: NVIDIA-SMI has failed"])
def test_gpu_that_pytorch_does_not_see_is_a_failure(sign: str, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "init", no_driver)
    if "PCI" in sign:
        add_card(node)
    elif "smi" in sign:
        add_command(node, "echo NVIDIA-SMI has failed >&2; exit 9")
    else:
        (node / "dev" / "nvidia0").touch()
    cuda, _ = gpu.device()
    assert (cuda.subject, cuda.level) == ("CUDA", "failure")
    assert sign.removeprefix("/dev") in cuda.detail
    assert "driver on your system is too old" in cuda.detail
    assert "repair the driver" in cuda.cure
    monkeypatch.setattr(torch.version, "cuda", None)  # a CPU build on the same machine
    assert "install a build of torch for CUDA" in next(gpu.device()).cure


@pytest.mark.parametrize(("vendor", "kind"), [("0x10de", "0x040300"), ("0x1002", "0x030000")])
def test_sound_chip_and_cards_of_others_are_no_gpu(vendor: str, kind: str, node: Path) -> None:
    add_card(node, vendor, kind)
    (node / "dev" / "nvidia-modeset").touch()
    assert next(gpu.device()).level == "warning"


@pytest.mark.parametrize("value", ["", "-1"])
def test_gpu_hidden_on_purpose_is_a_warning(value: str, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_card(node)
    monkeypatch.setenv(gpu.VISIBLE, value)
    cuda, _ = gpu.device()
    assert (cuda.level, cuda.cure) == ("warning", "unset CUDA_VISIBLE_DEVICES")


@pytest.mark.skipif(sys.platform == "win32", reason="shell scripts")
def test_command_of_the_driver_that_hangs_is_said(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_SECONDS", 0.2)
    add_command(node, "exec /bin/sleep 60")
    assert "timed out after 0.2 seconds" in next(gpu.device()).detail


@pytest.mark.parametrize("broken", [0, 1])
def test_every_gpu_has_to_compute(broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def ones(*_: object, device: str) -> torch.Tensor:
        if device == f"cuda:{broken}":
            raise RuntimeError("CUDA error: no kernel image is available\nCompile with TORCH_USE_CUDA_DSA")
        return torch.zeros(8)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=2**36))
    monkeypatch.setattr(torch, "ones", ones)
    *whole, failed = gpu.device()
    assert len(whole) == broken
    assert (failed.subject, failed.level) == ("CUDA", "failure")
    assert failed.detail == f"GPU {broken}: RuntimeError: CUDA error: no kernel image is available"


def test_gpu_that_ended_an_earlier_process_is_a_failure() -> None:
    (found,) = gpu.device("computing on it takes longer than 900 s")
    assert (found.subject, found.level) == ("CUDA", "failure")
    assert "takes longer" in found.detail


def test_compilation_that_fails_is_a_failure_with_the_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def no_compiler(function: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.delenv(gpu.COMPILE, raising=False)
    monkeypatch.setattr(torch, "compile", no_compiler)
    found = gpu._compilation()
    assert (found.level, found.detail) == ("failure", "RuntimeError: Failed to find C compiler.")
    assert "export nnUNet_compile=f" in found.cure
