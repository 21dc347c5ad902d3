"""Which trainers and planners belong to an architecture, and what was measured of it."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import pytest

from nnunet_ext import methods, registry
from nnunet_ext.methods import Measured

if TYPE_CHECKING:
    from tests.conftest import Install


def method(name: str) -> methods.Method:
    (found,) = [m for m in methods.methods() if m.architecture.name == name]
    return found


def test_every_architecture_of_this_package_has_a_trainer_a_planner_and_a_name() -> None:
    ours = [m for m in methods.methods() if m.architecture.distribution.startswith("nnunet-ext ")]
    assert ours
    for found in ours:
        assert found.trainers, found
        assert found.planners, found
        assert found.name, found


def test_what_names_an_architecture_belongs_to_it(install: Install) -> None:
    install("nets", 'class AcmeNet:\n    """Acme (Author 2020): a network."""\n', architectures=["AcmeNet"])
    install(
        "train",
        "from nets import AcmeNet as N\nclass nnUNetTrainerAcme: pass",
        trainers=["nnUNetTrainerAcme"],
    )
    install("plan", "class AcmePlanner:\n    network = 'nets.AcmeNet'", planners=["AcmePlanner"])
    install("other", "class nnUNetTrainerOther:\n    '''Not AcmeNet.'''", trainers=["nnUNetTrainerOther"])
    found = method("AcmeNet")
    assert (found.name, found.trainers, found.planners) == (
        "Acme (Author 2020)",
        ("nnUNetTrainerAcme",),
        ("AcmePlanner",),
    )


def test_what_extends_a_trainer_belongs_to_its_architecture(install: Install) -> None:
    install("nets", "class AcmeNet: pass", architectures=["AcmeNet"])
    install(
        "train", "from nets import AcmeNet\nclass nnUNetTrainerAcme: pass", trainers=["nnUNetTrainerAcme"]
    )
    source = "from train import nnUNetTrainerAcme\nclass nnUNetTrainerAcmeLite(nnUNetTrainerAcme): pass"
    install("lite", source, trainers=["nnUNetTrainerAcmeLite"])
    assert method("AcmeNet").trainers == ("nnUNetTrainerAcme", "nnUNetTrainerAcmeLite")


def test_trainers_that_name_each_other_end(install: Install) -> None:
    install("nets", "class AcmeNet: pass", architectures=["AcmeNet"])
    install(
        "one", "import two\ntwo.nnUNetTrainerTwo\nclass nnUNetTrainerOne: pass", trainers=["nnUNetTrainerOne"]
    )
    install(
        "two", "import one\none.nnUNetTrainerOne\nclass nnUNetTrainerTwo: pass", trainers=["nnUNetTrainerTwo"]
    )
    assert method("AcmeNet").trainers == ()


def test_refused_names_belong_to_nothing(install: Install) -> None:
    install("nets", "class AcmeNet: pass", architectures=["AcmeNet"])
    install("train", "from nets import AcmeNet\nclass nnUNetTrainer: pass", trainers=["nnUNetTrainer"])
    assert method("AcmeNet").trainers == ()


def test_names_are_those_of_the_code() -> None:
    tree = ast.parse("from a.b import C as D\nimport e.f\nx = g.H('i.j.K', 'L', 'See M.N or O.')  # P")
    assert methods.names_in(tree) == {"C", "f", "x", "g", "H", "K"}


def test_file_of_measured_numbers_has_the_documented_shape() -> None:
    assert set(methods.measured()) <= set(registry.names("architectures"))


def test_example_of_the_documentation_is_read() -> None:
    example = (methods.__doc__ or "").partition("::\n")[2].partition("\n\n``")[0]
    (numbers,) = methods.parse_measured(example).values()
    assert (numbers.parameters, numbers.device) == (0.5, "NVIDIA H100")


def test_missing_and_null_numbers_are_not_measured() -> None:
    assert methods.parse_measured('{"AcmeNet": {"peak": null}}') == {"AcmeNet": Measured()}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ('{"speed": 2}', "has 'speed', known are parameters"),
        ('{"peak": "2"}', "peak of AcmeNet can't be '2'"),
    ],
)
def test_other_shapes_are_refused_with_what_they_hold(record: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        methods.parse_measured(f'{{"AcmeNet": {record}}}')
