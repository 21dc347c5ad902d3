"""Functions that the backward pass runs once more instead of keeping what they compute.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (https://arxiv.org/abs/1604.06174), by PyTorch's own
`torch.utils.checkpoint`. Added: modes and parameters are those of the forward pass, running statistics count once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from nnunet_ext.architectures.reversible.recomputation import Modes, may_draw, parameters_of, standing


def repeated(run: Callable[..., Any], modules: Sequence[nn.Module], *inputs: Tensor) -> Any:
    """Return ``run(*inputs)``, of which autograd keeps the inputs only.

    The second run ends where it has computed what backward needs: a convolution at the end runs once.

    Args:
        run: Gives a tensor or several; changes none of its inputs.
        modules: All that it calls.
        inputs: Tensors.
    """
    # Under FakeTensorMode there are no random numbers.
    draws = any(map(may_draw, modules)) and not isinstance(inputs[0], FakeTensor)
    # A compiled graph keeps the modes that it was made with, and writes running statistics once.
    again = run if torch.compiler.is_compiling() else _Again(run, modules)
    return checkpoint(again, *inputs, use_reentrant=False, preserve_rng_state=draws)


class _Again:
    """A function whose later calls see modules as they were when it was made, and leave running statistics alone."""

    def __init__(self, run: Callable[..., Any], modules: Sequence[nn.Module]) -> None:
        self._run, self._modules = run, modules
        self._modes = Modes(modules)
        self._parameters = [place for module in modules for place in parameters_of(module)]
        self._ran = False

    def __call__(self, *inputs: Tensor) -> Any:
        if not self._ran:
            self._ran = True
            return self._run(*inputs)
        with self._modes.restored():
            statistics = [
                (part._buffers, name, buffer.clone())
                for module in self._modules
                for part in module.modules()
                if isinstance(part, _NormBase) and part.training
                for name, buffer in part._buffers.items()
                if buffer is not None
            ]
            with standing([*self._parameters, *statistics]):
                return self._run(*inputs)
