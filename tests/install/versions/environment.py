"""A new environment: made, filled, used and deleted, with a log of every command."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tests.install.lock import REPOSITORY
from tests.install.versions.matrix import SHOWN, Row

VERSIONS = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]), sep='\\n')"
PRODUCT = ("nnunet_ext", "_nnunet_ext_hook.py", "LICENSE", "pyproject.toml", "README.md")
TESTS = ("tests", "docs", "pyproject.toml", "README.md")


class CommandError(Exception):
    """A command ended with another status than 0, or not in time; its text is the end of what it wrote."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Folder of one row.

    Args:
        folder: holds `environment`, a copy of the tests in `tree`, and `log.txt`.
        base: Python that it is made with.
        uv: path of uv, which installs faster and takes less disk; pip where it is empty.
    """

    folder: Path
    base: Path
    uv: str = ""

    @property
    def python(self) -> Path:
        return self.folder / "environment" / ("Scripts" if os.name == "nt" else "bin") / "python"

    @property
    def tree(self) -> Path:
        return self.folder / "tree"

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def run(self, *command: str | Path, minutes: float) -> str:
        """Run in the copy of the tests, with the commands of the environment first on PATH; return the output.

        Raises:
            CommandError: It failed.
        """
        dropped = ("PYTHON", "VIRTUAL_ENV", "nnUNet_", "TORCH_DEVICE_BACKEND_AUTOLOAD")
        variables = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        variables["PATH"] = os.pathsep.join([str(self.python.parent), variables["PATH"]])
        line = [str(self.python if part == "PYTHON" else part) for part in command]
        with self.log.open("ab") as log:
            log.write(f"\n{time.strftime('%H:%M:%S')} $ {' '.join(line)}\n".encode())
            log.flush()
            start = log.tell()
            try:
                ended = subprocess.run(line, cwd=self.tree, env=variables, stdout=log, stderr=log, timeout=60 * minutes)
                status = str(ended.returncode)
            except subprocess.TimeoutExpired:
                status = f"none within {minutes:g} minutes"
        with self.log.open("rb") as log:
            log.seek(start)
            output = log.read().decode("utf-8", errors="replace")
        if status != "0":
            raise CommandError(f"status {status}\n{output[-3000:]}")
        return output

    def exists(self) -> bool:
        return self.python.exists()

    def create(self, row: Row) -> None:
        """Make the environment anew, with the package and what the row asks for.

        Raises:
            CommandError: A command failed, pip above all.
        """
        self.create_empty(row)
        with_pip = ("PYTHON", "-m", "pip", "install", "--disable-pip-version-check")
        # compiled as pip does it: what old code warns of while it is compiled would be an error in a test
        with_uv = (self.uv, "pip", "install", "--compile-bytecode", "--python", str(self.python))
        install = with_uv if self.uv else with_pip
        self.run(*install, *self.asked(row), minutes=60)

    def create_empty(self, row: Row) -> None:
        """Make the environment anew, with pip alone."""
        self.delete()
        self.copy(row)
        self.run(self.base, "-m", "venv", self.folder / "environment", minutes=5)

    def resolve(self, row: Row) -> None:
        """Let pip choose versions for the row, and install nothing.

        Raises:
            CommandError: It found none.
        """
        self.run("PYTHON", "-m", "pip", "install", "--dry-run", *self.asked(row), minutes=20)

    def asked(self, row: Row) -> list[str]:
        """Words that name the package and all that the row asks for."""
        package = ["-e", f"{self.source}[test]"] if row.form == "editable" else [f"{self.wheel()}[test]"]
        constraints = ["-c", str(row.constraints)] if row.constraints else []
        return [*package, *row.pins, *constraints]

    def wheel(self) -> Path:
        """Build the package."""
        folder = self.folder / "wheel"
        shutil.rmtree(folder, ignore_errors=True)
        self.run("PYTHON", "-m", "pip", "wheel", "--no-deps", "-w", folder, REPOSITORY, minutes=10)
        (wheel,) = folder.glob("*.whl")
        return wheel

    def copy(self, row: Row) -> None:
        """Copy the tests to where they find no working copy, and beside them what an editable install serves."""
        copy(TESTS, self.tree)
        if row.form == "editable":
            copy(PRODUCT, self.source)

    def versions(self) -> dict[str, str]:
        """Versions that are installed, of what the table shows."""
        return dict(zip(SHOWN, self.run("PYTHON", "-c", VERSIONS, *SHOWN, minutes=2).split(), strict=True))

    def delete(self) -> None:
        """Delete all but the log."""
        for name in ("environment", "tree", "source", "wheel"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


def copy(names: tuple[str, ...], target: Path) -> None:
    """Copy these of the repository into a new folder."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in names:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
