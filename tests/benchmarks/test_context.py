"""The phantom that needs context: its rows, and the plans that give them their patches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import context
from benchmarks.context import FIRST, HOST, LARGE_PLANS, PLANS, PRE_PLANS, ROWS, SECOND
from nnunet_ext import aims


def test_rows_are_told_apart_and_train_registered_trainers() -> None:
    assert len({row.key for row in ROWS}) == len({row.name for row in ROWS}) == len(ROWS)
    assert {row.trainer for row in ROWS} <= set(aims.BY_TRAINER)
    seen: set[str] = set()
    for row in ROWS:
        assert row.configuration != SECOND or row.trainer in seen
        seen |= {row.trainer} if row.configuration == FIRST else set()


@pytest.fixture
def plans(tmp_path: Path) -> dict[str, Any]:
    """What `write_plans` makes of a planner's, by name."""
    configuration = {"architecture": {"arch_kwargs": {}}}
    made = {name: json.loads(json.dumps(configuration)) for name in (HOST, FIRST, SECOND)}
    (tmp_path / f"{PLANS}.json").write_text(json.dumps({"plans_name": PLANS, "configurations": made}))
    context.write_plans(tmp_path)
    return {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in (PLANS, PRE_PLANS, LARGE_PLANS)}


def test_plans_give_each_row_its_patch_and_its_concatenation(plans: dict[str, Any]) -> None:
    assert [found["plans_name"] for found in plans.values()] == list(plans)
    hosts = {name: found["configurations"][HOST] for name, found in plans.items()}
    assert {name: host["patch_size"] for name, host in hosts.items()} == {
        PLANS: [16] * 3,
        PRE_PLANS: [16] * 3,
        LARGE_PLANS: [28] * 3,
    }
    assert {host["batch_size"] for host in hosts.values()} == {2}
    assert ["me_unet" in host for host in hosts.values()] == [False, False, True]
    first = plans[PLANS]["configurations"][FIRST]
    assert (first["patch_size"], first["me_unet"]["standard_patch_size"]) == ([28] * 3, [16] * 3)
    fusions = [found["configurations"][SECOND]["architecture"]["arch_kwargs"]["fusion"] for found in plans.values()]
    assert fusions == ["post", "pre", "post"]
