"""`tests/lock.txt`: the exact versions that `make test` installs, for each Python that the metadata names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
LOCK = REPOSITORY / "tests" / "lock.txt"
METADATA = REPOSITORY / "pyproject.toml"
# What a marker asks of a system, as far as the markers of our dependencies do.
SYSTEMS = {
    "linux": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"},
    "darwin": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64", "os_name": "posix"},
    "win32": {"sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64", "os_name": "nt"},
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is installed on.

    Args:
        python: Version of two numbers.
        system: One of `SYSTEMS`.
    """

    python: str
    system: str = "linux"

    def takes(self, requirement: Requirement, extra: str = "") -> bool:
        """Tell whether the marker of a requirement, if it has one, holds here."""
        python = {"python_version": self.python, "python_full_version": f"{self.python}.0"}
        implementation = {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
        asked = {**python, **implementation, **SYSTEMS[self.system], "extra": extra}
        return requirement.marker is None or requirement.marker.evaluate(asked)


def pythons() -> list[str]:
    """Give the versions of Python that the metadata names."""
    text = METADATA.read_text(encoding="utf-8")
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)


def pins(target: Target, path: Path = LOCK) -> dict[str, str]:
    """Give name of each distribution -> its version.

    Raises:
        ValueError: A line names no exact version, or two lines name two.
    """
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        if specifier.operator != "==" or "*" in specifier.version:
            raise ValueError(f"A line of {path.name} is NAME==VERSION, got {line!r}; call `make lock`.")
        if not target.takes(requirement):
            continue
        name = canonicalize_name(requirement.name)
        if found.setdefault(name, specifier.version) != specifier.version:
            raise ValueError(f"{path.name} names two versions of {name} for {target}; call `make lock`.")
    return found
