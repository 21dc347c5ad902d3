"""Names, refusals and schedules of the registry."""

from __future__ import annotations

import inspect
import logging
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nnunet_ext import registry
from nnunet_ext.registry import Entry, RegistryError, Schedule, UnknownNameError

if TYPE_CHECKING:
    from tests.conftest import Install, RunPython

# A trainer as far as schedules are concerned, without nnU-Net.
ACME = '''
class nnUNetTrainerAcme:
    """Trains Acme.

    At length.
    """

    def __init__(self, plans, configuration, fold, dataset_json, device="cpu"):
        self.num_epochs, self.save_every = 1000, 50
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 250, 50
        self.inference_allowed_mirroring_axes = (0, 1)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        return "rotation", "dummy", "patch", (0, 1)
'''
ARGUMENTS: tuple[Any, ...] = ({}, "2d", 0, {})


def entry(name: str, kind: str = "trainers") -> Entry:
    found = [entry for entry in registry.entries(kind) if entry.name == name]
    assert found, f"{name} is not registered"
    return found[0]


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("nnUNetTrainer_5epochs", Schedule(base="nnUNetTrainer", epochs=5, iterations=None, no_mirroring=False)),
        ("nnUNetTrainerX_50iters", Schedule(base="nnUNetTrainerX", epochs=None, iterations=50, no_mirroring=False)),
        (
            "nnUNetTrainerX_NoMirroring",
            Schedule(base="nnUNetTrainerX", epochs=None, iterations=None, no_mirroring=True),
        ),
        (
            "nnUNetTrainerX_20epochs_50iters",
            Schedule(base="nnUNetTrainerX", epochs=20, iterations=50, no_mirroring=False),
        ),
        (
            "nnUNetTrainerX_20epochs_50iters_NoMirroring",
            Schedule(base="nnUNetTrainerX", epochs=20, iterations=50, no_mirroring=True),
        ),
        (
            "nnUNetTrainer_X_1epochs_NoMirroring",
            Schedule(base="nnUNetTrainer_X", epochs=1, iterations=None, no_mirroring=True),
        ),
    ],
)
def test_suffix_is_parsed_as_a_schedule(name: str, schedule: Schedule) -> None:
    assert registry.parse_schedule(name) == schedule


@pytest.mark.parametrize(
    "name",
    [
        "nnUNetTrainerX",
        "nnUNetTrainerX_",
        "nnUNetTrainerX_0epochs",
        "nnUNetTrainerX_05epochs",
        "nnUNetTrainerX_0iters",
        "nnUNetTrainerX_5epoch",
        "nnUNetTrainerX_5epochs_",
        "nnUNetTrainerX_5epochs_Mirroring",
        "nnUNetTrainerX_5epochsNoMirroring",
        "nnUNetTrainerX_5epochs\n",
        "_5epochs",
        "5epochs",
        "",
    ],
)
def test_other_names_are_no_schedule(name: str) -> None:
    assert registry.parse_schedule(name) is None


@pytest.mark.parametrize(
    "suffix",
    ["_0epochs", "_50iters_20epochs", "_NoMirroring_20epochs", "_20epochs_30epochs", "__20epochs", "_20Epochs"],
)
def test_suffix_outside_the_grammar_is_an_unknown_name(install: Install, suffix: str) -> None:
    install("acme", ACME, trainers=["nnUNetTrainerAcme"])
    with pytest.raises(UnknownNameError):
        registry.resolve("trainers", "nnUNetTrainerAcme" + suffix)


def test_registered_class_is_resolved(install: Install) -> None:
    install("acme", ACME, trainers=["nnUNetTrainerAcme"])
    assert registry.resolve("trainers", "nnUNetTrainerAcme").__module__ == "acme"
    assert "nnUNetTrainerAcme" in registry.names("trainers")
    assert entry("nnUNetTrainerAcme") == Entry(
        kind="trainers", name="nnUNetTrainerAcme", value="acme:nnUNetTrainerAcme", distribution="acme 1.0"
    )


def test_schedule_that_nnunet_itself_has_stays_its_own() -> None:
    assert "nnUNetTrainer_5epochs" in registry.core_names("trainers")
    with pytest.raises(UnknownNameError, match="belongs to nnU-Net"):
        registry.resolve("trainers", "nnUNetTrainer_5epochs")


def test_planners_have_no_schedules(install: Install) -> None:
    install("acme", "class AcmePlanner: pass", planners=["AcmePlanner"])
    with pytest.raises(UnknownNameError):
        registry.resolve("planners", "AcmePlanner_5epochs")


def test_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="trainers, planners, architectures, got 'losses'"):
        registry.entries("losses")


def test_name_of_two_distributions_is_refused_and_both_are_named(install: Install) -> None:
    install("acme", ACME, trainers=["nnUNetTrainerAcme"])
    install("copycat", ACME, trainers=["nnUNetTrainerAcme"])
    with pytest.raises(RegistryError, match=r"acme 1\.0 .* and by copycat 1\.0 .*uninstall all but one"):
        registry.resolve("trainers", "nnUNetTrainerAcme")
    with pytest.raises(RegistryError, match="uninstall all but one"):
        registry.resolve("trainers", "nnUNetTrainerAcme_7epochs_3iters")
    assert "nnUNetTrainerAcme" not in registry.names("trainers")


def test_same_name_in_different_groups_is_no_duplicate(install: Install) -> None:
    install("acme", "class Acme: pass", planners=["Acme"], architectures=["Acme"])
    assert entry("Acme", "planners").refused == entry("Acme", "architectures").refused == ""


def test_distribution_that_is_seen_twice_is_no_duplicate(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = install("acme", ACME, trainers=["nnUNetTrainerAcme"])
    again = tmp_path / "again"
    again.mkdir()
    (again / info.name).symlink_to(info, target_is_directory=True)
    monkeypatch.syspath_prepend(again)
    assert [e.refused for e in registry.entries("trainers") if e.name == "nnUNetTrainerAcme"] == [""]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("trainers", "nnUNetTrainerAdam"), ("planners", "ExperimentPlanner"), ("trainers", "nnUNetTrainer_5epochs")],
)
def test_name_that_nnunet_has_is_refused_and_not_shadowed(install: Install, kind: str, name: str) -> None:
    install("acme", f"class {name}: pass", **{kind: [name]})
    assert "nnU-Net itself has" in entry(name, kind).refused
    with pytest.raises(UnknownNameError):
        registry.resolve(kind, name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nnUNetTrainer__Acme", "'__'"),
        ("nnUNetTrainer-Acme", "identifier"),
        ("nnUNetTrainerAcme_5epochs", "schedule"),
        ("nnUNetTrainerAcme_NoMirroring", "schedule"),
    ],
)
def test_name_that_can_not_work_is_refused_with_the_reason(install: Install, name: str, reason: str) -> None:
    install("acme", ACME, trainers=[name])
    assert reason in entry(name).refused
    assert name not in registry.names("trainers")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module", "no_such_module"),
        ("syntax error", "SyntaxError"),
        ("raise RuntimeError('no licence')", "no licence"),
        ("import sys; sys.exit(3)", "SystemExit"),
        ("", "has no attribute"),
        ("class Other: pass\nnnUNetTrainerBroken = Other", "both must be equal"),
    ],
)
def test_broken_plugin_says_which_distribution_and_spares_the_others(
    install: Install, source: str, reason: str
) -> None:
    install("acme", ACME, trainers=["nnUNetTrainerAcme"])
    install("broken", source, trainers=["nnUNetTrainerBroken"])
    with pytest.raises(RegistryError, match=r"broken 1\.0") as caught:
        registry.resolve("trainers", "nnUNetTrainerBroken")
    assert reason in str(caught.value)
    assert registry.resolve("trainers", "nnUNetTrainerAcme").__name__ == "nnUNetTrainerAcme"
    assert {"nnUNetTrainerAcme", "nnUNetTrainerBroken"} <= set(registry.names("trainers"))


@pytest.mark.parametrize("metadata", ["", "Version: 1.0\n"])
def test_half_removed_distribution_is_listed_as_unknown(install: Install, metadata: str) -> None:
    info = install("acme", ACME, trainers=["nnUNetTrainerAcme"])
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    assert entry("nnUNetTrainerAcme").distribution == "unknown distribution"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("METADATA", b"Name: M\xfcller\n"),
        ("entry_points.txt", b"[nnunet_ext.trainers]\nnnUNetTrainerM\xfcller = latin:X\n"),
        ("entry_points.txt", b"[nnunet_ext.trainers]\nno equals sign\n"),
    ],
)
def test_unreadable_metadata_of_one_distribution_spares_the_others(install: Install, file: str, content: bytes) -> None:
    install("acme", ACME, trainers=["nnUNetTrainerAcme"])
    (install("latin", ACME, trainers=["nnUNetTrainerLatin"]) / file).write_bytes(content)
    assert entry("nnUNetTrainerAcme").distribution == "acme 1.0"
    assert registry.resolve("trainers", "nnUNetTrainerAcme").__name__ == "nnUNetTrainerAcme"


def test_message_about_a_name_is_safe_to_print(install: Install) -> None:
    info = install("acme", "raise RuntimeError('\x1b[2J')", trainers=["nnUNetTrainerAcme"])
    (info / "METADATA").write_text("Name: ac\x1b]0;me\nVersion: 1\n", encoding="utf-8")
    with pytest.raises(RegistryError) as caught:
        registry.resolve("trainers", "nnUNetTrainerAcme")
    assert str(caught.value).isprintable()


def suggestions(caplog: pytest.LogCaptureFixture, kind: str, *names: str) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "nnunet_ext"):
        for name in names:
            registry.suggest(kind, name)
    return [record.getMessage() for record in caplog.records]


def test_near_name_is_suggested_once(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install("acme", ACME, trainers=["nnUNetTrainerAcme"])
    (message,) = suggestions(caplog, "trainers", "nnUNetTrainerAcne", "nnUNetTrainerAcne")
    assert "Did you mean nnUNetTrainerAcme" in message


def test_suggestion_keeps_the_schedule(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install("acme", ACME, trainers=["nnUNetTrainerAcme"])
    (message,) = suggestions(caplog, "trainers", "nnUNetTrainerAcne_7epochs_NoMirroring")
    assert "Did you mean nnUNetTrainerAcme_7epochs_NoMirroring" in message


def test_schedule_of_a_core_variant_is_explained(caplog: pytest.LogCaptureFixture) -> None:
    (message,) = suggestions(caplog, "trainers", "nnUNetTrainerAdam_7epochs")
    assert "nnUNetTrainerAdam has no schedules" in message


def test_names_that_nnunet_or_its_external_folders_have_log_nothing(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("class nnUNetTrainerMine:\n    pass\n", encoding="utf-8")
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nothing.py")
    monkeypatch.setenv(registry.EXTERNAL_TRAINERS, str(tmp_path))
    assert suggestions(caplog, "trainers", "nnUNetTrainerAdam", "nnUNetTrainerMine", "torch") == []


def test_hint_is_the_last_line_where_nnunets_commands_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments
    from nnunetv2.run.run_training import get_trainer_from_args

    registry.suggest.cache_clear()
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def last_line(end: Callable[[], Any]) -> str:
        with pytest.raises(Exception) as caught:  # noqa: PT011 (nnU-Net's own)
            end()
        capsys.readouterr()
        sys.excepthook(caught.type, caught.value, None)
        return capsys.readouterr().err.splitlines()[-1]

    planner = last_line(lambda: plan_experiments([1], "ReversibelUNetPlanner"))
    trainer = last_line(lambda: get_trainer_from_args("1", "2d", 0, "nnUNetTrainerReversibel_7epochs"))
    assert "no planner is called ReversibelUNetPlanner. Did you mean ReversibleUNetPlanner" in planner
    assert "Did you mean nnUNetTrainerReversible_7epochs" in trainer
    sys.excepthook(OSError, OSError("disk full"), None)
    assert capsys.readouterr().err == "OSError: disk full\n"


def test_import_and_listing_load_neither_torch_nor_nnunet(run_python: RunPython) -> None:
    run_python(
        "import sys\n"
        "from nnunet_ext import registry\n"
        "entries = [entry for kind in registry.KINDS for entry in registry.entries(kind)]\n"
        "summaries = [registry.summary(entry) for entry in entries]\n"
        "loaded = {'torch', 'nnunetv2', 'numpy'} & set(sys.modules)\n"
        "assert entries and not loaded, loaded\n"
    )


def test_schedule_sets_epochs_iterations_and_checkpoints(install: Install) -> None:
    install("acme", ACME, trainers=["nnUNetTrainerAcme"])
    trainer = registry.resolve("trainers", "nnUNetTrainerAcme_20epochs_12iters")(*ARGUMENTS)
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch) == (20, 12)
    assert (trainer.num_val_iterations_per_epoch, trainer.save_every) == (2, 2)
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] == (0, 1)


@pytest.mark.parametrize(("epochs", "save_every"), [(1, 1), (9, 1), (100, 10), (2000, 50)])
def test_schedule_saves_ten_times_at_least_as_often_as_before(install: Install, epochs: int, save_every: int) -> None:
    install("acme", ACME, trainers=["nnUNetTrainerAcme"])
    assert registry.resolve("trainers", f"nnUNetTrainerAcme_{epochs}epochs")(*ARGUMENTS).save_every == save_every


def test_what_the_suffix_does_not_name_stays_the_trainers_own(install: Install) -> None:
    install("acme", ACME, trainers=["nnUNetTrainerAcme"])
    fewer = registry.resolve("trainers", "nnUNetTrainerAcme_1iters")(*ARGUMENTS)
    assert (fewer.num_epochs, fewer.save_every) == (1000, 50)
    assert (fewer.num_iterations_per_epoch, fewer.num_val_iterations_per_epoch) == (1, 1)
    shorter = registry.resolve("trainers", "nnUNetTrainerAcme_7epochs")(*ARGUMENTS)
    assert (shorter.num_iterations_per_epoch, shorter.num_val_iterations_per_epoch) == (250, 50)


def test_no_mirroring_alone_changes_mirroring_only(install: Install) -> None:
    install("acme", ACME, trainers=["nnUNetTrainerAcme"])
    trainer = registry.resolve("trainers", "nnUNetTrainerAcme_NoMirroring")(*ARGUMENTS)
    configured = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert configured == ("rotation", "dummy", "patch", None)
    assert trainer.inference_allowed_mirroring_axes is None
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch) == (1000, 250)


def test_scheduled_class_is_one_subclass_with_the_signature_of_its_base(install: Install) -> None:
    install("acme", ACME, trainers=["nnUNetTrainerAcme"])
    base = registry.resolve("trainers", "nnUNetTrainerAcme")
    scheduled = registry.resolve("trainers", "nnUNetTrainerAcme_7epochs")
    assert scheduled is registry.resolve("trainers", "nnUNetTrainerAcme_7epochs")
    assert issubclass(scheduled, base)
    assert scheduled.__name__ == scheduled.__qualname__ == "nnUNetTrainerAcme_7epochs"
    assert inspect.signature(scheduled.__init__) == inspect.signature(base.__init__)
    assert inspect.signature(scheduled) == inspect.signature(base)


def test_scheduled_class_and_instances_can_be_pickled(install: Install) -> None:
    install("acme", ACME, trainers=["nnUNetTrainerAcme"])
    scheduled = registry.resolve("trainers", "nnUNetTrainerAcme_7epochs_NoMirroring")
    assert pickle.loads(pickle.dumps(scheduled)) is scheduled
    assert type(pickle.loads(pickle.dumps(scheduled(*ARGUMENTS)))) is scheduled


@pytest.mark.parametrize("name", ["nnUNetTrainerNobody_7epochs", "nothing", "_5epochs"])
def test_module_has_no_other_attributes(name: str) -> None:
    assert not hasattr(registry, name)


PLANS: dict[str, Any] = {
    "dataset_name": "Dataset999_Nothing",
    "plans_name": "nnUNetPlans",
    "continue_training": False,
    "label_manager": "LabelManager",
    "configurations": {
        "2d": {
            "patch_size": [64, 64],
            "batch_size": 2,
            "data_identifier": "nnUNetPlans_2d",
            "architecture": {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []},
        }
    },
}


def test_schedule_of_nnunets_own_trainer_is_a_working_trainer(tmp_path: Path, run_python: RunPython) -> None:
    code = f"""
import inspect, torch
from nnunet_ext import registry

dataset = {{"labels": {{"background": 0, "one": 1}}, "channel_names": {{"0": "CT"}}, "file_ending": ".nii.gz"}}
scheduled = registry.resolve("trainers", "nnUNetTrainer_3epochs_10iters_NoMirroring")
trainer = scheduled(plans={PLANS}, configuration="2d", fold=0, dataset_json=dataset, device=torch.device("cpu"))
assert set(trainer.my_init_kwargs) == set(inspect.signature(scheduled).parameters)
assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (3, 10, 2)
assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] is None
"""
    # a process of its own: nnU-Net before 2.8 reads the variables once
    run_python(code, env={f"nnUNet_{folder}": str(tmp_path) for folder in ("raw", "preprocessed", "results")})


@pytest.mark.parametrize("layout", ["one.py", "one/__init__.py"])
def test_summary_is_read_without_importing(install: Install, site: Path, layout: str) -> None:
    info = install("acme", "", trainers=[])
    (info / "entry_points.txt").write_text(
        "[nnunet_ext.trainers]\nnnUNetTrainerAcme = package.one:nnUNetTrainerAcme\n", encoding="utf-8"
    )
    path = site / "package" / layout
    path.parent.mkdir(parents=True)
    (site / "package" / "__init__.py").write_text("raise RuntimeError", encoding="utf-8")
    path.write_text("raise RuntimeError\n" + ACME, encoding="utf-8")
    assert registry.summary(entry("nnUNetTrainerAcme")) == "Trains Acme."


@pytest.mark.parametrize("source", ["(" * 5000, "-" * 100_000 + "1", "[" * 100 + "]" * 100, "\0"])
def test_source_that_is_too_deep_for_python_has_no_summary(install: Install, source: str) -> None:
    install("acme", source, trainers=["nnUNetTrainerAcme"])
    assert registry.summary(entry("nnUNetTrainerAcme")) == ""


@pytest.mark.parametrize("value", ["no_such_module:X", "sys:X", "acme:X", "acme.no.such:X"])
def test_summary_is_empty_where_there_is_no_source(install: Install, value: str) -> None:
    install("acme", "syntax error", trainers=[])
    broken = Entry(kind="trainers", name="X", value=value, distribution="acme 1.0")
    assert registry.summary(broken) == ""
