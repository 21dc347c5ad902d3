"""Sources of trainers that another distribution has."""

from __future__ import annotations

HEADER = """
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch import nn
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

class AcmeNet(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.conv = nn.Conv3d(channels, classes, 3, padding=1)
    def forward(self, x):
        return self.conv(x)
"""


def trainer(name: str, body: str, network: str = "AcmeNet") -> str:
    """Source of a trainer whose network is a subclass of a single convolution with `body`."""
    return (
        f"{HEADER}\nclass {network}_({network}):\n{body}\n"
        f"class {name}(nnUNetTrainer):\n"
        "    @staticmethod\n"
        "    def build_network_architecture(plans, configuration, channels, classes, deep_supervision=True):\n"
        f"        return {network}_(channels, classes)\n"
    )
