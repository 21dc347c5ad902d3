"""The decoder of networks whose stages are reversible and whose levels are joined in different ways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from nnunet_ext.architectures.reversible.stages import CouplingSpec, ReversiblePlan, StageSpec
from nnunet_ext.architectures.reversible.transitions import Head, Transition


class StagedDecoder(nn.Module):
    """Stages from the coarsest to the finest: a transition up, joined with the skip, couplings, a head.

    Args:
        num_classes: Channels of the logits.
        plan: Arguments of the plans.
        stages: Stages of the network, finest first.
        coupling: How couplings are built.
        deep_supervision: Give logits of every stage.

    Attributes:
        joins: Kind of step that leads up and joins with the skip.
    """

    joins: type[Transition]

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

    def steps(self) -> Iterator[Any]:
        """Steps of the chain from the coarsest feature map to the finest; heads where logits are wanted."""
        last = len(self.stages) - 1
        levels: Any = zip(self.transitions, self.stages, self.seg_layers, strict=True)
        for i, (transition, stage, head) in enumerate(levels):
            yield self.joins(transition)
            yield from stage.couplings.children()
            if self.deep_supervision or i == last:
                yield Head(head)
