"""Wheels and editable installs in environments of their own, each proven by nnU-Net's own search.

An environment is new and empty; what this Python has installed is linked into it as its dependencies, except
this package and nnU-Net, which every test installs the way that it is about.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.install.proof import PROOF, SEARCH

pytestmark = pytest.mark.install

REPOSITORY = Path(__file__).parents[2]
OURS_OR_HOST = re.compile(r"_*nnunet[-_]?(ext|v2)|__editable__|__pycache__|.*\.pth$", re.IGNORECASE)


@dataclass(frozen=True)
class Environment:
    """A virtual environment without pip of its own."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts" if os.name == "nt" else "bin") / "python"

    @property
    def site(self) -> Path:
        (site,) = self.folder.rglob("site-packages")
        return site

    def pip(self, *arguments: str) -> None:
        done = run([sys.executable, "-m", "pip", "--python", str(self.python), *arguments], self.folder)
        assert done.returncode == 0, done.stdout + done.stderr

    def prove(self) -> dict[str, str]:
        """Find every registered name; return the version of nnU-Net and the files of the three modules."""
        found: dict[str, str] = json.loads(self.run(PROOF).splitlines()[-1])
        return found

    def run(self, code: str) -> str:
        done = run([str(self.python), "-c", code], self.folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def doctor(self) -> tuple[int, dict[str, str]]:
        """Exit status, and levels by subject."""
        done = run([str(self.python.with_name("nnunet-ext")), "doctor", "--json"], self.folder)
        assert done.stdout, done.stderr
        return done.returncode, {finding["subject"]: finding["level"] for finding in json.loads(done.stdout)}


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run outside the repository, with the commands of that environment on PATH and none of our variables."""
    drop = ("PYTHON", "VIRTUAL_ENV", "nnUNet_", "TORCH_DEVICE_BACKEND_AUTOLOAD")
    env = {name: value for name, value in os.environ.items() if not name.startswith(drop)}
    env["PATH"] = os.pathsep.join([str(Path(command[0]).parent), env["PATH"]])
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)


def isolation(backend: str) -> list[str]:
    """Build with the backend that is installed here, else let pip fetch it."""
    return ["--no-build-isolation"] if importlib.util.find_spec(backend) else []


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", *isolation("hatchling"), "-w", str(folder)]
    done = run([*command, str(REPOSITORY)], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to what this Python has installed."""
    folder = tmp_path_factory.mktemp("dependencies")
    for installed in (Path(entry) for entry in sys.path if entry and any(Path(entry).glob("*.dist-info"))):
        for item in installed.iterdir():
            link = folder / item.name
            if not OURS_OR_HOST.match(item.name) and not link.exists():
                link.symlink_to(item, target_is_directory=item.is_dir())
    return folder


@pytest.fixture
def environment(tmp_path: Path, dependencies: Path) -> Environment:
    """A new environment without nnU-Net."""
    new = Environment(tmp_path / "environment")
    venv.create(new.folder, with_pip=False, symlinks=os.name != "nt")
    (new.site / "dependencies.pth").write_text(f"{dependencies}\n", encoding="utf-8")
    return new


def host_folder() -> Path:
    """The folder of the nnU-Net that is installed here."""
    spec = importlib.util.find_spec("nnunetv2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture
def with_host(environment: Environment) -> Environment:
    """The same with the nnU-Net that is installed here."""
    from importlib.metadata import distribution

    shutil.copytree(host_folder(), environment.site / "nnunetv2", ignore=shutil.ignore_patterns("__pycache__"))
    info = distribution("nnunetv2")
    target = environment.site / f"nnunetv2-{info.version}.dist-info"
    target.mkdir()
    for name in ("METADATA", "entry_points.txt"):
        (target / name).write_text(info.read_text(name) or "", encoding="utf-8")
    return environment


def test_wheel_holds_the_package_and_the_hook_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    ours = [p for p in (REPOSITORY / "nnunet_ext").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert names == {"_nnunet_ext_hook.py", *(p.relative_to(REPOSITORY).as_posix() for p in ours)}


def test_wheel_is_found(with_host: Environment, wheel: Path) -> None:
    with_host.pip("install", "--no-deps", str(wheel))
    found = with_host.prove()
    for module in ("nnunet_ext", "_nnunet_ext_hook", "nnunetv2"):
        assert Path(found[module]).is_relative_to(with_host.site)
    status, levels = with_host.doctor()
    assert (status, "failure" in levels.values()) == (0, False), levels


def test_editable_install_serves_both_modules_from_the_working_copy(with_host: Environment) -> None:
    with_host.pip("install", "--no-deps", *isolation("hatchling"), "-e", str(REPOSITORY))
    found = with_host.prove()
    assert Path(found["nnunet_ext"]) == REPOSITORY / "nnunet_ext" / "__init__.py"
    assert Path(found["_nnunet_ext_hook"]) == REPOSITORY / "_nnunet_ext_hook.py"


@pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
def test_names_are_found_where_nnunet_is_editable(environment: Environment, wheel: Path, mode: str) -> None:
    sources = environment.folder / "sources"
    shutil.copytree(host_folder(), sources / "nnunetv2", ignore=shutil.ignore_patterns("__pycache__"))
    (sources / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools>=67.8"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "nnunetv2"\nversion = "2.8.1"\n'
        '[tool.setuptools.packages.find]\ninclude = ["nnunetv2*"]\n',
        encoding="utf-8",
    )
    options = [*isolation("setuptools"), "--config-settings", f"editable_mode={mode}"]
    environment.pip("install", "--no-deps", *options, "-e", str(sources))
    environment.pip("install", "--no-deps", str(wheel))
    assert Path(environment.prove()["nnunetv2"]).is_relative_to(sources)


def test_nothing_is_left_after_uninstalling(with_host: Environment, wheel: Path) -> None:
    before = {path.name for path in with_host.site.iterdir()}
    with_host.pip("install", "--no-deps", str(wheel))
    with_host.prove()
    with_host.pip("uninstall", "--yes", "nnunet-ext")
    assert {path.name for path in with_host.site.iterdir()} - {"__pycache__"} == before
    with_host.run(
        SEARCH
        + "import importlib.util, sys, torch\n"
        + "assert importlib.util.find_spec('_nnunet_ext_hook') is None\n"
        + "assert trainer('nnUNetTrainerNoMirroring') and planner('ResEncUNetPlanner')\n"
        + "assert trainer('nnUNetTrainer_7epochs_3iters') is None\n"
    )


@pytest.mark.parametrize("requirement", ["nnunetv2==2.7.0", "nnunetv2>=2.7,<3"])
def test_names_are_found_by_nnunet_from_the_index(environment: Environment, wheel: Path, requirement: str) -> None:
    downloads = environment.folder / "downloads"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(downloads), requirement]
    done = run([*command, *isolation("setuptools")], environment.folder)
    if done.returncode != 0:
        pytest.skip(f"no index that pip reaches has {requirement}: {done.stderr.strip().splitlines()[-1]}")
    (host,) = downloads.glob("*.whl")
    environment.pip("install", "--no-deps", str(host), str(wheel))
    found = environment.prove()
    assert found["version"] == "2.7.0" or "==" not in requirement
    status, levels = environment.doctor()
    assert (status, "failure" in levels.values()) == (0, False), levels


def test_package_of_the_documentation_is_found(with_host: Environment, wheel: Path, tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "how-to" / "add-a-method.md").read_text(encoding="utf-8")
    files = re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    for name, text in files:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with_host.pip("install", "--no-deps", str(wheel))
    with_host.pip("install", "--no-deps", *isolation("hatchling"), str(tmp_path))
    with_host.prove()
    with_host.run(SEARCH + "assert trainer('nnUNetTrainerSlim') and planner('SlimUNetPlanner')")
