"""Names that users' plans and checkpoints hold: once released, they stay."""

from __future__ import annotations

from nnunet_ext import registry

# Networks by dotted path, as plans hold them; trainers and planners by class name, as checkpoints and plans do.
ARCHITECTURES = {
    "nnunet_ext.architectures.faster_fusion_unet.FasterFusionUNet",
    "nnunet_ext.architectures.me_unet.DualMeUNet",
    "nnunet_ext.architectures.implicit_unet.ImplicitUNet",
    "nnunet_ext.architectures.invertible_unet.InvertibleUNet",
    "nnunet_ext.architectures.partially_invertible_unet.PartiallyInvertibleUNet",
    "nnunet_ext.architectures.post_concat_unet.PostConcatUNet",
    "nnunet_ext.architectures.reversible_unet.ReversibleUNet",
}
TRAINERS = {
    "nnUNetTrainerActivationCheckpointing",
    "nnUNetTrainerDeployed",
    "nnUNetTrainerFasterFusion",
    "nnUNetTrainerFasterFusionBN",
    "nnUNetTrainerFasterFusionBNDistilled",
    "nnUNetTrainerFasterFusionFast",
    "nnUNetTrainerHalfWidth",
    "nnUNetTrainerHalfWidthBN",
    "nnUNetTrainerHalfWidthBNDistilled",
    "nnUNetTrainerImplicit",
    "nnUNetTrainerImplicitLite",
    "nnUNetTrainerImplicitLiteDistilled",
    "nnUNetTrainerInvertible",
    "nnUNetTrainerInvertibleNoVAE",
    "nnUNetTrainerMeCascade",
    "nnUNetTrainerMeCascadeCheckpointing",
    "nnUNetTrainerMeCascadeOnePass",
    "nnUNetTrainerMeCheckpointing",
    "nnUNetTrainerMeReversible",
    "nnUNetTrainerMeUNet",
    "nnUNetTrainerMeUNetOnePass",
    "nnUNetTrainerPartiallyInvertible",
    "nnUNetTrainerPartiallyInvertibleNoVAE",
    "nnUNetTrainerReversible",
}
PLANNERS = {
    "ActivationCheckpointingPlanner",
    "ActivationCheckpointingResEncPlanner",
    "CountedMemoryPlanner",
    "CountedMemoryResEncPlanner",
    "FasterFusionUNetPlanner",
    "HalfWidthPlanner",
    "ImplicitUNetPlanner",
    "InvertibleUNetPlanner",
    "MeCascadePlanner",
    "MeCascadeResEncPlanner",
    "MeResEncUNetPlanner",
    "MeReversibleUNetPlanner",
    "MeUNetPlanner",
    "PartiallyInvertibleUNetPlanner",
    "ReversibleUNetDeepPlanner",
    "ReversibleUNetPlanner",
}


def test_paths_of_networks_in_users_plans_still_exist() -> None:
    registered = {entry.value.replace(":", ".") for entry in registry.entries("architectures")}
    assert registered >= ARCHITECTURES


def test_names_in_users_checkpoints_and_plans_still_exist() -> None:
    assert set(registry.names("trainers")) >= TRAINERS
    assert set(registry.names("planners")) >= PLANNERS
