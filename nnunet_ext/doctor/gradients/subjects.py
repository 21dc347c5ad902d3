"""Whose gradients are compared: every registered trainer's training step, each kind of step once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.module import register_module_forward_pre_hook

from nnunet_ext import registry
from nnunet_ext.doctor.gradients import tiny
from nnunet_ext.doctor.gradients.cases import ORDINARY
from nnunet_ext.doctor.gradients.describe import description, kind
from nnunet_ext.doctor.gradients.step import Source, Step, trained
from nnunet_ext.memory.step import passes_of
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.printable import typed_line
from nnunet_ext.protocols import only_predicts


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A training step.

    Args:
        trainer: Whose it is.
        configuration: Of the tiny plans.
        source: What it is made of.
        parts: What has a backward pass of its own, described without the size of the patch.
        kinds: The same by `kind`.
    """

    trainer: str
    configuration: str
    source: Source
    parts: frozenset[str]
    kinds: frozenset[str]

    @property
    def name(self) -> str:
        """For rows."""
        return f"{self.trainer} {self.configuration}"


@dataclass(frozen=True, kw_only=True)
class Unbuilt:
    """A step that can't be made.

    Args:
        trainer: Whose it is.
        configuration: Of the tiny plans.
        reason: What its network or its import raised.
    """

    trainer: str
    configuration: str
    reason: str

    @property
    def name(self) -> str:
        """For rows."""
        return f"{self.trainer} {self.configuration}"


def subjects() -> Iterator[Subject | Unbuilt]:
    """Find the steps of all registered trainers; what was seen before is left out.

    A cascade's second stage trains the network of the first, but where a trainer has one of its own for it.
    """
    seen: set[frozenset[str]] = set()
    kinds: set[tuple[str, frozenset[str]]] = set()
    for setting in tiny.settings():
        for trainer in registry.names("trainers"):
            try:
                if only_predicts(trainer_class(trainer)):
                    continue
                subject = subject_of(trainer, setting)
            except Exception as error:  # of any method, also a third party's
                yield Unbuilt(trainer=trainer, configuration=setting.configuration, reason=typed_line(error))
                continue
            is_known = setting.configuration == tiny.CASCADE and (trainer, subject.kinds) in kinds
            if subject.parts not in seen and not is_known:
                yield subject
            seen.add(subject.parts)
            kinds.add((trainer, subject.kinds))


def subject_of(trainer: str, setting: Setting) -> Subject:
    """The step of one trainer.

    Raises:
        Exception: whatever its network raises when it is built.
    """
    build_network, form = setting.builder(trainer), setting.training_form(trainer)

    def build(deep_supervision: bool) -> nn.Module:
        return build_network() if deep_supervision else setting.builder(trainer, False)()

    source = Source(build=build, form=form, shape=(2, setting.input_channels, *setting.patch_size))
    passes = passes_of(form(build_network()), torch.empty(source.shape))
    parts = [trained(part) for part, _ in passes]
    return Subject(
        trainer=trainer,
        configuration=setting.configuration,
        source=source,
        parts=frozenset(map(description, parts)),
        kinds=frozenset(map(kind, parts)),
    )


def recomputes(step: Step) -> bool:
    """Whether a module runs in a backward pass of a step, or a function of own making stands in its graph."""
    x = step.input(ORDINARY)
    for loss in step.losses(x, ORDINARY):
        if any(isinstance(node, BackwardCFunction) for node in _nodes(loss)):
            return True
        called: list[nn.Module] = []
        hook = register_module_forward_pre_hook(lambda module, _, called=called: called.append(module))
        try:
            loss.backward()
        finally:
            hook.remove()
        if called:
            return True
    return False


def _nodes(loss: Tensor) -> Iterator[Any]:
    """Nodes of the graph that leads to a loss."""
    seen, following = set(), [loss.grad_fn]
    while following:
        node = following.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        following += [before for before, _ in node.next_functions]
