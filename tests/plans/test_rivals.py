"""What is said of a larger patch: how much of it is filling, and how much the method."""

from __future__ import annotations

from typing import Any

import pytest

from nnunet_ext.plans.rivals import Planned, Rivals

DEFAULT = Planned({"patch_size": [128, 128, 128], "batch_size": 2}, 6.16)
FILLED = Planned({"patch_size": [128, 128, 160], "batch_size": 2}, 7.5)
RIVALS = Rivals(name="default", default=DEFAULT, filled=FILLED)


def planned(patch: list[int], expected: float, batch: int = 2, **noted: Any) -> Planned:
    return Planned({"patch_size": patch, "batch_size": batch, **noted}, expected)


def test_the_two_effects_multiply_to_all_of_the_gain() -> None:
    times, filling, method = RIVALS.split(2 * 160**3)
    assert filling == 160 / 128
    assert method == 160**2 / 128**2
    assert times == pytest.approx(filling * method) == 160**3 / 128**3


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (FILLED, "1.25x the voxels of default, all of it filling the target."),
        (planned([160, 160, 160], 7.45), "1.95x the voxels of default: 1.25x is filling the target, 1.56x the method."),
        (
            planned([128, 128, 160], 7.4),
            "1.25x the voxels of default: 1.25x is filling the target, 1.00x the method, which frees no memory.",
        ),
        # One step of patches more, but fuller by as much.
        (
            planned([128, 128, 176], 8.0),
            "1.38x the voxels of default: 1.25x is filling the target, 1.10x the method, which frees no memory.",
        ),
        # As many, where the data set is the limit.
        (
            planned([128, 128, 160], 5.0),
            "1.25x the voxels of default: 1.25x is filling the target, 1.00x the method, which needs 5.00 GB instead "
            "of 7.50 GB.",
        ),
    ],
)
def test_a_gain_is_the_methods_only_beyond_the_filled_network(found: Planned, said: str) -> None:
    assert list(RIVALS.sentences(found)) == [said]


def test_a_default_plan_that_is_too_large_is_no_loss_of_the_method() -> None:
    rivals = Rivals(name="default", default=planned([128, 128, 128], 9.0), filled=planned([96, 128, 128], 7.0))
    (said,) = rivals.sentences(planned([128, 128, 128], 7.5))
    assert said == "1.00x the voxels of default: 0.75x is keeping to the target, 1.33x the method."


def test_where_only_the_method_fits_all_is_the_method() -> None:
    (said,) = Rivals(name="default", default=DEFAULT, filled=None).sentences(planned([128, 128, 128], 3.9))
    assert said == "1.00x the voxels of default, all of it the method: without it no patch fits the target."


def test_context_is_told_from_the_patch_that_it_surrounds() -> None:
    noted = {"standard_patch_size": [128, 128, 160]}
    said = list(RIVALS.sentences(planned([192, 192, 256], 7.9, me_unet=noted)))
    assert said == [
        "4.50x the voxels of default: 1.25x is filling the target, 3.60x the method.",
        "1.25x without the context: 1.25x and 1.00x.",
    ]


def test_plans_note_both_rivals() -> None:
    assert RIVALS.entry(planned([160, 160, 160], 7.45)) == {
        "default": {"patch_size": [128, 128, 128], "batch_size": 2, "expected_GB": 6.16},
        "filled": {"patch_size": [128, 128, 160], "batch_size": 2, "expected_GB": 7.5},
        "voxels_by_filling": 1.25,
        "voxels_by_method": 1.562,
    }
