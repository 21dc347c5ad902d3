"""Counted bytes, against hand-computed ones and against autograd's own list of what it saves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nnunet_ext.memory.network import (
    ASSUMED_SHARE,
    measure_inference,
    measure_step,
    surrogate_loss,
    training_outputs,
    with_assumed_share,
)
from nnunet_ext.nnunet.setting import Setting
from tests.settings import tiny

VOXELS = 8**3


def chain(n: int) -> nn.Module:
    """Convolution and ReLU, n times, four channels: keeps the input and each ReLU's output."""
    layers = [layer for i in range(n) for layer in (nn.Conv3d(4 if i else 1, 4, 3, padding=1, bias=False), nn.ReLU())]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_chain_holds_its_input_and_one_map_per_layer(n: int) -> None:
    memory = measure_step(lambda: chain(n), 1, (8, 8, 8), batch_size=1)
    assert memory.held == 4 * VOXELS * (1 + 4 * n)
    assert memory.parameters == 4 * 27 * (4 + 16 * (n - 1))
    assert memory.peak >= memory.held


def saved_bytes(network: nn.Module, x: Tensor) -> int:
    """Distinct storages that autograd saves, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        outputs = network(x)  # keeps the graph alive, so that no address is used twice
    del outputs
    return sum(s.untyped_storage().nbytes() for pointer, s in kept.items() if pointer not in parameters)


@pytest.mark.parametrize("patch", [(16, 16, 16), (32, 16)])
def test_held_bytes_are_what_autograd_saves_and_the_logits(patch: tuple[int, ...]) -> None:
    setting = tiny(patch)
    build = setting.builder("nnUNetTrainer")
    memory = measure_step(build, 1, patch, batch_size=2)
    network, x = build().train(), torch.randn(2, 1, *patch)
    logits = sum(output.numel() * 4 for output in network(x))
    assert memory.held == saved_bytes(network, x) + logits


def test_mixed_precision_holds_less() -> None:
    build = tiny().builder("nnUNetTrainer")
    full = measure_step(build, 1, (16, 16, 16))
    half = measure_step(build, 1, (16, 16, 16), autocast_dtype=torch.bfloat16)
    assert half.held < 0.8 * full.held


@pytest.mark.parametrize(("dtype", "element"), [(torch.float16, 2), (torch.bfloat16, 4)])
def test_only_float16_has_the_dtypes_of_cuda(dtype: torch.dtype, element: int) -> None:
    # CUDA pools in float16, the CPU in float32; alive are the image, the map and the pooled one.
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv3d(1, 8, 1, bias=False), nn.MaxPool3d(1))

    peak = measure_inference(build, 1, (8, 8, 8), dtype)
    assert peak >= VOXELS * (4 + 8 * 2 + 8 * element)
    assert (peak < VOXELS * (4 + 8 * 2 + 8 * 4)) is (element == 2)


def test_inference_peaks_at_the_input_and_two_maps(setting: Setting) -> None:
    # The caller holds the input; ReLU makes its map while that of the convolution is alive.
    assert measure_inference(lambda: chain(3), 1, (8, 8, 8)) == 4 * VOXELS * (1 + 4 + 4)
    step = measure_step(setting.builder("nnUNetTrainer"), 1, setting.patch_size, batch_size=1)
    assert measure_inference(setting.builder("nnUNetTrainer", False), 1, setting.patch_size) < step.held


def test_inference_in_mixed_precision_halves_the_maps() -> None:
    # Image in float32 and its copy, weights' copies, one map of a convolution and one of ReLU, all in two bytes.
    weights = 27 * (4 + 16 + 16)
    mixed = measure_inference(lambda: chain(3), 1, (8, 8, 8), torch.bfloat16)
    full = measure_inference(lambda: chain(3), 1, (8, 8, 8))
    assert full / 2 < mixed <= full / 2 + 2 * VOXELS + 2 * weights


def test_loss_is_the_sum_over_the_scales() -> None:
    outputs = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)]
    expected = sum(output.exp().sum(1).log().mean() for output in outputs)
    torch.testing.assert_close(surrogate_loss(outputs), expected)
    torch.testing.assert_close(surrogate_loss(outputs[0]), outputs[0].exp().sum(1).log().mean())


class OnPoints(nn.Module):
    """A network that training gives points, and whose prediction refines a share."""

    share: float | None = None

    def forward(self, x: Tensor, points: Tensor | None = None) -> Tensor:
        return x[..., :2] if points is not None else x

    def training_inputs(self, x: Tensor) -> dict[str, Tensor]:
        return {"points": torch.zeros(len(x), 2, 3)}

    def assume_refined_share(self, share: float | None) -> None:
        self.share = share


def test_training_gives_what_the_network_asks_for_beside_the_image() -> None:
    x = torch.randn(1, 1, 8, 8, 8)
    assert training_outputs(OnPoints(), x).shape[-1] == 2
    assert training_outputs(nn.Identity(), x) is x


def test_prediction_is_counted_with_the_assumed_share() -> None:
    network = OnPoints()
    assert with_assumed_share(network) is network
    assert network.share == ASSUMED_SHARE
    plain = nn.Identity()
    assert with_assumed_share(plain) is plain
