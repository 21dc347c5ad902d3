"""Names of trainers, planners and architectures, read from entry points of all installed distributions.

Holds strings until a class is asked for: importing this module loads neither torch nor nnU-Net. Any package
can register in the groups ``nnunet_ext.trainers``, ``nnunet_ext.planners`` and ``nnunet_ext.architectures``;
the name of an entry point is the name of its class.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, distributions, entry_points
from pathlib import Path
from types import TracebackType
from typing import Any

from nnunet_ext.printable import printable

KINDS = ("trainers", "planners", "architectures")
CORE_TRAINER = "nnUNetTrainer"
_CORE = EntryPoint("CoreTrainer", "nnunet_ext.trainers.core:CoreTrainer", "nnunet_ext.trainers")
EXTERNAL_TRAINERS = "nnUNet_extTrainer"  # variable: folders in which nnU-Net 2.8 searches trainers as well
_CORE_FOLDERS = {"trainers": "training/nnUNetTrainer", "planners": "experiment_planning", "architectures": ""}
_SCHEDULE = re.compile(
    r"(?P<base>\w+?)"
    r"(?=_)(?:_(?P<epochs>[1-9]\d*)epochs)?(?:_(?P<iters>[1-9]\d*)iters)?(?P<no_mirroring>_NoMirroring)?"
)
_logger = logging.getLogger("nnunet_ext")


class RegistryError(RuntimeError):
    """A registered name can't be used; the message says why and what to do, safe to print."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UnknownNameError(LookupError):
    """The registry does not hold the name."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One registered name.

    Args:
        kind: "trainers", "planners" or "architectures".
        name: Name of the class.
        value: "module:Class".
        distribution: Name and version of the distribution that registers it.
        refused: Why the name can't be used; empty where it can.
    """

    kind: str
    name: str
    value: str
    distribution: str
    refused: str = ""

    @property
    def module(self) -> str:
        """Dotted path of the module that holds the class."""
        return self.value.partition(":")[0]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A shorter training, asked for by a suffix of the trainer's name.

    Args:
        base: Name of the trainer without the suffix.
        epochs: Number of epochs; None leaves the trainer's own.
        iterations: Training iterations per epoch; a fifth of them, at least one, validate.
        no_mirroring: Train and predict without mirroring.
    """

    base: str
    epochs: int | None
    iterations: int | None
    no_mirroring: bool


def parse_schedule(name: str) -> Schedule | None:
    """Split ``<trainer>[_<N>epochs][_<M>iters][_NoMirroring]``; None where `name` has no such suffix."""
    match = _SCHEDULE.fullmatch(name)
    if match is None:
        return None
    epochs, iterations = match["epochs"], match["iters"]
    return Schedule(
        base=match["base"],
        epochs=int(epochs) if epochs else None,
        iterations=int(iterations) if iterations else None,
        no_mirroring=match["no_mirroring"] is not None,
    )


@cache
def core_names(kind: str) -> frozenset[str]:
    """Names of the classes that nnU-Net itself has, read from its source without importing it."""
    spec = importlib.util.find_spec("nnunetv2")
    if spec is None or not spec.submodule_search_locations or not _CORE_FOLDERS[kind]:
        return frozenset()
    folders = [Path(location, _CORE_FOLDERS[kind]) for location in spec.submodule_search_locations]
    return _class_names(folders)


def _class_names(folders: list[Path]) -> frozenset[str]:
    sources = [path for folder in folders if folder.is_dir() for path in sorted(folder.rglob("*.py"))]
    return frozenset(
        name for path in sources for name in re.findall(r"^class\s+(\w+)", _text(path), flags=re.MULTILINE)
    )


def _text(path: Path) -> str:
    """Return the text of a source file; nothing where it can't be read, as nnU-Net's own search will say."""
    try:
        return path.read_text(encoding="utf-8", errors="ignore")
    except OSError:
        return ""


def entries(kind: str) -> list[Entry]:
    """All registered names of `kind`, sorted; the refused ones say why in `Entry.refused`.

    Raises:
        ValueError: `kind` is not one of `KINDS`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    # One distribution can be seen twice (an editable install and its folder): same origin and value are one.
    points = {(point.name, point.value, _origin(point)) for point in _points(f"nnunet_ext.{kind}")}
    holders: dict[str, list[str]] = {}
    for name, value, origin in sorted(points):
        holders.setdefault(name, []).append(f"{origin} ({value})")
    return [
        Entry(kind=kind, name=name, value=value, distribution=origin, refused=_refusal(kind, name, holders[name]))
        for name, value, origin in sorted(points)
    ]


def _points(group: str) -> Iterable[EntryPoint]:
    """Entry points of all distributions, without those whose metadata can't be read (`doctor` names them)."""
    try:
        return entry_points(group=group)
    except Exception:  # one broken file anywhere takes all entry points with it
        readable: dict[str, list[EntryPoint]] = {}
        for distribution in distributions():
            try:
                readable.setdefault(distribution.metadata["Name"], list(distribution.entry_points))
            except Exception:
                continue
        return [point for points in readable.values() for point in points if point.group == group]


def _origin(point: EntryPoint) -> str:
    try:
        metadata = getattr(point.dist, "metadata", None) or {}
        name, version = metadata["Name"], metadata["Version"]
    except Exception:  # half removed, or no UTF-8
        name = version = ""
    return f"{name} {version}" if name else "unknown distribution"


def _refusal(kind: str, name: str, holders: list[str]) -> str:
    if not name.isidentifier() or "__" in name:
        return f"{name!r} is no class name that nnU-Net can store: use an identifier without '__'"
    if name in core_names(kind):
        return f"nnU-Net itself has {name}, which is never shadowed: register another name"
    if kind == "trainers" and parse_schedule(name) is not None:
        return f"{name} ends in a suffix that asks for a schedule: register a name without it"
    if len(holders) > 1:
        return f"{name} is registered by {' and by '.join(holders)}: uninstall all but one"
    return ""


def names(kind: str) -> list[str]:
    """Registered names of `kind` that can be used, sorted."""
    return [entry.name for entry in entries(kind) if not entry.refused]


def resolve(kind: str, name: str) -> Any:
    """Return the class registered as `name`; for trainers also with the suffix that asks for a schedule.

    Raises:
        UnknownNameError: no such name, or nnU-Net itself has it.
        RegistryError: the name is registered but refused, or its class can't be loaded.
    """
    if name in core_names(kind):
        raise UnknownNameError(f"{name} belongs to nnU-Net itself.")
    registered = {entry.name: entry for entry in entries(kind)}
    if name in registered:
        return _load(registered[name])
    schedule = parse_schedule(name) if kind == "trainers" else None
    if schedule is None or schedule.base not in {CORE_TRAINER, *registered}:
        raise UnknownNameError(f"No {kind[:-1]} is registered as {name}.")
    base = _CORE.load() if schedule.base == CORE_TRAINER else _load(registered[schedule.base])
    return _scheduled(name, base, schedule)


def _load(entry: Entry) -> Any:
    if entry.refused:
        raise RegistryError(f"{entry.kind[:-1].capitalize()} {entry.name} can't be used: {entry.refused}.")
    try:
        loaded = EntryPoint(entry.name, entry.value, f"nnunet_ext.{entry.kind}").load()
    except (Exception, SystemExit) as error:
        raise RegistryError(
            f"{entry.kind[:-1].capitalize()} {entry.name} of {entry.distribution} can't be loaded from "
            f"{entry.value}: {error!r}. Repair or uninstall that distribution."
        ) from error
    if getattr(loaded, "__name__", None) != entry.name:
        raise RegistryError(
            f"{entry.value} of {entry.distribution} is called {getattr(loaded, '__name__', loaded)!r}, but "
            f"registered as {entry.name!r}. nnU-Net stores class names: both must be equal."
        )
    return loaded


@cache
def _scheduled(name: str, base: Any, schedule: Schedule) -> Any:
    """Make the subclass of `base` that trains by `schedule`; the same class for the same name."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        super(scheduled, self).__init__(*args, **kwargs)
        if schedule.epochs is not None:
            self.num_epochs = schedule.epochs
            self.save_every = max(1, min(self.save_every, schedule.epochs // 10))
        if schedule.iterations is not None:
            self.num_iterations_per_epoch = schedule.iterations
            self.num_val_iterations_per_epoch = max(1, schedule.iterations // 5)

    # nnU-Net reads the parameters' names from the signature and looks each up among its own locals.
    __init__.__signature__ = inspect.signature(base.__init__)  # type: ignore[attr-defined]

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self: Any) -> Any:  # noqa: N802
        rotation, dummy_2d, initial_patch_size, _ = base.configure_rotation_dummyDA_mirroring_and_inital_patch_size(
            self
        )
        self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, None

    body: dict[str, Any] = {"__init__": __init__, "__module__": __name__, "__doc__": f"{base.__name__}: {schedule}."}
    if schedule.no_mirroring:
        hook = configure_rotation_dummyDA_mirroring_and_inital_patch_size
        body[hook.__name__] = hook
    scheduled: type[Any] = type(name, (base,), body)
    return scheduled


def __getattr__(name: str) -> Any:
    """Find a scheduled trainer by its name, so that instances can be pickled."""
    if not name.startswith("_") and parse_schedule(name) is not None:
        try:
            return resolve("trainers", name)
        except UnknownNameError:
            pass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def suggest(kind: str, name: str) -> None:
    """Log, once for a name, which known names it resembles; and again below nnU-Net's own error, if one follows.

    nnU-Net's search may still find the name elsewhere, so that nothing is raised here.
    """
    cure = cure_for(kind, name)
    if cure:
        hint = f"nnunet_ext: no {kind[:-1]} is called {name}. {cure}"
        _logger.warning(hint)
        # A trainer that isn't found is named; a planner that isn't found is None, which nnU-Net calls.
        signs = (name, "'NoneType' object is not callable")[: 1 + (kind == "planners")]
        sys.excepthook = _ExceptHook(sys.excepthook, signs, hint)


@dataclass(frozen=True)
class _ExceptHook:
    """Prints a hint as the last line where the process ends by an error that holds one of the signs."""

    previous: Callable[[type[BaseException], BaseException, TracebackType | None], Any]
    signs: tuple[str, ...]
    hint: str

    def __call__(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        self.previous(kind, error, traceback)
        if any(sign in str(error) for sign in self.signs):
            print(self.hint, file=sys.stderr)


def cure_for(kind: str, name: str) -> str:
    """Which known names an unknown one resembles, a sentence; empty where nnU-Net itself may have it."""
    if name in core_names(kind) or name in _class_names(_external_folders()):
        return ""
    schedule = parse_schedule(name) if kind == "trainers" else None
    if schedule is not None and schedule.base in core_names(kind) - {CORE_TRAINER}:
        return f"{schedule.base} has no schedules; {CORE_TRAINER} and registered trainers have."
    asked, suffix = (schedule.base, name[len(schedule.base) :]) if schedule else (name, "")
    known = {CORE_TRAINER, *names(kind)} if schedule else {*names(kind), *core_names(kind)}
    close = difflib.get_close_matches(asked, sorted(known), n=3, cutoff=0.75)
    similar = [candidate + suffix for candidate in close]
    if similar:
        return f"Did you mean {' or '.join(similar)}?"
    return "`nnunet-ext list` shows all names." if "Trainer" in name or "Planner" in name else ""


def _external_folders() -> list[Path]:
    return [Path(folder) for folder in os.environ.get(EXTERNAL_TRAINERS, "").split(os.pathsep) if folder]


def _source(entry: Entry) -> ast.Module:
    """Syntax tree of the entry's module, read without importing it; empty where that can't be done."""
    top, *rest = entry.module.split(".")
    try:
        spec = importlib.util.find_spec(top)
        if spec is None or spec.origin is None:
            return ast.Module([], [])
        path = Path(spec.origin)
        if rest:
            file = path.parent.joinpath(*rest).with_suffix(".py")
            path = file if file.is_file() else path.parent.joinpath(*rest, "__init__.py")
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, ImportError, RecursionError, MemoryError):
        return ast.Module([], [])  # the last two: nested deeper than Python's parser goes


def _definition(entry: Entry) -> ast.ClassDef | None:
    found = (node for node in _source(entry).body if isinstance(node, ast.ClassDef) and node.name == entry.name)
    return next(found, None)


def summary(entry: Entry) -> str:
    """First line of the docstring of the entry's class, read from its source without importing it."""
    node = _definition(entry)
    return ((ast.get_docstring(node) if node else None) or "").partition("\n")[0]


def planned(entry: Entry) -> tuple[str, str]:
    """Trainer that a planner names and name of its plans, read from its source; "" for what it does not say.

    A planner says them as `trainer` and `default_plans_name`, itself or by a registered planner that it derives from,
    or the plans as nnU-Net's own planners do, by the default of `plans_name`.
    """
    return _text_of(entry, "trainer"), _text_of(entry, "default_plans_name") or _text_of(entry, "plans_name")


def _text_of(entry: Entry, name: str, seen: frozenset[str] = frozenset()) -> str:
    """Text that a class sets or its `__init__` takes for a name, or the first registered class that it derives from."""
    node = _definition(entry)
    if node is None or entry.name in seen:
        return ""
    said = dict(_texts(node)).get(name)
    if said is not None:
        return said
    registered = {other.name: other for other in entries(entry.kind)}
    bases = (base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "") for base in node.bases)
    found = (_text_of(registered[base], name, seen | {entry.name}) for base in bases if base in registered)
    return next(filter(None, found), "")


def _texts(node: ast.ClassDef) -> Iterable[tuple[str, str]]:
    """Names and texts of a class's body and of the defaults of its `__init__`."""
    for statement in node.body:
        pairs: Iterable[tuple[str, ast.expr | None]] = ()
        if isinstance(statement, ast.Assign):
            pairs = [(target.id, statement.value) for target in statement.targets if isinstance(target, ast.Name)]
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            pairs = [(statement.target.id, statement.value)]
        elif isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            taken = statement.args
            names = [argument.arg for argument in (*taken.posonlyargs, *taken.args)]
            pairs = [*zip(reversed(names), reversed(taken.defaults), strict=False)]
            pairs += [(arg.arg, value) for arg, value in zip(taken.kwonlyargs, taken.kw_defaults, strict=True)]
        for name, value in pairs:
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield name, value.value
