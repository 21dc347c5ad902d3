"""The steps of a cross-validation, and what each of them needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nnunet_ext.cluster.gathering import BestConfiguration, Comparing, Gathering
from nnunet_ext.cluster.planning import Planning
from nnunet_ext.cluster.request import CrossValidation, Method
from nnunet_ext.cluster.step import Step
from nnunet_ext.cluster.training import Training
from nnunet_ext.cluster.work import Commands, StepError
from nnunet_ext.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Reading(Step):
    """What stands for all steps of a data set whose plans or split can't be read."""

    reason: str

    def is_done(self) -> bool:
        """Never: once they can be read there is no such step."""
        return False

    def work(self, commands: Commands) -> None:
        """Say why not."""
        raise StepError(self.reason)


def make_steps(asked: CrossValidation) -> dict[str, Step]:
    """All steps by name, each after those that it needs."""
    steps: dict[str, Step] = {}
    for dataset in asked.datasets:
        try:
            own: list[Step] = [*_of_dataset(asked, dataset)]
        except UsageError as error:
            own = [Reading(asked=asked, name=f"{dataset}__read", dataset=dataset, title="read", reason=str(error))]
        for step in own:
            steps.setdefault(step.name, step)
    return steps


def _of_dataset(asked: CrossValidation, dataset: str) -> Iterator[Step]:
    before: tuple[str, ...] = ()
    for plans in dict.fromkeys(method.plans for method in asked.methods):
        chains = _chains(asked, dataset, plans)
        planning = Planning(
            asked=asked,
            name=_planning(dataset, plans),
            dataset=dataset,
            title=f"plan {plans}",
            after=before,
            plans=plans,
            configurations=tuple(dict.fromkeys(stage for chain in chains for stage in chain)),
        )
        yield planning
        before = (planning.name,)
    trainings: list[Training] = []
    for fold in asked.folds_of(dataset):
        for method in asked.methods:
            chains = _chains(asked, dataset, method.plans)
            followers = {stage: following for chain in chains for stage, following in pairwise(chain)}
            for chain in chains:
                made = list(_trainings(asked, dataset, method, chain, fold, followers))
                yield from made
                trainings.append(made[-1])
    yield from _gatherings(asked, dataset, tuple(trainings))


def _planning(dataset: str, plans: str) -> str:
    return f"{dataset}__plan__{plans}"


def _chains(asked: CrossValidation, dataset: str, plans: str) -> list[list[str]]:
    """Each configuration that is asked for after the stages before it.

    Raises:
        UsageError: they lead in a circle.
    """
    chains = []
    for configuration in asked.configurations:
        stages = [configuration]
        while (before := asked.stage_before(dataset, plans, stages[0])) is not None:
            if before in stages:
                raise UsageError(f"{plans} of {dataset}: the stages before {configuration} form a circle: plan again.")
            stages.insert(0, before)
        chains.append(stages)
    return chains


def _trainings(
    asked: CrossValidation, dataset: str, method: Method, chain: Sequence[str], fold: int, followers: Mapping[str, str]
) -> Iterator[Training]:
    """All folds of the stages before, each after all of the one before it, then the fold."""
    needs: tuple[str, ...] = (_planning(dataset, method.plans),)
    for stage in chain:
        made = [
            Training(
                asked=asked,
                name=f"{dataset}__{method.trainer}__{method.plans}__{stage}__fold_{number}",
                dataset=dataset,
                title=f"{method.trainer}, {method.plans}, {stage}, fold {number}",
                needs=needs,
                method=method,
                configuration=stage,
                fold=number,
                next_stage=followers.get(stage),
            )
            for number in ([fold] if stage == chain[-1] else asked.all_folds(dataset))
        ]
        yield from made
        needs = tuple(training.name for training in made)


def _gatherings(asked: CrossValidation, dataset: str, trainings: tuple[Training, ...]) -> Iterator[Gathering]:
    """A best configuration is one of all folds."""
    if set(asked.folds_of(dataset)) == set(asked.all_folds(dataset)):
        for method in asked.methods:
            own = tuple(training for training in trainings if training.method == method)
            yield BestConfiguration(
                asked=asked,
                name=f"{dataset}__best__{method.trainer}__{method.plans}",
                dataset=dataset,
                title=f"best configuration of {method.trainer}, {method.plans}",
                needs=tuple(training.name for training in own),
                trainings=own,
                method=method,
            )
    yield Comparing(
        asked=asked,
        name=f"{dataset}__compare",
        dataset=dataset,
        title="compare",
        needs=tuple(training.name for training in trainings),
        trainings=trainings,
    )
