"""What gradients are compared in: situations in which backward passes of own making went wrong, in PyTorch or here."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Case:
    """One situation of a training step.

    Args:
        name: Of rows and messages.
        deep_supervision: Whether the network gives logits of all levels.
        shared: Whether one layer stands in two places of the network.
        samples: Of the batch.
        equal_samples: Whether the batch holds one sample twice.
        grouped: Whether what goes through the batch in groups has one sample in each. Not with dropout, whose random
            numbers the reference, which has no groups, would draw in another order.
        dropout: Whether it follows each activation.
        evaluated: Whether `eval()` comes between forward and backward pass; dropout makes the difference.
        backward_passes: Of different batches, whose gradients add up.
        frozen: Whether every other parameter, and the input, want no gradient.
        strided: Whether input and gradients of the outputs are not contiguous.
        first_only: Whether the loss uses the first output only; the others get no gradient at all.
        offloaded: Whether what autograd keeps passes through `torch.autograd.graph.save_on_cpu`.
    """

    name: str
    deep_supervision: bool = True
    shared: bool = False
    samples: int = 2
    equal_samples: bool = False
    grouped: bool = False
    dropout: bool = False
    evaluated: bool = False
    backward_passes: int = 1
    frozen: bool = False
    strided: bool = False
    first_only: bool = False
    offloaded: bool = False


ORDINARY = Case(name="ordinary")
CASES = (
    ORDINARY,
    Case(name="equal samples", equal_samples=True),
    Case(name="two backward passes", backward_passes=2),
    Case(name="some outputs unused", first_only=True),
    Case(name="strided input and gradients", strided=True),
    # https://github.com/pytorch/pytorch/issues/147565: checkpoints within hooks of saved tensors
    Case(name="saved on the CPU", offloaded=True),
    Case(name="frozen parameters and input", frozen=True),
    Case(name="without deep supervision", deep_supervision=False),
    Case(name="shared weights", shared=True),
    Case(name="three samples", samples=3),
    Case(name="three groups of samples", samples=3, grouped=True),
    Case(name="dropout", dropout=True),
    Case(name="evaluation mode before the backward pass", dropout=True, evaluated=True),
)


# The same in four steps, for where there is less than a minute.
COMBINED = (
    ORDINARY,
    Case(
        name="shared weights, equal samples, two backward passes, strided, some outputs unused",
        shared=True,
        equal_samples=True,
        backward_passes=2,
        strided=True,
        first_only=True,
    ),
    Case(
        name="frozen parameters and input, without deep supervision, saved on the CPU, three groups of samples",
        deep_supervision=False,
        samples=3,
        grouped=True,
        frozen=True,
        offloaded=True,
    ),
    Case(
        name="three samples, dropout, evaluation mode before the backward pass", samples=3, dropout=True, evaluated=True
    ),
)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How a step computes.

    Args:
        name: Of rows and messages.
        dtype: Of parameters and input.
        autocast: Lower precision of autocast; None: without.
    """

    name: str
    dtype: torch.dtype
    autocast: torch.dtype | None = None


DOUBLE = Precision(name="float64", dtype=torch.float64)
SINGLE = Precision(name="float32", dtype=torch.float32)


def mixed(device: str) -> Precision:
    """Autocast as nnU-Net trains on CUDA; on the CPU bfloat16, which its kernels know best."""
    low = torch.float16 if device == "cuda" else torch.bfloat16
    return Precision(name=f"autocast to {str(low).removeprefix('torch.')}", dtype=torch.float32, autocast=low)
