"""Loss of a student: nnU-Net's on the labels, and the divergence from its teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from nnunet_ext.nnunet.taught import Taught


@dataclass(frozen=True)
class Lesson:
    """What the teacher says of a batch.

    Args:
        logits: (B, C, *patch).
        unlabelled: Samples of the batch that have no labels.
    """

    logits: Tensor
    unlabelled: Sequence[int] = ()


def divergence(student: Tensor, teacher: Tensor, temperature: float, regions: bool) -> Tensor:
    """KL(teacher || student) of softened probabilities, summed over classes, mean over voxels, in float32.

    Of regions, which may overlap, the sum of the divergences of their Bernoulli distributions.

    Args:
        student, teacher: Logits.
        temperature: Divides both (T of Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2).
        regions: Whether channels are regions, not classes.

    Shape: (B, C, *voxels) -> (B,).
    """
    student, teacher = student.float() / temperature, teacher.detach().float() / temperature
    likely = teacher.sigmoid() if regions else teacher.softmax(1)

    def cross_entropy(logits: Tensor) -> Tensor:
        if regions:
            return functional.binary_cross_entropy_with_logits(logits, likely, reduction="none").sum(1)
        return functional.cross_entropy(logits, likely, reduction="none")

    return (cross_entropy(student) - cross_entropy(teacher)).flatten(1).mean(1)


class DistillationLoss(nn.Module):
    """``(1 - a) L + a T^2 KL(teacher || student)``, of a sample without labels ``T^2 KL`` alone.

    Deep supervision and the ignore label concern L: the teacher is asked about all voxels at full resolution. Where
    there is no lesson, as in validation, the loss is L.

    Args:
        hard: Loss on the labels (L).
        regions: Whether channels are regions, not classes.
        temperature: T.
        weight: a.
        at_outputs: Gives the teacher's logits at the student's outputs.

    Attributes:
        lesson: Of the batch that is trained on.
    """

    def __init__(
        self, hard: nn.Module, regions: bool, temperature: float, weight: float, at_outputs: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.hard, self.regions, self.temperature, self.weight = hard, regions, temperature, weight
        self.lesson: Lesson | None = None
        self._at_outputs = at_outputs
        self._sums: Tensor | None = None  # of the epoch: L, KL
        self._steps = self._labelled = 0

    def forward(self, output: Any, target: Any) -> Tensor:
        """Loss of the network's output, at full resolution or, with deep supervision, a list from there down."""
        if isinstance(output, Taught):
            return self._taught(output.output, target, output.teacher, ())
        if self.lesson is None:
            loss: Tensor = self.hard(output, target)
            return loss
        return self._taught(output, target, self._at_outputs(self.lesson.logits), self.lesson.unlabelled)

    def _taught(self, output: Any, target: Any, teacher: Tensor, unlabelled: Sequence[int]) -> Tensor:
        student = _finest(output)
        if student.shape != teacher.shape:
            raise NotImplementedError(
                f"A student and its teacher must have logits of one shape, got {tuple(student.shape)} and "
                f"{tuple(teacher.shape)}: distil a trainer whose loss sees the whole patch, or override at_outputs."
            )
        divergences = divergence(student, teacher, self.temperature, self.regions)
        labelled = [sample for sample in range(len(student)) if sample not in unlabelled]
        if len(labelled) == len(student):  # without waiting for the GPU
            hard, soft = self.hard(output, target), self.weight * divergences.mean()
        else:
            output, target = (tree_map(lambda of: of[labelled], value) for value in (output, target))
            hard = self.hard(output, target) if labelled else student.new_zeros(())
            weights = [self.weight if sample in labelled else 1.0 for sample in range(len(student))]
            soft = (divergences.new_tensor(weights) * divergences).mean()
        self._note(hard, divergences, bool(labelled))
        total: Tensor = (1 - self.weight) * len(labelled) / len(student) * hard + self.temperature**2 * soft
        return total

    def _note(self, hard: Tensor, divergences: Tensor, has_labels: bool) -> None:
        terms = torch.stack([hard.detach().float(), divergences.detach().mean()])
        terms = torch.where(terms.isfinite().all(), terms, 0)  # else the step is left out
        self._sums = terms if self._sums is None else self._sums + terms
        self._steps, self._labelled = self._steps + 1, self._labelled + has_labels

    def epoch_means(self) -> tuple[float, float] | None:
        """Means of L, where there were labels, and of KL since the last call; None where there was no step."""
        if self._sums is None:
            return None
        hard, soft = self._sums.tolist()
        means = hard / max(self._labelled, 1), soft / self._steps
        self._sums, self._steps, self._labelled = None, 0, 0
        return means


def _finest(output: Any) -> Tensor:
    """Logits at full resolution of whatever nests them."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output
