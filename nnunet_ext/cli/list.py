"""Show the trainers by what they are for, the one to take first, with their planners and plans.

Research switches, trainers of other packages, architectures and names that can't be used, with the reason, follow.

example: nnunet-ext list --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict

from nnunet_ext import aims, registry
from nnunet_ext.cli.terminal import wrapped
from nnunet_ext.registry import Entry

SCHEDULES = (
    "Schedules: every trainer here, and nnUNetTrainer, takes a suffix [_<N>epochs][_<M>iters][_NoMirroring], "
    "e.g. -tr nnUNetTrainer_20epochs_50iters: N epochs of M training iterations."
)
HOW = (
    "Under the aims a block's first word is for nnUNetv2_train -tr, with the plans -p that nnUNetv2_plan_experiment "
    "-pl makes; rival: nnU-Net's own way to the same aim. All trainers but the cascade's also take plans that you have "
    "(-p nnUNetPlans): the same patch."
)
NNUNET_PLANS = "nnUNetPlans"  # what nnU-Net's default planner writes
_RESEARCH = "research switches: variants of the above, for comparisons"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nnunet-ext list``."""
    parser.add_argument("--json", action="store_true", help="print the records as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the names; return the exit status."""
    names = Names()
    print(json.dumps(names.records(), indent=2) if args.json else "\n".join(names.lines()))
    return 0


class Names:
    """All that is registered, and which planners and plans belong to which trainers."""

    def __init__(self) -> None:
        self.entries = [entry for kind in registry.KINDS for entry in registry.entries(kind)]
        self.usable = {(entry.kind, entry.name): entry for entry in self.entries if not entry.refused}
        # Planner -> trainer and name of plans, "" where it does not say.
        self.planned = {name: _planned(entry) for (kind, name), entry in self.usable.items() if kind == "planners"}

    def records(self) -> list[dict[str, object]]:
        """Of each entry, with its aims, planners and plans."""
        return [{**asdict(entry), "summary": registry.summary(entry), **self._belongs(entry)} for entry in self.entries]

    def _belongs(self, entry: Entry) -> dict[str, list[str]]:
        method, planners = self._method(entry), self._planners(entry)
        return {
            "aim": list(method.aims) if method else [aims.OTHER] * (entry.kind != "architectures"),
            "recommended": list(method.recommended) if method and entry.kind == "trainers" else [],
            "planner": list(planners),
            "plans": [plans for plans in planners.values() if plans] or [NNUNET_PLANS] * bool(method),
        }

    def _method(self, entry: Entry) -> aims.Method | None:
        """What an entry is for, a planner as the trainer that it plans for."""
        if not _is_ours(entry) or entry.kind == "architectures":
            return None
        return aims.of(self.planned[entry.name][0] if self._plans(entry) else entry.name)

    def _plans(self, entry: Entry) -> bool:
        return entry.kind == "planners" and entry.name in self.planned

    def _planners(self, entry: Entry) -> dict[str, str]:
        """Planners that plan for a trainer, or the planner itself, with the names of their plans."""
        if self._plans(entry):
            return {entry.name: self.planned[entry.name][1]}
        return self._planning_for(entry.name) if entry.kind == "trainers" else {}

    def _planning_for(self, name: str) -> dict[str, str]:
        method = aims.of(name)
        named = method.plans_of if method and method.plans_of else name
        found = {planner: plans for planner, (trainer, plans) in self.planned.items() if trainer == named}
        return dict(sorted(found.items(), key=lambda item: len(item[0])))  # variants have the longer names

    def lines(self) -> Iterator[str]:
        """Text, no line wider than the terminal."""
        for aim in aims.AIMS:
            yield f"{aim}: {aims.TITLES[aim]}"
            for method in aims.serving(aim):
                if aim in method.recommended or (aim == method.aims[0] and method.standing != "research"):
                    yield from self._block(method, method.recommended.get(aim, ""))
            yield ""
        yield _RESEARCH
        for method in aims.METHODS:
            if method.standing == "research":
                yield from self._block(method)
        for planner in filter(self.planned.get, aims.RESEARCH_PLANNERS):
            yield f"  {self.planned[planner][0]}"
            yield from wrapped(registry.summary(self.usable["planners", planner]), 4)
            yield from _options(pl=planner, p=self.planned[planner][1])
        yield ""
        yield from self._rest()
        yield from wrapped(HOW)
        yield ""
        yield from wrapped(SCHEDULES)

    def _block(self, method: aims.Method, why: str = "") -> Iterator[str]:
        """A trainer: why it is recommended, else what it is; planners and plans."""
        entry = self.usable.get(("trainers", method.trainer))
        if entry is None and method.trainer != aims.DEFAULT:
            return
        standing = "  recommended" if why else "  rival" if method.standing == "rival" else ""
        yield f"  {method.trainer}{standing}"
        yield from wrapped(why or (registry.summary(entry) if entry else "nnU-Net's own network and trainer."), 4)
        for planner, plans in self._planning_for(method.trainer).items() or [("", NNUNET_PLANS)]:
            if planner not in aims.RESEARCH_PLANNERS:
                yield from _options(pl=planner, p=plans)

    def _rest(self) -> Iterator[str]:
        """What serves no aim here: of other packages, for prediction alone, architectures, refused."""
        named = [entry for entry in self.usable.values() if entry.kind != "architectures"]
        groups = {
            aims.OTHER: [entry for entry in named if self._method(entry) is None],
            "architectures": [entry for entry in self.usable.values() if entry.kind == "architectures"],
            "refused": [entry for entry in self.entries if entry.refused],
        }
        for title, entries in groups.items():
            if not entries:
                continue
            yield title
            for entry in entries:
                yield from wrapped(f"{entry.name}  {entry.distribution}", 2)
                yield from wrapped(entry.refused or registry.summary(entry), 4)
                if self._plans(entry):
                    trainer, plans = self.planned[entry.name]
                    yield from _options(pl=entry.name, p=plans, tr=trainer)
            yield ""


def _is_ours(entry: Entry) -> bool:
    return entry.module.startswith("nnunet_ext.")


def _planned(entry: Entry) -> tuple[str, str]:
    trainer, plans = registry.planned(entry)
    return trainer or (aims.DEFAULT if _is_ours(entry) else ""), plans


def _options(**values: str) -> list[str]:
    """Options of nnU-Net's commands on one line, or on one line each where they are longer."""
    said = [f"-{option} {value}" for option, value in values.items() if value]
    line = wrapped(" ".join(said), 4)
    return line if len(line) == 1 else [piece for option in said for piece in wrapped(option, 4)]
