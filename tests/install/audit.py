"""Known holes of what `make test` installs: `make check-security`.

pip-audit asks PyPI's JSON API about every pin of `tests/lock.txt`, for each Python that we allow. Where that service
does not know a package, or knows none at all, pip-audit says "No known vulnerabilities found" and ends with 0: here
what was not audited is counted, named and ends with 2. Findings end with 1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.install.lock import LOCK, REPOSITORY, Target, pins, pythons


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What came out, each `name version` once.

    Args:
        clean: asked for, and nothing is known.
        holes: `name version` -> identifiers, and the versions that mend them.
        unknown: the service had no answer.
    """

    clean: frozenset[str]
    holes: dict[str, list[str]]
    unknown: frozenset[str]

    @property
    def status(self) -> int:
        return 1 if self.holes else 2 if self.unknown or not self.clean else 0

    def lines(self) -> list[str]:
        """What to print."""
        total = len(self.clean) + len(self.holes) + len(self.unknown)
        counts = f"{len(self.clean) + len(self.holes)} of {total} packages audited, {len(self.holes)} with findings"
        found = [f"{package}: {', '.join(holes)}" for package, holes in sorted(self.holes.items())]
        if not self.unknown:
            return [*found, counts]
        named = ", ".join(sorted(self.unknown)[:5]) + (", ..." if len(self.unknown) > 5 else "")
        reason = f"NOT AUDITED: {len(self.unknown)} packages, PyPI's JSON API had no answer for them ({named})"
        cure = "call `make check-security` where PyPI's JSON API can be reached"
        return [*found, counts, reason, cure]


def read(reports: list[tuple[dict[str, str], dict[str, Any]]]) -> Audit:
    """Join what pip-audit wrote: for each Python the pins that it was asked about, and its JSON."""
    clean, holes, asked = set(), {}, set()
    for wanted, report in reports:
        asked |= {f"{name} {version}" for name, version in wanted.items()}
        for entry in report["dependencies"]:
            if "skip_reason" in entry:
                continue
            package = f"{entry['name']} {entry['version']}"
            if entry["vulns"]:
                holes[package] = [
                    f"{hole['id']} (mended in {', '.join(hole['fix_versions']) or 'no version'})"
                    for hole in entry["vulns"]
                ]
            else:
                clean.add(package)
    return Audit(clean=frozenset(clean), holes=holes, unknown=frozenset(asked - clean - holes.keys()))


def ask(wanted: dict[str, str]) -> dict[str, Any]:
    """Call pip-audit on exact versions; give its JSON, an empty one where it could ask nobody."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "pins.txt"
        asked.write_text("".join(f"{name}=={version}\n" for name, version in wanted.items()), encoding="utf-8")
        options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "-f", "json", "-r", str(asked)]
        done = subprocess.run([sys.executable, "-m", "pip_audit", *options], capture_output=True, text=True)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except json.JSONDecodeError:
        print(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "pip-audit wrote nothing")
        return {"dependencies": []}
    return answer


def main() -> int:
    """Audit the lock; print what came out; return the exit status."""
    print(f"pip-audit asks PyPI about {LOCK.relative_to(REPOSITORY)}, Python {', '.join(pythons())}")
    wanted = [pins(Target(python=python)) for python in pythons()]
    audit = read([(part, ask(part)) for part in wanted])
    print("\n".join(audit.lines()))
    return audit.status


if __name__ == "__main__":
    sys.exit(main())
