"""Which environments are made, and what is run in each: rows and columns of the table, as data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.contract.variants import VARIANTS
from tests.install.proof import PROOF

LOWEST = Path(__file__).parents[1] / "lowest.txt"
SHOWN = ("torch", "nnunetv2", "numpy")  # what the table gives the versions of, beside Python


@dataclass(frozen=True, kw_only=True)
class Row:
    """An environment.

    Args:
        name: word in the table, and name of its folder.
        python: version of two numbers.
        why: what this row is there for.
        pins: what pip is asked for beside the package.
        constraints: file of versions.
        form: how the package is installed.
        refused: whether pip has to refuse it; nothing is installed then.
    """

    name: str
    python: str
    why: str
    pins: tuple[str, ...] = ()
    constraints: Path | None = None
    form: Literal["wheel", "editable"] = "wheel"
    refused: bool = False


ROWS = (
    Row(name="lowest", python="3.10", constraints=LOWEST, why="all lower bounds of the metadata at once"),
    Row(
        name="torch-2.6", python="3.11", pins=("torch==2.6.0", "numpy==1.26.4"), why="the last NumPy 1, newest nnU-Net"
    ),
    Row(name="torch-2.8", python="3.12", pins=("torch==2.8.0",), why="the last PyTorch before the excluded 2.9"),
    Row(name="torch-2.9", python="3.12", pins=("torch==2.9.1",), refused=True, why="nnU-Net excludes it"),
    Row(
        name="torch-2.11",
        python="3.12",
        pins=("torch==2.11.0", "nnunetv2==2.7.0"),
        why="a PyTorch between the bounds, oldest nnU-Net",
    ),
    Row(name="newest-3.10", python="3.10", why="what pip gives to the lowest Python"),
    Row(name="newest-editable", python="3.11", form="editable", why="the newest of all, served from a working copy"),
    Row(name="newest", python="3.13", why="the newest of all, newest Python"),
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is run in an environment, in a folder with the tests; it has passed where it ends with 0.

    Args:
        name: word in the table.
        command: the command, PYTHON for that environment's.
        minutes: limit.
        offered: command and what its output must hold; the step is left out where it does not.
    """

    name: str
    command: tuple[str, ...]
    minutes: float = 10
    offered: tuple[tuple[str, ...], str] | None = None


PYTEST = ("PYTHON", "-m", "pytest", "-p", "no:cacheprovider", "-q", "--durations=5")
# Dynamo and AOTAutograd for one trainer of each network; what comes after them, inductor, takes minutes for each.
COMPILED = " and not ".join(["aot_eager and bfloat16", *(f"{name}-" for name in sorted(VARIANTS))])
# A step more is a line more; those that pip and a second tell about come first.
STEPS = (
    Step(name="pip check", command=("PYTHON", "-m", "pip", "check")),
    Step(name="names", command=("PYTHON", "-c", PROOF)),
    Step(name="doctor", command=("nnunet-ext", "doctor", "--quiet")),
    Step(
        name="gradients",
        command=("nnunet-ext", "doctor", "--gradients", "--quiet"),
        offered=(("nnunet-ext", "doctor", "--help"), "--gradients"),
    ),
    Step(
        name="suite",
        command=(*PYTEST, "tests/test_registry.py", "tests/test_hook.py", "tests/nnunet/test_checkpoints.py"),
        minutes=30,
    ),
    Step(name="two ranks", command=(*PYTEST, "tests/contract/test_ddp.py"), minutes=30),
    Step(
        name="compiled",
        command=(*PYTEST, "-m", "", "-k", COMPILED, "tests/contract/test_compiled_training.py"),
        minutes=60,
    ),
    Step(name="journey", command=(*PYTEST, "-m", "", "tests/contract/test_journey.py"), minutes=60),
)
