"""What must hold before a report may say that one run is better than another, and what it may say then.

A difference between two networks says something of them only where both were trained to the end, alike. So every report
begins with these checks; a verdict on two runs is given only where both pass all of them, or the user named the failing
ones as meant (`accepted`), which the report says in its first line.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, prod
from typing import Literal, get_args

import numpy as np

from nnunet_ext.comparison.accuracy import MEAN, Comparand, Evaluation
from nnunet_ext.comparison.checks import contradictory
from nnunet_ext.comparison.run_folders import Run
from nnunet_ext.comparison.statistics import Verdict, verdict
from nnunet_ext.comparison.training import Training
from nnunet_ext.nnunet.training_log import TURNED, Curves, TrainingLog

Name = Literal[
    "trainings", "checkpoint", "schedule", "curve", "iterations", "augmentation", "voxels", "folds", "data", "baseline"
]
NAMES: tuple[Name, ...] = get_args(Name)
ITERATIONS = 250_000  # of nnU-Net's own schedule
SHARE = 0.1  # of it, below which no network counts as trained
RISE = 0.01  # Dice of the validation patches between the last two tenths of a training that has flattened
LEARNED = 0.5  # mean Dice of the baseline from which on it counts as trained
LOST = 0.1  # mean Dice of a structure below which a run has failed, where another run reaches `LEARNED`
_FEWEST_SEEN = 3  # cases of a structure, below which nobody has failed who does not find it
_FEWEST_EPOCHS = 20  # whose tenths are means of two
UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that must hold.

    Args:
        name: What `--accept` calls it.
        title: What tables call it.
        rule: What must hold, as the start of a sentence.
        values: Run -> text of what was found.
        failing: Runs for which it does not hold, whatever the other run.
        keys: Run -> what must be the same in both runs; without those of which it is not known.
    """

    name: Name
    title: str
    rule: str
    values: Mapping[str, str]
    failing: frozenset[str] = frozenset()
    keys: Mapping[str, Hashable] = field(default_factory=dict)

    def failures(self, run: str, baseline: str) -> tuple[str, ...]:
        """The runs of the two to name, because it does not hold; none where it does."""
        if run in self.keys and baseline in self.keys and self.keys[run] != self.keys[baseline]:
            return baseline, run
        return tuple(label for label in (baseline, run) if label in self.failing)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """All checks of a comparison.

    Args:
        checks: In the order of a report.
        margin: Loss of Dice that does not matter, in Dice points; None: nobody chose one.
        accepted: Names of checks that may fail, as the user said.
        failed: Run -> why it counts as failed.
    """

    checks: tuple[Check, ...]
    margin: float | None
    accepted: frozenset[str]
    failed: Mapping[str, str]

    def reasons(self, pairs: Iterable[tuple[str, str]], accepted: bool = False) -> list[str]:
        """Why nothing may be said of pairs of run and baseline; with `accepted` what was accepted in them."""
        found = []
        for check in self.checks:
            if (check.name in self.accepted) != accepted:
                continue
            labels = dict.fromkeys(label for pair in pairs for label in check.failures(*pair))
            if labels:
                found.append(f"{check.rule} ({'; '.join(f'{label}: {check.values[label]}' for label in labels)})")
        return found

    def judge(self, evaluation: Evaluation, found: Comparand) -> Verdict | None:
        """What may be said of a difference in Dice; None of other metrics.

        Args:
            evaluation: Its evaluation.
            found: The difference.
        """
        if found.metric != "Dice":
            return None
        if self.margin is None or self.reasons([found.pair]):
            return Verdict(None)
        failed = [self.failed[label] for label in found.pair if label in self.failed]
        if failed:
            return Verdict(None, failed[0])
        if found.structure is not MEAN and not any(evaluation.finds(run, found.structure) for run in found.pair):
            return Verdict(None, "found by neither")
        return verdict(found.difference, found.p_holm, self.margin / 100)

    def first_line(self, evaluations: Sequence[Evaluation]) -> str:
        """What the report says before all else: whether there are verdicts, and why not."""
        means = [(e, c) for e in evaluations for c in e.comparands if c.metric == "Dice" and c.structure is MEAN]
        if not means:
            return "One run: nothing is compared."
        pairs = [c.pair for _, c in means]
        why = self.reasons(pairs)
        why += [] if self.margin is not None else ["no margin was chosen (--margin)"]
        judged = [(e.name, c.run, self.judge(e, c) or Verdict(None)) for e, c in means]
        why += [f"{name}, {run}: {v.note}" for name, run, v in judged if v.word is None and v.note]
        sentences = []
        if any(v.word for _, _, v in judged):
            points = f"{self.margin:g} Dice point{'' if self.margin == 1 else 's'}"
            sentences.append(f"Verdicts by the margin of {points} that --margin gives.")
            sentences += [f"Not on all: {'; '.join(dict.fromkeys(why))}."] if why else []
        else:
            sentences.append(f"No verdict: {'; '.join(dict.fromkeys(why))}.")
        meant = self.reasons(pairs, accepted=True)
        if not why and not meant:
            sentences.insert(0, "All checks hold.")
        return " ".join([*sentences, *([f"Accepted by --accept: {'; '.join(meant)}."] if meant else [])])


def gate(
    runs: Sequence[Run],
    trainings: Mapping[str, Training],
    evaluations: Sequence[Evaluation],
    *,
    margin: float | None = None,
    accepted: Iterable[str] = (),
) -> Gate:
    """Check what a comparison rests on.

    Args:
        runs: Trained models; may be empty where only predictions are compared.
        trainings: Label -> what its run logged.
        evaluations: Their accuracy.
        margin, accepted: See `Gate`.
    """
    labels = evaluations[0].labels
    known = {label: trainings.get(label, Training({})) for label in labels}
    named = {run.label: run for run in runs}
    of_runs = _of_trainings(known) + _of_settings(named, labels) if runs else []
    return Gate(
        checks=(_known(known), *of_runs, _data(evaluations, named), _baseline(evaluations)),
        margin=margin,
        accepted=frozenset(accepted),
        failed=_failed(evaluations, known),
    )


def _known(trainings: Mapping[str, Training]) -> Check:
    """Trainings of which nothing is known; the other checks then don't say the same again."""
    unknown = frozenset(label for label, training in trainings.items() if not training.is_known)
    return Check(
        name="trainings",
        title="training",
        rule="the trainings must be known: keep checkpoints beside validations, name the models of predictions by -m",
        values={label: UNKNOWN if label in unknown else "known" for label in trainings},
        failing=unknown,
    )


def _of_trainings(trainings: Mapping[str, Training]) -> list[Check]:
    lengths = {label: _length(list(t.logs.values())) for label, t in trainings.items()}
    rises = {label: _rise(t) for label, t in trainings.items()}
    known = [label for label, t in trainings.items() if t.is_known]
    other = frozenset(label for label, t in trainings.items() if t.other_checkpoint)
    return [
        Check(
            name="checkpoint",
            title="validated checkpoint",
            rule="validations must be of the final checkpoint",
            values={label: "perhaps another" if label in other else "final" for label in trainings},
            failing=other,
        ),
        Check(
            name="schedule",
            title=f"iterations, share of nnU-Net's {ITERATIONS:,}",
            rule=f"trainings must be finished and have at least {SHARE:.0%} of nnU-Net's {ITERATIONS:,} iterations",
            values={label: _shown_length(trainings[label], length) for label, length in lengths.items()},
            failing=frozenset(label for label in known if _is_short(trainings[label], lengths[label])),
        ),
        Check(
            name="curve",
            title="learning curve in its last tenth",
            rule="learning curves must have flattened",
            values={label: _shown_rise(rise) for label, rise in rises.items()},
            failing=frozenset(label for label in known if not abs(rises[label]) < RISE),
        ),
        Check(
            name="iterations",
            title="iterations of each fold",
            rule="runs must have equal iterations",
            values={
                label: UNKNOWN if n is None else " to ".join(f"{i:,}" for i in sorted(set(n)))
                for label, n in lengths.items()
            },
            keys={label: _by_fold(trainings[label]) for label in known},
        ),
        _augmentation(trainings, known),
    ]


def _length(logs: Sequence[TrainingLog]) -> tuple[int, int] | None:
    """Fewest and most iterations of the folds; None where one is not known."""
    trained = [log.trained for log in logs]
    numbers = [n for n in trained if n is not None]
    return (min(numbers), max(numbers)) if numbers and len(numbers) == len(trained) else None


def _by_fold(training: Training) -> tuple[tuple[str, int | None], ...]:
    return tuple(sorted((fold, log.trained) for fold, log in training.logs.items()))


def _is_short(training: Training, length: tuple[int, int] | None) -> bool:
    if length is None or any(log.epochs is None or log.is_unfinished for log in training.logs.values()):
        return True
    return length[0] < SHARE * ITERATIONS


def _shown_length(training: Training, length: tuple[int, int] | None) -> str:
    if length is None:
        return UNKNOWN
    unfinished = ", unfinished" if any(log.is_unfinished for log in training.logs.values()) else ""
    unfinished = ", of unknown epochs" if any(log.epochs is None for log in training.logs.values()) else unfinished
    return f"{100 * length[0] / ITERATIONS:.3g} %{unfinished}"


def _rise(training: Training) -> float:
    """Rise of the folds' mean Dice of validation patches from the last tenth but one to the last; NaN: not known."""
    curves = [curve.dice for curve in training.curves.values()]
    epochs = min(map(len, curves), default=0)
    if epochs < _FEWEST_EPOCHS:
        return -np.inf if epochs else np.nan
    tenth = epochs // 10
    mean = np.mean([dice[:epochs] for dice in curves], axis=0)
    return float(mean[-tenth:].mean() - mean[-2 * tenth : -tenth].mean())


def _shown_rise(rise: float) -> str:
    if np.isnan(rise):
        return UNKNOWN
    if not isfinite(rise):
        return f"fewer than {_FEWEST_EPOCHS} epochs"
    points = round(100 * rise, 1) + 0.0  # without a negative zero
    return f"{points:+.1f} Dice points".replace("-", "\N{MINUS SIGN}")


def _augmentation(trainings: Mapping[str, Training], known: Sequence[str]) -> Check:
    """Releases of batchgeneratorsv2 before and after `TURNED` rotate differently."""
    eras = {label: frozenset(log.is_turned for log in t.logs.values()) for label, t in trainings.items()}
    return Check(
        name="augmentation",
        title="batchgeneratorsv2",
        rule=f"augmentation must be the same: batchgeneratorsv2 before {TURNED} or from it on",
        values={label: _shown_augmentation(t) for label, t in trainings.items()},
        failing=frozenset(label for label in known if len(eras[label]) != 1 or None in eras[label]),
        keys={label: eras[label] for label in known},
    )


def _shown_augmentation(training: Training) -> str:
    by_date = {True: f"{TURNED} or later, by date", False: f"before {TURNED}, by date", None: UNKNOWN}
    shown = (log.augmentation or by_date[log.is_turned] for log in training.logs.values())
    return " and ".join(dict.fromkeys(shown)) or UNKNOWN


def _of_settings(runs: Mapping[str, Run], labels: Sequence[str]) -> list[Check]:
    voxels = {label: _voxels(runs[label]) for label in labels}
    trained_on = frozenset(label for label in labels if "all" in runs[label].folds)
    return [
        Check(
            name="voxels",
            title="voxels of an iteration",
            rule="runs must see equal voxels in an iteration",
            values={label: UNKNOWN if n is None else _shown_voxels(runs[label]) for label, n in voxels.items()},
            failing=frozenset(label for label, n in voxels.items() if n is None),
            keys={label: n for label, n in voxels.items() if n is not None},
        ),
        Check(
            name="folds",
            title="folds",
            rule="runs must have the same folds, which hold their cases back"
            if trained_on
            else "runs must have the same folds",
            values={label: " ".join(runs[label].folds) for label in labels},
            failing=trained_on,
            keys={label: runs[label].folds for label in labels},
        ),
    ]


def _voxels(run: Run) -> int | None:
    patch, batch = run.settings.get("patch_size"), run.settings.get("batch_size")
    return int(prod(patch) * batch) if patch and batch else None


def _shown_voxels(run: Run) -> str:
    patch = "x".join(map(str, run.settings["patch_size"]))
    return f"{_voxels(run):,} ({run.settings['batch_size']} of {patch})"


def _data(evaluations: Sequence[Evaluation], runs: Mapping[str, Run]) -> Check:
    """Cases, folds that validate them, and their references; the report's warnings name those that differ."""
    labels = evaluations[0].labels
    names = {label: str(runs[label].plans.get("dataset_name", UNKNOWN)) if label in runs else "" for label in labels}
    odd = frozenset(label for e in evaluations for label in contradictory(e.compared))
    keys = {label: (names[label], *(_references(e, label) for e in evaluations)) for label in labels}
    shown = {label: names[label] or "the same references" for label in labels}
    return Check(
        name="data",
        title="data set, splits, references",
        rule="runs must have the same data set, splits and references, and Dice of their counts, see below",
        values={label: f"{text}, edited Dice" if label in odd else text for label, text in shown.items()},
        failing=odd,
        keys=keys,
    )


def _references(evaluation: Evaluation, label: str) -> tuple[tuple[str, str, str, str], ...]:
    """Case, structure, fold and voxels of the reference of all rows of a run."""
    own = evaluation.compared[evaluation.compared["run"] == label].sort_values(["case", "structure"])
    voxels = (own["TP"] + own["FN"]).astype(str)
    return tuple(zip(own["case"], own["structure"], own["fold"].astype(str), voxels, strict=True))


def _baseline(evaluations: Sequence[Evaluation]) -> Check:
    """Mean Dice of the baselines: what has not learned is no baseline."""
    labels = evaluations[0].labels
    dice = {label: min((e.mean(label).mean for e in evaluations), key=_or_none) for label in labels}
    return Check(
        name="baseline",
        title="mean Dice",
        rule=f"a baseline must reach a mean Dice of {LEARNED:g}",
        values={label: f"{value:.3f}" if isfinite(value) else "not defined" for label, value in dice.items()},
        failing=frozenset(b for e in evaluations for b in e.baselines if not dice[b] >= LEARNED),
    )


def _or_none(dice: float) -> float:
    return dice if isfinite(dice) else -1.0


def _failed(evaluations: Sequence[Evaluation], trainings: Mapping[str, Training]) -> dict[str, str]:
    """Runs whose training diverged, or that lack a structure that another run has learned or finds."""
    failed = {
        label: f"the loss of {label} is not finite"
        for label, training in trainings.items()
        if not all(_converged(curves) for curves in training.curves.values())
    }
    for evaluation in evaluations:
        for structure in evaluation.structures:
            if evaluation.present(structure) < _FEWEST_SEEN:
                continue
            dice = {label: evaluation.mean(label, "Dice", structure).mean for label in evaluation.labels}
            finding = {label: evaluation.finds(label, structure) for label in evaluation.labels}
            if any(finding.values()):
                failed |= {r: f"{r} never finds {structure}" for r, finds in finding.items() if not finds}
            if any(value >= LEARNED for value in dice.values()):
                lost = {r: value for r, value in dice.items() if value < LOST and finding[r]}
                failed |= {r: f"{r} has a Dice of {value:.3f} in {structure}" for r, value in lost.items()}
    return failed


def _converged(curves: Curves) -> bool:
    """Whether both losses are finite in the last tenth of the epochs."""
    losses = (curves.training_loss, curves.validation_loss)
    return all(loss and all(map(isfinite, loss[-max(1, len(loss) // 10) :])) for loss in losses)
