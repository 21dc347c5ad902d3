"""Split against concatenation, encoding, and what the decoder keeps."""

from __future__ import annotations

import io
from math import ceil, cos, pi, sin
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from nnunet_ext.architectures.implicit.decoder import (
    PointDecoder,
    ReLUDropout,
    SegmentationHeads,
    WeightNormLinear,
    encoded_axis,
    octaves,
)

# patch, cumulative strides of the maps
GRIDS = {
    "3d": ((16, 16, 16), [(1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 8, 8)]),
    "2d": ((24, 16), [(1, 1), (2, 2), (4, 4)]),
    "anisotropic": ((4, 16, 24), [(1, 1, 1), (1, 2, 2), (2, 4, 4), (2, 8, 8)]),
    "stride 3": ((18, 12, 6), [(1, 1, 1), (3, 1, 2), (9, 3, 6)]),
    "does not divide": ((11, 7, 9), [(1, 1, 1), (2, 2, 2), (4, 4, 8)]),
    "no full resolution": ((12, 12), [(2, 2), (4, 4)]),
}


def decoder(grid: str, split: bool = True, **changes: Any) -> PointDecoder:
    torch.manual_seed(0)
    _, strides = GRIDS[grid]
    options = {"width": 12, "depth": 8, "frequencies": None, "dropout": 0.0, **changes}
    made = PointDecoder([3 + i for i in range(len(strides))], strides, 3, split=split, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def maps(grid: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(1)
    patch, strides = GRIDS[grid]
    sizes = [[ceil(n / s) for n, s in zip(patch, stride, strict=True)] for stride in strides]
    return [torch.randn(2, 3 + i, *size, dtype=dtype, requires_grad=True) for i, size in enumerate(sizes)]


def points(grid: str, n: int) -> Tensor:
    torch.manual_seed(2)
    return torch.stack([torch.randint(size, (2, n)) for size in GRIDS[grid][0]], -1)


def by_hand(made: PointDecoder, features: list[Tensor], p: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Logits of one point of the first sample, straight from the equations."""
    z = []
    for values, stride in zip(features, made.strides, strict=True):
        z += values[(0, slice(None), *(int(a) // s for a, s in zip(p, stride, strict=True)))].tolist()
    for a, n in zip(p, patch, strict=True):
        c = (2 * int(a) + 1) / n - 1
        encoding = [f(2**octave * pi * c) for octave in range(octaves(n, None)) for f in (sin, cos)]
        z += encoding + [0.0] * (20 - len(encoding))
    z = torch.tensor(z, dtype=torch.float64)
    h = z
    for i, layer in enumerate(made.layers):
        w = layer.scale * layer.direction / layer.direction.norm(dim=1, keepdim=True)
        h = torch.relu(w @ (torch.cat([h, z]) if i == 3 else h) + layer.bias)
    return made.seg_layers.weight @ h + made.seg_layers.bias


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("grid", ["3d", "anisotropic"])
def test_logits_are_those_of_the_equations(grid: str, split: bool) -> None:
    made, features, p = decoder(grid, split), maps(grid), points(grid, 9)
    found = made(features, p, GRIDS[grid][0])
    for k in range(9):
        torch.testing.assert_close(found[0, :, k], by_hand(made, features, p[0, k], GRIDS[grid][0]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("n", [1, 40, 4000])  # no map, some maps, all maps multiplied as a whole
@pytest.mark.parametrize("grid", GRIDS)
def test_split_equals_concatenation(grid: str, n: int, dtype: torch.dtype, tolerance: float) -> None:
    split, concat = (decoder(grid, s).to(dtype) for s in (True, False))
    features, p, patch = maps(grid, dtype), points(grid, n), GRIDS[grid][0]
    outputs = [made(features, p, patch) for made in (split, concat)]
    assert (outputs[0] - outputs[1]).abs().max() <= tolerance * outputs[1].abs().max().clamp_min(1)
    gradients = [torch.autograd.grad(o.square().mean(), features, retain_graph=True) for o in outputs]
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("changes", [{"depth": 1}, {"depth": 3}, {"depth": 4}, {"frequencies": 0}, {"frequencies": 10}])
def test_split_equals_concatenation_with_other_options(changes: dict[str, Any]) -> None:
    features, p = maps("3d"), points("3d", 300)
    found, wanted = (decoder("3d", s, **changes)(features, p, (16, 16, 16)) for s in (True, False))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_weights_of_split_and_concatenation_are_the_same_names_and_shapes() -> None:
    decoder("3d", split=True).load_state_dict(decoder("3d", split=False).state_dict(), strict=True)


def test_fourth_of_eight_layers_sees_the_input_again() -> None:
    d_in = 3 + 4 + 5 + 6 + 3 * 20
    widths = [layer.direction.shape[1] for layer in decoder("3d").layers]
    assert widths == [d_in, 12, 12, 12 + d_in, 12, 12, 12, 12]


@pytest.mark.parametrize("size", [8, 40, 128])
def test_the_octave_after_the_last_is_constant_where_the_size_is_a_power_of_two(size: int) -> None:
    encoded = encoded_axis(size, octaves(size, None) + 1, torch.zeros(1, dtype=torch.float64))
    spread = (encoded.amax(0) - encoded.amin(0)).view(-1, 2).amax(1)  # of sine or cosine
    assert spread[:-1].min() > 0.5
    if size != 40:
        assert spread[-1] < 1e-9


@pytest.mark.parametrize(
    ("size", "added"), [(64, 0), (128, 0), (40, 0), (96, 0), (160, 0), (56, 2), (112, 2), (224, 2)]
)
def test_octaves_left_out_add_dimensions_for_seven_times_a_power_of_two_alone(size: int, added: int) -> None:
    constant = torch.ones(size, 1, dtype=torch.float64)

    def dimensions(n: int) -> int:
        encoded = encoded_axis(size, n, torch.zeros(1, dtype=torch.float64))
        return int(torch.linalg.matrix_rank(torch.cat([constant, encoded], 1), atol=1e-8))

    used = octaves(size, None)
    assert dimensions(used + 1) - dimensions(used) == added
    assert dimensions(10) == dimensions(used + 1)


def test_octaves_are_those_of_the_axis_at_most_ten() -> None:
    assert [octaves(n, None) for n in (1, 2, 40, 128, 5000)] == [0, 1, 5, 7, 10]
    assert octaves(8, 10) == 10


def test_weight_norm_is_torchs() -> None:
    layer = WeightNormLinear(5, 4)
    with torch.no_grad():
        layer.scale.mul_(torch.rand(4, 1))
    torch.testing.assert_close(layer.weight(), torch._weight_norm(layer.direction, layer.scale, 0))


def test_relu_dropout_has_the_gradient_of_relu_then_dropout() -> None:
    x = torch.randn(50, 40, dtype=torch.float64, requires_grad=True)
    y = ReLUDropout(0.3).train()(x)
    kept = (y != 0) / 0.7
    torch.testing.assert_close(y, F.relu(x) * kept)
    weights = torch.randn_like(y)
    (found,) = torch.autograd.grad((y * weights).sum(), x)
    (wanted,) = torch.autograd.grad((F.relu(x) * kept * weights).sum(), x)
    torch.testing.assert_close(found, wanted)


def test_relu_dropout_drops_its_share_in_training_alone() -> None:
    ones = torch.ones(100_000)
    assert float((ReLUDropout(0.2).train()(ones) == 0).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float(ReLUDropout(0.2).train()(ones).mean()) == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(ReLUDropout(0.2).eval()(ones), ones)


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(x)
    del output
    return sum(storages.values())


def test_relu_dropout_keeps_half_of_what_torch_keeps() -> None:
    """The next layer needs the output anyway: nothing is kept beside it."""
    x = torch.randn(1000, 16)
    layers = lambda: [nn.Linear(16, 16), nn.Linear(16, 16)]  # noqa: E731
    fused = nn.Sequential(layers()[0], ReLUDropout(0.2), layers()[1])
    plain = nn.Sequential(layers()[0], nn.ReLU(), nn.Dropout(0.2), layers()[1])
    weights, y = 2 * 16 * 16 * 4, x.numel() * 4
    assert kept_bytes(fused, x) <= 2 * y + weights
    assert kept_bytes(plain, x) >= 3 * y


def test_meaning_of_the_logits_is_part_of_the_checkpoint() -> None:
    heads, twin = SegmentationHeads(4, 2), SegmentationHeads(4, 2)
    heads.regions = True
    stored = io.BytesIO()
    torch.save(heads.state_dict(), stored)
    stored.seek(0)
    twin.load_state_dict(torch.load(stored, weights_only=True), strict=True)
    assert twin.regions
