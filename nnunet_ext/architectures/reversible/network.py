"""What the networks that are one chain share: the chain itself, from the image to the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from nnunet_ext.architectures.reversible.chain import Chain
from nnunet_ext.architectures.reversible.coupling import ExactRange
from nnunet_ext.architectures.reversible.stages import StageSpec
from nnunet_ext.architectures.reversible.transitions import Tap


class ChainNetwork(nn.Module):
    """A U-Net whose encoder and decoder give the `steps` of one chain.

    Attributes:
        encoder: Its `enter` leads from the image to the first feature map; None: it is given that.
        decoder: Its last step is a head.
        stages: Of the network, finest first.
        reversible, exact, group_elements, exact_range: See `Chain`.
    """

    encoder: Any
    decoder: Any
    stages: Sequence[StageSpec]
    reversible: bool
    exact: bool
    group_elements: int | None
    exact_range: ExactRange

    def chain(self, bottleneck_tap: bool = False) -> Chain:
        """The whole network: what it gives are the bottleneck where asked for, then logits, coarsest first."""
        tap = [Tap()] if bottleneck_tap else []
        return Chain(
            steps=[*self.encoder.steps(), *tap, *self.decoder.steps()],
            enter=self.encoder.enter,
            gives_last=False,
            exact=self.exact,
            reversible=self.reversible,
            group_elements=self.group_elements,
            channels=self.stages[0].channels,
            exact_range=self.exact_range,
        )
