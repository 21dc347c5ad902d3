"""Which row to take: what the figures of the aim say, nnU-Net's own network where the difference is small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nnunet_ext import aims
from nnunet_ext.advise.records import DEFAULT_PLANNER, Advice, Row
from nnunet_ext.errors import UsageError
from nnunet_ext.memory.tracker import GIB

SMALL = 0.1  # difference that default nnU-Net is not left for
UNSHOWN = 0.5  # the same of the best own network, for methods whose accuracy has not been shown


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The row to take, the best one of nnU-Net's own networks, and the best one of all; they may be the same."""

    row: Row
    own: Row | None
    best: Row


def choose(advice: Advice) -> Choice:
    """Take the best for the aim; of rows as good as that default nnU-Net, then its own network, then the cheapest.

    As good is what lacks less than a tenth: of the best one's coverage, else of what default nnU-Net needs. For context
    and memory nnU-Net's own networks are left only where the best of them lacks half, as their accuracy is known.

    Raises:
        UsageError: nothing fits the GPU.
    """
    able = [row for row in advice.rows if advice.fits(row) and not row.is_research and _serves(row, advice.aim)]
    if not able:
        raise UsageError(_too_small(advice))
    best = min(able, key=advice.value)
    whole = abs(advice.value(best if advice.aim == "context" else advice.default))
    own = [row for row in able if row.has_own_weights]
    nearest = min(own, key=advice.value, default=None)
    if advice.aim in ("context", "memory") and nearest is not None and not nearest.is_default:
        able = own if advice.value(nearest) - advice.value(best) <= UNSHOWN * whole else able
    least = min(map(advice.value, able))
    near = [row for row in able if advice.value(row) - least <= SMALL * whole]
    row = min(near, key=lambda row: (not row.is_default, not row.has_own_weights, *_cost(advice, row)))
    return Choice(row=row, own=nearest, best=best)


def _serves(row: Row, aim: aims.Aim) -> bool:
    """In the memory of the same patch only what trains all levels on it."""
    return aim != "memory" or row.standard_patch is None


def _cost(advice: Advice, row: Row) -> tuple[float, float, int]:
    """What decides between rows that are equally good for the aim."""
    in_use = advice.aim in ("size", "speed")
    time = advice.prediction(row)[0] if in_use else advice.step(row)
    return time, advice.value(row), row.parameters_deployed


def _too_small(advice: Advice) -> str:
    planned = [row for row in advice.rows if not row.reason]
    if not planned:
        return f"no method trains {advice.configuration} of {advice.dataset} in {advice.target:g} GB: enlarge --gpu."
    least = min(planned, key=lambda row: row.expected)
    return (
        f"no method trains {advice.configuration} of {advice.dataset} in {advice.target:g} GB, the least is "
        f"{least.expected / GIB:.1f} GB ({least.trainer}): enlarge --gpu."
    )


def reasons(advice: Advice, choice: Choice) -> Iterator[str]:
    """Sentences on why this one, what it costs, and what is not known of it."""
    row = choice.row
    if row.is_default:
        yield _stay(advice, choice)
        yield from _beyond(advice, choice)
        return
    beside = "" if advice.aim == "speed" else f"; default nnU-Net {_does(advice, advice.default)}"
    yield f"It {_does(advice, row)}{beside}{_too_large(advice)}."
    yield _step(advice, row)
    if row.has_own_weights:
        yield "Network, weights and training are nnU-Net's own, whose accuracy is published for its default patch."
        yield from _beyond(advice, choice)
        return
    yield (
        "Its accuracy at nnU-Net's full schedule has not been shown (docs/methods): compare it with nnUNetTrainer on "
        "your data (nnunet-ext compare)."
    )
    if choice.own is not None and not choice.own.is_default:
        yield f"Of nnU-Net's own networks the best here is {label(choice.own)}: it {_does(advice, choice.own)}."


def _stay(advice: Advice, choice: Choice) -> str:
    default = advice.default
    if default.coverage == 1 and advice.aim == "context":
        return "Its patch covers a typical image already, and it fits the card: a larger one gains nothing."
    unproven = list(_beyond(advice, choice))
    others = [row for row in advice.rows if advice.fits(row) and not row.is_default]
    others = [row for row in others if row.has_own_weights or not unproven]
    if not others:
        return "Nothing else fits the card."
    best = min(others, key=advice.value)
    which = "No network of known accuracy" if unproven else "Nothing"
    return f"{which} is better by a tenth: {label(best)} {_does(advice, best)}, itself it {_does(advice, default)}."


def _beyond(advice: Advice, choice: Choice) -> Iterator[str]:
    """The best of all, where it is better by a tenth than the network of known accuracy that was taken."""
    best, whole = choice.best, abs(advice.value(choice.best if advice.aim == "context" else advice.default))
    if not best.has_own_weights and advice.value(choice.row) - advice.value(best) > SMALL * whole:
        yield (
            f"{label(best)} {_does(advice, best)}, but its accuracy at nnU-Net's full schedule has not been shown "
            "(docs/methods): compare it before you rely on it."
        )


def _does(advice: Advice, row: Row) -> str:
    """What a row does for the aim."""
    if advice.aim == "context":
        return f"covers {row.coverage:.1%} of a typical image with a patch"
    if advice.aim == "memory":
        return f"trains the patch {'x'.join(map(str, row.patch))} in {row.expected / GIB:.1f} GB"
    if advice.aim == "size":
        return f"ships {row.parameters_deployed / 1e6:.2f} M weights"
    time, is_measured = advice.prediction(row)
    how = "measured on a CPU" if is_measured else "predicted from operations"
    return f"predicts a typical image in {time:.2f} times the time of default nnU-Net, {how}"


def _too_large(advice: Advice) -> str:
    default = advice.default
    return "" if advice.fits(default) else f", which needs {default.expected / GIB:.1f} GB and does not fit"


def _step(advice: Advice, row: Row) -> str:
    known = row.measured_step
    on_gpu = "" if known is None else f"; on one H100 it took {known:.1f} times as long on the same patch"
    return f"A training step has {advice.step(row):.2g} times the operations of default nnU-Net's{on_gpu}."


def label(row: Row) -> str:
    """Trainer and planner."""
    return (
        f"{row.trainer} on nnU-Net's own plans"
        if row.planner == DEFAULT_PLANNER
        else f"{row.trainer} with {row.planner}"
    )
