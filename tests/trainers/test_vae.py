"""Loss of the VAE branch, its log, and weights between trainings with and without the branch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from torch import nn

from nnunet_ext.architectures.invertible_unet import InvertibleUNet
from nnunet_ext.architectures.partially_invertible_unet import PartiallyInvertibleUNet
from nnunet_ext.architectures.reversible.vae_branch import Reconstruction, VAEBranch
from nnunet_ext.trainers.vae import VAELoss, VAETrainerMixin, image_channels
from tests.contract.plans import arguments

NETWORKS = [InvertibleUNet, PartiallyInvertibleUNet]


class Constant(nn.Module):
    """A segmentation loss of 2."""

    def forward(self, output: Any, target: Any) -> torch.Tensor:
        assert isinstance(output, list)
        return torch.tensor(2.0)


def reconstruction(error: float) -> Reconstruction:
    zero = torch.zeros(1, 1, 2, 2)
    return Reconstruction(zero + error, zero, zero + 1.0, zero)  # a latent per voxel; KL: 1 + 1 - 0 - 1


def test_loss_is_the_weighted_sum_and_its_terms_are_kept_apart() -> None:
    loss = VAELoss(Constant(), l2_weight=0.1, kl_weight=0.5)
    assert loss(([], reconstruction(2.0)), None).item() == pytest.approx(2 + 0.1 * 4 + 0.5 * 1)
    loss(([], reconstruction(0.0)), None)
    assert loss.epoch_means() == pytest.approx((2.0, 2.0, 1.0))
    assert loss.epoch_means() is None  # a new epoch


def test_validation_counts_the_segmentation_alone() -> None:
    loss = VAELoss(Constant(), 0.1, 0.1)
    assert loss([torch.zeros(1)], None).item() == 2.0
    assert loss.epoch_means() is None


def test_terms_are_logged_every_epoch() -> None:
    lines: list[str] = []

    class Host:
        def _build_loss(self) -> nn.Module:
            return Constant()

        def on_train_epoch_end(self, outputs: list[Any]) -> None:
            lines.append(f"host {len(outputs)}")

    class Trainer(VAETrainerMixin, Host):
        def print_to_log_file(self, text: str) -> None:
            lines.append(text)

    trainer = Trainer()
    trainer.loss = trainer._build_loss()  # type: ignore[attr-defined]
    trainer.loss(([], reconstruction(1.0)), None)  # type: ignore[attr-defined]
    trainer.on_train_epoch_end([{}])
    trainer.on_train_epoch_end([])
    assert lines == ["host 1", "segmentation loss 2.0000, L2 of the reconstruction 1.0000, KL per voxel 1", "host 0"]


def test_what_kl_is_divided_by_is_an_attribute_of_the_trainer() -> None:
    class Host:
        def _build_loss(self) -> nn.Module:
            return Constant()

    class PerLatent(VAETrainerMixin, Host):
        kl_per = "latent"

    record = reconstruction(0.0)._replace(mean=torch.ones(1, 1, 1, 1), log_variance=torch.zeros(1, 1, 1, 1))
    for trainer, kl in ((type("Trainer", (VAETrainerMixin, Host), {}), 0.25), (PerLatent, 1.0)):
        assert trainer()._build_loss()(([], record), None).item() == pytest.approx(2 + 0.1 * kl)


def test_another_divisor_of_kl_is_refused() -> None:
    with pytest.raises(ValueError, match=r'"voxel" or "latent", got .voxels.'):
        VAELoss(Constant(), 0.1, 0.1, "voxels")  # type: ignore[arg-type]


def test_previous_stage_of_a_cascade_is_not_reconstructed() -> None:
    configuration: Any = SimpleNamespace(normalization_schemes=["ZScoreNormalization"] * 2)
    assert image_channels(configuration) == 2


def branch_of(network: nn.Module) -> VAEBranch:
    torch.manual_seed(0)
    branch = network.vae
    for conv in (branch.mean, branch.log_variance):
        nn.init.normal_(conv.weight)
    return branch.train()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latent_is_float32_under_autocast(dtype: torch.dtype) -> None:
    branch = branch_of(InvertibleUNet(1, 2, vae=True, **arguments("2d")))
    features, image = torch.randn(1, 32, 4, 4), torch.zeros(1, 1, 16, 16)
    with torch.autocast("cpu", dtype=dtype):
        record = branch(features.to(dtype), image)
    expected = branch.mean(features.to(dtype).float())
    torch.testing.assert_close(record.mean, expected, rtol=0, atol=0)
    assert record.log_variance.dtype == torch.float32


@pytest.mark.parametrize("size", [1e3, -1e3])
def test_kl_brings_a_log_variance_beyond_the_limits_back(size: float) -> None:
    branch = branch_of(InvertibleUNet(1, 2, vae=True, **arguments("2d")))
    nn.init.constant_(branch.log_variance.bias, size)
    record = branch(torch.randn(1, 32, 4, 4), torch.zeros(1, 1, 16, 16))
    assert record.log_variance.abs().max() == 10
    record.losses()[1].backward()
    gradient = branch.log_variance.bias.grad
    assert gradient.isfinite().all()
    assert (gradient.sign() == torch.tensor(size).sign()).all()


@pytest.mark.parametrize("network_class", NETWORKS)
def test_reconstruction_gets_better_in_training(network_class: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = network_class(1, 2, vae=True, deep_supervision=True, **arguments("2d")).train()
    network.apply(network.initialize)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    grid = torch.linspace(-2, 2, 32)
    x = (grid[:, None] + grid[None, :]).expand(2, 1, 32, 32)
    errors = []
    for _ in range(30):
        outputs, record = network(x)
        l2, kl = record.losses()
        errors.append(l2.item())
        optimiser.zero_grad()
        (sum(o.square().mean() for o in outputs) + l2 + 0.1 * kl).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimiser.step()
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("network_class", NETWORKS)
def test_pretrained_weights_with_a_branch_fit_a_network_without(network_class: type[nn.Module], tmp_path: Path) -> None:
    values = {**arguments("3d"), "deep_supervision": True}
    torch.manual_seed(0)
    with_vae, without = network_class(1, 2, vae=True, **values), network_class(1, 2, **values)
    path = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": with_vae.state_dict()}, path)
    load_pretrained_weights(without, str(path))
    weights = with_vae.state_dict()
    for name, value in without.state_dict().items():
        if ".seg_layers." not in name:  # nnU-Net leaves the heads as they are
            torch.testing.assert_close(value, weights[name], rtol=0, atol=0)
    torch.save({"network_weights": without.state_dict()}, path)
    with pytest.raises(AssertionError, match=r"vae\..* is missing in the pretrained model weights"):
        load_pretrained_weights(with_vae, str(path))
