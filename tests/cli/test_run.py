"""``nnunet-ext run``: nnU-Net's commands where PyTorch doesn't install the hook."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.metadata import EntryPoint, EntryPoints, PackageNotFoundError
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

import _nnunet_ext_hook as hook
from nnunet_ext import cli, launch, registry
from tests.conftest import write_distribution

if TYPE_CHECKING:
    from tests.conftest import Claims, Install

ACME = """
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
class nnUNetTrainerAcme(nnUNetTrainer): pass
class AcmePlanner(ExperimentPlanner): pass
"""
# Commands that stand for nnU-Net's
HOST = """
import os, sys
state = []
def train():
    state.append((list(sys.argv), os.environ["nnUNet_extTrainer"]))
def fail():
    sys.exit(3)
def status():
    return 4
"""


@pytest.fixture
def host(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("host", HOST)
    points = [EntryPoint(f"nnUNetv2_{name}", f"host:{name}", "console_scripts") for name in ("train", "fail", "status")]
    fake = SimpleNamespace(version="2.8.0", entry_points=EntryPoints(points))
    monkeypatch.setattr(launch, "distribution", lambda name: fake)
    monkeypatch.setattr(sys, "argv", ["nnunet-ext"])
    monkeypatch.setenv(registry.EXTERNAL_TRAINERS, "")
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, hook.Finder)])


def run(*arguments: str) -> object:
    with pytest.raises(SystemExit) as left:
        cli.main(["run", *arguments])
    return left.value.code


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["-h"],
        ["--version"],
        ["--json"],
        ["4", "3d_fullres", "0", "-tr", "nnUNetTrainerX_5epochs", "--c"],
        ["-i", "in put", "-f", "0", "1", "--", "-x"],
        ["run", "list", ""],
    ],
)
def test_arguments_reach_the_command_unchanged(arguments: list[str]) -> None:
    assert run("nnUNetv2_train", *arguments) is None
    from host import state  # type: ignore[import-not-found]

    assert state[-1][0] == ["nnUNetv2_train", *arguments]


@pytest.mark.usefixtures("host")
def test_hook_and_shim_are_there_when_the_command_runs() -> None:
    assert not hook.is_installed()
    run("nnUNetv2_train")
    from host import state

    assert hook.is_installed()
    assert state[-1][1] == str(launch.SHIM)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(("command", "status"), [("train", None), ("fail", 3), ("status", 4)])
def test_exit_status_of_the_command_passes_through(command: str, status: int | None) -> None:
    assert run(f"nnUNetv2_{command}") == status


@pytest.mark.usefixtures("host")
def test_unknown_command_is_one_line_with_the_near_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "nnUNetv2_trian", "4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "nnunet-ext run: nnunetv2 2.8.0 has no command 'nnUNetv2_trian'. Did you mean nnUNetv2_train"
    )


@pytest.mark.usefixtures("host")
def test_command_like_no_other_is_one_line_with_all_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "ls"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("It has nnUNetv2_fail, nnUNetv2_status, nnUNetv2_train.")


def test_missing_nnunet_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(launch, "distribution", missing)
    assert cli.main(["run", "nnUNetv2_train"]) == 2
    assert "nnunetv2 isn't installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], [str(launch.SHIM)]),
        (["/mine", "/yours"], ["/mine", "/yours", str(launch.SHIM)]),
        ([str(launch.SHIM), "/mine"], [str(launch.SHIM), "/mine"]),
    ],
)
def test_shim_is_appended_once_to_what_is_set(before: list[str], after: list[str]) -> None:
    assert launch.with_shim(os.pathsep.join(before)).split(os.pathsep) == after


def test_shim_folder_holds_one_module() -> None:
    assert [path.name for path in launch.SHIM.iterdir() if path.suffix == ".py"] == ["nnunet_ext_shim.py"]


CLAIMS = """
import importlib.util

if importlib.util.find_spec("nnunetv2.utilities.find_objects"):  # nnU-Net 2.8
    os.environ["EXTERNAL"] = "SHIM"

    @claim
    def shim():
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
        import _nnunet_ext_hook
        assert not _nnunet_ext_hook.is_installed()
        assert find("nnUNetTrainerAcme").__module__ == "acme"
        assert find("nnUNetTrainerAcme_7epochs").__base__ is find("nnUNetTrainerAcme")
        try:
            find("nnUNetTrainerNobody")
        except RuntimeError as error:
            assert "Could not find requested nnunet trainer nnUNetTrainerNobody" in str(error)
        else:
            raise AssertionError("nnUNetTrainerNobody was found")

    del os.environ["EXTERNAL"]
forget("nnunetv2", "acme")

@claim
def commands():
    from nnunet_ext.cli import main
    for command in (
        "nnUNetv2_plan_experiment -d 999 -pl AcmePlanner",
        "nnUNetv2_train 999 2d 0 -device cpu -tr nnUNetTrainerAcme_7epochs",
    ):
        try:
            main(["run", *command.split()])
        except RuntimeError as error:  # nnU-Net looks for the dataset once it has found the name
            assert "Could not find a dataset with the ID 999" in str(error), error
        else:
            raise AssertionError("nnU-Net found a dataset")
"""


@pytest.fixture(scope="module")
def without_pytorchs_help(claims: Claims, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong with each of `CLAIMS` where PyTorch doesn't install the hook."""
    site = tmp_path_factory.mktemp("site")
    write_distribution(site, "acme", ACME, trainers=["nnUNetTrainerAcme"], planners=["AcmePlanner"])
    script = CLAIMS.replace("EXTERNAL", registry.EXTERNAL_TRAINERS).replace("SHIM", str(launch.SHIM))
    folders = {f"nnUNet_{name}": str(site) for name in ("raw", "preprocessed", "results")}
    return claims(script, site, TORCH_DEVICE_BACKEND_AUTOLOAD="0", **folders)


def test_nnunets_commands_find_names_without_pytorchs_help(without_pytorchs_help: dict[str, str]) -> None:
    assert not without_pytorchs_help["commands"]


@pytest.mark.skipif(
    importlib.util.find_spec("nnunetv2.utilities.find_objects") is None, reason="nnUNet_extTrainer needs nnU-Net 2.8"
)
def test_process_that_nnunet_starts_finds_names_through_the_shim(without_pytorchs_help: dict[str, str]) -> None:
    assert not without_pytorchs_help["shim"]
