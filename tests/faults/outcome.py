"""What a class of faults came to: how many were injected, and each that did not end as it must."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What may go wrong; the target of each is 0.
KINDS = {
    "unrecoverable": "a checkpoint can't be loaded, or the training can't be continued to its end",
    "silently wrong": "a checkpoint or model differs from what it says it is, or from an undisturbed training",
    "epochs lost": "the training continued before the last checkpoint that it had written, whatever its name",
    "unclear": "the error does not say what is wrong and what helps, or the exit status is that of success",
    "hung": "the training did not end",
    "processes left": "a process outlived the training",
    "files left": "a partial file, a lock or a changed checkpoint stayed",
}


@dataclass
class Outcome:
    """Counts of one class of faults.

    Args:
        injected: Kind of fault -> how many took place.
        problems: Kind of problem -> each, in words that name the fault.
        observed: What else was seen -> how often; no fault of the package.
        seconds: Time that it took.
    """

    injected: Counter[str] = field(default_factory=Counter)
    problems: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    observed: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def problem(self, kind: str, words: str) -> None:
        """Note what went wrong."""
        self.problems[kind].append(words)

    @property
    def is_clean(self) -> bool:
        """Whether nothing went wrong."""
        return not any(self.problems.values())


def write(outcomes: dict[str, Outcome], folder: Path, facts: dict[str, Any]) -> str:
    """Write ``faults.json`` and ``faults.md``; return the latter."""
    content = {
        **facts,
        "classes": {
            name: {
                "injected": dict(o.injected),
                "problems": o.problems,
                "observed": dict(o.observed),
                "seconds": round(o.seconds, 1),
            }
            for name, o in outcomes.items()
        },
    }
    text = _markdown(outcomes, facts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "faults.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (folder / "faults.md").write_text(text, encoding="utf-8")
    return text


def _markdown(outcomes: dict[str, Outcome], facts: dict[str, Any]) -> str:
    lines = ["# Faults injected", "", ", ".join(f"{key}: {value}" for key, value in facts.items()), ""]
    lines += _table(["class", "faults", *KINDS, "seconds"], [_row(name, o) for name, o in outcomes.items()])
    lines += ["", *(f"- {kind}: {meaning}" for kind, meaning in KINDS.items()), "", "## Faults by kind", ""]
    lines += _table(
        ["class", "fault", "number"], [[n, k, v] for n, o in outcomes.items() for k, v in o.injected.items()]
    )
    for title, rows in (
        ("Problems", [[n, k, words] for n, o in outcomes.items() for k, all_ in o.problems.items() for words in all_]),
        ("Also seen", [[n, k, v] for n, o in outcomes.items() for k, v in o.observed.items()]),
    ):
        if rows:
            lines += ["", f"## {title}", "", *_table(["class", "what", ""], rows)]
    return "\n".join(lines) + "\n"


def _row(name: str, outcome: Outcome) -> list[object]:
    return [name, outcome.injected.total(), *(len(outcome.problems[k]) for k in KINDS), round(outcome.seconds)]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in rows]
