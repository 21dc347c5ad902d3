"""Checkpoints that are damaged, or of another training: the error names the file, and what it says to do works."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nnunet_ext import registry
from nnunet_ext.files import sha256
from tests.faults.bench import Bench, note_end, read
from tests.faults.outcome import Outcome
from tests.faults.training import Training
from tests.faults.triggers import AtEpoch, Trigger

TRAINER = "nnUNetTrainer_8epochs_1iters"
_REACHED = 4  # epochs of the training whose checkpoint is spoiled
_FINAL, _LATEST, _BEST = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"
Spoil = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to spoil a checkpoint.

    Args:
        name: In words.
        spoil: Does it.
        words: What the error must say beside file and cure.
    """

    name: str
    spoil: Spoil
    words: str


def corruption(bench: Bench) -> Outcome:
    """Spoil the latest and the final checkpoint in each way, continue, then do what the error says."""
    outcome = Outcome()
    half, whole = bench.training(TRAINER, trigger=AtEpoch(_REACHED)), bench.training(TRAINER)
    for training in (half, whole):
        bench.run(training)
    cases = _cases(bench, half)
    if bench.is_short:
        cases = [case for case in cases if case.name in ("a bit flipped", "other plans")]
    for case in cases:
        _spoiled(bench, half, _LATEST, case, outcome)
    for case in cases[: 0 if bench.is_short else 4]:
        _spoiled(bench, whole, _FINAL, case, outcome)
        _spoiled(bench, whole, _FINAL, case, outcome, arguments=("--val",))
        _predicted(bench, whole, case, outcome)
    if not bench.is_short:
        _alone(bench, half, cases[0], outcome)
        _same_network(bench, outcome)
    return outcome


def _cases(bench: Bench, training: Training) -> list[Case]:
    draw = bench.draw
    cases = [
        Case(name="cut off", spoil=partial(_cut, share=draw.random()), words="not a whole checkpoint"),
        Case(name="empty", spoil=lambda path: path.write_bytes(b""), words="not a whole checkpoint"),
        Case(name="a bit flipped", spoil=partial(_flip, draw=draw), words="not a whole checkpoint"),
        Case(name="a folder in its place", spoil=_folder, words="must be a file"),
        Case(name="weights that are NaN", spoil=partial(_changed, change=_nan), words="diverged"),
        Case(name="other plans", spoil=partial(_changed, change=_other_plans), words="plans_name"),
        Case(name="a pickle of something else", spoil=_pickle, words="not a whole checkpoint"),
        Case(
            name="a list saved by PyTorch", spoil=lambda path: torch.save([1], path), words="it lacks network_weights"
        ),
        Case(name="NaN in the optimiser's memory", spoil=partial(_changed, change=_nan_memory), words="no numbers"),
        Case(name="another optimiser", spoil=partial(_changed, change=_other_optimizer), words="fit the optimiser"),
        Case(name="labels of other numbers", spoil=partial(_changed, change=_other_labels), words="another training"),
    ]
    cases += [
        Case(
            name=f"without {key}",
            spoil=partial(_changed, change=lambda content, key=key: content.pop(key)),
            words=f"it lacks {key}",
        )
        for key in ("network_weights", "optimizer_state", "logging", "_best_ema", "current_epoch", "init_args")
    ]
    if not bench.is_short:
        fold = bench.training(TRAINER, fold=1, trigger=AtEpoch(2))
        bench.run(fold)
        cases.append(Case(name="another fold", spoil=partial(_copy, fold.folder / _LATEST), words="fold 1, not 0"))
        other = _of_another_network(bench, training.folder / _LATEST)
        cases.append(Case(name="another trainer", spoil=partial(_copy, other), words="does not fit the network"))
    return cases


def _of_another_network(bench: Bench, mine: Path) -> Path:
    """A checkpoint of a registered trainer whose network has other weights."""
    for name in registry.names("trainers"):
        training = bench.training(f"{name}_2epochs_1iters", trigger=AtEpoch(1))
        bench.run(training)
        path = training.folder / _LATEST
        if path.is_file() and read(path)["network_weights"].keys() != read(mine)["network_weights"].keys():
            return path
    raise RuntimeError("all registered trainers have the same network")


def _spoiled(
    bench: Bench, like: Training, name: str, case: Case, outcome: Outcome, arguments: tuple[str, ...] = ("--c",)
) -> None:
    fault = f"{case.name} {name} {arguments[0]}"
    training = _copied(bench, like)
    path = training.folder / name
    case.spoil(path)
    before = _sums(training.folder)
    told = len(training.told())
    ended = bench.run(replace(training, arguments=arguments, validates=True))
    outcome.injected[f"{name}: {case.name}"] += 1
    note_end(ended, outcome, fault)
    is_folder_of_validation = path.is_dir() and arguments == ("--val",)  # for nnU-Net it is not finished
    words = ("not finished",) if is_folder_of_validation else (name, "move it away", case.words)
    if ended.status == 0 or not all(word in ended.last_line for word in words):
        outcome.problem("unclear", f"{fault}: {ended.last_line or ended.status}")
    if any("begins" in note for note in training.told()[told:]):
        outcome.problem("silently wrong", f"{fault}: it trained")
    if _sums(training.folder) != before:
        outcome.problem("files left", f"{fault}: checkpoints changed")
    if path.exists():  # else it has trained to its end
        path.rename(path.with_name("away"))
        _cured(bench, training, outcome, fault)
    bench.tidy(training)


def _cured(bench: Bench, training: Training, outcome: Outcome, fault: str) -> None:
    """Continue from what is left, as the error says."""
    best, told = training.folder / _BEST, len(training.told())
    reached = read(best)["current_epoch"] if best.exists() else 0
    ended = bench.run(training)
    (training.folder / "away").rename(training.results / "away")
    bench.check_begin(training, told, reached, outcome, fault)
    bench.check_end(training, ended, outcome, fault)


def _alone(bench: Bench, like: Training, case: Case, outcome: Outcome) -> None:
    """The same where no other checkpoint is there: the training starts anew only when the user has moved it away."""
    training = _copied(bench, like)
    (training.folder / _BEST).unlink()
    case.spoil(training.folder / _LATEST)
    ended = bench.run(training)
    fault = f"{case.name} {_LATEST}, no other"
    outcome.injected[fault] += 1
    if ended.status == 0 or "then starts a new training" not in ended.last_line:
        outcome.problem("unclear", f"{fault}: {ended.last_line}")
    (training.folder / _LATEST).rename(training.folder / "away")
    _cured(bench, training, outcome, fault)
    bench.tidy(training)


def _same_network(bench: Bench, outcome: Outcome) -> None:
    """A checkpoint of another trainer with the same network is taken, and the log says so."""
    other = bench.training("nnUNetTrainer_9epochs_1iters", trigger=AtEpoch(_REACHED))
    bench.run(other)
    training = bench.training(TRAINER)
    training.folder.mkdir(parents=True)
    shutil.copy(other.folder / _LATEST, training.folder)
    ended = bench.run(training)
    outcome.injected[f"{_LATEST}: another schedule"] += 1
    begun = [note["begins"] for note in training.told() if "begins" in note]
    if ended.status or "was written by nnUNetTrainer_9epochs_1iters" not in ended.text or begun[:1] != [_REACHED]:
        outcome.problem("unclear", f"another schedule: {ended.last_line}")


def _predicted(bench: Bench, like: Training, case: Case, outcome: Outcome) -> None:
    """What nnU-Net's own prediction, which loads without a trainer, makes of it: told, not judged."""
    training = _copied(bench, like)
    case.spoil(training.folder / _FINAL)
    ended = bench.run(partial(training.predict, bench.folder / "predicted"))
    said = ended.last_line.replace(str(bench.folder), "")[:120]
    outcome.observed[f"nnUNetv2_predict, final {case.name}: status {ended.status}, {said}"] += 1
    bench.tidy(training)


def _copied(bench: Bench, like: Training) -> Training:
    training = replace(bench.training(like.trainer), trigger=Trigger())
    shutil.copytree(like.results, training.results, dirs_exist_ok=True)
    shutil.copy(like.notes, training.notes)
    return training


def _sums(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.glob("checkpoint_*.pth") if path.is_file()}


def _cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def _flip(path: Path, draw: Any) -> None:
    """Flip a bit of the weights, which make up most of the file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * (0.1 + 0.8 * draw.random()))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _copy(source: Path, path: Path) -> None:
    shutil.copy(source, path)


def _pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"network_weights": {}}))


def _changed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = read(path)
    change(content)
    torch.save(content, path)


def _nan_memory(content: dict[str, Any]) -> None:
    memory = next(iter(content["optimizer_state"]["state"].values()))
    memory["momentum_buffer"].view(-1)[0] = float("nan")


def _other_optimizer(content: dict[str, Any]) -> None:
    content["optimizer_state"]["param_groups"][0]["params"].pop()


def _other_labels(content: dict[str, Any]) -> None:
    labels = content["init_args"]["dataset_json"]["labels"]
    labels.update({name: number + 1 for name, number in labels.items() if number})


def _nan(content: dict[str, Any]) -> None:
    next(iter(content["network_weights"].values())).view(-1)[0] = float("nan")


def _other_plans(content: dict[str, Any]) -> None:
    content["init_args"]["plans"].update(plans_name="nnUNetOtherPlans")
