"""Where points lie: statistics, borders, labels that are not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nnunet_ext.architectures.implicit.point_sampling import (
    PointSampler,
    at_points,
    boundary_voxels,
    points_per_patch,
    reflect,
)


def ball(size: int = 32, radius: float = 6, dim: int = 3) -> Tensor:
    axes = torch.meshgrid(*[torch.arange(size) - (size - 1) / 2] * dim, indexing="ij")
    return (sum(a**2 for a in axes) <= radius**2).long()[None, None]


def sampler(**changes: Any) -> PointSampler:
    return PointSampler(**{"n_points": 8000, "boundary_share": 0.5, "sigma": (0.0, 0.0, 0.0), **changes})


def brute_force_boundary(labels: Tensor) -> Tensor:
    boundary = torch.zeros_like(labels, dtype=torch.bool)
    for p in torch.cartesian_prod(*[torch.arange(n) for n in labels.shape]).tolist():
        for axis in range(labels.ndim):
            for step in (-1, 1):
                q = list(p)
                q[axis] += step
                if 0 <= q[axis] < labels.shape[axis] and labels[tuple(q)] != labels[tuple(p)]:
                    boundary[tuple(p)] = True
    return boundary


def test_boundary_is_every_voxel_with_another_label_across_a_face() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (1, 1, 7, 6, 5)) * ball(8)[..., :7, :6, :5]
    assert torch.equal(boundary_voxels(labels)[0], brute_force_boundary(labels[0, 0]))


def test_boundary_of_regions_is_that_of_any() -> None:
    torch.manual_seed(0)
    regions = torch.rand(1, 2, 6, 6, 6) > 0.7
    expected = brute_force_boundary(regions[0, 0]) | brute_force_boundary(regions[0, 1])
    assert torch.equal(boundary_voxels(regions, regions=True)[0], expected)


@pytest.mark.parametrize("regions", [False, True])
def test_voxels_to_be_ignored_make_no_boundary(regions: bool) -> None:
    labels = torch.zeros(1, 1, 8, 8, 8, dtype=torch.long)
    labels[..., 2:4] = labels[..., 6:] = 3  # on both sides of valid voxels
    target = torch.cat([torch.zeros_like(labels), labels == 3], 1) if regions else labels
    assert not boundary_voxels(target, ignore_label=3, regions=regions).any()
    assert boundary_voxels(labels).any()


def test_share_at_the_boundary_and_all_of_it_is_reached() -> None:
    torch.manual_seed(0)
    target = ball()
    boundary = boundary_voxels(target)[:, None]
    points = sampler()(target)
    assert points.shape == (1, 8000, 3)
    assert points.dtype == torch.int64
    near, anywhere = at_points(boundary, points[:, :4000]), at_points(boundary, points[:, 4000:])
    assert near.all()
    assert anywhere.float().mean() == pytest.approx(float(boundary.float().mean()), abs=0.01)
    hit = torch.zeros(32, 32, 32, dtype=torch.bool)
    hit[tuple(points[0, :4000].T)] = True
    assert hit[boundary[0, 0]].float().mean() > 0.9


def test_displacement_has_the_deviation_asked_for_on_every_axis() -> None:
    torch.manual_seed(0)
    target = torch.zeros(1, 1, 101, 101, 101, dtype=torch.long)
    target[..., 50, 50, 50] = 1  # boundary: the voxel and its six neighbours
    made = PointSampler(100_000, 1.0, (2.0, 5.0, 8.0))
    offsets = (made(target)[0] - 50).double()
    expected = (torch.tensor([2.0, 5.0, 8.0], dtype=torch.float64) ** 2 + 2 / 7 + 1 / 12).sqrt()
    torch.testing.assert_close(offsets.std(0), expected, rtol=0.02, atol=0)
    assert offsets.mean(0).abs().max() < 0.1


def test_sigma_is_a_length_scaled_by_the_spacing() -> None:
    made = PointSampler.for_spacing(10, 0.5, 5.0, [5.0, 1.0, 1.0])
    assert made.sigma == (1.0, 5.0, 5.0)


def test_reflection_mirrors_at_the_border_as_often_as_needed() -> None:
    position = torch.tensor([-1, -2, 0, 4, 5, 6, -6, 11, 27])
    assert reflect(position, 5).tolist() == [0, 1, 0, 4, 4, 3, 4, 1, 2]
    assert reflect(position, 1).eq(0).all()


def test_points_displaced_beyond_the_patch_come_back() -> None:
    torch.manual_seed(0)
    target = torch.zeros(1, 1, 12, 12, 12, dtype=torch.long)
    target[..., 0, :, :] = 1
    points = PointSampler(400, 1.0, (30.0, 30.0, 30.0))(target)
    assert points.min() == 0
    assert points.max() == 11
    # A normal distribution much wider than the patch, folded, is flat; clamping would pile up at the borders.
    assert (points == 0).float().mean() == pytest.approx(1 / 12, abs=0.03)


def test_balanced_points_are_shared_equally_among_labels() -> None:
    torch.manual_seed(0)
    target = torch.zeros(1, 1, 32, 32, 32, dtype=torch.long)
    target[..., 4:24, 4:24, 4:24] = 1
    target[..., 28:30, 28:30, 28:30] = 2
    for balanced, low, high in ((True, 0.31, 0.36), (False, 0.0, 0.02)):
        made = sampler(class_balanced=balanced, boundary_share=1.0)
        found = at_points(target, made(target))
        assert low <= (found == 2).float().mean() <= high


def test_without_a_boundary_all_points_are_uniform() -> None:
    torch.manual_seed(0)
    target = torch.cat([torch.zeros(1, 1, 32, 32, 32), torch.full((1, 1, 32, 32, 32), 7.0)])
    points = sampler(sigma=(5.0,) * 3)(target, ignore_label=7)
    assert points.shape == (2, 8000, 3)
    counts = torch.bincount(points[..., 0].flatten(), minlength=32) / 16000
    torch.testing.assert_close(counts, torch.full((32,), 1 / 32), rtol=0.2, atol=0)


def test_samples_of_a_batch_are_drawn_each_from_its_own_boundary() -> None:
    torch.manual_seed(0)
    target = torch.zeros(2, 1, 16, 16, 16, dtype=torch.long)
    target[0, 0, :4], target[1, 0, 12:] = 1, 1
    points = sampler(n_points=500)(target)
    assert set(points[0, :250, 0].tolist()) == {3, 4}
    assert set(points[1, :250, 0].tolist()) == {11, 12}


def test_at_most_a_quarter_of_the_voxels_at_least_one() -> None:
    assert points_per_patch(30_000, (128, 128, 128)) == 30_000
    assert points_per_patch(30_000, (16, 16, 16)) == 1024
    assert points_per_patch(30_000, (1, 2)) == 1
    assert sampler(n_points=10**9)(ball(8, 2)).shape == (1, 128, 3)


def test_points_in_two_dimensions() -> None:
    torch.manual_seed(0)
    target = ball(32, 6, dim=2)
    points = PointSampler(100, 1.0, (0.0, 0.0))(target)
    assert at_points(boundary_voxels(target)[:, None], points).all()


def test_the_seed_of_torch_or_a_generator_decides() -> None:
    made, target = sampler(sigma=(5.0,) * 3), ball()
    torch.manual_seed(3)
    first = made(target)
    torch.manual_seed(3)
    assert torch.equal(made(target), first)
    assert not torch.equal(made(target), first)
    one, other = (made(target, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_points": 0}, "n_points must be at least 1, got 0"),
        ({"boundary_share": 1.5}, r"boundary_share must lie in 0 to 1, got 1\.5"),
        ({"sigma": (-1.0,)}, "sigma must not be negative"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(**changes)
