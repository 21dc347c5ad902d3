"""The step that is compared: what it shares, freezes and adds up, by hand on a network of two layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nnunet_ext import architectures
from nnunet_ext.architectures.reversible.frugal import FrugalLeakyReLU
from nnunet_ext.doctor.gradients.cases import CASES, DOUBLE, ORDINARY, Case
from nnunet_ext.doctor.gradients.changes import NotThereError, drop, share
from nnunet_ext.doctor.gradients.describe import description
from nnunet_ext.doctor.gradients.groups import CONSTANT, HOLDERS, groups_of_one
from nnunet_ext.doctor.gradients.planted import WrongBackward
from nnunet_ext.doctor.gradients.slopes import TOLERANCE, slope_error
from nnunet_ext.doctor.gradients.step import Source, Step, loss_of
from nnunet_ext.doctor.gradients.subjects import recomputes


class Two(nn.Module):
    """Two layers, run in one of several ways."""

    def __init__(self, way: str = "plain", stop: bool = False) -> None:
        super().__init__()
        self.way, self.stop = way, stop
        self.first, self.second = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        if self.way == "checkpoint":
            y: Tensor = checkpoint(self.first, x, use_reentrant=False)
        elif self.way == "own":
            y = WrongBackward.apply(self.first(x))
        else:
            y = self.first(x).sin()
        z = self.second(y.detach() if self.stop else y)
        return [z, 2 * y]


def step_of(way: str = "plain", **options: Any) -> Step:
    source = Source(build=lambda _: Two(way), form=lambda network: network, shape=(2, 2, 4, 6))
    return Step(source, DOUBLE, "cpu", **options)


def by_hand(step: Step, case: Case) -> list[Tensor | None]:
    """The same gradients by `torch.autograd.grad` of the sum of all losses."""
    inputs = [step.input(case, number) for number in range(case.backward_passes)]
    total = torch.stack([loss_of(step.form(x), case) for x in inputs]).sum()
    wanted = [parameter for i, parameter in enumerate(step.parameters) if not (case.frozen and i % 2)]
    found = iter(torch.autograd.grad(total, [*wanted, *([] if case.frozen else inputs)], allow_unused=True))
    gradients = [None if case.frozen and i % 2 else next(found) for i, _ in enumerate(step.parameters)]
    return [*gradients, None if case.frozen else torch.stack([g for g in found if g is not None]).sum(0)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_of_a_case_are_those_of_the_sum_of_its_losses(case: Case) -> None:
    step = step_of(shared=case.shared)
    for mine, theirs in zip(step.gradients(case), by_hand(step, case), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_cases_are_what_they_are_called() -> None:
    step = step_of()
    case = {case.name: case for case in CASES}
    equal = step.input(case["equal samples"])
    assert torch.equal(equal[0], equal[1])
    assert not step.input(case["strided input and gradients"]).is_contiguous()
    assert step.input(case["strided input and gradients"]).shape == step.input(ORDINARY).shape
    assert not step.input(case["frozen parameters and input"]).requires_grad
    assert step.input(case["three groups of samples"]).shape == (3, *step.input(ORDINARY).shape[1:])
    assert len({tuple(step.input(ORDINARY, number).flatten().tolist()) for number in range(2)}) == 2


def test_shared_layer_stands_in_both_places_under_all_its_names() -> None:
    network = Two()
    network.again = nn.Sequential(network.second)
    share(network)
    assert network.first is network.second is network.again[0]
    assert len(list(network.parameters())) == 2


def test_network_without_two_layers_alike_is_refused() -> None:
    with pytest.raises(NotThereError, match="alike"):
        share(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1)))


def test_dropout_follows_each_activation_under_all_its_names() -> None:
    network = nn.Module()
    network.act = nn.LeakyReLU(inplace=True)
    network.layers = nn.Sequential(nn.Conv2d(1, 1, 1), network.act, FrugalLeakyReLU())
    drop(network)
    assert network.act is network.layers[1]
    assert [type(part) for part in network.act] == [nn.LeakyReLU, nn.Dropout]
    assert [type(part) for part in network.layers[2]] == [FrugalLeakyReLU, nn.Dropout]
    assert type(network.layers[0]) is nn.Conv2d


def test_network_without_activation_is_refused() -> None:
    with pytest.raises(NotThereError, match="activation"):
        drop(nn.Conv2d(1, 2, 1))


def test_all_that_goes_through_a_batch_in_groups_has_one_sample_in_each_for_a_while() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in Path(architectures.__file__).parent.rglob("*.py")}
    assert {path for path, text in sources.items() if CONSTANT in text} == {Path(str(x.__file__)) for x in HOLDERS}
    before = [vars(holder)[CONSTANT] for holder in HOLDERS]
    with groups_of_one():
        assert {vars(holder)[CONSTANT] for holder in HOLDERS} == {1}
    assert [vars(holder)[CONSTANT] for holder in HOLDERS] == before


def test_network_is_in_evaluation_mode_in_the_backward_pass_and_as_before_after_it() -> None:
    step = step_of()
    step.form.second.eval()
    seen: list[bool] = []
    step.form.first.weight.register_hook(lambda _: seen.append(step.form.training))
    step.gradients(Case(name="x", evaluated=True))
    assert seen == [False]
    assert (step.form.first.training, step.form.second.training) == (True, False)


@pytest.mark.parametrize(("way", "found"), [("plain", False), ("checkpoint", True), ("own", True)])
def test_backward_pass_of_own_making_is_seen(way: str, found: bool) -> None:
    assert recomputes(step_of(way)) is found


@pytest.mark.parametrize(("way", "is_right"), [("plain", True), ("checkpoint", True), ("own", False)])
def test_differences_of_the_loss_tell_right_from_wrong(way: str, is_right: bool) -> None:
    assert (slope_error(step_of(way)) <= TOLERANCE) is is_right


def test_differences_leave_out_what_gets_no_gradient_and_leave_weights_as_they_were() -> None:
    step = step_of()
    step.form.stop = True
    before = [parameter.detach().clone() for parameter in step.parameters]
    # The second output still leads to the first layer, the first output no more.
    assert slope_error(step) > TOLERANCE
    assert all(torch.equal(a, b) for a, b in zip(before, step.parameters, strict=True))


def test_description_tells_options_apart() -> None:
    assert description(Two("own")) == description(Two("own"))
    assert description(Two("own")) != description(Two("plain"))
