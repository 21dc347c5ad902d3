"""Checks of versions: what distributions ask of each other, and versions that are known to be bad."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, requires, version

from nnunet_ext.doctor.finding import Finding, failure, ok, warning
from nnunet_ext.doctor.owners import label
from nnunet_ext.installation import DISTRIBUTION, reinstall

REPORTED = ("torch", "nnunetv2", "dynamic-network-architectures")
# Distribution, versions -> what is bad about them, and where that is known from.
KNOWN_BAD = {
    ("torch", "==2.9.*"): "runs 3D convolutions under AMP about four times slower than 2.8 "
    "(https://github.com/pytorch/pytorch/issues/166122)"
}


def versions() -> Iterator[Finding]:
    """Python and the distributions that decide, compared with what this package asks for."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    yield ok("python", f"{platform.python_version()} ({sys.executable})")
    try:
        yield ok(DISTRIBUTION, version(DISTRIBUTION))
        lines = {line: Requirement(line) for line in requires(DISTRIBUTION) or []}
    except PackageNotFoundError:
        yield failure(DISTRIBUTION, "is on the path, but not installed: it has no entry points", reinstall())
        lines = {}
    wanted: dict[str, str] = {canonicalize_name(r.name): line for line, r in lines.items() if not r.marker}
    for name in REPORTED:
        try:
            found = version(name)
        except PackageNotFoundError:
            yield failure(name, "isn't installed", f"pip install {name}")
            continue
        requirement = wanted.get(name, name)
        bad = known_bad(name, found)
        if not satisfies(found, requirement):
            yield failure(name, f"{found}, but needed is {requirement}", f'pip install "{requirement}"')
        elif bad:
            yield warning(name, f"{found} {bad}", f"install another version of {name} with pip")
        else:
            yield ok(name, found)


def satisfies(found: str, requirement: str) -> bool:
    """Tell whether a version lies within the bounds of a requirement; a prerelease counts as its release."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    return Requirement(requirement).specifier.contains(Version(found).base_version)


def known_bad(name: str, found: str) -> str:
    """What is known to be bad about a version; empty where nothing is."""
    return next(
        (why for (bad, bounds), why in KNOWN_BAD.items() if bad == name and satisfies(found, name + bounds)), ""
    )


def refused_by(by: str, name: str) -> str:
    """What an installed distribution asks of another whose version it excludes; empty where it does not.

    Args:
        by: Name of the distribution that asks.
        name: Name of the other one.
    """
    try:
        lines = [line for asked, line in _asked(distribution(by)) if asked == name]
        found = version(name)
    except PackageNotFoundError:
        return ""
    return next((line for line in lines if not satisfies(found, line)), "")


def installed() -> dict[str, Distribution]:
    """This package and what it asks for, and what that asks for: by name, as far as it is installed."""
    found: dict[str, Distribution] = {}
    names = [DISTRIBUTION, *REPORTED]
    while names:
        name = names.pop()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        names += [asked for asked, _ in _asked(found[name])]
    return found


def _asked(by: Distribution) -> Iterator[tuple[str, str]]:
    """Names and lines of what a distribution asks for here, without its extras."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    for line in by.requires or []:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            yield canonicalize_name(requirement.name), str(requirement)


def conflicts() -> Iterator[Finding]:
    """Find versions that a distribution among `installed` excludes, and what it asks for that is missing."""
    found = installed()
    for name, by in found.items():
        for asked, line in _asked(by):
            if asked not in found:
                yield warning(
                    "requirement", f"{label(by)} asks for {line}, which isn't installed", f'pip install "{line}"'
                )
            elif not (name == DISTRIBUTION and asked in REPORTED) and not satisfies(found[asked].version, line):
                detail = f"{label(by)} asks for {line}, but {label(found[asked])} is installed"
                yield warning("requirement", detail, f'pip install "{line}"')
