"""The product in environments of the lowest, a middle and the newest versions that its metadata allows.

Each environment is new, holds the wheel and what pip's index gives for it, and is deleted afterwards. It needs an
index that pip reaches, about 7 GB of disk for one environment at a time, as much for pip's ordinary cache of each
PyTorch (kept: the next call downloads nothing), and two hours in all on two cores. Every command has a time limit and
writes to a log whose path is printed.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
HERE = Path(__file__).parent
LOWEST_PYTHON = (3, 10)
FAST, ALL = "not slow and not install", ""
# What meets another version of nnU-Net, PyTorch or NumPy first: each file, and which of its tests.
SLICE = (
    ("tests/test_registry.py", FAST),
    ("tests/test_hook.py", FAST),
    ("tests/nnunet/test_checkpoints.py", FAST),
    ("tests/contract/test_compiled_training.py", ALL),
    ("tests/contract/test_ddp.py", "install"),
)
# Only with the lowest: `make test` runs them with the newest.
REST = (
    "tests/test_doctor.py",
    "tests/contract/test_architectures.py",
    "tests/contract/test_deploy.py",
    "tests/contract/test_planners.py",
    "tests/contract/test_trainers.py",
    "tests/comparison",
)
JOURNEY = "tests/contract/test_journey.py"
install = pytest.mark.install


@dataclass(frozen=True)
class Environment:
    """A virtual environment that holds the wheel and what its tests need.

    Args:
        folder: holds the environment, a copy of the tests and the log.
        constraints: file of versions; None for the newest.
    """

    folder: Path
    constraints: Path | None

    @property
    def python(self) -> Path:
        return self.folder / "environment" / ("Scripts" if os.name == "nt" else "bin") / "python"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def run(self, *command: str | Path, minutes: float) -> str:
        """Run in the copy of the tests, with the commands of the environment first on PATH; return the output."""
        dropped = ("PYTHON", "VIRTUAL_ENV", "nnUNet_", "TORCH_DEVICE_BACKEND_AUTOLOAD")
        variables = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        variables["PATH"] = os.pathsep.join([str(self.python.parent), variables["PATH"]])
        with self.log.open("ab") as log:
            start = log.tell()
            line = [str(part) for part in command]
            done = subprocess.run(
                line, cwd=self.folder / "tree", env=variables, stdout=log, stderr=log, timeout=60 * minutes
            )
        with self.log.open("rb") as log:
            log.seek(start)
            output = log.read().decode("utf-8", errors="replace")
        assert done.returncode == 0, f"{' '.join(line)}\n{output[-8000:]}\n(all of it: {self.log})"
        return output

    def pytest(self, *arguments: str, minutes: float) -> None:
        options = ["-m", "pytest", "-p", "no:cacheprovider", "-q", "--durations=5"]
        self.run(self.python, *options, *arguments, minutes=minutes)


def python(wanted: tuple[int, int]) -> Path | None:
    """Find a Python of this version: on PATH, then uv's, then pyenv's; None where there is none that runs."""
    name = ".".join(map(str, wanted))
    roots = [os.environ.get("PYENV_ROOT", ""), output_of("pyenv", "root"), str(Path.home() / ".pyenv")]
    versions = [path for root in roots if root for path in sorted(Path(root, "versions").glob(f"{name}*"))]
    candidates = [
        shutil.which(f"python{name}"),
        output_of("uv", "python", "find", name),
        *(str(version / "bin" / "python") for version in versions),
    ]
    ask = "import sys; print(*sys.version_info[:2], sep='.')"
    # pyenv's shims are on PATH also where they refuse to run
    return next((Path(found) for found in candidates if found and output_of(found, "-c", ask) == name), None)


def output_of(*command: str) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def lowest_python() -> Path:
    """The lowest Python that we allow and that is there; at the latest the one that runs this."""
    minors = range(LOWEST_PYTHON[1], sys.version_info.minor)
    return next(filter(None, (python((3, minor)) for minor in minors)), Path(sys.executable))


@pytest.fixture(scope="module", params=["lowest", "middle", "newest"])
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """A new environment of these versions, deleted when its tests have run; its log stays."""
    constraints = HERE / f"{request.param}.txt"
    new = Environment(tmp_path_factory.mktemp(request.param), constraints if constraints.is_file() else None)
    base = lowest_python() if request.param == "lowest" else Path(sys.executable)
    say(request, f"{request.param}: {base}, log {new.log}")
    if request.param == "lowest" and output_of(str(base), "-c", "import sys; print(sys.version_info[1])") != "10":
        say(request, "no Python 3.10 is there: the lowest versions are tried with the next one")
    tree = new.folder / "tree"
    shutil.copytree(REPOSITORY / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "docs", tree / "docs")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, tree)
    try:
        new.run(base, "-m", "venv", new.folder / "environment", minutes=5)
        pip = [new.python, "-m", "pip"]
        new.run(*pip, "wheel", "--no-deps", "-w", new.folder / "wheel", REPOSITORY, minutes=10)
        (wheel,) = (new.folder / "wheel").glob("*.whl")
        pinned = ["-c", constraints] if new.constraints else []
        start = time.monotonic()
        new.run(*pip, "install", f"{wheel}[test]", *pinned, minutes=60)
        say(request, f"{request.param}: installed in {time.monotonic() - start:.0f} s")
        yield new
    finally:
        shutil.rmtree(new.folder / "environment", ignore_errors=True)


def say(request: pytest.FixtureRequest, text: str) -> None:
    """Write to the terminal while tests run."""
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    reporter.ensure_newline()
    reporter.write_line(text)


# pytest keeps the tests of one environment together.
@install
def test_versions_are_those_asked_for(environment: Environment) -> None:
    code = "from importlib.metadata import version; import sys; print(*map(version, sys.argv[1:]))"
    wanted = pins(environment.constraints) if environment.constraints else {}
    found = environment.run(environment.python, "-c", code, *wanted, minutes=2).split()
    assert [version.partition("+")[0] for version in found] == list(wanted.values())
    environment.run(environment.python, "-m", "pip", "check", minutes=5)


@install
def test_model_is_trained_predicted_deployed_and_compared(environment: Environment) -> None:
    environment.pytest("-m", "", JOURNEY, minutes=30)


@install
@pytest.mark.parametrize(("part", "marked"), SLICE)
def test_part_of_the_suite_passes(environment: Environment, part: str, marked: str) -> None:
    environment.pytest("-m", marked, "-n", "2", part, minutes=90)


@install
def test_rest_of_the_slice_passes_with_the_lowest(environment: Environment) -> None:
    if environment.constraints is None or environment.constraints.stem != "lowest":
        pytest.skip("only the lowest versions run it")
    environment.pytest("-m", FAST, "-n", "2", *REST, minutes=90)


# --- Fast: the constraints and pyproject.toml say the same


def pins(path: Path) -> dict[str, str]:
    """Name of each distribution -> its version."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = (re.fullmatch(r"([\w.-]+)==([\d.]+)", line) for line in lines if line and not line.startswith("#"))
    return {match[1].lower(): match[2] for match in found if match}


def bounds() -> dict[str, str]:
    """Name of each dependency of pyproject.toml, those of the extras `report` and `onnx` too -> its lower bound."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:dependencies|report|onnx) = (\[.*?\])$", text, re.DOTALL | re.MULTILINE)
    found = [Requirement(line) for part in lists for line in ast.literal_eval(part)]
    return {r.name.lower(): next(s.version for s in r.specifier if s.operator == ">=") for r in found}


def test_lowest_versions_are_the_bounds_of_the_metadata() -> None:
    lowest = pins(HERE / "lowest.txt")
    assert lowest.keys() == bounds().keys()
    differing = {
        name: (lowest[name], bound)
        for name, bound in bounds().items()
        if lowest[name] != bound and not lowest[name].startswith(f"{bound}.")
    }
    assert differing == {}


def test_middle_pytorch_lies_between_the_lowest_and_is_allowed() -> None:
    lowest, middle = (tuple(map(int, pins(HERE / f"{name}.txt")["torch"].split("."))) for name in ("lowest", "middle"))
    assert lowest < middle


def test_this_python_is_found_by_its_version() -> None:
    version = (sys.version_info[0], sys.version_info[1])
    found = python(version) or Path(sys.executable)
    assert output_of(str(found), "-c", "import sys; print(sys.version_info[1])") == str(version[1])
    assert python((3, 99)) is None


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
    assert python((3, 98)) == kept
