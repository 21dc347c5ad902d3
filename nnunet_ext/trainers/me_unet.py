"""meU-net's training step: a large patch for the coarse levels, its centre for the full network.

Wang, Blackie, Miguel-Aliaga, Bai 2022, "Memory-efficient Segmentation of High-resolution Volumetric MicroCT Images"
(MIDL). Different from the paper: the two losses go backward one after the other, so that the peak is the larger of
both and not their sum; gradients are the same, because instance norm has no statistics across patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor, nn

from nnunet_ext.architectures.expanded.partial_pass import ExpandedPass, centre_crop, downsample_labels
from nnunet_ext.architectures.expanded.patch import Size, divisors, standard_patch
from nnunet_ext.trainers.autocast import without_cache
from nnunet_ext.trainers.finite_steps import or_nan
from nnunet_ext.trainers.passes import TwoPasses
from nnunet_ext.trainers.softmax_weighted_ce import Form, weight_classes
from nnunet_ext.trainers.unwrapped import unwrapped

if TYPE_CHECKING:
    from nnunet_ext.protocols import HostTrainer
else:
    HostTrainer = object


class MeUNetTrainerMixin(HostTrainer):
    """Two-pass training step for trainers; place it before nnUNetTrainer.

    The plans' patch is the expanded patch kP; loading, augmentation and prediction are nnU-Net's own. One step:

        1. kP: ``w L(level-2 logits)``, gradient for levels 2 and coarser, backward
        2. P, the centre of kP: ``(1 - w) L(logits)``, the full network, nnU-Net's loss, backward
        3. one clip, one step of the optimiser

    Attributes:
        k: Size of kP over that of P, one number or one per axis, where the plans do not say it.
        expanded_weight: Weight w of the expanded pass.
        expanded_deep_supervision: Whether the expanded patch supervises all levels from the second on, with
            nnU-Net's weights, and not only the second.
        softmax_weighted: Weight rare classes up in the cross-entropy of all passes: True, or which form of
            `SoftmaxWeightedCrossEntropy`.
    """

    k: float | Sequence[float] = 1.5
    expanded_weight = 0.5
    expanded_deep_supervision = False
    softmax_weighted: bool | Form = False

    @classmethod
    def training_form(cls, network: nn.Module, configuration: ConfigurationManager) -> nn.Module:
        """Both passes as one module, for `nnunet-ext benchmark`."""
        patch = tuple(configuration.patch_size)
        if plan_standard_patch(configuration, cls.k) == patch:
            return network
        divisor = divisors(configuration.pool_op_kernel_sizes, len(patch))
        k = configuration.configuration.get("me_unet", {}).get("k", cls.k)
        return TwoPasses(network, lambda size: standard_patch(tuple(size), k, divisor))

    def initialize(self) -> None:
        """Initialise as nnU-Net does; check the patches before."""
        self.standard_patch = plan_standard_patch(self.configuration_manager, self.k)
        super().initialize()
        self.is_expanded = self.standard_patch != tuple(self.configuration_manager.patch_size)
        self.prepare_passes(unwrapped(self.network))
        self.print_to_log_file(
            f"meU-net: expanded patch {list(self.configuration_manager.patch_size)}, standard patch "
            f"{list(self.standard_patch)}"
            + ("." if self.is_expanded else ": nothing is expanded, so this is nnU-Net's own training step.")
        )

    def _build_loss(self) -> nn.Module:
        """nnU-Net's loss, its classes weighted where asked for."""
        loss: nn.Module = super()._build_loss()
        if self.softmax_weighted:
            weight_classes(loss, self.softmax_weighted)
        return loss

    def prepare_passes(self, network: nn.Module) -> None:
        """Keep what the training step runs in addition to the network itself.

        Args:
            network: Network without the wrappers of DDP and torch.compile.
        """
        self.expanded_pass = self.make_expanded_pass(network)

    def make_expanded_pass(self, network: nn.Module) -> ExpandedPass:
        """Make the expanded pass of a network, compiled where nnU-Net compiles."""
        expanded = ExpandedPass(network, self.expanded_deep_supervision)
        if self._do_i_compile():
            expanded.compile_levels()
        return expanded

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's own step on the standard patch, with the gradients of the expanded one added before."""
        if not self.is_expanded:
            return super().train_step(batch)
        data, target = self.on_device(batch)
        with self._joined(data, target):
            result: dict[str, Any] = super().train_step(self.centre_batch(batch, data, target, self.standard_patch))
        return result

    def on_device(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Images and labels at full resolution; the coarser labels follow from these."""
        target = batch["target"]
        target = target[0] if isinstance(target, list) else target
        return batch["data"].to(self.device, non_blocking=True), target.to(self.device, non_blocking=True)

    def centre_batch(self, batch: dict[str, Any], data: Tensor, target: Tensor, size: Size) -> dict[str, Any]:
        """What nnU-Net's loader would give for the centre of a patch."""
        data, target = (centre_crop(x, size) for x in (data, target))
        levels = [downsample_labels(target, s) for s in self._level_strides()]
        labels = levels if isinstance(batch["target"], list) else target
        return {"whole_patch": batch["data"], **batch, "data": data, "target": labels}

    @contextmanager
    def _joined(self, data: Tensor, target: Tensor) -> Iterator[None]:
        """nnU-Net's step in here is that of the joint loss.

        Its `zero_grad` comes first, then this hook, then its forward pass. Not through DDP's wrapper: like a pass
        under `no_sync`, the expanded one adds to the gradients of this rank, which DDP averages in the standard pass
        (tests/trainers/test_me_unet_ddp.py).
        """
        loss, weight = self.loss, self.expanded_weight

        def expand(*_: Any) -> None:
            hook.remove()  # the expanded pass runs a copy of the network, with its hooks
            expanded = self._backward_expanded(data, target)
            self.loss = lambda output, labels: or_nan((1 - weight) * loss(output, labels) + expanded)

        hook = self.network.register_forward_pre_hook(expand)
        try:
            yield
        finally:
            hook.remove()
            self.loss = loss

    def _backward_expanded(self, data: Tensor, target: Tensor) -> Tensor:
        """Forward and backward pass of the expanded patch; return its weighted loss, detached."""
        with without_cache(self.device):
            loss = self.expanded_weight * self.expanded_loss(self.expanded_pass(data), target)
        with torch.autocast(self.device.type, enabled=False):  # as nnU-Net
            (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()
        return loss.detach()

    def expanded_loss(self, output: Any, target: Tensor) -> Tensor:
        """The same loss of level 2, or of all levels from the second on; `target` at full resolution."""
        loss = self.loss.loss if isinstance(self.loss, DeepSupervisionWrapper) else self.loss
        _, *strides = self._level_strides()
        if not isinstance(output, (list, tuple)):
            return loss(output, downsample_labels(target, strides[0]))
        weights = np.array([1 / 2**i for i in range(len(strides))])
        weights[1:][-1:] = 0  # as in nnU-Net, not the coarsest, unless it is the only one
        return DeepSupervisionWrapper(loss, weights / weights.sum())(
            output, [downsample_labels(target, s) for s in strides]
        )

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Validate at kP sample by sample: a full batch could need more memory than the training step."""
        # Under DDP ranks may hold different numbers of samples, and would wait for each other in the Dice loss.
        if not self.is_expanded or self.is_ddp:
            return super().validation_step(batch)
        found = [super(MeUNetTrainerMixin, self).validation_step(sample) for sample in _samples(batch)]
        sums = {key: sum(result[key] for result in found) for key in found[0]}
        return {**sums, "loss": sums["loss"] / len(found)}

    def _level_strides(self) -> list[list[int]]:
        """Strides from the patch to each level that has a head, finest first."""
        return np.cumprod(self.configuration_manager.pool_op_kernel_sizes, axis=0)[:-1].tolist()


def plan_standard_patch(configuration: ConfigurationManager, default_k: float | Sequence[float]) -> Size:
    """The standard patch of a configuration.

    Args:
        configuration: Its ``me_unet`` holds k, and `MeUNetPlanner` writes ``standard_patch_size``.
        default_k: Size of kP over that of P where the configuration has none.

    Raises:
        ValueError: k, the patch or the stages do not fit, or k and the noted standard patch contradict each other.
    """
    noted = configuration.configuration.get("me_unet", {})
    patch = tuple(configuration.patch_size)
    divisor = divisors(configuration.pool_op_kernel_sizes, len(patch))
    k = noted.get("k", default_k)
    size = standard_patch(patch, k, divisor)
    if tuple(noted.get("standard_patch_size", size)) != size:
        raise ValueError(
            f"The plans note the standard patch {noted['standard_patch_size']}, but the patch {list(patch)} over k = "
            f"{k} gives {list(size)}: correct one of them, or remove standard_patch_size."
        )
    return size


def _samples(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """A batch for each sample."""

    def one(x: Any, i: int) -> Any:
        return [one(entry, i) for entry in x] if isinstance(x, list) else x[i : i + 1]

    parts = [key for key in ("data", "target", "keys") if batch.get(key) is not None]
    return [{key: one(batch[key], i) for key in parts} for i in range(len(batch["data"]))]
