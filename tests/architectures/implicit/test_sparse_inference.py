"""Sparse against dense prediction of decoders that are known exactly, so that every miss is one of the search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from nnunet_ext.architectures.implicit.sparse_inference import Mesh, Refinement, SparsePrediction, dense_logits

PATCH = (32, 32, 32)


class Known:
    """Logits of a label map, certain everywhere: nothing but a decoded voxel tells that an object is there."""

    def __init__(self, labels: Tensor, classes: int = 3, certainty: float = 20.0) -> None:
        self.dense = torch.stack([(labels == c).float() * certainty for c in range(classes)])
        self.asked = 0
        self.largest = 0

    def __call__(self, voxels: Tensor) -> Tensor:
        self.asked += len(voxels)
        self.largest = max(self.largest, len(voxels))
        return self.dense[(slice(None), *voxels.T)]


def balls(*centres_and_radii: tuple[Sequence[float], float], patch: Sequence[int] = PATCH) -> Tensor:
    axes = torch.meshgrid(*[torch.arange(n) for n in patch], indexing="ij")
    labels = torch.zeros(tuple(patch), dtype=torch.long)
    for centre, radius in centres_and_radii:
        distance = sum((a - c) ** 2 for a, c in zip(axes, centre, strict=True))
        labels[distance <= radius**2] = 1
    return labels


def sparse(
    known: Known, finest: Tensor, spacing: Sequence[int] | None = None, regions: bool = False, **changes: Any
) -> tuple[Tensor, SparsePrediction]:
    patch = known.dense.shape[1:]
    mesh = Mesh.fitting(patch, spacing or [4] * len(patch))
    prediction = SparsePrediction(known, mesh, replace(Refinement(), **changes), regions)
    return prediction.logits(finest), prediction


def featureless(patch: Sequence[int] = PATCH) -> Tensor:
    return torch.zeros(4, *patch)


@pytest.mark.parametrize(
    ("patch", "spacing"),
    [((64, 64, 64), (4, 4, 4)), ((65, 51, 70), (4, 4, 4)), ((17, 64, 60), (2, 4, 4)), ((80, 67), (4, 4))],
)
def test_object_larger_than_the_mesh_is_exactly_as_in_dense_prediction(
    patch: tuple[int, ...], spacing: tuple[int, ...]
) -> None:
    known = Known(balls(([n / 2 for n in patch], min(patch) / 5), patch=patch))
    logits, prediction = sparse(known, featureless(patch), spacing)
    assert torch.equal(logits.argmax(0), known.dense.argmax(0))
    assert 0 < prediction.refined < prod(Mesh.fitting(patch, spacing).size)


def test_decoded_voxels_have_the_logits_of_dense_prediction() -> None:
    known = Known(balls(([15, 15, 15], 9)))
    known.dense += torch.randn_like(known.dense)
    logits, _ = sparse(known, featureless())
    boundary = (logits - known.dense).abs().amax(0) == 0
    assert boundary[15, 15, 4:9].all()  # across the rim of the ball


def test_ball_between_mesh_points_is_found_by_its_features() -> None:
    labels = balls(([16, 16, 16], 1.5))  # mesh points at 14 and 18: none inside
    known = Known(labels)
    assert not labels[2::4, 2::4, 2::4].any()
    finest = labels.float()[None] + 0.1 * torch.randn(4, *PATCH)
    logits, prediction = sparse(known, finest)
    assert torch.equal(logits.argmax(0), labels)
    assert prediction.refined < 100
    logits, _ = sparse(known, finest, second_look=0.0)
    assert not logits.argmax(0).any()  # what the second look is for


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("kind", ["one label", "two labels", "regions"])
@pytest.mark.parametrize("specks", [0.01, 0.03, 0.2])
def test_ball_between_mesh_points_is_found_among_louder_specks(dim: int, kind: str, specks: float) -> None:
    torch.manual_seed(0)
    patch = (64,) * 2 if dim == 2 else PATCH
    ball = balls(([16] * dim, 1.5), patch=patch)
    image = ball + 0.1 * torch.randn(patch)
    image[(torch.rand(patch) < specks) & (ball == 0)] -= 4
    known = Known(ball)
    object_logit = 40 * (image - 0.5)
    if kind == "regions":
        known.dense = torch.stack([object_logit, object_logit - 80])
    elif kind == "one label":
        known.dense = torch.stack([-object_logit, object_logit])
    else:
        known.dense = torch.stack([-object_logit, object_logit, object_logit.clamp_max(0) - 80])
    finest = torch.stack([image, torch.randn(patch), -2 * image + 0.1 * torch.randn(patch)])
    logits, prediction = sparse(known, finest, regions=kind == "regions")
    expected = known.dense > 0 if kind == "regions" else known.dense.argmax(0)
    assert torch.equal(logits > 0 if kind == "regions" else logits.argmax(0), expected)
    assert prediction.refined <= 0.25 * prod(Mesh.fitting(patch, [4] * dim).size)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_features_that_are_no_numbers_do_not_break_prediction(value: float) -> None:
    finest = torch.randn(4, *PATCH)
    finest[0, 2, 2, 2] = value
    known = Known(balls(([15, 15, 15], 9)))
    logits, _ = sparse(known, finest)
    assert torch.equal(logits.argmax(0), known.dense.argmax(0))


def test_proposals_are_those_of_full_precision_under_autocast() -> None:
    torch.manual_seed(0)
    known, finest = Known(balls(([16, 16, 16], 1.5))), torch.randn(8, *PATCH)
    known.dense = torch.einsum("kc,cxyz->kxyz", torch.randn(3, 8), finest) + 1e3
    prediction = SparsePrediction(known, Mesh.fitting(PATCH, [4] * 3), Refinement(), False)
    expected = prediction.logits(finest)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prediction.logits(finest), expected)


def test_ball_between_mesh_points_is_found_where_the_mesh_is_unsure() -> None:
    labels = balls(([16, 16, 16], 1.5))
    known = Known(labels)
    known.dense[1, 18, 18, 18] = 18.0  # 0.12 against 20 for the background
    logits, _ = sparse(known, featureless(), second_look=0.0)
    assert torch.equal(logits.argmax(0), labels)


def test_thin_tube_that_one_mesh_point_touches_is_followed_to_its_end() -> None:
    labels = torch.zeros(PATCH, dtype=torch.long)
    labels[2, 2, 2] = 1
    labels[2, 2:5, 2] = 1
    labels[2, 4, 2:30] = 1  # between mesh points from here on
    labels[2:28, 4, 29] = 1
    logits, prediction = sparse(Known(labels), featureless(), second_look=0.0)
    assert torch.equal(logits.argmax(0), labels)
    assert prediction.refined < 0.25 * 512


def test_every_object_that_is_touched_is_complete() -> None:
    torch.manual_seed(0)
    for _ in range(5):
        spots = [((torch.rand(3) * 32).tolist(), float(1 + 4 * torch.rand(()))) for _ in range(6)]
        labels = balls(*spots)
        logits, _ = sparse(Known(labels), labels.float()[None])
        assert torch.equal(logits.argmax(0), labels)


def test_regions_are_compared_each_for_itself() -> None:
    whole, core = balls(([15, 15, 15], 10)), balls(([16, 16, 16], 1.5))
    known = Known(whole)
    known.dense = torch.stack([(m.float() * 2 - 1) * 20 for m in (whole, core)])
    logits, _ = sparse(known, core.float()[None], regions=True)
    assert torch.equal(logits > 0, known.dense > 0)


def test_where_most_cells_need_refinement_everything_is_decoded() -> None:
    torch.manual_seed(0)
    known = Known(torch.randint(0, 3, PATCH))
    logits, prediction = sparse(known, featureless())
    assert torch.equal(logits, known.dense)
    assert prediction.refined == 512


def test_many_touching_organs_cost_at_most_the_mesh_and_the_second_look_more_than_dense() -> None:
    torch.manual_seed(0)
    centres = torch.rand(13, 3) * 32
    voxels = torch.cartesian_prod(*[torch.arange(32.0)] * 3)
    known = Known(torch.cdist(voxels, centres).argmin(1).view(PATCH), classes=13)
    logits, prediction = sparse(known, featureless())
    assert torch.equal(logits.argmax(0), known.dense.argmax(0))
    assert prediction.refined > 256
    assert known.asked <= 32**3 + 512 + 128


def test_chunks_bound_what_is_decoded_at_a_time_and_change_nothing() -> None:
    labels = balls(([15, 15, 15], 9))
    whole, small = Known(labels), Known(labels)
    expected, _ = sparse(whole, featureless())
    found, _ = sparse(small, featureless(), chunk_size=100)
    assert torch.equal(found, expected)
    assert small.largest == 100
    known = Known(labels)
    dense = dense_logits(known, PATCH, 1000, torch.device("cpu"))
    assert torch.equal(dense, known.dense)
    assert known.largest == 1000


def test_empty_image_costs_the_mesh_and_the_second_look() -> None:
    known = Known(torch.zeros(PATCH, dtype=torch.long))
    _, prediction = sparse(known, featureless())
    assert prediction.refined == 0
    assert known.asked == 512 + 128


@pytest.mark.parametrize("patch", [(2, 2, 2), (3, 5, 1), (4, 4, 4)])
def test_patch_smaller_than_the_mesh_is_decoded_voxel_by_voxel(patch: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    known = Known(torch.randint(0, 3, patch))
    logits, _ = sparse(known, featureless(patch))
    assert torch.equal(logits, known.dense)


def test_mesh_points_lie_in_the_middle_of_their_cells() -> None:
    mesh = Mesh.fitting((40, 33), (4, 4))
    assert mesh.size == (10, 9)
    centres = mesh.centres(torch.device("cpu")).view(10, 9, 2)
    assert centres[:3, 0, 0].tolist() == [2, 6, 10]
    assert centres[0, -2:, 1].tolist() == [30, 32]
    assert Mesh.fitting((16, 64), (4, 4)).spacing == (2, 4)


def test_voxels_of_all_cells_are_the_patch_once() -> None:
    mesh = Mesh(patch=(9, 7, 5), spacing=(4, 2, 3))
    voxels = mesh.voxels(torch.arange(prod(mesh.size)))
    assert len(voxels) == 9 * 7 * 5
    assert len(torch.unique(voxels, dim=0)) == len(voxels)


def test_pooling_a_cell_widened_by_a_voxel_sees_its_neighbours() -> None:
    mesh = Mesh(patch=(10, 12), spacing=(4, 4))
    values = torch.zeros(1, 10, 12)
    values[0, 4, 5] = 1  # first row of the second cell
    assert mesh.pooled(values)[0].nonzero().tolist() == [[1, 1]]
    assert mesh.pooled(values, margin=1)[0].nonzero().tolist() == [[0, 1], [1, 1]]
    values[0, 4, 4] = 1
    assert len(mesh.pooled(values, margin=1)[0].nonzero()) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"margin": 2.0}, r"margin must lie in 0 to 1, got 2\.0"),
        ({"dense_above": -0.1}, "dense_above must lie in 0 to 1"),
        ({"chunk_size": 0}, "chunk_size must be at least 1 voxel, got 0"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Refinement(**changes)


def test_pieces_are_larger_on_cuda_unless_their_size_is_given() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert Refinement().chunk_on(cuda) == 4 * Refinement().chunk_on(cpu) == 65536
    assert Refinement(chunk_size=7).chunk_on(cpu) == Refinement(chunk_size=7).chunk_on(cuda) == 7
