"""meU-net's training step in the real trainer: gradients, memory, scaler, checkpoints, refusals."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnunet_ext.memory.tracker import StorageTracker
from nnunet_ext.trainers.nnUNetTrainerMeReversible import nnUNetTrainerMeReversible
from nnunet_ext.trainers.nnUNetTrainerMeUNet import nnUNetTrainerMeUNet
from nnunet_ext.trainers.nnUNetTrainerReversible import nnUNetTrainerReversible
from nnunet_ext.trainers.softmax_weighted_ce import SoftmaxWeightedCrossEntropy
from tests.contract.gradients import gradients_of
from tests.contract.plans import sizes

CPU = torch.device("cpu")
Dataset = Callable[[str], int]


@pytest.fixture
def trainer_of(dataset: Dataset, workspace: Path) -> Callable[..., Any]:
    """Make an initialised trainer: ``trainer_of(nnUNetTrainerMeUNet, "regions", me_unet={"k": 1.5})``."""

    def make(trainer_class: type[nnUNetTrainer], kind: str = "labels", **changes: Any) -> Any:
        (folder,) = (workspace / "preprocessed").glob(f"Dataset{dataset(kind)}_*")
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        configuration = plans["configurations"]["3d_fullres"]
        arch = configuration["architecture"]["arch_kwargs"]
        arch.update(sizes([4, 8, 16, 32]))  # deep enough for several levels without the finest
        configuration["patch_size"] = [24, 24, 24]
        configuration.update(copy.deepcopy(changes))
        torch.manual_seed(0)
        trainer = trainer_class(
            {**plans, "continue_training": False},
            "3d_fullres",
            0,
            json.loads((folder / "dataset.json").read_text()),
            CPU,
        )
        trainer.initialize()
        trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
        trainer.network.train()
        return trainer

    return make


def batch_of(trainer: Any, batch_size: int = 2) -> dict[str, Any]:
    """What nnU-Net's loader gives, of random numbers."""
    torch.manual_seed(1)
    patch = trainer.configuration_manager.patch_size
    labels = trainer.label_manager
    if labels.has_regions:
        target = torch.rand(batch_size, len(labels.foreground_regions), *patch) > 0.6
    else:
        target = torch.randint(0, 4 if labels.has_ignore_label else 3, (batch_size, 1, *patch)).short()
    return {"data": torch.randn(batch_size, 2, *patch), "target": targets(trainer, target)}


def targets(trainer: Any, target: Tensor) -> list[Tensor]:
    transform = DownsampleSegForDSTransform(trainer._get_deep_supervision_scales())
    samples = [transform._apply_to_segmentation(sample) for sample in target]
    return [torch.stack(scale) for scale in zip(*samples, strict=True)]


def joint_gradients(trainer: Any, batch: dict[str, Any], all_levels: bool) -> list[Tensor]:
    """Gradients of half the loss of each patch, summed, in one backward pass through nnU-Net's own forward."""
    network = trainer.network
    first = network.encoder.transitions[1] if hasattr(network.encoder, "transitions") else None
    hook = (first or network.encoder.stages[1][0].convs[0]).register_forward_hook(lambda m, x, y: y.detach())
    recomputes = vars(network).get("reversible")
    network.reversible = False  # plain autograd, which the hook can cut
    _, *coarse = network(batch["data"])
    hook.remove()
    base = trainer.loss.loss
    if all_levels:
        weights = [1.0] if len(coarse) == 1 else [0.5**i for i in range(len(coarse) - 1)]
        pairs = zip(weights, coarse, batch["target"][1:], strict=False)
        expanded = sum(w * base(output, target) for w, output, target in pairs) / sum(weights)
    else:
        expanded = base(coarse[0], batch["target"][1])
    margins = [
        (a - b) // 2 for a, b in zip(trainer.configuration_manager.patch_size, trainer.standard_patch, strict=True)
    ]
    centre = (slice(None), slice(None), *(slice(m, -m) for m in margins))
    standard = trainer.loss(network(batch["data"][centre]), targets(trainer, batch["target"][0][centre]))
    network.reversible = recomputes
    parameters = list(network.parameters())
    return list(torch.autograd.grad(0.5 * expanded + 0.5 * standard, parameters, allow_unused=True))


class nnUNetTrainerMeUNetWeighted(nnUNetTrainerMeUNet):
    softmax_weighted = True


def test_classes_are_weighted_in_both_passes(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(nnUNetTrainerMeUNetWeighted, "ignore")
    batch = batch_of(trainer)
    wanted = joint_gradients(trainer, batch, all_levels=False)
    found = gradients_of(trainer, batch)
    assert isinstance(trainer.loss.loss.ce, SoftmaxWeightedCrossEntropy)
    for ours, gradient in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-6)


def test_weighted_classes_need_labels_that_exclude_each_other(trainer_of: Callable[..., Any]) -> None:
    with pytest.raises(NotImplementedError, match="regions"):
        trainer_of(nnUNetTrainerMeUNetWeighted, "regions")


@pytest.mark.parametrize("trainer_class", [nnUNetTrainerMeUNet, nnUNetTrainerMeReversible])
@pytest.mark.parametrize("kind", ["labels", "regions", "ignore"])
@pytest.mark.parametrize("all_levels", [False, True])
def test_two_passes_have_the_gradients_of_the_joint_loss(
    trainer_class: type[nnUNetTrainer],
    kind: str,
    all_levels: bool,
    trainer_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer_class, "expanded_deep_supervision", all_levels)
    trainer = trainer_of(trainer_class, kind)
    assert trainer.is_expanded
    trainer.network.double()
    batch = batch_of(trainer)
    batch["data"] = batch["data"].double()
    expected = joint_gradients(trainer, batch, all_levels)
    for found, wanted in zip(gradients_of(trainer, batch), expected, strict=True):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)


def test_in_float32_they_differ_by_less_than_1e_5(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(nnUNetTrainerMeUNet)
    batch = batch_of(trainer)
    expected = joint_gradients(trainer, batch, False)
    pairs = [pair for pair in zip(gradients_of(trainer, batch), expected, strict=True) if pair[1] is not None]
    found, wanted = (torch.cat([x.flatten() for x in side]) for side in zip(*pairs, strict=True))
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_step_peaks_like_a_step_on_the_small_patch(trainer_of: Callable[..., Any]) -> None:
    def peak(trainer: Any) -> int:
        batch = batch_of(trainer)
        trainer.train_step(batch)  # makes the optimiser's state
        with StorageTracker() as tracker:
            trainer.train_step(batch)
        return tracker.peak

    ours = trainer_of(nnUNetTrainerMeUNet)
    small = peak(trainer_of(nnUNetTrainer, patch_size=list(ours.standard_patch)))
    large = peak(trainer_of(nnUNetTrainer))
    found = peak(ours)
    assert found < 1.25 * small  # the expanded pass of so few features is no larger
    assert found < 0.5 * large


def test_k_of_one_is_nnunets_own_step(trainer_of: Callable[..., Any]) -> None:
    ours, default = trainer_of(nnUNetTrainerMeUNet, me_unet={"k": 1}), trainer_of(nnUNetTrainer)
    assert not ours.is_expanded
    for trainer in (ours, default):
        trainer.network.load_state_dict(default.network.state_dict())
        trainer.train_step(batch_of(trainer))
    torch.testing.assert_close(ours.network.state_dict(), default.network.state_dict(), rtol=0, atol=0)


def test_without_deep_supervision_the_second_level_still_learns(
    trainer_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoDeepSupervision(nnUNetTrainerMeUNet):
        def _build_loss(self) -> Any:
            self.enable_deep_supervision = False
            return super()._build_loss()

    trainer = trainer_of(NoDeepSupervision)
    trainer.set_deep_supervision_enabled(False)
    batch = batch_of(trainer_of(nnUNetTrainer))
    trainer.train_step({"data": batch["data"], "target": batch["target"][0]})
    assert trainer.network.decoder.seg_layers[-2].weight.grad.any()


def test_validation_sample_by_sample_counts_what_nnunet_counts(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(nnUNetTrainerMeUNet)
    trainer.network.eval()
    with torch.no_grad():
        found = trainer.validation_step(batch_of(trainer, 3))
        expected = nnUNetTrainer.validation_step(trainer, batch_of(trainer, 3))
    for key in ("tp_hard", "fp_hard", "fn_hard"):
        assert (found[key] == expected[key]).all()
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), abs=0.05)


def test_scaled_gradients_are_unscaled_once_and_take_the_same_step(trainer_of: Callable[..., Any]) -> None:
    plain, scaled = trainer_of(nnUNetTrainerMeUNet), trainer_of(nnUNetTrainerMeUNet)
    scaled.network.load_state_dict(plain.network.state_dict())
    scaled.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = [trainer.train_step(batch_of(trainer))["loss"] for trainer in (plain, scaled)]
    assert float(losses[0]) == pytest.approx(float(losses[1]))
    torch.testing.assert_close(scaled.network.state_dict(), plain.network.state_dict(), rtol=1e-4, atol=1e-6)


def test_an_overflow_in_the_expanded_pass_skips_the_step(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(nnUNetTrainerMeUNet)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(trainer.network.state_dict())
    trainer.expanded_loss = lambda output, target: output.sum() * float("inf")
    trainer.train_step(batch_of(trainer))
    torch.testing.assert_close(trainer.network.state_dict(), before, rtol=0, atol=0)
    assert trainer.grad_scaler.get_scale() == 2.0**9


@pytest.mark.parametrize(
    ("ours", "host"), [(nnUNetTrainerMeUNet, nnUNetTrainer), (nnUNetTrainerMeReversible, nnUNetTrainerReversible)]
)
def test_checkpoints_load_into_the_hosts_trainer_and_back(
    ours: type[nnUNetTrainer], host: type[nnUNetTrainer], trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    for source_class, target_class in ((ours, host), (host, ours)):
        source, target = trainer_of(source_class), trainer_of(target_class)
        assert type(source.network) is type(target.network)
        source.train_step(batch_of(source))
        path = str(tmp_path / "checkpoint.pth")
        source.save_checkpoint(path)
        target.load_checkpoint(path)
        torch.testing.assert_close(target.network.state_dict(), source.network.state_dict(), rtol=0, atol=0)
        weights = torch.load(path, weights_only=False)["network_weights"]
        target.network.load_state_dict(weights, strict=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"me_unet": {"k": 0.9}}, "must be at least 1, got 0.9: use 1.5"),
        ({"me_unet": {"k": 100}}, "smaller than the product of the strides"),
        ({"patch_size": [24, 23, 24]}, "must be divisible by the product of the strides"),
        (
            {"me_unet": {"k": 1.5, "standard_patch_size": [8, 8, 8]}},
            r"note the standard patch \[8, 8, 8\].*: correct one of them",
        ),
    ],
)
def test_plans_that_do_not_fit_are_refused_in_one_sentence(
    changes: dict[str, Any], message: str, trainer_of: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        trainer_of(nnUNetTrainerMeUNet, **changes)
    assert "\n" not in str(error.value)


def test_plans_with_a_single_stage_are_refused(trainer_of: Callable[..., Any]) -> None:
    architecture = {"arch_kwargs": {"n_stages": 1, "features_per_stage": [4], "strides": [[1, 1, 1]]}}
    with pytest.raises(ValueError, match="at least 3 stages, got 1"):
        trainer_of(nnUNetTrainerMeUNet, architecture=architecture)


def test_the_plans_k_is_stronger_than_the_trainers(trainer_of: Callable[..., Any]) -> None:
    assert trainer_of(nnUNetTrainerMeUNet).standard_patch == (16, 16, 16)
    assert trainer_of(nnUNetTrainerMeUNet, me_unet={"k": [1, 3, 1.5]}).standard_patch == (24, 8, 16)


def test_the_standard_patch_is_an_option_of_prediction(
    dataset: Dataset, trainer_of: Callable[..., Any], tmp_path: Path, workspace: Path
) -> None:
    trainer = trainer_of(nnUNetTrainerMeUNet)
    plans = copy.deepcopy(trainer.plans_manager.plans)
    plans["configurations"]["3d_fullres"]["patch_size"] = list(trainer.standard_patch)
    (tmp_path / "fold_0").mkdir()
    trainer.save_checkpoint(str(tmp_path / "fold_0" / "checkpoint_final.pth"))
    (tmp_path / "plans.json").write_text(json.dumps(plans))
    (folder,) = (workspace / "preprocessed").glob(f"Dataset{dataset('labels')}_*")
    shutil.copy(folder / "dataset.json", tmp_path)
    predictor = nnUNetPredictor(use_mirroring=False, device=CPU, perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(tmp_path), (0,), "checkpoint_final.pth")
    assert tuple(predictor.configuration_manager.patch_size) == trainer.standard_patch
    assert predictor.predict_logits_from_preprocessed_data(torch.randn(2, 20, 18, 30)).isfinite().all()
