"""The decoder of networks whose stages are reversible and whose levels are joined in different ways."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nnunet_ext.architectures.reversible.mixed_precision import convolve
from nnunet_ext.architectures.reversible.recomputation import uncompiled
from nnunet_ext.architectures.reversible.stages import CouplingSpec, ReversiblePlan, StageSpec


class StagedDecoder(nn.Module):
    """Stages from the coarsest to the finest: a transition up, joined with the skip, couplings, a head.

    Args:
        num_classes: Channels of the logits.
        plan: Arguments of the plans.
        stages: Stages of the network, finest first.
        coupling: How couplings are built.
        deep_supervision: Return a list of logits, largest first.

    Shape: list of skips -> (B, num_classes, *patch), or with deep supervision a list of them, largest first.
    """

    def __init__(
        self,
        num_classes: int,
        plan: ReversiblePlan,
        stages: Sequence[StageSpec],
        coupling: CouplingSpec,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.reversible = coupling.reversible
        self.recomputed = coupling.reversible and plan.samples_are_independent
        pairs = list(zip(stages[::-1], stages[-2::-1], strict=False))  # (coarser, finer), coarsest first
        self.transitions = nn.ModuleList(self.transition(plan, coarse, fine) for coarse, fine in pairs)
        self.stages = nn.ModuleList(coupling.sequence(plan, fine, fine.decoder_blocks) for _, fine in pairs)
        # All heads exist with and without deep supervision, so that checkpoints fit both (as in nnU-Net).
        self.seg_layers = nn.ModuleList(
            plan.conv_op(fine.channels, num_classes, 1, 1, 0, bias=True) for _, fine in pairs
        )

    def transition(self, plan: ReversiblePlan, coarse: StageSpec, fine: StageSpec) -> nn.Module:
        """Build what leads from a coarser stage to a finer one."""
        raise NotImplementedError

    def join(self, transition: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
        """Lead a feature map up and join it with the skip of the finer stage."""
        raise NotImplementedError

    @uncompiled
    def forward(self, skips: list[Tensor]) -> Tensor | list[Tensor]:
        """Return logits of the finest stage, or with deep supervision of every stage, largest first."""
        x = skips[-1]
        outputs = []
        last = len(self.stages) - 1
        for i, skip in enumerate(skips[-2::-1]):
            x = self.stages[i](self.join(self.transitions[i], x, skip))
            if self.deep_supervision or i == last:
                outputs.append(convolve(self.seg_layers[i], x))
        return outputs[::-1] if self.deep_supervision else outputs[0]
