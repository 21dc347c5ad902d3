"""Points between batch, network and loss; the refined share in the log; options between trainer, plans, prediction."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_ext.architectures.implicit.point_sampling import PointSampler, at_points
from nnunet_ext.architectures.implicit_unet import ImplicitUNet
from nnunet_ext.trainers.implicit import ImplicitTrainerMixin, implicit_network
from nnunet_ext.trainers.nnUNetTrainerImplicit import nnUNetTrainerImplicit
from nnunet_ext.trainers.nnUNetTrainerImplicitLite import nnUNetTrainerImplicitLite
from tests.contract.plans import PATCHES, arguments
from tests.ranks import Ranks
from tests.trainers.test_from_plans import configuration

SMALL = {"decoder_width": 16, "decoder_depth": 4, "dropout": 0.0}


class Host:
    """What the mixin needs of nnUNetTrainer."""

    device = torch.device("cpu")
    local_rank = 1  # the first rank compares with dense prediction, see tests/contract/test_dense_check.py

    def __init__(self, network: nn.Module, regions: bool = False, ignore: int | None = None) -> None:
        self.network = network
        self.label_manager = SimpleNamespace(has_regions=regions, ignore_label=ignore)
        self.lines: list[str] = []
        self.sampler = PointSampler(100, 0.5, (2.0,) * 3)
        dice = {"batch_dice": False, "smooth": 1e-5, "ddp": False}
        if regions:
            self.loss: nn.Module = DC_and_BCE_loss(
                {}, {**dice, "do_bg": True}, 1, 1, ignore is not None, MemoryEfficientSoftDiceLoss
            )
        else:
            dice["do_bg"] = False
            self.loss = DC_and_CE_loss(dice, {}, 1, 1, ignore, MemoryEfficientSoftDiceLoss)

    def train_step(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        self.output = self.network(batch["data"])
        self.target = batch["target"]
        loss = self.loss(self.output, self.target)
        loss.backward()
        return {"loss": loss.detach()}

    def on_validation_epoch_start(self) -> None:
        self.network.eval()

    def on_validation_epoch_end(self, outputs: list[Any]) -> None:
        pass

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        with torch.inference_mode():
            self.network.eval()(torch.randn(1, 2, *PATCHES["3d"]))

    def print_to_log_file(self, text: str) -> None:
        self.lines.append(text)


class Trainer(ImplicitTrainerMixin, Host):
    """The mixin on its host."""


def network() -> ImplicitUNet:
    torch.manual_seed(0)
    made = ImplicitUNet(2, 3, **arguments("3d"), **SMALL)
    return made.apply(made.initialize).train()


def batch(kind: str = "labels") -> dict[str, Tensor]:
    torch.manual_seed(1)
    data = torch.randn(2, 2, *PATCHES["3d"])
    labels = (data[:, :1] > 0.5).long() + (data[:, :1] > 1.5)
    if kind == "ignored":
        labels = torch.full_like(labels, 3)
    if kind == "regions":
        labels = torch.cat([labels > 0, labels > 1, labels > 1], 1)
    return {"data": data, "target": labels}


@pytest.mark.parametrize("compiled", [False, True])
def test_network_and_loss_get_the_same_points(compiled: bool) -> None:
    torch._dynamo.reset()
    inner = network()
    trainer = Trainer(torch.compile(inner, backend="aot_eager") if compiled else inner)
    given = batch()
    torch.manual_seed(5)
    trainer.train_step(given)
    torch.manual_seed(5)
    points = trainer.sampler(given["target"])
    assert torch.equal(trainer.target, at_points(given["target"], points))
    torch.testing.assert_close(trainer.output, inner(given["data"], points=points), rtol=1e-4, atol=1e-5)
    assert given["target"].shape == (2, 1, *PATCHES["3d"])  # the batch stays as it was


def test_no_points_are_left_behind_for_validation() -> None:
    trainer = Trainer(network())
    trainer.train_step(batch())
    assert not trainer.network._forward_pre_hooks
    trainer.loss = nn.Identity()  # fails on two arguments
    with pytest.raises(TypeError):
        trainer.train_step(batch())
    assert trainer.network(batch()["data"]).shape == (2, 3, *PATCHES["3d"])


@pytest.mark.parametrize("kind", ["labels", "regions", "ignored"])
def test_nnunets_losses_take_points(kind: str) -> None:
    ignore = {"labels": None, "regions": None, "ignored": 3}[kind]
    trainer = Trainer(network(), regions=kind == "regions", ignore=ignore)
    loss = trainer.train_step(batch(kind))["loss"]
    assert loss.isfinite()
    gradients = [p.grad for p in trainer.network.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)


def test_loss_of_all_voxels_as_points_is_the_dense_loss() -> None:
    trainer, made, given = Trainer(network()), network().eval(), batch()
    made.sparse = False
    points = torch.cartesian_prod(*[torch.arange(n) for n in PATCHES["3d"]]).expand(2, -1, -1)
    with torch.no_grad():
        dense = trainer.loss(made(given["data"]), given["target"])
        found = trainer.loss(made(given["data"], points=points), at_points(given["target"], points))
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5)


def test_training_on_points_learns_the_whole_patch() -> None:
    torch.manual_seed(0)
    trainer = Trainer(network())
    trainer.sampler = PointSampler(500, 0.5, (2.0,) * 3)
    optimiser = torch.optim.AdamW(trainer.network.parameters(), lr=3e-3)
    axes = torch.meshgrid(*[torch.arange(16) - 7.5] * 3, indexing="ij")
    target = (sum(a**2 for a in axes) < 25).long().expand(2, 1, -1, -1, -1)
    data = target.float().expand(2, 2, -1, -1, -1) + 0.2 * torch.randn(2, 2, 16, 16, 16)
    for _ in range(40):
        optimiser.zero_grad()
        trainer.train_step({"data": data, "target": target})
        optimiser.step()
    with torch.inference_mode():
        predicted = trainer.network.eval()(data).argmax(1)
    assert (predicted == target[:, 0]).float().mean() > 0.98


def test_refined_share_is_logged_after_validation() -> None:
    trainer = Trainer(network())
    trainer.on_validation_epoch_start()
    with torch.inference_mode():
        trainer.network(batch()["data"])
    trainer.on_validation_epoch_end([])
    trainer.perform_actual_validation()
    assert trainer.lines == [
        "refined share of the validation patches: 1.0000",
        "refined share of the validation cases: 1.0000",
    ]


def test_switch_of_deep_supervision_does_nothing() -> None:
    Trainer(network()).set_deep_supervision_enabled(True)


def test_another_network_is_refused() -> None:
    with pytest.raises(TypeError, match="needs an ImplicitUNet, got Linear"):
        implicit_network(nn.Linear(1, 1))


@pytest.mark.parametrize(("trainer", "width"), [(nnUNetTrainerImplicit, 512), (nnUNetTrainerImplicitLite, 256)])
def test_options_come_from_the_plans_else_from_the_trainer(trainer: Any, width: int) -> None:
    plain = configuration(ImplicitUNet, n_conv_per_stage=[2, 2])
    planned = configuration(ImplicitUNet, n_conv_per_stage=[2, 2], decoder_width=32, mesh_spacing=2)
    first = trainer.build_network_architecture(None, plain, 1, 2, False)
    second = trainer.build_network_architecture(None, planned, 1, 2, False)
    assert first.point_decoder.width == width
    assert second.point_decoder.width == 32
    assert second.mesh_spacing == (2, 2)


def test_a_variant_is_a_class_attribute() -> None:
    class Variant(nnUNetTrainerImplicit):
        decoder_width, n_points, frequencies = 24, 77, 0

    built = Variant.build_network_architecture(None, configuration(ImplicitUNet, n_conv_per_stage=[2, 2]), 1, 2)
    assert (built.point_decoder.width, built.n_points, built.point_decoder.encoded) == (24, 77, 0)


def ddp_step(rank: int) -> None:
    trainer = Trainer(DistributedDataParallel(network()))
    torch.manual_seed(rank)
    trainer.train_step(batch())
    assert trainer.output.shape == (2, 3, 100)
    mine = torch.cat([p.grad.flatten() for p in trainer.network.parameters() if p.grad is not None])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    torch.testing.assert_close(both[0], both[1])
    assert mine.abs().sum() > 0


def test_points_pass_through_ddp_and_gradients_are_shared(ranks: Ranks) -> None:
    ranks.run(ddp_step)
