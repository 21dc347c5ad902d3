"""SIGKILL at moments of a training, most of them while it saves; each training is killed again as it continues.

Which moment is drawn from the seed. Those that a process meets by itself are the same each time; those that come from
outside are so many seconds after an epoch has begun. The short suite has only the former.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from nnunet_ext import registry
from tests.faults.bench import Bench, Undisturbed, note_end
from tests.faults.outcome import Outcome
from tests.faults.processes import Child
from tests.faults.training import Training
from tests.faults.triggers import AtByte, AtCall, AtTick, Trigger

TRAINER = "nnUNetTrainer_8epochs_1iters"
_STEPS = 12  # on files, in which a checkpoint is saved; two more than there are


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill.

    Args:
        what: Its kind, as it is counted.
        where: More precisely.
        trigger: For a process that ends itself.
        rank: Which one.
        delay: Seconds after the first epoch of this run, where it is ended from outside.
        whole_group: Whether all processes are ended at once.
    """

    what: str
    where: str = ""
    trigger: Trigger
    rank: int = 0
    delay: float | None = None
    whole_group: bool = False


@dataclass(frozen=True, kw_only=True)
class Victims:
    """Trainings of one kind that are killed.

    Args:
        name: Of the kind.
        options: Of `Training`.
        draw: Draws the next kill.
        wanted: How many kills, in the short and in the whole suite.
        is_repeatable: Whether the training has the same weights each time.
    """

    name: str
    options: dict[str, Any]
    draw: Callable[[Bench, Undisturbed], Kill]
    wanted: tuple[int, int]
    is_repeatable: bool = True


def kills(bench: Bench) -> Outcome:
    """Kill trainings of one process, of one with augmentation processes, and of two ranks."""
    outcome = Outcome()
    for victims in VICTIMS:
        wanted = victims.wanted[0 if bench.is_short else 1]
        done = 0
        while done < wanted:
            done += _chain(bench, victims, wanted - done, outcome)
    return outcome


def registered(bench: Bench) -> Outcome:
    """Kill a training of each registered trainer."""
    outcome = Outcome()
    for name in registry.names("trainers"):
        _registered(bench, name, outcome)
    return outcome


def _registered(bench: Bench, name: str, outcome: Outcome) -> None:
    """Kill a training of a registered trainer twice, where it trains on default plans at all."""
    trainer = f"{name}_3epochs_1iters"
    try:
        bench.undisturbed(trainer)
    except RuntimeError:  # it needs plans or a stage of its own, or only predicts
        outcome.observed[f"{name}: does not train on default plans"] += 1
        return
    victims = Victims(name="registered trainers", options={}, draw=_saving, wanted=(0, 2))
    _chain(bench, victims, 2, outcome, trainer)


def _chain(bench: Bench, victims: Victims, most: int, outcome: Outcome, trainer: str = TRAINER) -> int:
    """Kill one training again and again until it has ended or `most` kills took place; return how many did."""
    like = bench.undisturbed(trainer, victims.options.get("ranks", 1))
    training = bench.training(trainer, **victims.options)
    done, reached, fault = 0, 0, "none"
    while done < most:
        kill = victims.draw(bench, like)
        fault = f"{victims.name}: {kill.what} {kill.where}, {trainer}"
        before = len(training.told())
        ended = _killed(bench, replace(training, trigger=kill.trigger, rank=kill.rank), kill)
        bench.check_begin(training, before, reached, outcome, fault)
        if not ended.status:  # it was faster than the kill
            bench.check_end(training, ended, outcome, fault, victims.is_repeatable)
            outcome.observed["training ended before its kill"] += 1
            break
        if not _is_killed(ended.text, ended.status):
            outcome.problem("unrecoverable", f"{fault}: ended with {ended.status}: {ended.last_line}")
        done += 1
        outcome.injected[f"{victims.name}: {kill.what}"] += 1
        note_end(ended, outcome, fault)
        reached = bench.check(training, outcome, fault) if training.folder.exists() else 0
    else:
        bench.finish(training, outcome, fault, victims.is_repeatable)
    bench.tidy(training)
    return done


def _is_killed(text: str, status: int) -> bool:
    """Whether a run ended by the kill, or, of ranks, because another one was killed."""
    return status < 0 or "ProcessExitedException" in text or "ProcessRaisedException" in text


def _killed(bench: Bench, training: Training, kill: Kill) -> Any:
    child = Child(training, bench.log())
    if kill.delay is not None:
        before = len(training.told())
        child.wait(60, lambda: len(training.told()) > before)
        child.wait(kill.delay)
        child.kill(whole_group=kill.whole_group)
    return child.end(120)


def _drawn_save(bench: Bench, like: Undisturbed) -> Iterator[Kill]:
    """Kills while a checkpoint is saved, of one process or of the first rank."""
    draw = bench.draw
    save = draw.randrange(4)
    size = int(like.size * draw.random())
    yield Kill(what="at a byte of a checkpoint", where=f"{size} of save {save}", trigger=AtByte(save, size))
    at = draw.choice([save, save, None])
    tick = 1 + draw.randrange(_STEPS if at is not None else 2 * _STEPS)
    where = f"{tick} of {'the end' if at is None else f'save {at}'}"
    yield Kill(what="at a step of a save", where=where, trigger=AtTick(at, tick))


def _saving(bench: Bench, like: Undisturbed) -> Kill:
    """A kill while one of the first two checkpoints is saved."""
    draw = bench.draw
    size, tick, save = int(like.size * draw.random()), 1 + draw.randrange(_STEPS - 2), draw.randrange(2)
    byte = Kill(what="at a byte of a checkpoint", where=f"{size} of save {save}", trigger=AtByte(save, size))
    step = Kill(what="at a step of a save", where=f"{tick} of save {save}", trigger=AtTick(save, tick))
    return draw.choice([byte, step])


def _alone(bench: Bench, like: Undisturbed) -> Kill:
    """A kill of a training of one process."""
    draw = bench.draw
    call = 1 + draw.randrange(like.calls)
    anywhere = Kill(what="at a call", where=str(call), trigger=AtCall(call))
    delay = 0.4 * draw.random()
    late = Kill(what="from outside", where=f"after {delay:.3f} s", trigger=Trigger(), delay=delay)
    byte, step = _drawn_save(bench, like)
    return draw.choice([byte, step, step, byte, anywhere, *([] if bench.is_short else [late])])


def _augmented(bench: Bench, like: Undisturbed) -> Kill:
    """A kill of a training with augmentation processes."""
    draw = bench.draw
    delay, whole_group = 0.4 * draw.random(), draw.random() < 0.5
    what = "whole group from outside" if whole_group else "main process from outside"
    late = Kill(what=what, where=f"after {delay:.3f} s", trigger=Trigger(), delay=delay, whole_group=whole_group)
    byte, step = _drawn_save(bench, like)
    return draw.choice([byte, step, *([] if bench.is_short else [late, late])])


def _ranks(bench: Bench, like: Undisturbed) -> Kill:
    """A kill of one of two ranks, of the process that has started them, or of all."""
    draw = bench.draw
    delay, whole_group = 0.5 * draw.random(), draw.random() < 0.5
    what = "whole group from outside" if whole_group else "starting process from outside"
    late = Kill(what=what, where=f"after {delay:.3f} s", trigger=Trigger(), delay=delay, whole_group=whole_group)
    call = 1 + draw.randrange(400_000)
    second = Kill(what="second rank at a call", where=str(call), trigger=AtCall(call), rank=1)
    byte, step = (replace(kill, what=f"first rank {kill.what}") for kill in _drawn_save(bench, like))
    return draw.choice([byte, step, byte, step, *([] if bench.is_short else [late, second])])


VICTIMS = (
    Victims(name="one process", options={}, draw=_alone, wanted=(4, 130)),
    Victims(name="with workers", options={"workers": 2}, draw=_augmented, wanted=(0, 40), is_repeatable=False),
    Victims(name="two ranks", options={"ranks": 2}, draw=_ranks, wanted=(1, 50)),
)
