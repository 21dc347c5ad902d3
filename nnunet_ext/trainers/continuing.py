"""Looks at the checkpoint that a training is to continue from, before anything is taken from it.

nnU-Net chooses it by name, and PyTorch reads what is damaged without a word, or ends with words about its format. A
training from weights that are not its own looks like any other.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnunet_ext.errors import UsageError
from nnunet_ext.files import check_regular
from nnunet_ext.nnunet.checkpoints import BEST_CHECKPOINT, FINAL_CHECKPOINT, LATEST_CHECKPOINT
from nnunet_ext.trainers.unwrapped import unwrapped
from nnunet_ext.whole import check_whole, is_whole

if TYPE_CHECKING:
    from nnunet_ext.protocols import HostTrainer

# In the order in which nnU-Net looks for what `--c` continues from.
_NAMES = (FINAL_CHECKPOINT, LATEST_CHECKPOINT, BEST_CHECKPOINT)
# What nnU-Net's load_checkpoint takes from it, and what kind of thing that is.
_CONTENT: Mapping[str, type | tuple[type, ...]] = {
    "network_weights": Mapping,
    "optimizer_state": Mapping,
    "logging": Mapping,
    "init_args": Mapping,
    "current_epoch": Integral,
    "_best_ema": object,
}
_OLD = b"\x80\x02"  # a bare pickle: the format of PyTorch before 1.6, without checksums
_SHOWN = 3  # names of weights in a message


def check_continuable(path: Path, trainer: HostTrainer) -> None:
    """See that a checkpoint is whole, finite, fits the network and, in the fold's own folder, belongs to this training.

    Weights of another trainer whose network is the same are taken, as to go on with activation checkpointing; the log
    says so.

    Args:
        path: File that nnU-Net is about to load.
        trainer: Whose network is built.

    Raises:
        UsageError: names the file, what is wrong with it, and what `--c` does without it.
    """
    is_own = path.parent.resolve() == Path(trainer.output_folder).resolve()
    cure = _cure(path) if is_own else "take another one"
    content = _read(path, cure)
    if is_own and (others := _others(content, trainer)):
        raise UsageError(
            f"{path} belongs to another training ({'; '.join(others)}): {cure}. To start a new training from its "
            "weights give it to -pretrained_weights."
        )
    _check_progress(path, content, cure)
    _check_weights(path, content, trainer, cure)
    _check_optimizer(path, content, trainer, cure)
    if is_own:
        _tell_changes(path, content, trainer)
    theirs, mine = (_planned(a, "dataset_name") for a in (content["init_args"], trainer.my_init_kwargs))
    if theirs != mine:  # renamed, or another one
        trainer.print_to_log_file(f"{path} was trained on {theirs}: its training goes on with {mine}.")
    name = content.get("trainer_name")
    if name != type(trainer).__name__:
        trainer.print_to_log_file(f"{path} was written by {name}: its training goes on as {type(trainer).__name__}.")


def latest_of(path: Path, trainer: HostTrainer) -> Path:
    """Find what a training has reached: nnU-Net continues its latest checkpoint, though a best one may be newer.

    It saves the latest every ``save_every`` epochs, 50 by default, and the best whenever there is one.

    Args:
        path: File that nnU-Net is about to load, which `check_continuable` has seen.
        trainer: Who loads it.

    Returns:
        The fold's best checkpoint, where `path` is its latest and of an earlier epoch; else `path`.
    """
    best, folder = path.with_name(BEST_CHECKPOINT), Path(trainer.output_folder)
    if path.name != LATEST_CHECKPOINT or path.parent.resolve() != folder.resolve() or not best.is_file():
        return path
    try:
        reached, epoch = (_read(file, "it is not looked at")["current_epoch"] for file in (path, best))
    except UsageError as error:  # a damaged best one is no reason to stop
        trainer.print_to_log_file(f"The training goes on from {path.name}: {error}")
        return path
    if epoch <= reached:
        return path
    trainer.print_to_log_file(f"{best} is of epoch {epoch}, {path.name} of {reached}: the training goes on from it.")
    return best


def check_places(folder: Path) -> None:
    """See that no checkpoint's name in a fold's folder is taken by something else than a file.

    nnU-Net takes it for missing, and a training could not save.

    Raises:
        UsageError: one is.
    """
    for path in (folder / name for name in _NAMES):
        if path.exists() or path.is_symlink():
            check_regular(path, "move it away, nnU-Net writes a checkpoint of this name")


def _read(path: Path, cure: str) -> Mapping[str, Any]:
    """Content of a checkpoint, in which all that is needed is there."""
    try:
        is_old = path.is_file() and _starts_with(path, _OLD)
        if not is_old:
            check_whole(path)  # PyTorch does not look at checksums
        content = torch.load(path, map_location="cpu", weights_only=False, mmap=not is_old)  # as nnU-Net does next
    except Exception as error:  # whatever a damaged file makes the unpickler meet
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UsageError(f"{path} is not a whole checkpoint of nnU-Net ({reason}): {cure}.") from error
    found = content if isinstance(content, Mapping) else {}
    wrong = [key for key, kind in _CONTENT.items() if key not in found or not isinstance(found[key], kind)]
    if wrong:
        raise UsageError(f"{path} must hold what nnU-Net stores in a checkpoint, it lacks {', '.join(wrong)}: {cure}.")
    return found


def _starts_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _others(content: Mapping[str, Any], trainer: HostTrainer) -> list[str]:
    """In what a checkpoint's training is another one than this."""
    arguments, mine = content["init_args"], trainer.my_init_kwargs
    pairs = {
        "fold": (arguments.get("fold"), mine.get("fold")),
        "configuration": (arguments.get("configuration"), mine.get("configuration")),
        "plans_name": (_planned(arguments, "plans_name"), _planned(mine, "plans_name")),
    }
    others = [f"{key} {theirs}, not {own}" for key, (theirs, own) in pairs.items() if str(theirs) != str(own)]
    labels, own_labels = _labels(arguments), _labels(mine)
    moved = [key for key in labels if key in own_labels and str(labels[key]) != str(own_labels[key])]
    return others + [f"label {key} {labels[key]}, not {own_labels[key]}" for key in moved]


def _planned(arguments: Mapping[str, Any], key: str) -> Any:
    return _mapping(arguments, "plans").get(key)


def _labels(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    return _mapping(_mapping(arguments, "dataset_json"), "labels")


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What stands under a key, nothing where it is no mapping."""
    found = content.get(key)
    return found if isinstance(found, Mapping) else {}


def _tell_changes(path: Path, content: Mapping[str, Any], trainer: HostTrainer) -> None:
    """Say in the log which settings of the plans the training goes on with that it has not begun with."""
    arguments, mine = content["init_args"], trainer.my_init_kwargs
    theirs, own = (
        _mapping(_planned(a, "configurations") or {}, str(a.get("configuration"))) for a in (arguments, mine)
    )
    changed = [f"{key} {theirs[key]}, now {own[key]}" for key in theirs if key in own and theirs[key] != own[key]]
    if changed:
        trainer.print_to_log_file(f"Plans have changed since {path} was written: {'; '.join(changed)}.")


def _check_progress(path: Path, content: Mapping[str, Any], cure: str) -> None:
    """See that the moving averages of the epochs are numbers."""
    logged, best = content["logging"].get("ema_fg_dice"), content["_best_ema"]
    noted = [] if best is None else [best]
    if not isinstance(logged, list) or not all(isinstance(value, Real) for value in (*logged, *noted)):
        raise UsageError(
            f"{path} must hold a list of numbers for ema_fg_dice and a number for _best_ema, it has "
            f"{reprlib.repr(logged)} and {reprlib.repr(best)}: {cure}."
        )


def _check_weights(path: Path, content: Mapping[str, Any], trainer: HostTrainer, cure: str) -> None:
    """See that weights are those of the network, and numbers."""
    wanted = unwrapped(trainer.network).state_dict()
    weights = content["network_weights"].items()
    found = {key if key in wanted else str(key).removeprefix("module."): w for key, w in weights}
    keys = [key for key in {**wanted, **found} if not key.endswith("_extra_state")]  # which networks translate
    odd = [key for key in keys if _shape(wanted.get(key)) != _shape(found.get(key))]
    if odd:
        raise UsageError(
            f"{path} does not fit the network of {type(trainer).__name__} with these plans, it was written by "
            f"{content.get('trainer_name')} and has {len(odd)} other weights ({_named(odd)}): {cure}."
        )
    lost = [key for key, w in found.items() if isinstance(w, Tensor) and not torch.isfinite(w).all()]
    if lost:
        raise UsageError(
            f"{path} holds weights that are no numbers (NaN or infinite, in {_named(lost)}), the training has "
            f"diverged before epoch {content['current_epoch']}: {cure}."
        )


def _shape(weight: Any) -> tuple[Any, ...] | None:
    return (weight.is_floating_point(), *weight.shape) if isinstance(weight, Tensor) else None


def _check_optimizer(path: Path, content: Mapping[str, Any], trainer: HostTrainer, cure: str) -> None:
    """See that the optimiser's memory is of these weights, and numbers: otherwise its first step spoils them.

    Raises:
        UsageError: it is not.
    """
    state, own = content["optimizer_state"], [group["params"] for group in trainer.optimizer.param_groups]
    wanted, sizes = [*map(len, own)], None
    try:
        theirs = [group["params"] for group in state["param_groups"]]
        sizes = [*map(len, theirs)]
        memory = [
            (parameter, value)
            for indices, parameters in zip(theirs, own, strict=False)
            for index, parameter in zip(indices, parameters, strict=False)
            for value in state["state"].get(index, {}).values()
            if isinstance(value, Tensor)
        ]
    except (AttributeError, KeyError, TypeError):
        sizes, memory = None, []
    odd = sum(value.dim() > 0 and value.shape != parameter.shape for parameter, value in memory)
    if sizes != wanted or odd:
        raise UsageError(
            f"{path} does not fit the optimiser of {type(trainer).__name__} with these plans: it must hold the memory "
            f"of {wanted} weights in its groups, it has that of {sizes or 'none'}, {odd} of other shapes: {cure}."
        )
    lost = sum(not torch.isfinite(value).all() for _, value in memory)
    if lost:
        raise UsageError(
            f"{path} holds an optimiser's memory that is no numbers (NaN or infinite, in {lost} of {len(memory)} "
            f"tensors), its next step would spoil the weights: {cure}."
        )


def _named(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")


def _cure(path: Path) -> str:
    """What to do with a checkpoint that can't be used, and what happens then."""
    rest = (path.with_name(name) for name in _NAMES if name != path.name)
    following = next((other.name for other in rest if is_whole(other)), None)
    then = f"continues from {following}" if following else "starts a new training, there is no other whole checkpoint"
    return f"move it away, nnUNetv2_train --c then {then}"
