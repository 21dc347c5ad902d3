"""``nnunet-ext list``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from nnunet_ext import aims, cli, registry
from nnunet_ext.cli.list import SCHEDULES

if TYPE_CHECKING:
    from tests.conftest import Install


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["list", *arguments]) == 0
    return capsys.readouterr().out


def blocks(text: str) -> dict[str, dict[str, list[str]]]:
    """Title -> first line of a block -> its other lines, stripped."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in text.splitlines():
        if line and not line.startswith(" "):
            title = found.setdefault(line, {})
        elif line.startswith("  ") and not line.startswith("    "):
            block = title.setdefault(line.strip(), [])
        elif line:
            block.append(line.strip())
    return found


def test_text_holds_every_registered_name(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("acme", 'class nnUNetTrainerAcme:\n    """Trains Acme."""\n', trainers=["nnUNetTrainerAcme"])
    text = output(capsys)
    assert {name for kind in registry.KINDS for name in registry.names(kind)} <= set(text.split())
    assert blocks(text)["other"]["nnUNetTrainerAcme  acme 1.0"] == ["Trains Acme."]


def test_recommended_trainer_stands_first_below_its_aim(capsys: pytest.CaptureFixture[str]) -> None:
    found = blocks(output(capsys))
    for aim in aims.AIMS:
        first, *others = found[f"{aim}: {aims.TITLES[aim]}"]
        assert first == f"{aims.recommended(aim).trainer}  recommended"
        assert not [line for line in others if "recommended" in line]


def test_research_switches_stand_below_all_aims(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys)
    above, _, below = text.partition("\nresearch switches")
    for method in aims.METHODS:
        if method.standing == "research":
            assert method.trainer not in above.split()
            assert method.trainer in below.split()
    assert "ReversibleUNetDeepPlanner" not in above.split()


def test_planners_and_plans_stand_with_the_trainer_that_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    listed = [(block.split()[0], lines) for title in blocks(output(capsys)).values() for block, lines in title.items()]
    for name in registry.names("planners"):
        planner = registry.resolve("planners", name)
        lines = " ".join(line for trainer, found in listed if trainer == planner.trainer for line in found)
        assert f"-pl {name} -p {planner.default_plans_name}" in lines


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ('class APlanner:\n    trainer = "T"\n    default_plans_name: str = "P"', ["-pl APlanner -p P -tr T"]),
        ('class APlanner(Base):\n    def __init__(self, a, plans_name="P", b=1):\n        pass', ["-pl APlanner -p P"]),
        ('class APlanner(Base):\n    def __init__(self, *, plans_name="P"):\n        pass', ["-pl APlanner -p P"]),
        (
            'import x\nclass APlanner(x.ReversibleUNetPlanner):\n    default_plans_name = "P"',
            ["-pl APlanner -p P -tr nnUNetTrainerReversible"],
        ),
        ("class APlanner(APlanner):\n    pass", ["-pl APlanner"]),
        ("class APlanner:\n    trainer = T", ["-pl APlanner"]),
    ],
)
def test_planners_of_others_say_what_their_source_says(
    source: str, options: list[str], install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("acme", source, planners=["APlanner"])
    assert blocks(output(capsys))["other"]["APlanner  acme 1.0"] == options


def test_escapes_of_others_do_not_reach_the_terminal(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("acme", 'class AcmeNet:\n    """A \x1b[2Jnet\u202e\x9b."""\n', architectures=["AcmeNet", "X\x1b[2J"])
    for arguments in ([], ["--json"]):
        assert all(line.isprintable() for line in output(capsys, *arguments).split("\n"))
    assert "A \\x1b[2Jnet\\u202e\\x9b." in output(capsys)


def test_text_explains_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    assert "[_<N>epochs][_<M>iters][_NoMirroring]" in output(capsys)


def test_example_of_a_schedule_is_one() -> None:
    example = SCHEDULES.partition("-tr ")[2].partition(":")[0]
    assert registry.parse_schedule(example) is not None


def test_one_name_of_two_kinds_is_listed_twice(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("acme", 'class Acme:\n    default_plans_name = "P"', planners=["Acme"], architectures=["Acme"])
    found = blocks(output(capsys))
    assert found["other"]["Acme  acme 1.0"] == ["-pl Acme -p P"]
    assert found["architectures"]["Acme  acme 1.0"] == []


def test_refused_names_are_listed_with_the_reason(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("acme", "", trainers=["nnUNetTrainerAdam"])
    above, _, refused = output(capsys).partition("\nrefused\n")
    assert "nnU-Net itself has nnUNetTrainerAdam" in refused
    assert "nnUNetTrainerAdam" not in above


def test_broken_plugin_is_listed(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("broken", "syntax error", trainers=["nnUNetTrainerBroken"])
    assert "nnUNetTrainerBroken  broken 1.0" in blocks(output(capsys))["other"]


def test_json_holds_the_records(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("acme", 'class AcmeNet:\n    """A network."""\n', architectures=["AcmeNet", "Acme-Net"])
    records = json.loads(output(capsys, "--json"))
    assert {record["kind"] for record in records} <= set(registry.KINDS)
    assert {
        "kind": "architectures",
        "name": "AcmeNet",
        "value": "acme:AcmeNet",
        "distribution": "acme 1.0",
        "refused": "",
        "summary": "A network.",
        "aim": [],
        "recommended": [],
        "planner": [],
        "plans": [],
    } in records
    of_name = {record["name"]: record for record in records}
    assert of_name["nnUNetTrainerDeployed"]["aim"] == [aims.OTHER]
    said = [of_name["nnUNetTrainerFasterFusion"], of_name["nnUNetTrainerInvertibleNoVAE"], of_name["MeUNetPlanner"]]
    assert [(record["aim"], record["planner"], record["plans"]) for record in said] == [
        (["size", "speed"], [], ["nnUNetPlans"]),
        (["memory", "context"], ["InvertibleUNetPlanner"], ["nnUNetInvertiblePlans"]),
        (["context", "memory"], ["MeUNetPlanner"], ["nnUNetMePlans"]),
    ]
    assert [record["refused"] != "" for record in records if record["name"] == "Acme-Net"] == [True]
