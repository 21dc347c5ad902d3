"""Planner of nnU-Net's own network whose trainer recomputes activations."""

from __future__ import annotations

from nnunet_ext.plans.counted_memory_planner import CountedMemoryPlanner


class ActivationCheckpointingPlanner(CountedMemoryPlanner):
    """Spends the memory that recomputing activations frees on a larger patch, then on a larger batch.

    The plans hold nnU-Net's own network: `nnUNetTrainer` reads them too, and needs more memory.
    """

    trainer = "nnUNetTrainerActivationCheckpointing"
    default_plans_name = "nnUNetActivationCheckpointingPlans"
