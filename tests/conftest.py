"""Fixtures for tests that need another distribution, a fresh process or tiny plans."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from nnunet_ext import registry
from tests.ranks import Ranks
from tests.settings import machine, planned_dataset, setting  # noqa: F401 (fixtures)

# Tiny networks wait for threads longer than they compute; processes that tests start read the variable.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

Install = Callable[..., Path]
RunPython = Callable[..., "subprocess.CompletedProcess[str]"]
KilledPartial = Callable[[Path], Path]
Claims = Callable[..., "dict[str, str]"]

_CLAIMS = """
import json, os, pathlib, sys, traceback

results = {}

def claim(function):
    try:
        function()
        results[function.__name__] = ""
    except BaseException:
        results[function.__name__] = traceback.format_exc()
    pathlib.Path("results.json").write_text(json.dumps(results))

def forget(*packages):
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]
"""


def console_script(name: str) -> str:
    """Path of a console script of this environment; skips the test where none of that name is installed."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"{path} is missing: pip install -e .[test]")
    return str(path)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two processes of one group: ``ranks.run(job, *arguments)``."""
    pair = Ranks()
    yield pair
    pair.close()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path of this process and of those it starts."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    return folder


def write_distribution(site: Path, name: str, source: str, **groups: list[str]) -> Path:
    """Write a distribution's module and metadata; return the folder of the latter.

    Args:
        site: Folder on the path.
        name: Name of the distribution and of its module.
        source: Source of the module.
        groups: Names for groups of nnunet_ext's entry points.
    """
    (site / f"{name}.py").write_text(source, encoding="utf-8")
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    lines = []
    for group, names in groups.items():
        lines += [f"[nnunet_ext.{group}]", *(f"{entry} = {name}:{entry}" for entry in names)]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return info


@pytest.fixture
def install(site: Path) -> Iterator[Install]:
    """Install a distribution: ``install("acme", "class Acme: ...", architectures=["Acme"])``."""
    modules = []

    def _install(name: str, source: str, **groups: list[str]) -> Path:
        info = write_distribution(site, name, source, **groups)
        importlib.invalidate_caches()
        registry.suggest.cache_clear()
        modules.append(name)
        return info

    yield _install
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture(scope="module")
def claims(tmp_path_factory: pytest.TempPathFactory) -> Claims:
    """Run functions of a script in turn, in one fresh process: ``claims(script, *sites, VARIABLE="value")``.

    The script decorates each by ``claim``; the result holds what went wrong in each, or "". ``forget("package")`` makes
    a package count as not imported.
    """

    def _claims(script: str, *sites: Path, **env: str) -> dict[str, str]:
        folder = tmp_path_factory.mktemp("claims")
        (folder / "main.py").write_text(_CLAIMS + script, encoding="utf-8")
        path = [*map(str, sites), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, "main.py"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        found: dict[str, str] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return found

    return _claims


@pytest.fixture
def run_python(tmp_path: Path) -> RunPython:
    """Run code in a fresh process of this Python, outside the repository; it must end with status 0."""

    def _run(code: str, *options: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *options, "-c", code],
            cwd=tmp_path,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done

    return _run


@pytest.fixture
def killed_partial(run_python: RunPython) -> KilledPartial:
    """Name that a process, dead by now, would have written under: ``killed_partial(folder)``."""

    def name(folder: Path) -> Path:
        code = f"from nnunet_ext.files import partial, Path; print(partial(Path({str(folder)!r}) / 'x'))"
        return Path(run_python(code).stdout.strip())

    return name
