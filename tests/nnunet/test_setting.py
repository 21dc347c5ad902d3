"""The setting that networks are built in."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from dynamic_network_architectures.architectures.unet import PlainConvUNet

from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.source import Source
from nnunet_ext.nnunet.trainers import trainer_class

if TYPE_CHECKING:
    from tests.conftest import Install


def test_builder_gives_the_trainers_network(setting: Setting) -> None:
    network = setting.builder("nnUNetTrainer")()
    assert type(network) is PlainConvUNet
    assert network.decoder.deep_supervision
    assert network.decoder.seg_layers[-1].out_channels == 3
    assert not setting.builder("nnUNetTrainer", deep_supervision=False)().decoder.deep_supervision


def test_sizes_are_those_of_the_plans(setting: Setting) -> None:
    assert (setting.patch_size, setting.batch_size) == ((16, 16, 16), 2)
    assert (setting.input_channels, setting.num_classes) == (1, 3)
    assert setting.strides == (4, 4, 4)


def test_cascade_reads_the_previous_stages_classes_too() -> None:
    planned = Source(patch=(16, 16, 16), channels=2, classes=4).setting()
    configuration = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    plans = {**planned.plans, "configurations": {**planned.plans["configurations"], "cascade": configuration}}
    assert Setting(plans=plans, dataset=planned.dataset, configuration="cascade").input_channels == 2 + 3


def test_regions_and_ignore_label_have_no_background_head() -> None:
    planned = Source(patch=(16, 16, 16)).setting()
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    dataset = {**planned.dataset, "labels": labels, "regions_class_order": [1, 2]}
    assert Setting(plans=planned.plans, dataset=dataset, configuration="3d_fullres").num_classes == 2


def test_unknown_configuration_names_the_known_ones(setting: Setting) -> None:
    with pytest.raises(UsageError, match="have the configurations 3d_fullres, got 3d_lowres: choose one"):
        Setting(plans=setting.plans, dataset=setting.dataset, configuration="3d_lowres")


@pytest.mark.parametrize(
    "name", ["nnUNetTrainer", "nnUNetTrainerAdam", "nnUNetTrainerReversible", "nnUNetTrainerReversible_3epochs"]
)
def test_trainers_of_nnunet_and_registered_ones_are_found(name: str) -> None:
    assert trainer_class(name).__name__ == name


def test_unknown_trainer_is_refused_with_the_cure() -> None:
    with pytest.raises(UsageError, match=r"got nnUNetTrainerRevrsible: .* Did you mean nnUNetTrainerReversible\b"):
        trainer_class("nnUNetTrainerRevrsible")
    with pytest.raises(UsageError, match=r"got Nobody: .* from\. `nnunet-ext list` shows all names\.$"):
        trainer_class("Nobody")


def test_broken_trainer_is_refused_with_its_distribution(install: Install) -> None:
    install("broken", "syntax error", trainers=["nnUNetTrainerBroken"])
    with pytest.raises(UsageError, match=r"broken 1\.0 can't be loaded"):
        trainer_class("nnUNetTrainerBroken")


def test_search_of_nnunet_before_2_8_is_used_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nnunetv2.utilities.find_objects", None)
    assert trainer_class("nnUNetTrainerAdam").__name__ == "nnUNetTrainerAdam"
    with pytest.raises(UsageError, match="got nnUNetTrainerNobody"):
        trainer_class("nnUNetTrainerNobody")


def test_building_leaves_the_plans_as_they_are(setting: Setting) -> None:
    before = str(setting.plans)
    setting.builder("nnUNetTrainerReversible")()
    assert str(setting.plans) == before
