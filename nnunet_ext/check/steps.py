"""The steps of a training and a prediction, each followed by what nnU-Net relies on and never says."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from nnunet_ext.check.phantom import PLANS, DataKind

CPU = torch.device("cpu")
CHECKPOINT = "checkpoint_final.pth"
_NAMED = 3  # weights that a row names


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
        dataset: Name of the data set.
        trainer: From the first step on.
        losses: What the training and the validation step returned.
    """

    name: str
    case: DataKind
    dataset: str
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
    run.trainer = run.new_trainer()
    run.trainer.initialize()
    network = run.trainer.network
    return f"{type(network).__name__}, {sum(p.numel() for p in network.parameters())} weights"


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
    return f"logits of shape {wanted}" + ("" if scales is None else f", {len(scales)} levels in training")


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
    hook = trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: p.grad for name, p in weights.items()})
    )
    run.losses["train"] = trainer.train_step(next(trainer.dataloader_train))
    hook.remove()
    loss = float(np.mean(run.losses["train"]["loss"]))
    _check_finite("loss", loss)
    if not gradients:
        raise ContractError(
            "train_step never steps the optimizer", "call self.optimizer.step() in train_step"
        )
    _check_weights(trainer, gradients)
    if all(torch.equal(before[name], p) for name, p in weights.items()):
        raise ContractError(
            "no weight changes", "see whether the optimizer has the network's parameters and a learning rate"
        )
    return f"loss {loss:.3f}, all {len(gradients)} weights have finite gradients"


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
            f"the gradient is not finite for {_named(broken)}",
            "look for a division, a root or a logarithm of 0",
        )
    stepped = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    if left := [
        name for name, p in trainer.network.named_parameters() if p.requires_grad and id(p) not in stepped
    ]:
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
    trainer = run.trainer
    trainer.on_validation_epoch_start()
    batch = _first(next(trainer.dataloader_val))
    with torch.no_grad():
        result = trainer.validation_step(deepcopy(batch))
        if run.case.ignore:
            _check_ignored(run, batch, result)
    loss = float(np.mean(result["loss"]))
    _check_finite("loss", loss)
    trainer.on_train_epoch_end([run.losses["train"]])
    trainer.on_validation_epoch_end([result])
    return f"loss {loss:.3f}" + (", the same whatever the ignored voxels hold" if run.case.ignore else "")


def _first(batch: Any) -> dict[str, Any]:
    """A batch of the first sample alone."""
    target = batch["target"]
    first = [level[:1] for level in target] if isinstance(target, list) else target[:1]
    return {"data": batch["data"][:1], "target": first}


def _check_ignored(run: Trial, batch: dict[str, Any], result: dict[str, Any]) -> None:
    """Change the logits of ignored voxels: neither loss nor counts may change."""
    trainer, manager = run.trainer, run.trainer.label_manager
    target = batch["target"]
    levels = target if isinstance(target, list) else [target]
    # Of regions, the last channel says what is ignored.
    masks = [level[:, -1:] > 0 if manager.has_regions else level == manager.ignore_label for level in levels]
    of_size = {tuple(mask.shape[2:]): mask for mask in masks}

    def disturb(_: nn.Module, __: Any, outputs: Any) -> Any:
        if isinstance(outputs, (list, tuple)):
            return type(outputs)(disturb(_, __, entry) for entry in outputs)
        mask = of_size.get(tuple(outputs.shape[2:])) if isinstance(outputs, Tensor) else None
        return outputs if mask is None else outputs + 3 * torch.randn_like(outputs) * mask

    with trainer.network.register_forward_hook(disturb):
        other = trainer.validation_step(deepcopy(batch))
    for key, value in result.items():
        if not np.allclose(value, other[key], rtol=1e-4, atol=1e-5):
            raise ContractError(
                f"{key} depends on voxels with the ignore label ({np.round(value, 4)} and {np.round(other[key], 4)} "
                "for the same other voxels)",
                IGNORE,
            )


def checkpoint(run: Trial) -> str:
    """A trainer made anew that loads the checkpoint is the same."""
    trainer, path = run.trainer, str(Path(run.trainer.output_folder, CHECKPOINT))
    trainer.save_checkpoint(path)
    resumed = run.new_trainer()
    resumed.load_checkpoint(path)
    mine, theirs = trainer.network.state_dict(), resumed.network.state_dict()
    if changed := [key for key in mine if not torch.equal(mine[key], theirs[key])]:
        raise ContractError(
            f"loading does not restore {_named(changed)}", "let load_checkpoint call nnU-Net's own"
        )
    if not _is_same(trainer.optimizer.state_dict(), resumed.optimizer.state_dict()):
        raise ContractError(
            "loading does not restore the optimizer's state", "let load_checkpoint call nnU-Net's own"
        )
    image = run.image()[None]
    wanted, again, found = (_logits(of, image) for of in (trainer, trainer, resumed))
    if not _is_close(wanted, again):
        raise ContractError(
            "a prediction differs from call to call", "switch dropout and other noise off in eval mode"
        )
    if not _is_close(wanted, found):
        raise ContractError(
            f"the loaded network predicts differently, by up to {float((wanted - found).abs().max()):.2g}",
            "keep all that a prediction depends on in parameters or buffers: a checkpoint holds the state_dict alone",
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
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def prediction(run: Trial) -> str:
    """nnU-Net's predictor, from the model folder, on an image larger than the patch."""
    trainer = run.trainer
    longest, *others = run.case.patch
    size = (longest + longest // 3, *others)
    image = run.image(*((2, *size) if len(size) == 2 else size))
    options = {
        "use_mirroring": False,
        "device": CPU,
        "perform_everything_on_device": False,
        "allow_tqdm": False,
    }
    stored = nnUNetPredictor(**options)
    stored.initialize_from_trained_model_folder(trainer.output_folder_base, (0,), CHECKPOINT)
    found = stored.predict_logits_from_preprocessed_data(image)
    wanted = (run.heads, *image.shape[1:])
    if tuple(found.shape) != wanted:
        raise ContractError(
            f"the prediction has shape {tuple(found.shape)}, not {wanted}",
            "return logits of the patch's size",
        )
    if not found.isfinite().all():
        raise ContractError(
            "the prediction is not finite", "keep logits below 65504: nnU-Net adds them up in float16"
        )
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


_REBUILD = (
    "let build_network_architecture alone give the network that a checkpoint loads into: prediction calls neither "
    "__init__ nor initialize of the trainer"
)
IGNORE = (
    "give the loss self.label_manager.ignore_label as nnUNetTrainer._build_loss does, or raise NotImplementedError "
    "with a sentence where self.label_manager.has_ignore_label"
)
SEE = "see the traceback: repeat the command with --verbose"
# Title, step, cure of an error that it raises, whether the next step makes sense after a failure.
STEPS: tuple[tuple[str, Callable[[Trial], str], str, bool], ...] = (
    ("build", build, "keep the parameters of nnUNetTrainer's methods; " + SEE, False),
    ("output", output, "take a batch (B, C, *patch) in forward; " + SEE, False),
    (
        "training step",
        training_step,
        "run nnUNetTrainer's train_step and loss on the outputs; " + SEE,
        False,
    ),
    ("validation step", validation_step, SEE, True),
    ("checkpoint", checkpoint, "let save_checkpoint and load_checkpoint call nnU-Net's own; " + SEE, True),
    ("prediction", prediction, _REBUILD, True),
)
