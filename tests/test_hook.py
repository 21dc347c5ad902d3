"""nnU-Net's own lookup through the hook, and that the hook can't do harm."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

import _nnunet_ext_hook as hook
from nnunet_ext.registry import RegistryError
from tests.conftest import write_distribution

if TYPE_CHECKING:
    from tests.conftest import Claims, Install, RunPython

TRAINERS, PLANNERS = hook.TARGETS
ACME = """
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

class nnUNetTrainerAcme(nnUNetTrainer):
    pass

class AcmePlanner(ExperimentPlanner):
    pass
"""
# nnU-Net's own search, as its commands call it
SEARCH = """
def search(kind, name):
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
    package = {"trainers": "training.nnUNetTrainer", "planners": "experiment_planning"}[kind]
    folder = nnunetv2.__path__[0] + "/" + package.replace(".", "/")
    return recursive_find_python_class(folder, name, "nnunetv2." + package)
"""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state before the hook is installed; nnU-Net's modules count as not imported."""
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, hook.Finder)])
    monkeypatch.setattr(hook, "errors", [])
    for name in hook.TARGETS:
        monkeypatch.delitem(sys.modules, name, raising=False)


def target(**attributes: Any) -> ModuleType:
    """A module with the name of nnU-Net's, to which the hook is attached."""
    module = ModuleType(TRAINERS)
    module.__dict__.update(attributes)
    hook._attach(module)
    return module


# --- In a fresh process, with nnU-Net itself


CLAIMS = """
import importlib, importlib.machinery

@claim
def broken_registry():
    assert "torch" not in sys.modules
    import TRAINERS  # imports torch, and the hook with it, while it is half executed
    assert search("trainers", "nnUNetTrainerNoMirroring").__module__.startswith("nnunetv2")
    import _nnunet_ext_hook as hook
    assert hook.is_installed()
    assert "broken" in hook.errors[0], hook.errors
    hook.errors.clear()

forget("nnunet_ext")
sys.path.remove(os.environ["BROKEN"])
importlib.invalidate_caches()
import torch, _nnunet_ext_hook as hook

@claim
def half_executed():
    assert search("trainers", "nnUNetTrainerAcme").__module__ == "acme"

forget("nnunetv2", "acme")

@claim
def registered_and_own():
    assert search("trainers", "nnUNetTrainerAcme").__module__ == "acme"
    assert search("planners", "AcmePlanner").__module__ == "acme"
    assert search("trainers", "nnUNetTrainerAcme_7epochs_3iters").__base__.__module__ == "acme"
    assert search("trainers", "nnUNetTrainer").__module__.startswith("nnunetv2")
    assert search("trainers", "nnUNetTrainer_5epochs").__module__.startswith("nnunetv2")
    assert search("planners", "ResEncUNetPlanner").__module__.startswith("nnunetv2")
    assert search("planners", "nnUNetTrainerAcme") is None
    assert not hook.errors


def forget_more():
    # Our finder comes in where nnU-Net's modules import others that are not imported yet.
    forget("nnunetv2", "acme", "batchgenerators", "batchgeneratorsv2", "acvl_utils", "tqdm", "nibabel", "tifffile")

forget_more()

@claim
def finder_that_answers_first():
    class AnsweringFinder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return importlib.machinery.PathFinder.find_spec(name, path) if name.startswith("nnunetv2") else None

    sys.meta_path.insert(0, AnsweringFinder)
    assert search("trainers", "nnUNetTrainerAcme")
    forget_more()
    assert search("planners", "AcmePlanner")
    assert not hook.errors and not hook.bypassed()

sys.meta_path.pop(0)
forget("nnunetv2", "acme")

@claim
def reloaded():
    for _ in range(2):
        importlib.reload(hook).install()
    assert search("trainers", "nnUNetTrainerAcme") and search("planners", "AcmePlanner")
    assert not hook.errors and not hook.bypassed()
"""


@pytest.fixture(scope="module")
def fresh_process(claims: Claims, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong with each of `CLAIMS`."""
    site, broken = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("broken")
    write_distribution(site, "acme", ACME, trainers=["nnUNetTrainerAcme"], planners=["AcmePlanner"])
    (broken / "nnunet_ext").mkdir()
    (broken / "nnunet_ext" / "__init__.py").write_text("raise RuntimeError('broken')", encoding="utf-8")
    script = SEARCH + CLAIMS.replace("TRAINERS", TRAINERS)
    return claims(script, broken, site, BROKEN=str(broken))


def test_broken_registry_harms_neither_torch_nor_nnunets_names(fresh_process: dict[str, str]) -> None:
    assert not fresh_process["broken_registry"]


def test_module_that_is_half_executed_when_torch_comes_in_finds_names(fresh_process: dict[str, str]) -> None:
    assert not fresh_process["half_executed"]


def test_nnunets_search_finds_registered_names_and_its_own(fresh_process: dict[str, str]) -> None:
    assert not fresh_process["registered_and_own"]


def test_names_are_found_where_a_finder_answers_before_ours(fresh_process: dict[str, str]) -> None:
    assert not fresh_process["finder_that_answers_first"]


def test_reloaded_hook_still_finds_names(fresh_process: dict[str, str]) -> None:
    assert not fresh_process["reloaded"]


def test_hook_is_harmless_where_nnunet_is_absent(tmp_path: Path, run_python: RunPython) -> None:
    shutil.copy(hook.__file__, tmp_path)  # nnU-Net may be installed beside it
    run_python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import _nnunet_ext_hook as hook\n"
        "before = set(sys.modules)\n"
        "hook.install()\n"
        "import json, importlib.util\n"
        "assert hook.is_installed() and not hook.errors\n"
        "assert importlib.util.find_spec('nnunetv2') is None\n"
        "assert all(hook.Finder().find_spec(name) is None for name in hook.TARGETS)\n"
        "assert 'nnunet_ext' not in sys.modules\n",
        "-I",
        "-S",  # no site-packages: neither torch nor nnU-Net
    )


# --- In this process, with modules that stand for nnU-Net's


@pytest.mark.usefixtures("fresh")
def test_finder_touches_two_modules_only() -> None:
    asked = []

    class Spy:
        @staticmethod
        def find_spec(name: str, path: Any, target: Any) -> None:
            asked.append(name)

    sys.meta_path = [Spy, *sys.meta_path]  # type: ignore[list-item]
    others = ["json", "torch", "nnunetv2", "nnunetv2.training.nnUNetTrainer", "nnunetv2.run.run_training"]
    assert [hook.Finder().find_spec(name) for name in others] == [None] * len(others)
    assert asked == []
    for name in hook.TARGETS:
        hook.Finder().find_spec(name)
    assert asked == list(hook.TARGETS)


@pytest.mark.usefixtures("fresh")
def test_second_install_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(TRAINERS)
    monkeypatch.setitem(sys.modules, TRAINERS, module)
    hook.install()
    finders, attached = list(sys.meta_path), module.__getattr__
    hook.install()
    assert sys.meta_path == finders
    assert module.__getattr__ is attached
    assert hook.is_installed()
    assert hook.errors == []


class AskingFinder:
    """Asks the others, as ours does, without a guard of its own."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                return spec
        return None


def second_copy() -> ModuleType:
    """Another module made from the hook's source, as after `del sys.modules[...]` and a new import."""
    spec = importlib.util.spec_from_file_location("second_copy_of_the_hook", hook.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("place", [0, 1, 2])
def test_finders_that_ask_each_other_find_the_modules(place: int) -> None:
    hook.install()
    sys.meta_path.insert(place, second_copy().Finder())
    sys.meta_path.insert(place, AskingFinder())  # type: ignore[arg-type]
    for name, kind in hook.TARGETS.items():
        module = importlib.import_module(name)
        assert getattr(module, "nnUNetTrainerReversible" if kind == "trainers" else "ReversibleUNetPlanner")
    assert (hook.errors, hook.bypassed()) == ([], [])


@pytest.mark.usefixtures("fresh")
def test_second_copy_replaces_the_first_ones_finder() -> None:
    hook.install()
    others = [finder for finder in sys.meta_path if not isinstance(finder, hook.Finder)]
    copy = second_copy()
    copy.install()
    assert [type(finder) for finder in sys.meta_path] == [copy.Finder, *map(type, others)]


@pytest.mark.usefixtures("fresh")
def test_module_that_is_loaded_past_the_finder_is_said_with_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hook.install()
    sys.meta_path.insert(0, AskingFinder())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, TRAINERS, ModuleType(TRAINERS))
    (text,) = hook.bypassed()
    assert text == f"{TRAINERS} was loaded past our finder, before which stand: AskingFinder"


@pytest.mark.usefixtures("fresh")
def test_install_stores_what_goes_wrong_and_does_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, TRAINERS, object())
    hook.install()
    hook.Finder().find_spec("json")
    (message,) = hook.errors
    assert "can't be extended" in message


@pytest.mark.usefixtures("fresh")
def test_loader_that_can_not_be_extended_still_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loader:
        __slots__ = ()

        def create_module(self, spec: Any) -> None:
            return None

        def exec_module(self, module: Any) -> None:
            module.loaded = True

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any, target: Any) -> Any:
            return importlib.machinery.ModuleSpec(name, Loader())  # type: ignore[arg-type]

    sys.meta_path = [Finder]  # type: ignore[list-item]
    found = hook.Finder().find_spec(TRAINERS)
    assert found is not None
    assert isinstance(found.loader, Loader)
    assert "can't be extended" in hook.errors[0]


def test_registered_name_is_an_attribute(install: Install) -> None:
    install("acme", "class nnUNetTrainerAcme: pass", trainers=["nnUNetTrainerAcme"])
    assert target().nnUNetTrainerAcme.__module__ == "acme"


def test_attributes_of_the_module_come_first(install: Install) -> None:
    install("acme", "class nnUNetTrainerAcme: pass", trainers=["nnUNetTrainerAcme"])
    assert target(nnUNetTrainerAcme="its own").nnUNetTrainerAcme == "its own"


def test_getattr_that_the_module_had_is_asked_first(install: Install) -> None:
    install("acme", "class nnUNetTrainerAcme: pass\nclass Old: pass", trainers=["nnUNetTrainerAcme", "Old"])

    def previous(name: str) -> str:
        if name == "Old":
            return "previous"
        raise AttributeError(name)

    module = target(__getattr__=previous)
    assert module.Old == "previous"
    assert module.nnUNetTrainerAcme.__module__ == "acme"


def test_unknown_name_is_an_attribute_error_of_the_module() -> None:
    module = target()
    assert not hasattr(module, "nothing")
    with pytest.raises(AttributeError, match=rf"module '{TRAINERS}' has no attribute 'nothing'"):
        _ = module.nothing


def test_private_names_do_not_reach_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nnunet_ext.registry", None)
    monkeypatch.setattr(hook, "errors", [])
    module = target()
    assert not any(hasattr(module, name) for name in ("_private", "__path__", "__wrapped__"))
    assert hook.errors == []


def test_registry_that_can_not_be_imported_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nnunet_ext.registry", None)
    monkeypatch.setattr(hook, "errors", [])
    assert not hasattr(target(), "nnUNetTrainerAcme")
    assert "nnunet_ext.registry can't be imported" in hook.errors[0]


def test_unexpected_error_of_the_registry_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(kind: str, name: str) -> None:
        raise TypeError("unexpected")

    monkeypatch.setattr("nnunet_ext.registry.resolve", unexpected)
    monkeypatch.setattr(hook, "errors", [])
    assert not hasattr(target(), "nnUNetTrainerAcme")
    assert "TypeError('unexpected')" in hook.errors[0]


def test_registered_name_that_can_not_be_loaded_says_why(install: Install) -> None:
    install("broken", "import no_such_module", trainers=["nnUNetTrainerBroken"])
    with pytest.raises(RegistryError, match=r"broken 1\.0 .*no_such_module"):
        hasattr(target(), "nnUNetTrainerBroken")


def test_kinds_do_not_mix(install: Install) -> None:
    install("acme", "class AcmePlanner: pass", planners=["AcmePlanner"])
    assert not hasattr(target(), "AcmePlanner")
    planners = ModuleType(PLANNERS)
    hook._attach(planners)
    assert planners.AcmePlanner.__module__ == "acme"
