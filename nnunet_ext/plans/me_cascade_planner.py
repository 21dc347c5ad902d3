"""Planner of meU-net's cascade: two stages at full resolution beside nnU-Net's own configurations."""

from __future__ import annotations

import warnings
from typing import Any

from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_ext.architectures.me_unet import DualMeUNet
from nnunet_ext.architectures.post_concat_unet import PostConcatUNet
from nnunet_ext.plans.me_unet_planner import MeUNetPlanner


class MeCascadePlanner(MeUNetPlanner):
    """Plans meU-net's cascade (Wang et al. 2022): large context first, then the prior joins the decoder.

    For `2d` and `3d_fullres`, which stay nnU-Net's own network at the standard patch P and take no part in the cascade:

        2d_me_context, 3d_me_context:    stage 1, `DualMeUNet` at kP
        2d_post_concat, 3d_post_concat:  stage 2, `PostConcatUNet` at P

    All use the same preprocessed data. P is planned so that the larger stage fits the memory.
    """

    default_plans_name = "nnUNetMeCascadePlans"
    k = 1.75

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Add the stages, then save."""
        super().save_plans(
            {**plans, "configurations": self.with_stages(plans["configurations"], self.dataset_json)}
        )

    @staticmethod
    def with_stages(
        configurations: dict[str, dict[str, Any]], dataset_json: dict[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """Configurations at P, and the stages of the cascade.

        Args:
            configurations: as planned, with kP as patch.
            dataset_json: of the data set.
        """
        labels = LabelManager(dataset_json["labels"], dataset_json.get("regions_class_order"))
        planned: dict[str, dict[str, Any]] = {}
        for name, configuration in configurations.items():
            noted = configuration.get("me_unet")
            planned[name] = configuration if noted is None else at_standard_patch(configuration)
            if name not in ("2d", "3d_fullres"):
                continue
            if noted is None:
                warnings.warn(
                    f"meU-net's cascade needs a network of at least 3 stages, {name} has fewer: it gets no cascade.",
                    stacklevel=2,
                )
                continue
            dim = name[:2]
            context, post = f"{dim}_me_context", f"{dim}_post_concat"
            planned[context] = {
                "inherits_from": name,
                "next_stage": post,
                "patch_size": configuration["patch_size"],
                "me_unet": noted,
                "architecture": _architecture(configuration, DualMeUNet, regions=labels.has_regions),
            }
            planned[post] = {
                "inherits_from": name,
                "previous_stage": context,
                "architecture": _architecture(
                    configuration,
                    PostConcatUNet,
                    prior_channels=len(labels.foreground_labels),
                    fusion="post",
                ),
            }
        return planned


def at_standard_patch(configuration: dict[str, Any]) -> dict[str, Any]:
    """A configuration of meU-net as an ordinary one at P."""
    rest = {key: value for key, value in configuration.items() if key != "me_unet"}
    return {**rest, "patch_size": configuration["me_unet"]["standard_patch_size"]}


def _architecture(configuration: dict[str, Any], network: type, **options: Any) -> dict[str, Any]:
    architecture = configuration["architecture"]
    return {
        **architecture,
        "network_class_name": f"{network.__module__}.{network.__name__}",
        "arch_kwargs": {**architecture["arch_kwargs"], **options},
    }
