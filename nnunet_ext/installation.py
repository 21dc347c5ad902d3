"""Install lines for this copy of the package: from where it came, never by a name that others could register."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

DISTRIBUTION = "nnunet-ext"
UNKNOWN = "<the folder or wheel that you have it from>"  # no word of it is a project to a shell


def reinstall() -> str:
    """Command that installs this copy once more, without its dependencies."""
    return f"pip install --force-reinstall --no-deps {origin()}"


def origin() -> str:
    """What `pip install` takes to install this copy elsewhere, from what pip wrote down (PEP 610)."""
    try:
        text = distribution(DISTRIBUTION).read_text("direct_url.json")
        return _argument(json.loads(text)) if text else UNKNOWN
    except (PackageNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return UNKNOWN


def _argument(record: dict[str, Any]) -> str:
    url = record["url"]
    if "vcs_info" in record:
        vcs = record["vcs_info"]
        return shlex.quote(f"{vcs['vcs']}+{url}@{vcs['commit_id']}")
    parts = urlsplit(url)
    if parts.scheme != "file":
        return shlex.quote(url)
    path = url2pathname(unquote(parts.path) if "%" in parts.path else parts.path)
    if not Path(path).exists():
        return UNKNOWN
    return f"-e {shlex.quote(path)}" if record.get("dir_info", {}).get("editable") else shlex.quote(path)


def extra(name: str, fallback: tuple[str, ...]) -> str:
    """Command that installs what an optional part of this package needs.

    Args:
        name: Extra to install.
        fallback: Distributions to name where this copy has no metadata.
    """
    try:
        wanted = requirements(distribution(DISTRIBUTION), name)
    except PackageNotFoundError:
        wanted = []
    return f"pip install {' '.join(map(shlex.quote, wanted or fallback))}"


def requirements(installed: Distribution, name: str) -> list[str]:
    """Requirements of the extra `name`, as its metadata has them, without their markers."""
    from packaging.requirements import Requirement

    wanted = []
    for requirement in map(Requirement, installed.requires or []):
        marker, requirement.marker = requirement.marker, None
        if marker and marker.evaluate({"extra": name}) and not marker.evaluate({"extra": ""}):
            wanted.append(str(requirement))
    return wanted
