"""Instance norm of a part of a patch by the statistics of the whole, which a pass without gradient has found.

Not in a paper: so a level that is trained on a part computes what it computes in prediction on the whole patch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.instancenorm import _InstanceNorm

Statistics = tuple[Tensor, Tensor]
Inside = Mapping[tuple[int, ...], Tensor]  # voxels per axis of a feature map -> (1, 1, *spatial), one in the part


class _OfWhole(nn.Module):
    """Instance norm that notes its statistics.

    Attributes:
        found: Mean and variance of the last input, (B C) each.
    """

    found: Statistics

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise by the statistics of the input."""
        weight, bias = _affine(self.norm, x)
        y, mean, rstd = torch.native_batch_norm(_flat(x), weight, bias, None, None, True, 0.0, self.norm.eps)
        self.found = (mean, rstd.pow(-2) - self.norm.eps)
        return y.view(x.shape)


class _OfPart(nn.Module):
    """Instance norm by given statistics.

    Attributes:
        given: Mean and variance, (B C) each; None: those of the input.
        inside: Which voxels of an input of some size stand for the whole patch.
    """

    given: Statistics | None = None
    inside: Inside

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        if self.given is None:
            result: Tensor = self.norm(x)
            return result
        run = _normalized if torch.compiler.is_compiling() else _NormalizePart.apply
        result = run(x, *_affine(self.norm, x), *self.given, self.norm.eps, self.inside[tuple(x.shape[2:])])
        return result


class SharedStatistics:
    """A level in two forms with the same weights, whose instance norms share the statistics of the whole patch.

    Args:
        level: Any module. Norms of another kind stay as they are.

    Attributes:
        of_whole: Notes statistics as it runs.
        of_part: Uses them.
    """

    def __init__(self, level: nn.Module) -> None:
        self._whole: list[_OfWhole] = []
        self._part: list[_OfPart] = []
        self.of_whole: nn.Module = _with_norms(level, lambda norm: _added(self._whole, _OfWhole(norm)), {})
        self.of_part: nn.Module = _with_norms(level, lambda norm: _added(self._part, _OfPart(norm)), {})

    def found(self) -> list[Statistics]:
        """What each norm of `of_whole` has noted in its last run."""
        return [norm.found for norm in self._whole]

    def use(self, groups: list[list[Statistics]], inside: Inside) -> None:
        """Let `of_part` use what was found.

        Args:
            groups: What `found` gives, of each group of samples.
            inside: Which voxels of a feature map stand for the whole patch.
        """
        for norm, found in zip(self._part, zip(*groups, strict=True), strict=True):
            mean, var = (torch.cat(parts) for parts in zip(*found, strict=True))
            norm.given, norm.inside = (mean, var), inside


class _NormalizePart(torch.autograd.Function):
    """``y = w z + b``, ``z = (x - m) / s``, m and s of the whole patch.

    The backward pass knows a part only. Its n voxels stand for the whole as those by which m and s change:

        dx = w / s (dy - sum(dy) / n - z sum(dy z) / n) inside, w / s dy in the rim around it

    So of a gradient along the scale or the mean of x, which m and s take back, next to nothing stays. With m and s of
    the part itself all this is instance norm.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, inside: Tensor
    ) -> Tensor:
        """Normalise; keep the input, as instance norm does."""
        ctx.save_for_backward(x, weight, mean, var, inside)
        ctx.eps = eps
        y = functional.batch_norm(_flat(x), mean, var, weight, bias, False, 0.0, eps)
        # Not a view for autograd, so that a nonlinearity may change it in place.
        result: Tensor = torch.ops.aten._unsafe_view(y, x.shape)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Add what passes through m and s to batch norm's gradient for fixed ones."""
        x, weight, mean, var, inside = ctx.saved_tensors
        flat = _flat(x)
        dx, dw, db = torch.ops.aten.native_batch_norm_backward(
            _flat(grad), flat, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        rstd = torch.rsqrt(var + ctx.eps)
        share = weight * rstd / inside.sum()
        slope = share * rstd * dw
        shape = [1, -1, *[1] * (x.ndim - 2)]
        through = torch.addcmul((share * db - slope * mean).view(shape), flat, slope.view(shape))
        dx.addcmul_(through.to(dx.dtype), inside.to(dx.dtype), value=-1)
        return dx.view(x.shape), dw, db, None, None, None, None


def _normalized(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, inside: Tensor
) -> Tensor:
    """The same by plain autograd, for compilers, which keep no more of it."""
    shape = [1, -1, *[1] * (x.ndim - 2)]
    weight, bias, mean, var = (t.view(shape) for t in (weight, bias, mean, var))
    z = _flat(x).to(mean.dtype) - mean
    axes = list(range(2, x.ndim))
    n = inside.sum()
    # Their values are not those of the whole patch; only gradients pass.
    m, v = ((value * inside).sum(axes, keepdim=True) / n for value in (z, z.square()))
    y = (z - (m - m.detach())) * torch.rsqrt(var + (v - v.detach()) + eps) * weight + bias
    return y.to(x.dtype).view(x.shape)


def _affine(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias for each channel of each sample, (B C)."""
    if norm.weight is None:
        ones = torch.ones(x.shape[0] * x.shape[1], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        return ones, torch.zeros_like(ones)
    return norm.weight.repeat(len(x)), norm.bias.repeat(len(x))


def _flat(x: Tensor) -> Tensor:
    """Samples as channels, (1, B C, *spatial), as PyTorch computes instance norm by batch norm."""
    return x.contiguous().view(1, -1, *x.shape[2:])


def _added(norms: list[Any], norm: Any) -> Any:
    norms.append(norm)
    return norm


def _with_norms(module: Any, replace: Callable[[nn.Module], nn.Module], done: dict[int, nn.Module]) -> Any:
    """A module whose instance norms are replaced; what has none is shared with the original."""
    if id(module) not in done:
        twin = module
        if isinstance(module, _InstanceNorm):
            twin = module if module.track_running_stats else replace(module)
        else:
            children = {name: child and _with_norms(child, replace, done) for name, child in module._modules.items()}
            if any(child is not module._modules[name] for name, child in children.items()):
                twin = copy.copy(module)
                twin._modules = children
        done[id(module)] = twin
    return done[id(module)]
