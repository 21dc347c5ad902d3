"""Training as nnU-Net runs it on CUDA: compiled, in mixed precision, with a gradient scaler; emulated on the CPU.

Each registered trainer's own `initialize`, `train_step` and `validation_step` run. From CUDA differ the device, its
kernels and what runs at the same time. Runs wherever the package and pytest are: ``make test-versions`` runs it with
the lowest PyTorch that the metadata allow and with others.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnunet_ext import registry
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.teacher import VARIABLE
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.protocols import HasTeacher, only_predicts
from nnunet_ext.trainers.teachers import Teachers
from tests.contract.variants import slow_variants

TRAINERS = [name for name in registry.names("trainers") if not only_predicts(trainer_class(name))]
# Four stages have more convolutions than PyTorch's recompile limit, 8; meU-net takes a smaller patch out of this one.
PATCH = [4, 4, 16]
STRIDES = [[1, 1, 1], [1, 1, 2], [1, 1, 2], [1, 2, 2]]
CONFIGURATION: dict[str, Any] = {
    "data_identifier": "compiled",
    "preprocessor_name": "DefaultPreprocessor",
    "batch_size": 2,
    "patch_size": PATCH,
    "spacing": [1.0, 1.0, 1.0],
    "normalization_schemes": ["ZScoreNormalization"] * 2,
    "use_mask_for_norm": [False] * 2,
    "batch_dice": True,
    "architecture": {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 4,
            "features_per_stage": [4, 4, 8, 8],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[1, 3, 3]] * 2 + [[3, 3, 3]] * 2,
            "strides": STRIDES,
            "n_conv_per_stage": [1] * 4,
            "n_conv_per_stage_decoder": [1] * 3,
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    },
}
DATASET = {
    "channel_names": {"0": "T1", "1": "T2"},
    "labels": {"background": 0, "a": 1, "b": 2},
    "numTraining": 1,
    "file_ending": ".nii.gz",
}
CASCADE = {**CONFIGURATION, "previous_stage": "3d_lowres"}
CONFIGURATIONS = {"3d_fullres": CONFIGURATION, "3d_lowres": CONFIGURATION, "3d_cascade_fullres": CASCADE}
PLANS = {"dataset_name": "Dataset999_Compiled", "plans_name": "nnUNetPlans", "configurations": CONFIGURATIONS}


@pytest.fixture(autouse=True)
def _preprocessed(workspace: Path) -> None:
    """What nnU-Net looks at to choose how a data set is read."""
    folder = workspace / "preprocessed" / PLANS["dataset_name"] / "compiled"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "case.npz").touch()


@pytest.fixture(autouse=True)
def compiler_says() -> Iterator[list[str]]:
    """Warnings of the compiler; none is expected."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("torch._dynamo")
    logger.addHandler(handler)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._inductor.config.patch(fallback_random=True):  # the random numbers of the uncompiled network
        yield said
    logger.removeHandler(handler)
    torch._dynamo.reset()


@pytest.fixture
def trainer_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make an initialised trainer: ``trainer_of(name, torch.float16, backend="inductor")``."""
    monkeypatch.delenv(VARIABLE, raising=False)

    def make(name: str, dtype: torch.dtype, backend: str | None, configuration: str) -> Any:
        found = trainer_class(name)
        for module in {cls.__module__ for cls in found.__mro__}:
            if hasattr(sys.modules[module], "dummy_context"):  # what nnU-Net enters on the CPU instead of autocast
                monkeypatch.setattr(f"{module}.dummy_context", partial(torch.autocast, "cpu", dtype=dtype))
        monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: backend is not None)
        torch.manual_seed(0)
        plans = {**copy.deepcopy(PLANS), "continue_training": False}
        trainer = found(plans, configuration, 0, copy.deepcopy(DATASET), torch.device("cpu"))
        # Smaller than nnU-Net's 65536, because so few voxels have large gradients.
        trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with monkeypatch.context() as patch:
            if backend is not None:
                compile_ = torch.compile
                patch.setattr(torch, "compile", lambda *args, **kw: compile_(*args, **{"backend": backend, **kw}))
            trainer.initialize()
            if isinstance(found, HasTeacher):
                network = found.teacher_builder(Setting(plans=PLANS, dataset=DATASET, configuration=configuration))()
                trainer._teachers = Teachers(network, {"0": {}}, {})
                if backend is not None:
                    trainer._teachers.compile()
        return trainer

    return make


def batch_of(trainer: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    data = torch.randn(2, trainer.num_input_channels, *PATCH)
    labels = torch.randint(0, 3, (2, 1, *PATCH)).short()
    if trainer._get_deep_supervision_scales() is None:
        return {"data": data, "target": labels}
    strides = np.cumprod(trainer.configuration_manager.pool_op_kernel_sizes, axis=0)[:-1]
    return {"data": data, "target": [labels[:, :, :: s[0], :: s[1], :: s[2]].contiguous() for s in strides]}


def train(trainer: Any, batch: dict[str, Any], n_steps: int) -> list[float]:
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    trainer.network.train()
    losses = []
    for _ in range(n_steps):
        torch.manual_seed(2)
        losses.append(float(trainer.train_step(batch)["loss"]))
    return losses


def validate(trainer: Any, batch: dict[str, Any], predicts: bool) -> list[float]:
    """Loss of nnU-Net's validation; then, if wanted, a prediction, as after the last epoch."""
    trainer.network.eval()
    with torch.no_grad():
        torch.manual_seed(2)
        loss = float(trainer.validation_step(batch)["loss"])
    trainer.set_deep_supervision_enabled(False)
    if predicts:
        with torch.inference_mode():
            assert trainer.network(batch["data"]).isfinite().all()
    return [loss]


def steps(trainer: Any, rounds: int) -> list[float]:
    """Losses of training, validation, and training again; with more rounds predictions between."""
    batch = batch_of(trainer)
    losses = []
    for _ in range(rounds):
        losses += train(trainer, batch, rounds) + validate(trainer, batch, predicts=rounds > 1)
    return losses + train(trainer, batch, 1)


def weights(trainer: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.network.parameters()]


def test_at_least_one_trainer_is_registered() -> None:
    assert TRAINERS


# Dynamo alone, which decides what breaks and what is compiled again, is fast; the rest of the compiler takes minutes.
FAST = [pytest.param(torch.float16, "3d_fullres", "eager", id="eager")]
# PyTorch 2.5 writes C++ for nnU-Net's own Dice loss in half precision that no compiler takes.
INDUCTOR = "inductor" if torch.__version__ >= (2, 6) else "aot_eager"
WHOLE = [
    pytest.param(dtype, configuration, backend, id=f"{backend}-{dtype}-{configuration}", marks=pytest.mark.slow)
    for dtype, configuration, backend in (
        (torch.float16, "3d_fullres", INDUCTOR),
        (torch.bfloat16, "3d_fullres", "aot_eager"),
        (torch.float16, "3d_cascade_fullres", "aot_eager"),
    )
]


@pytest.mark.parametrize(("dtype", "configuration", "backend"), [*FAST, *WHOLE])
@pytest.mark.parametrize("name", slow_variants(TRAINERS))
def test_compiled_training_in_mixed_precision_is_the_uncompiled_one(
    name: str,
    dtype: torch.dtype,
    configuration: str,
    backend: str,
    trainer_of: Callable[..., Any],
    compiler_says: list[str],
) -> None:
    compiled = trainer_of(name, dtype, backend, configuration)
    before = weights(compiled)
    rounds = 1 if backend == "eager" else 2
    losses = steps(compiled, rounds)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiler_says == []
    assert np.isfinite(losses).all()
    after = weights(compiled)
    assert all(weight.isfinite().all() for weight in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))

    plain = trainer_of(name, dtype, None, configuration)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(weights(plain), before, strict=True))
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(losses, steps(plain, rounds), rtol=tolerance, atol=tolerance)
