"""Every registered trainer trains a step with whatever valid plans, or says by a sentence what does not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_ext import registry
from nnunet_ext.errors import UsageError
from nnunet_ext.memory.step import TrainerStep
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.protocols import only_predicts
from tests.fuzz.plans import Drawn, network_plans
from tests.fuzz.trial import check_sentence, configuration_of, quiet

Tally = Callable[[str, Counter[str]], None]
TRAINERS = [name for name in registry.names("trainers") if not only_predicts(trainer_class(name))]
LABELS: dict[str, dict[str, Any]] = {
    "labels": {"background": 0, "a": 1, "b": 2},
    "one label": {"background": 0, "a": 1},
    "ignore": {"background": 0, "a": 1, "ignore": 2},
    "regions": {"background": 0, "whole": [1, 2], "core": [2]},
}
FEW = settings.get_current_profile_name() != "fuzz"


def setting_of(drawn: Drawn, labels: str, has_previous_stage: bool) -> Setting:
    """Plans around the architecture that was drawn, and a data set for them."""
    configuration = {
        **configuration_of(drawn).configuration,
        "spacing": [1.0] * len(drawn.patch),
        "normalization_schemes": ["ZScoreNormalization"] * drawn.channels,
        "use_mask_for_norm": [False] * drawn.channels,
        "batch_dice": False,
        **({"previous_stage": "coarse"} if has_previous_stage else {}),
    }
    plans = {
        "dataset_name": "drawn",
        "plans_name": "nnUNetPlans",
        "label_manager": "LabelManager",
        "configurations": {"drawn": configuration},
    }
    dataset = {
        "channel_names": {str(i): "T1" for i in range(drawn.channels)},
        "labels": LABELS[labels],
        **({"regions_class_order": [1, 2]} if labels == "regions" else {}),
        "file_ending": ".nii.gz",
    }
    return Setting(plans=plans, dataset=dataset, configuration="drawn")


def refusal_of(trainer: str, setting: Setting) -> str | None:
    """Build as the trainer builds, and run its own step; return the sentence by which it refuses."""
    torch.manual_seed(0)
    with quiet():
        try:
            losses = [loss.detach() for loss in TrainerStep(setting, trainer, mixed=False).passes()]
        except (ValueError, NotImplementedError, UsageError) as error:
            check_sentence(error)
            return str(error)
    assert losses
    assert all(loss.isfinite() for loss in losses)
    return None


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_trains_a_step_or_says_what_does_not_fit(
    name: str, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attribute in ("decoder_width", "decoder_depth"):  # wide ones take most of the time
        if hasattr(trainer_class(name), attribute):
            monkeypatch.setattr(trainer_class(name), attribute, 8)
    counted: Counter[str] = Counter()

    # Of two stages nnU-Net's own weights of deep supervision are 0 / 0.
    plans = network_plans(None, kinds=["planned", "varied"], least_stages=3)

    @settings(max_examples=4 if FEW else 60)
    @given(plans, st.sampled_from(sorted(LABELS)), st.booleans())
    def trial(drawn: Drawn, labels: str, has_previous_stage: bool) -> None:
        refusal = refusal_of(name, setting_of(drawn, labels, has_previous_stage))
        counted["worked" if refusal is None else "refused"] += 1

    trial()
    assert counted["worked"]
    tally(f"steps of {name}", counted)
