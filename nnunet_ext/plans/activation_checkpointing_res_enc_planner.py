"""Planner of nnU-Net's own residual encoder network whose trainer recomputes activations."""

from __future__ import annotations

from nnunet_ext.plans.counted_memory_res_enc_planner import CountedMemoryResEncPlanner


class ActivationCheckpointingResEncPlanner(CountedMemoryResEncPlanner):
    """Spends the memory like `ActivationCheckpointingPlanner`, with the network of nnU-Net's ResEnc presets."""

    trainer = "nnUNetTrainerActivationCheckpointing"
    default_plans_name = "nnUNetActivationCheckpointingResEncPlans"
