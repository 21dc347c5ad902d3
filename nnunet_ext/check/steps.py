"""The steps of a training and a prediction, each followed by what nnU-Net relies on and never says."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nnunet_ext.check.phantom import PLANS, DataKind, write, write_teacher
from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.printable import counted
from nnunet_ext.protocols import HasTeacher

CPU = torch.device("cpu")
CHECKPOINT = "checkpoint_final.pth"
_NAMED = 3  # weights that a row names
_REBUILD = (
    "let build_network_architecture return the network as it is trained: prediction calls neither __init__ nor "
    "initialize of the trainer"
)
_RESTORE = "let load_checkpoint call nnU-Net's own"
_SEE = "see the traceback: repeat the command with --verbose"
_IGNORE = (
    "give the loss self.label_manager.ignore_label as nnUNetTrainer._build_loss does, or raise NotImplementedError "
    "with a sentence where self.label_manager.has_ignore_label"
)


class ContractError(Exception):
    """What a step found wrong, and the cure, each in one line."""

    def __init__(self, detail: str, cure: str) -> None:
        super().__init__(detail)
        self.cure = cure


@dataclass
class Trial:
    """What the steps of one case hand on.

    Args:
        name: Name of the trainer, as after ``-tr``.
        case: Kind of data set.
        dataset: Name of the data set, from the first step on.
        trainer: From the first step on.
        losses: What the training and the validation step returned.
    """

    name: str
    case: DataKind
    dataset: str = ""
    trainer: Any = None
    losses: dict[str, Any] = field(default_factory=dict)

    def new_trainer(self) -> Any:
        """Make the trainer as `nnUNetv2_train` does."""
        configuration = self.case.setting.configuration
        return get_trainer_from_args(self.dataset, configuration, 0, self.name, PLANS, device=CPU)

    def image(self, *size: int) -> Tensor:
        """A random image of this size, or of that of a patch: (channels of the network, *size)."""
        return torch.randn(self.trainer.num_input_channels, *(size or self.case.patch))

    @property
    def heads(self) -> int:
        """Channels of the network's output."""
        return int(self.trainer.label_manager.num_segmentation_heads)


def build(run: Trial) -> str:
    """nnU-Net's own search and the network of the plans."""
    try:
        run.dataset = write(run.case)
    except UsageError as error:
        raise ContractError(str(error), "name a folder with free space by TMPDIR") from error
    if isinstance(trainer_class(run.name), HasTeacher):
        write_teacher(run.dataset, run.case.setting.configuration, [0])
    run.trainer = run.new_trainer()
    run.trainer.initialize()
    network = run.trainer.network
    return f"{type(network).__name__}, {counted(sum(p.numel() for p in network.parameters()), 'weight')}"


def output(run: Trial) -> str:
    """What the network returns in eval mode, with and without deep supervision."""
    trainer, image = run.trainer, run.image()[None]
    trainer.network.eval()
    scales = trainer._get_deep_supervision_scales()
    with torch.no_grad():
        if scales is not None:
            trainer.set_deep_supervision_enabled(True)
            _check_levels(run, trainer.network(image), scales)
        trainer.set_deep_supervision_enabled(False)
        found = _shapes(trainer.network(image))
        trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    wanted = (1, run.heads, *run.case.patch)
    if found != wanted:
        raise ContractError(
            f"without deep supervision the network returns {found}, nnU-Net needs one tensor of shape {wanted}",
            "return logits of the patch's size while decoder.deep_supervision is False, or override "
            "set_deep_supervision_enabled",
        )
    levels = "" if scales is None else f", {counted(len(scales), 'level')} in training"
    return f"logits of shape {wanted}{levels}"


def _check_levels(run: Trial, outputs: Any, scales: list[list[float]]) -> None:
    sizes = [tuple(round(n * s) for n, s in zip(run.case.patch, scale, strict=True)) for scale in scales]
    wanted, found = [(1, run.heads, *size) for size in sizes], _shapes(outputs)
    # A validation step of its own may take something else.
    if found != wanted and type(run.trainer).validation_step is nnUNetTrainer.validation_step:
        raise ContractError(
            f"with deep supervision the network returns {found}, nnU-Net's loss needs a list of {wanted}",
            "return one tensor for each level, the largest first, while decoder.deep_supervision is True, or set "
            "enable_deep_supervision = False in the trainer's initialize, before nnU-Net's own",
        )


def _shapes(outputs: Any) -> Any:
    if isinstance(outputs, (list, tuple)):
        return [_shapes(entry) for entry in outputs]
    return tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__


def training_step(run: Trial) -> str:
    """One step of the optimiser on patches of nnU-Net's loader: gradients and weights."""
    trainer = run.trainer
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    _supervise_all_levels(trainer.loss)
    weights = {name: p for name, p in trainer.network.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in weights.items()}
    gradients: dict[str, Tensor | None] = {}
    hook = trainer.optimizer.register_step_pre_hook(  # of several steps, as of a cascade's branches, any that has one
        lambda *_: gradients.update(
            {name: gradients.get(name) if p.grad is None else p.grad for name, p in weights.items()}
        )
    )
    run.losses["train"] = trainer.train_step(next(trainer.dataloader_train))
    hook.remove()
    loss = float(np.mean(run.losses["train"]["loss"]))
    _check_finite("loss", loss)
    if not gradients:
        raise ContractError("train_step never steps the optimizer", "call self.optimizer.step() in train_step")
    _check_weights(trainer, gradients)
    if all(torch.equal(before[name], p) for name, p in weights.items()):
        raise ContractError(
            "no weight changes", "see whether the optimizer has the network's parameters and a learning rate"
        )
    return f"loss {loss:.3f}, the gradients of {counted(len(gradients), 'weight tensor')} are finite"


def _supervise_all_levels(loss: Any) -> None:
    """Give the coarsest level the weight that nnU-Net gives it in distributed training; else it is zero."""
    for wrapper in loss.modules() if isinstance(loss, nn.Module) else ():
        if isinstance(wrapper, DeepSupervisionWrapper):
            wrapper.weight_factors = tuple(weight or 1e-6 for weight in wrapper.weight_factors)


def _check_weights(trainer: Any, gradients: dict[str, Tensor | None]) -> None:
    if missing := [name for name, gradient in gradients.items() if gradient is None]:
        raise ContractError(
            f"no gradient for {_named(missing)}",
            "use it in forward, or freeze it (requires_grad = False): distributed training stops at such a weight",
        )
    if broken := [name for name, g in gradients.items() if g is not None and not g.isfinite().all()]:
        raise ContractError(
            f"the gradient is not finite for {_named(broken)}", "look for a division, a root or a logarithm of 0"
        )
    stepped = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    if left := [name for name, p in trainer.network.named_parameters() if p.requires_grad and id(p) not in stepped]:
        raise ContractError(
            f"the optimizer does not have {_named(left)}",
            "give configure_optimizers all parameters, or freeze those (requires_grad = False)",
        )


def _named(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _check_finite(what: str, value: float) -> None:
    if not np.isfinite(value):
        raise ContractError(f"the {what} is {value}", "see in which layer the first such value appears")


def validation_step(run: Trial) -> str:
    """Loss and counts of one patch; voxels with the ignore label must not matter."""
    trainer, ignored = run.trainer, ""
    trainer.on_validation_epoch_start()
    batch = _first(next(trainer.dataloader_val))
    with torch.no_grad():
        result = trainer.validation_step(deepcopy(batch))
        if run.case.ignore:
            ignored = _check_ignored(run, batch, result)
    loss = float(np.mean(result["loss"]))
    _check_finite("loss", loss)
    trainer.on_train_epoch_end([run.losses["train"]])
    trainer.on_validation_epoch_end([result])
    return f"loss {loss:.3f}{ignored}"


def _first(batch: Any) -> dict[str, Any]:
    """A batch of only the first sample."""
    target = batch["target"]
    first = [level[:1] for level in target] if isinstance(target, list) else target[:1]
    return {"data": batch["data"][:1], "target": first}


def _check_ignored(run: Trial, batch: dict[str, Any], result: dict[str, Any]) -> str:
    """Change the logits of ignored voxels: neither loss nor counts may change; return what that has shown."""
    trainer, manager = run.trainer, run.trainer.label_manager
    target = batch["target"]
    levels = target if isinstance(target, list) else [target]
    # Of regions, the last channel says what is ignored.
    masks = [level[:, -1:] > 0 if manager.has_regions else level == manager.ignore_label for level in levels]
    of_size = {tuple(mask.shape[2:]): mask for mask in masks}

    disturbed = 0

    def disturb(output: Any) -> Any:
        nonlocal disturbed
        mask = of_size.get(tuple(output.shape[2:])) if isinstance(output, Tensor) else None
        if mask is None:
            return output
        disturbed += int(mask.sum())
        return output + 3 * torch.randn_like(output) * mask

    with trainer.network.register_forward_hook(lambda _, __, outputs: tree_map(disturb, outputs)):
        other = trainer.validation_step(deepcopy(batch))
    for key, value in result.items():
        if not np.allclose(value, other[key], rtol=1e-4, atol=1e-5):
            raise ContractError(
                f"{key} depends on voxels with the ignore label ({np.round(value, 4)} and {np.round(other[key], 4)} "
                "for the same other voxels)",
                _IGNORE,
            )
    if not disturbed:
        return "; ignored voxels not checked: no call of self.network in the validation step returns logits of them"
    return ", the same whatever the ignored voxels hold"


def checkpoint(run: Trial) -> str:
    """A new trainer that loads the checkpoint is the same."""
    trainer, path = run.trainer, str(Path(run.trainer.output_folder, CHECKPOINT))
    trainer.save_checkpoint(path)
    resumed = run.new_trainer()
    resumed.load_checkpoint(path)
    mine, theirs = trainer.network.state_dict(), resumed.network.state_dict()
    if changed := [key for key in mine if not _is_same(mine[key], theirs.get(key))]:
        raise ContractError(f"loading does not restore {_named(changed)}", _RESTORE)
    if not _is_same(trainer.optimizer.state_dict(), resumed.optimizer.state_dict()):
        raise ContractError("loading does not restore the optimizer's state", _RESTORE)
    image = run.image()[None]
    wanted, again, found = (_logits(of, image) for of in (trainer, trainer, resumed))
    if not _is_close(wanted, again):
        raise ContractError("a prediction differs from call to call", "switch dropout and other noise off in eval mode")
    if not _is_close(wanted, found):
        raise ContractError(
            f"the loaded network predicts differently, by up to {float((wanted - found).abs().max()):.2g}",
            "keep all that a prediction depends on in parameters or buffers: a checkpoint holds only the state_dict",
        )
    return "weights, optimizer and prediction are the same after loading"


def _switch_to_prediction(trainer: Any) -> None:
    trainer.network.eval()
    trainer.set_deep_supervision_enabled(False)


def _logits(trainer: Any, image: Tensor) -> Tensor:
    _switch_to_prediction(trainer)
    with torch.no_grad():
        logits: Tensor = trainer.network(image)
    return logits


def _is_close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=1e-3, atol=1e-3)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return np.array_equal(one, other)


def prediction(run: Trial) -> str:
    """nnU-Net's predictor, from the model folder, on an image larger than the patch."""
    trainer = run.trainer
    first, *others = run.case.patch
    size = (first + first // 3, *others)
    image = run.image(*((2, *size) if len(size) == 2 else size))
    options = {"use_mirroring": False, "device": CPU, "perform_everything_on_device": False, "allow_tqdm": False}
    stored = nnUNetPredictor(**options)
    stored.initialize_from_trained_model_folder(trainer.output_folder_base, (0,), CHECKPOINT)
    found = stored.predict_logits_from_preprocessed_data(image)
    wanted = (run.heads, *image.shape[1:])
    if tuple(found.shape) != wanted:
        raise ContractError(
            f"the prediction has shape {tuple(found.shape)}, not {wanted}", "return logits of the patch's size"
        )
    if not found.isfinite().all():
        raise ContractError("the prediction is not finite", "keep logits below 65504: nnU-Net adds them up in float16")
    own = nnUNetPredictor(**options)  # as the validation at the end of a training
    own.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        run.name,
        None,
    )
    _switch_to_prediction(trainer)
    if not _is_close(found, own.predict_sliding_window_return_logits(image)):
        raise ContractError("predicts differently from the network that was trained", _REBUILD)
    return f"{'x'.join(map(str, size))} voxels, finite, the same as from the trained network"


class Step(NamedTuple):
    """One step.

    Args:
        title: Title for people.
        run: Does it and returns what it found right; raises `ContractError` for what is wrong.
        cure: Cure of any other error that it raises.
        goes_on: Whether the next step makes sense after a failure.
        cure_of_ignore: Cure where the data set has the ignore label, if it is another one.
    """

    title: str
    run: Callable[[Trial], str]
    cure: str
    goes_on: bool = False
    cure_of_ignore: str = ""


STEPS = (
    Step("build", build, f"keep the parameters of nnUNetTrainer's methods; {_SEE}"),
    Step("output", output, f"take a batch (B, C, *patch) in forward; {_SEE}"),
    Step(
        "training step",
        training_step,
        f"run nnUNetTrainer's train_step and loss on the outputs; {_SEE}",
        cure_of_ignore=f"{_IGNORE}; {_SEE}",
    ),
    Step("validation step", validation_step, _SEE, goes_on=True, cure_of_ignore=f"{_IGNORE}; {_SEE}"),
    Step("checkpoint", checkpoint, f"let save_checkpoint call nnU-Net's own, {_RESTORE}; {_SEE}", goes_on=True),
    Step("prediction", prediction, _REBUILD, goes_on=True),
)
