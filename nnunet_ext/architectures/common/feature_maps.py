"""What nnU-Net's own planners ask a network for: elements of the feature maps that its convolutions make.

The planners of this package count bytes instead (`nnunet_ext.memory.count`), which tells what recomputation saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.conv import _ConvNd


class CountedFeatureMaps(nn.Module):
    """A network whose convolutions are counted as nnU-Net counts those of PlainConvUNet.

    Attributes:
        input_channels: Channels of the network's input.
    """

    input_channels: int

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Elements that all convolutions give in the prediction of one sample, counted on shapes.

        Args:
            input_size: Voxels per axis.
        """
        sizes: list[int] = []

        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            sizes.append(output.numel())

        hooks = [part.register_forward_hook(count) for part in self.modules() if isinstance(part, _ConvNd)]
        was_training = self.training
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
                self.eval()(torch.empty(1, self.input_channels, *input_size))
        finally:
            for hook in hooks:
                hook.remove()
            self.train(was_training)
        return sum(sizes)
