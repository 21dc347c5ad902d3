"""Training of meU-net's cascade: two meU-nets in turn in stage 1, an ordinary step in stage 2.

Wang, Blackie, Miguel-Aliaga, Bai 2022, "Memory-efficient Segmentation of High-resolution Volumetric MicroCT Images"
(MIDL). Different from the paper: one trainer for both stages, told apart by the plans, as nnU-Net's cascade wants it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from batchgeneratorsv2.transforms.nnunet.random_binary_operator import ApplyRandomBinaryOperatorTransform
from batchgeneratorsv2.transforms.nnunet.remove_connected_components import (
    RemoveRandomConnectedComponentFromOneHotEncodingTransform,
)
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor, nn

from nnunet_ext.architectures.expanded.partial_pass import ExpandedPass
from nnunet_ext.architectures.expanded.patch import Size, divisors, expanded_patch, standard_patch
from nnunet_ext.trainers.me_unet import MeUNetTrainerMixin, plan_standard_patch
from nnunet_ext.trainers.passes import InTurn
from nnunet_ext.trainers.priors import first_stage
from nnunet_ext.trainers.several_gpus import is_first
from nnunet_ext.trainers.unwrapped import unwrapped


@dataclass(frozen=True)
class Branch:
    """One meU-net of the dual network.

    Args:
        network: The branch itself.
        whole: What the standard pass calls, compiled where nnU-Net compiles.
        expanded: Its expanded pass.
        patch: Its expanded patch.
    """

    network: nn.Module
    whole: Any
    expanded: ExpandedPass
    patch: Size


class MeCascadeTrainerMixin(MeUNetTrainerMixin):
    """Both stages of meU-net's cascade for trainers; place it before nnUNetTrainer.

    Stage 1, a configuration without ``previous_stage``: `DualMeUNet`. The plans' patch is the larger expanded patch;
    each branch takes meU-net's two passes on its own centre of it, one branch after the other, so that memory is
    that of the larger branch. Gradients are clipped branch by branch: two trainings in one.

    Stage 2, a configuration with ``previous_stage``: `PostConcatUNet`, nnU-Net's own step at the plans' patch.

    Attributes:
        k: Ratio of the plans' patch to the standard patch, where the plans do not say it: that of the larger branch.
        branch_ks: Size of each branch's expanded patch over the standard patch they share.
        one_pass: Train each branch on its expanded patch at full resolution, as if it were nnU-Net's own network.
        augment_prior: Erode, dilate and remove objects of the prior at random in stage 2, as nnU-Net's cascade does. A
            network that often sees a thin structure without its prior learns to do without: it then labels whatever
            looks like it. The paper does not augment its cascade.
    """

    k: float | Sequence[float] = 1.75
    branch_ks: Sequence[float] = (1.5, 1.75)
    one_pass = False
    augment_prior = False

    @classmethod
    def training_form(cls, network: Any, configuration: ConfigurationManager) -> nn.Module:
        """What a training step runs as one module, for `nnunet-ext benchmark`."""
        if configuration.previous_stage_name is not None:
            return network
        plan_standard_patch(configuration, cls.k)  # says what does not fit
        divisor = divisors(configuration.pool_op_kernel_sizes, len(configuration.patch_size))
        k = configuration.configuration.get("me_unet", {}).get("k", cls.k)

        def standard(patch: Sequence[int]) -> Size:
            return standard_patch(patch, k, divisor)

        def expanded(branch_k: float) -> Callable[[Sequence[int]], Size]:
            return lambda patch: expanded_patch(standard(patch), branch_k, divisor, patch)

        return InTurn(network, standard, [expanded(branch_k) for branch_k in cls.branch_ks], cls.one_pass)

    @classmethod
    def branch_patches(cls, configuration: ConfigurationManager, standard: Size) -> list[Size]:
        """Expanded patch of each branch: k P, at most the plans' patch, in steps of what the strides divide."""
        patch = tuple(configuration.patch_size)
        divisor = divisors(configuration.pool_op_kernel_sizes, len(patch))
        return [expanded_patch(standard, k, divisor, patch) for k in cls.branch_ks]

    def initialize(self) -> None:
        """Initialise as nnU-Net does; stage 1 prepares its branches."""
        if self.is_cascaded:
            self.is_expanded = False
            super(MeUNetTrainerMixin, self).initialize()
            return
        super().initialize()
        self.is_expanded = True  # also where no patch is: the branches train apart

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """Make nnU-Net's data sets; stage 2 checks the prior of each of their cases."""
        datasets = super().get_tr_and_val_datasets()
        if self.is_cascaded:
            self._check_priors(*datasets)
        return datasets

    @classmethod
    def get_training_transforms(cls, *arguments: Any, **options: Any) -> Any:
        """nnU-Net's augmentation; `augment_prior` says whether that of the prior is part of it."""
        composed = super().get_training_transforms(*arguments, **options)
        if not cls.augment_prior:
            composed.transforms = [t for t in composed.transforms if not _changes_prior(t)]
        return composed

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate as nnU-Net does; stage 2 without a training before (``--val``) checks its priors."""
        if self.is_cascaded and self.dataloader_val is None:
            _, keys = self.do_split()
            self._check_priors(
                self.dataset_class(self.preprocessed_dataset_folder, keys, self.folder_with_segs_from_previous_stage)
            )
        super().perform_actual_validation(save_probabilities)

    def _check_priors(self, *datasets: Any) -> None:
        stage = first_stage(self)
        stage.check_labels(self.dataset_json)
        stage.check(datasets, self.label_manager.foreground_labels, read=is_first(self))

    def prepare_passes(self, network: Any) -> None:
        """Tell the network of regions, and prepare its branches."""
        network.regions = self.label_manager.has_regions
        sizes = self.branch_patches(self.configuration_manager, self.standard_patch)
        self.branches = [
            Branch(
                branch, torch.compile(branch) if self._do_i_compile() else branch, self.make_expanded_pass(branch), size
            )
            for branch, size in zip(network.branches, sizes, strict=True)
        ]
        self.print_to_log_file(f"Dual meU-net: expanded patches {[list(size) for size in sizes]}.")

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A step of each branch in turn, as if it were the network; return the mean loss."""
        if self.is_cascaded:
            return super().train_step(batch)
        data, target = self.on_device(batch)
        return {"loss": np.mean([self._branch_step(branch, batch, data, target) for branch in self.branches])}

    def _branch_step(self, branch: Branch, batch: dict[str, Any], data: Tensor, target: Tensor) -> Any:
        """meU-net's step of one branch, not through DDP's wrapper, which waits for both branches."""
        dual = self.network
        self.network, self.expanded_pass = branch.whole, branch.expanded
        self.is_expanded = not self.one_pass and branch.patch != self.standard_patch
        hook = branch.whole.register_forward_hook(self._average_after) if self.is_ddp else None
        try:
            return super().train_step(self.centre_batch(batch, data, target, branch.patch))["loss"]
        finally:
            if hook is not None:
                hook.remove()
            self.network, self.is_expanded = dual, True

    def _average_after(self, _: nn.Module, __: Any, output: Any) -> None:
        """Average the gradients over the ranks when the backward pass of this output has ended."""
        first = output[0] if isinstance(output, (list, tuple)) else output
        queue = torch.autograd.Variable._execution_engine.queue_callback
        first.register_hook(lambda _: queue(self._average_over_ranks))

    def _average_over_ranks(self) -> None:
        """What DDP does with gradients, once they are whole, in one message."""
        gradients = [p.grad for p in unwrapped(self.network).parameters() if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)
        together /= dist.get_world_size()
        for gradient, part in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _changes_prior(transform: Any) -> bool:
    """Whether an augmentation is one that nnU-Net has for the previous stage's segmentation alone."""
    return isinstance(transform, RandomTransform) and isinstance(
        transform.transform,
        (ApplyRandomBinaryOperatorTransform, RemoveRandomConnectedComponentFromOneHotEncodingTransform),
    )
