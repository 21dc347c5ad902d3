"""What each rank does in the DDP test of meU-net's step; a module of its own because ranks are spawned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_ext.architectures.expanded.partial_pass import ExpandedPass
from nnunet_ext.architectures.me_unet import DualMeUNet
from nnunet_ext.architectures.reversible_unet import ReversibleUNet
from nnunet_ext.trainers.me_cascade import Branch, MeCascadeTrainerMixin
from nnunet_ext.trainers.me_unet import MeUNetTrainerMixin
from nnunet_ext.trainers.unwrapped import unwrapped
from tests.contract.gradients import gradients_of
from tests.contract.plans import arguments
from tests.ranks import SIZE

NETWORKS = {"PlainConvUNet": PlainConvUNet, "ReversibleUNet": ReversibleUNet, "DualMeUNet": DualMeUNet}
STEPS = 3


class Step(MeUNetTrainerMixin, nnUNetTrainer):
    """The step alone, with a loss whose gradient is that of a mean over the batch."""

    is_cascaded, is_expanded = False, True

    def __init__(self, network: nn.Module) -> None:
        self.device, self.grad_scaler, self.optimizer = torch.device("cpu"), None, None
        self.network, self.is_ddp = network, isinstance(network, DistributedDataParallel)
        self.standard_patch = (8, 8, 8)
        self.configuration_manager = SimpleNamespace(pool_op_kernel_sizes=arguments("3d")["strides"])
        self.prepare_passes(unwrapped(network))

    def make_expanded_pass(self, network: nn.Module) -> ExpandedPass:
        return ExpandedPass(network)

    def loss(self, output: Any, target: Any) -> Tensor:
        pairs = zip(output, target, strict=True) if isinstance(output, list) else [(output, target)]
        return sum((a - b).square().mean() for a, b in pairs)


class CascadeStep(MeCascadeTrainerMixin, Step):
    """The step of stage 1 alone."""

    def prepare_passes(self, network: Any) -> None:
        self.branches = [
            Branch(branch, branch, ExpandedPass(branch), size)
            for branch, size in zip(network.branches, ((12, 12, 12), (16, 16, 16)), strict=True)
        ]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name](input_channels=2, num_classes=3, deep_supervision=True, **arguments("3d")).train()


def batch_of(data: Tensor, target: Tensor) -> dict[str, Any]:
    return {"data": data, "target": [target]}  # the coarser ones follow from it


def run(rank: int, name: str, compiled: bool, options: dict[str, Any]) -> None:
    """Steps on this rank's half of the batch; gradients must equal those of one process on the whole."""
    torch.manual_seed(1)
    data, target = torch.randn(2 * SIZE, 2, 16, 16, 16), torch.randn(2 * SIZE, 1, 16, 16, 16)
    step = CascadeStep if name == "DualMeUNet" else Step
    wanted = gradients_of(step(build(name)), batch_of(data, target))
    network = build(name)
    inner = torch.compile(network, backend="aot_eager") if compiled else network
    ours = step(DistributedDataParallel(inner, **options))
    mine = slice(2 * rank, 2 * rank + 2)
    for _ in range(STEPS):  # DDP builds its buckets anew after the first
        found = gradients_of(ours, batch_of(data[mine], target[mine]))
        for ours_of, wanted_of in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours_of, wanted_of, rtol=1e-3, atol=1e-5)
