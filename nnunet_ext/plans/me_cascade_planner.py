"""Planner of meU-net's cascade: two stages at full resolution in addition to nnU-Net's own configurations."""

from __future__ import annotations

import warnings
from typing import Any

from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_ext.architectures.me_unet import DualMeUNet
from nnunet_ext.architectures.post_concat_unet import PostConcatUNet
from nnunet_ext.memory.count import training_memory
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.plans.me_unet_planner import MeUNetPlanner
from nnunet_ext.plans.planned_report import figures

STAGED = ("2d", "3d_fullres")  # configurations that get a cascade, by dimensions
STAGES = ("me_context", "post_concat")


class MeCascadePlanner(MeUNetPlanner):
    """Plans meU-net's cascade (Wang et al. 2022): large context first, then the prior joins the decoder.

    For `2d` and `3d_fullres`, which stay nnU-Net's own network at the standard patch P and take no part in the cascade:

        2d_me_context, 3d_me_context:    stage 1, `DualMeUNet` at kP
        2d_post_concat, 3d_post_concat:  stage 2, `PostConcatUNet` at P

    All use the same preprocessed data. P is planned so that the larger stage fits the memory.
    """

    default_plans_name = "nnUNetMeCascadePlans"
    trainer = "nnUNetTrainerMeCascade"
    k = 1.75

    def settings_of(self, plan: dict[str, Any]) -> list[Setting]:
        """Both stages."""
        if "me_unet" not in plan:
            return super().settings_of(plan)
        base, name = at_standard_patch(plan), STAGED[len(plan["patch_size"]) - 2]
        return [self.setting_of({**base, **stage}) for stage in stages_of(plan, name, self.dataset_json)]

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Add the stages, each with its own memory, then save."""
        configurations = self.with_stages(plans["configurations"], self.dataset_json)
        for base in STAGED:
            if f"{base[:2]}_me_context" not in configurations:
                continue
            planned = plans["configurations"][base]
            for stage, setting in zip(STAGES, self.settings_of(planned), strict=True):
                memory = figures(training_memory(setting, self.trainer))
                configurations[f"{base[:2]}_{stage}"]["memory"] = {**planned["memory"], **memory}
        super().save_plans({**plans, "configurations": configurations})

    @staticmethod
    def with_stages(
        configurations: dict[str, dict[str, Any]], dataset_json: dict[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """Configurations at P, and the stages of the cascade.

        Args:
            configurations: Configurations as planned, with kP as patch.
            dataset_json: Content of the data set's dataset.json.
        """
        planned: dict[str, dict[str, Any]] = {}
        for name, configuration in configurations.items():
            if "me_unet" in configuration:
                planned[name] = at_standard_patch(configuration)
                if name in STAGED:
                    stages = stages_of(configuration, name, dataset_json)
                    planned |= {f"{name[:2]}_{stage}": found for stage, found in zip(STAGES, stages, strict=True)}
                continue
            planned[name] = configuration
            if name in STAGED:
                warnings.warn(
                    f"meU-net's cascade needs a network of at least 3 stages, {name} has fewer: it gets no cascade.",
                    stacklevel=2,
                )
        return planned


def stages_of(
    configuration: dict[str, Any], name: str, dataset_json: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both stages, as configurations that inherit from the one at P.

    Args:
        configuration: Configuration as planned, with kP as patch.
        name: Name of the configuration.
        dataset_json: Content of the data set's dataset.json.
    """
    labels = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
    context, post = (f"{name[:2]}_{stage}" for stage in STAGES)
    first = {
        "inherits_from": name,
        "next_stage": post,
        "patch_size": configuration["patch_size"],
        "me_unet": configuration["me_unet"],
        "architecture": _architecture(configuration, DualMeUNet, regions=labels.has_regions),
    }
    options = {"prior_channels": len(labels.foreground_labels), "fusion": "post"}
    second = {
        "inherits_from": name,
        "previous_stage": context,
        "architecture": _architecture(configuration, PostConcatUNet, **options),
    }
    return first, second


def at_standard_patch(configuration: dict[str, Any]) -> dict[str, Any]:
    """A configuration of meU-net as an ordinary one at P."""
    rest = {key: value for key, value in configuration.items() if key not in ("me_unet", "memory")}
    return {**rest, "patch_size": configuration["me_unet"]["standard_patch_size"]}


def _architecture(configuration: dict[str, Any], network: type, **options: Any) -> dict[str, Any]:
    architecture = configuration["architecture"]
    return {
        **architecture,
        "network_class_name": f"{network.__module__}.{network.__name__}",
        "arch_kwargs": {**architecture["arch_kwargs"], **options},
    }
