"""Norms need more than one voxel, and the network says so before PyTorch does, of patch and batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nnunet_ext import registry
from tests.contract.plans import isotropic

NORMS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "instance": (nn.InstanceNorm2d, {"affine": True}),
    "instance, tracked": (nn.InstanceNorm2d, {"track_running_stats": True}),
    "batch": (nn.BatchNorm2d, {}),
    "batch, not tracked": (nn.BatchNorm2d, {"track_running_stats": False}),
}
TRAINING, EVALUATION = True, False
# As PyTorch has it: where one value is left to take a variance of.
REFUSED = {
    ("instance", 1, TRAINING),
    ("instance", 2, TRAINING),
    ("instance", 1, EVALUATION),
    ("instance", 2, EVALUATION),
    ("instance, tracked", 1, TRAINING),
    ("instance, tracked", 2, TRAINING),
    ("batch", 1, TRAINING),
    ("batch, not tracked", 1, TRAINING),
    ("batch, not tracked", 1, EVALUATION),
}


@pytest.mark.parametrize("name", registry.names("architectures"))
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("training", [TRAINING, EVALUATION])
def test_a_coarsest_map_of_one_voxel_is_refused_where_a_norm_has_one_value(
    name: str, norm: str, batch: int, training: bool
) -> None:
    network_class: Callable[..., nn.Module] = registry.resolve("architectures", name)
    operation, options = NORMS[norm]
    network = network_class(1, 2, **isotropic([4, 8], 2, norm_op=operation, norm_op_kwargs=options)).train(training)
    x = torch.randn(batch, 1, 2, 2)
    if (norm, batch, training) in REFUSED:
        with pytest.raises(ValueError, match=rf"got a batch of {batch} and a patch of \[2, 2\].*: use a larger patch"):
            network(x)
    else:
        network(x)
    network(torch.randn(batch, 1, 2, 4))  # two voxels are enough
