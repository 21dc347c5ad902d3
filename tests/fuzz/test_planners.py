"""Every registered planner, and nnU-Net's own, writes plans for whatever data set that nnU-Net can train on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ext import registry
from nnunet_ext.memory import count
from nnunet_ext.memory.count import TrainingMemory
from nnunet_ext.memory.step import TrainerStep
from nnunet_ext.nnunet.setting import Setting
from tests.fuzz.datasets import DrawnDataset, datasets
from tests.fuzz.trial import check_sentence, quiet

Tally = Callable[[str, Counter[str]], None]
PLANNERS = registry.names("planners")
WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)  # planning a data set takes seconds
FEW = settings.get_current_profile_name() != "fuzz"


class RefusedError(Exception):
    """A planner says that it can't plan a data set."""


@pytest.fixture
def without_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is a number for each voxel: counting takes half a minute; data sets that train a step are counted."""

    def by_voxels(setting: Setting, trainer: str, batch_size: int, mixed: bool) -> tuple[TrainingMemory, int]:
        channels = 1.5 if setting.configuration_manager.previous_stage_name else 1.0
        size = round(2000 * channels * batch_size * prod(setting.patch_size))
        memory = TrainingMemory(parameters=0, gradients=0, optimizer=0, held=size, peak=size, workspace=0)
        return memory, 0

    monkeypatch.setattr(count, "_of_step", by_voxels)


def planned(planner: type[Any], drawn: DrawnDataset, workspace: Path, number: int) -> dict[str, Any]:
    """Plans as they lie on disk; raises `RefusedError` where the planner does so by a sentence of this package."""
    made = planner(drawn.write(workspace, number), drawn.target)
    with torch.device("meta"):  # nnU-Net's planner only counts
        try:
            content = made.plan_experiment()
        except ValueError as error:
            check_sentence(error)
            raise RefusedError(str(error)) from error
    path = workspace / "preprocessed" / made.dataset_name / f"{made.plans_identifier}.json"
    stored: dict[str, Any] = json.loads(path.read_text())
    assert content["configurations"].keys() <= stored["configurations"].keys()
    return stored


def check_plans(plans: dict[str, Any], dataset: dict[str, Any], trainer: str) -> None:
    """See that each configuration's network is built by its trainer, and takes the patch."""
    assert json.loads(json.dumps(plans)) == plans
    manager = PlansManager(plans)
    assert "2d" in manager.available_configurations
    for name in manager.available_configurations:
        configuration = manager.get_configuration(name)
        assert configuration.batch_size >= 2
        strides = configuration.network_arch_init_kwargs["strides"]
        divisors = [prod(axis) for axis in zip(*strides, strict=True)]
        patch = configuration.patch_size
        assert all(n >= 1 and n % divisor == 0 for n, divisor in zip(patch, divisors, strict=True)), (name, patch)
        setting = Setting(plans=plans, dataset=dataset, configuration=name, trusted=True)
        with torch.device("meta"):
            network = setting.builder(trainer)()
        assert sum(p.numel() for p in network.parameters()) > 0


def host_plans(drawn: DrawnDataset, workspace: Path, number: int) -> bool:
    """Whether nnU-Net's default planner can plan the data set."""
    try:
        planned(ExperimentPlanner, drawn, workspace, number)
    except Exception:  # whatever it meets
        return False
    return True


@pytest.mark.usefixtures("without_counting")
@pytest.mark.parametrize("name", PLANNERS)
def test_a_planner_plans_or_says_what_does_not_fit(
    name: str, tally: Tally, workspace: Path, unused_number: Callable[[], int]
) -> None:
    planner = registry.resolve("planners", name)
    counted: Counter[str] = Counter()

    @settings(max_examples=2 if FEW else 30, phases=WITHOUT_SHRINKING)
    @given(datasets())
    def trial(drawn: DrawnDataset) -> None:
        number = unused_number()
        with quiet():
            theirs = host_plans(drawn, workspace, number)
            try:
                plans = planned(planner, drawn, workspace, number)
            except RefusedError:
                counted["refused" if theirs else "refused by nnU-Net's planner too"] += 1
                return
            check_plans(plans, drawn.content, planner.trainer)
        counted["planned" if theirs else "planned where nnU-Net's planner fails"] += 1

    trial()
    tally(f"data sets of {name}", counted)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", PLANNERS)
def test_a_step_of_the_planned_training_runs(
    name: str, tally: Tally, workspace: Path, unused_number: Callable[[], int]
) -> None:
    planner = registry.resolve("planners", name)
    counted: Counter[str] = Counter()

    @settings(max_examples=2, phases=WITHOUT_SHRINKING)
    @given(datasets(small=True))
    def trial(drawn: DrawnDataset) -> None:
        with quiet():
            try:
                plans = planned(planner, drawn, workspace, unused_number())
            except RefusedError:
                counted["refused"] += 1
                return
            configuration = list(plans["configurations"])[-1]
            setting = Setting(plans=plans, dataset=drawn.content, configuration=configuration, trusted=True)
            losses = [loss.detach() for loss in TrainerStep(setting, planner.trainer, mixed=False).passes()]
        assert losses
        assert all(loss.isfinite() for loss in losses)
        counted["stepped"] += 1

    trial()
    tally(f"steps of plans of {name}", counted)
