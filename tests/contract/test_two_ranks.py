"""Every registered trainer on two GPUs, as ``nnUNetv2_train -num_gpus 2`` trains it; see `tests.contract.two_ranks`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from torch import Tensor
from torch.multiprocessing import ProcessExitedException
from torch.nn.modules.batchnorm import _BatchNorm

from nnunet_ext import registry
from nnunet_ext.check.phantom import write_teacher
from nnunet_ext.files import PARTIAL
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.protocols import HasTeacher, only_predicts
from nnunet_ext.trainers.unwrapped import unwrapped
from tests.contract import two_ranks
from tests.contract.conftest import WORKSPACE, prepare
from tests.contract.plans import sizes
from tests.contract.two_ranks import DEVICE, ON_GPUS, Orders
from tests.ranks import SIZE, Ranks

PLANS, OWN_DICE, UNEVEN = "nnUNetPlans", "nnUNetOwnDicePlans", "nnUNetUnevenPlans"
FIRST, SECOND = "3d_fullres", "3d_second"
VALIDATED = (["case3", "case4", "case5"], ["case3"])  # by fold; one rank has more of them than the other, or all
EPOCHS = 2
TOLERANCE = 2e-2 if ON_GPUS else 1e-4  # in float16 and float32
TRAINERS = [
    registry.CORE_TRAINER,
    *(name for name in registry.names("trainers") if not only_predicts(trainer_class(name))),
]


def own(name: str) -> tuple[Any, ...]:
    """What a trainer does otherwise than nnU-Net's own in a step or in validation."""
    methods = ("train_step", "_branch_step", "perform_actual_validation")
    found = (getattr(trainer_class(name), method, None) for method in methods)
    shared = trainer_class(f"{registry.CORE_TRAINER}_1epochs")
    return tuple(m for m in found if m and m is not getattr(shared, m.__name__, None))


def slow_but(fast: list[str]) -> list[Any]:
    """All trainers as parameters, most of them slow."""
    return [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in TRAINERS]


def slow_second_stages(fast: list[str]) -> list[Any]:
    """All trainers in both stages; first ones of `fast`, and second ones of `UNLIKE`, are not slow.

    The teacher of trainers that need one is of the first stage.
    """
    return [
        pytest.param(name, configuration, marks=[] if name in quick else pytest.mark.slow)
        for name in TRAINERS
        for configuration, quick in ((FIRST, fast), (SECOND, UNLIKE))
        if configuration == FIRST or not isinstance(trainer_class(name), HasTeacher)
    ]


# One of each way to train is enough for most runs, and one of all for the longest.
UNLIKE = list({own(name): name for name in reversed(TRAINERS[1:])}.values())
MOST_OWN = max(UNLIKE, key=lambda name: len(own(name)))


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    ranks = Ranks(joined=False)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def dataset_name(unused_number: Callable[[], int]) -> str:
    """Data set of three cases to train and three to validate, planned in two stages."""
    name = f"Dataset{unused_number()}_ranks"
    (source,) = (WORKSPACE / "preprocessed").glob(f"Dataset{prepare('labels')}_*")
    folder = WORKSPACE / "preprocessed" / name
    shutil.copytree(source, folder)
    splits = [{"train": ["case0", "case1", "case2"], "val": cases} for cases in VALIDATED]
    (folder / "splits_final.json").write_text(json.dumps(splits))
    plans = json.loads((folder / f"{PLANS}.json").read_text())
    first = plans["configurations"][FIRST]
    first["architecture"]["arch_kwargs"].update(sizes([4, 8, 16], convs=1))
    first |= {"patch_size": [24, 24, 24], "batch_size": 2 * SIZE, "me_unet": {"k": 1.5}}
    plans["configurations"] = {FIRST: {**first, "next_stage": SECOND}, SECOND: {**first, "previous_stage": FIRST}}
    for plans_name, changes in {
        PLANS: {"batch_dice": True},
        OWN_DICE: {"batch_dice": False},
        UNEVEN: {"batch_dice": False, "batch_size": SIZE + 1},
    }.items():
        plans |= {"dataset_name": name, "plans_name": plans_name}
        for configuration in plans["configurations"].values():
            configuration.update(changes)
        (folder / f"{plans_name}.json").write_text(json.dumps(plans))
    write_teacher(name, FIRST, range(len(splits)))
    return name


@dataclass(frozen=True, kw_only=True)
class Training:
    """Trainings of one trainer, configuration and fold, each in the fold's folder.

    Args:
        trainer: Registered name.
        dataset: Name of the data set.
        plans: Name of the plans.
        configuration: One of theirs.
        ranks: Processes.
        notes: Folder for what ranks write down.
        fold: Number of the fold.
    """

    trainer: str
    dataset: str
    plans: str
    configuration: str
    ranks: Ranks | None
    notes: Path
    fold: int = 0

    @property
    def name(self) -> str:
        return f"{self.trainer}_{EPOCHS}epochs_2iters"

    @property
    def folder(self) -> Path:
        results = WORKSPACE / "results" / self.dataset
        return results / f"{self.name}__{self.plans}__{self.configuration}" / f"fold_{self.fold}"

    def run(self, num_gpus: int = SIZE, **options: Any) -> list[dict[str, Any]]:
        """Train; give what each rank saw."""
        shutil.rmtree(self.notes, ignore_errors=True)
        self.notes.mkdir()
        orders = {key: options.pop(key) for key in ("stop_at", "kill") if key in options}
        two_ranks.train(
            self.name,
            orders=Orders(folder=self.notes, **orders),
            ranks=self.ranks,
            num_gpus=num_gpus,
            dataset=self.dataset,
            configuration=self.configuration,
            fold=self.fold,
            plans_identifier=self.plans,
            **options,
        )
        return [torch.load(path, weights_only=False) for path in sorted(self.notes.iterdir())]

    def single(self) -> Any:
        """A trainer of this process, ready for a step."""
        with two_ranks.small(self.name):
            trainer = get_trainer_from_args(self.dataset, self.configuration, 0, self.name, self.plans, device=DEVICE)
            trainer.initialize()
        trainer.print_to_log_file = print
        if isinstance(trainer, HasTeacher):
            trainer._read_teachers()  # building its network draws random numbers
        trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
        trainer.network.train()
        return trainer

    def segmentations(self) -> dict[str, Any]:
        """What the validation wrote."""
        paths = sorted((self.folder / "validation").glob("*.nii.gz"))
        return {path.name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in paths}


def gradients(trainer: Any, start: dict[str, Tensor], batch: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Of one step of one process."""
    unwrapped(trainer.network).load_state_dict(start)
    two_ranks.unclipped(trainer, batch, seed)
    return two_ranks.gradients(trainer.network)


def joint(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """The batches of all ranks as one."""
    targets = [batch["target"] for batch in batches]
    levels = zip(*targets, strict=True) if isinstance(targets[0], list) else [targets]
    joined = [torch.cat([*level]) for level in levels]
    target = joined if isinstance(targets[0], list) else joined[0]
    return {"data": torch.cat([batch["data"] for batch in batches]), "target": target}


def is_random(trainer: Any) -> bool:
    """Whether a step draws points or samples of its own."""
    batch = next(trainer.get_dataloaders()[0])
    start = two_ranks.state(trainer.network)
    one, other = (gradients(trainer, start, batch, seed) for seed in range(2))
    return not all(torch.equal(one[name], other[name]) for name in one)


class Stopped:
    """Trainings that ended after the first epoch of two, each made once."""

    def __init__(self, dataset: str, ranks: Ranks, folder: Path) -> None:
        self.dataset, self.ranks, self.folder = dataset, ranks, folder
        self.made: dict[tuple[str, str, int], tuple[Training, Path, list[dict[str, Any]]]] = {}

    def __call__(self, name: str, configuration: str = FIRST, num_gpus: int = SIZE) -> tuple[Training, Any]:
        """Give the training, its folder as it was then, and what each rank saw."""
        key = (name, configuration, num_gpus)
        if key not in self.made:
            self.made[key] = self._make(*key)
        training, kept, seen = self.made[key]
        shutil.rmtree(training.folder, ignore_errors=True)
        shutil.copytree(kept, training.folder)
        return training, seen

    def _make(self, name: str, configuration: str, num_gpus: int) -> tuple[Training, Path, list[dict[str, Any]]]:
        training = self.training(name, configuration)
        if configuration == SECOND:
            write_priors(training)
        shutil.rmtree(training.folder, ignore_errors=True)
        seen = training.run(num_gpus, stop_at=1)
        kept = self.folder / f"{name}-{configuration}-{num_gpus}"
        shutil.copytree(training.folder, kept)
        return training, kept, seen

    def training(self, name: str, configuration: str) -> Training:
        """With a Dice loss over all ranks where one process can compute what they do."""
        shared = {"trainer": name, "dataset": self.dataset, "ranks": self.ranks, "notes": self.folder / "notes"}
        plain = Training(**shared, configuration=FIRST, plans=PLANS)
        plans = OWN_DICE if is_random(plain.single()) else PLANS
        return Training(**shared, configuration=configuration, plans=plans)


def write_priors(training: Training) -> None:
    """What the validations of all folds of the first stage leave, without training them."""
    trainer = training.single()
    dataset_class = infer_dataset_class(trainer.preprocessed_dataset_folder)
    folder = Path(trainer.folder_with_segs_from_previous_stage)
    folder.mkdir(parents=True, exist_ok=True)
    dataset = dataset_class(trainer.preprocessed_dataset_folder)
    for case in dataset.identifiers:
        _, segmentation, _, _ = dataset.load_case(case)
        dataset_class.save_seg(np.maximum(segmentation[0], 0).astype(np.uint8), str(folder / case))


@pytest.fixture(scope="module")
def stopped(dataset_name: str, pair: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """Give a training that ended after the first of two epochs: ``stopped(name)``."""
    return Stopped(dataset_name, pair, tmp_path_factory.mktemp("stopped"))


@pytest.fixture(autouse=True)
def _load_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_ended(training: Training) -> None:
    """All that nnU-Net writes is there, and nothing else."""
    checkpoint = torch.load(training.folder / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    losses = checkpoint["logging"]["train_losses"]
    assert len(losses) == EPOCHS == checkpoint["current_epoch"]
    assert np.isfinite(losses).all()
    logs = "".join(path.read_text() for path in training.folder.glob("training_log_*.txt"))
    assert logs.count("Training done.") == logs.count("Validation complete") == 1
    assert (training.folder / "checkpoint_best.pth").is_file()
    assert not (training.folder / "checkpoint_latest.pth").exists()
    assert [path for path in training.folder.rglob("*") if path.name.startswith(PARTIAL)] == []
    assert [*training.segmentations()] == [f"{case}.nii.gz" for case in VALIDATED[0]]
    summary = json.loads((training.folder / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == len(VALIDATED[0])
    if training.configuration == FIRST:
        priors = training.folder.parent / "predicted_next_stage" / SECOND
        assert {path.stem for path in priors.iterdir()} >= {*VALIDATED[0]}


@pytest.mark.parametrize(("trainer", "configuration"), slow_second_stages(TRAINERS))
def test_two_ranks_have_the_gradients_of_one_process(trainer: str, configuration: str, stopped: Stopped) -> None:
    training, seen = stopped(trainer, configuration)
    start, batches = seen[0]["start"], [rank["batch"] for rank in seen]
    assert not torch.equal(batches[0]["data"], batches[1]["data"])
    assert_same(seen[1]["start"], start)
    alone = training.single()
    if training.plans == PLANS:
        expected = gradients(alone, start, joint(batches), seed=0)
    else:  # one process draws other points or samples for the joint batch than two for its halves
        assert not any(isinstance(module, _BatchNorm) for module in alone.network.modules())
        halves = [gradients(alone, start, batch, seed) for seed, batch in enumerate(batches)]
        expected = {name: sum(half[name] for half in halves) / SIZE for name in halves[0]}
    for name, gradient in seen[0]["gradients"].items():  # nnU-Net's loss for several GPUs takes 1e-6 of that head in
        expected.setdefault(name, torch.zeros_like(gradient))
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for rank in seen:
        torch.testing.assert_close(rank["gradients"], expected, rtol=TOLERANCE, atol=TOLERANCE * largest)


@pytest.mark.parametrize(("trainer", "configuration"), slow_second_stages(UNLIKE))
def test_two_ranks_go_on_at_the_next_epoch_and_end_with_the_same_weights(
    trainer: str, configuration: str, stopped: Stopped
) -> None:
    training, _ = stopped(trainer, configuration)
    checkpoint = torch.load(training.folder / "checkpoint_latest.pth", map_location="cpu", weights_only=False)
    seen = training.run(continue_training=True)
    assert [rank["epoch"] for rank in seen] == [1, 1]
    for rank in seen:
        assert_same(rank["start"], checkpoint["network_weights"])
        assert_same(rank["end"], seen[0]["end"])
    assert_ended(training)


@pytest.mark.parametrize("trainer", slow_but(UNLIKE))
def test_one_process_ends_what_two_ranks_began_and_they_validate_as_it_does(trainer: str, stopped: Stopped) -> None:
    training, _ = stopped(trainer)
    checkpoint = torch.load(training.folder / "checkpoint_latest.pth", map_location="cpu", weights_only=False)
    (seen,) = training.run(1, continue_training=True)
    assert seen["epoch"] == 1
    assert_same(seen["start"], checkpoint["network_weights"])
    assert_ended(training)

    expected = training.segmentations()
    shutil.rmtree(training.folder / "validation")
    assert training.run(only_run_validation=True) == []
    found = training.segmentations()
    assert [*found] == [*expected]
    for name, segmentation in found.items():
        assert (segmentation == expected[name]).mean() >= (0.999 if ON_GPUS else 1)
    assert (training.folder / "validation" / "summary.json").is_file()


@pytest.mark.parametrize("trainer", slow_but(UNLIKE))
def test_two_ranks_end_what_one_process_began(trainer: str, stopped: Stopped) -> None:
    training, _ = stopped(trainer, num_gpus=1)
    checkpoint = torch.load(training.folder / "checkpoint_latest.pth", map_location="cpu", weights_only=False)
    seen = training.run(continue_training=True)
    for rank in seen:
        assert rank["epoch"] == 1
        assert_same(rank["start"], checkpoint["network_weights"])
        assert_same(rank["end"], seen[0]["end"])
    assert_ended(training)


@pytest.mark.parametrize("trainer", slow_but(UNLIKE))
def test_ranks_with_different_numbers_of_samples_end_with_the_same_weights(trainer: str, stopped: Stopped) -> None:
    training = replace(stopped.training(trainer, FIRST), plans=UNEVEN)
    seen = training.run()
    assert [len(rank["batch"]["data"]) for rank in seen] == [2, 1]
    assert_same(seen[1]["end"], seen[0]["end"])
    assert_ended(training)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_rank_without_a_case_to_validate_lets_the_other_validate(trainer: str, stopped: Stopped) -> None:
    training, _ = stopped(trainer)
    alone = replace(training, fold=1)
    alone.folder.mkdir(exist_ok=True)
    checkpoint = torch.load(training.folder / "checkpoint_latest.pth", weights_only=False)
    checkpoint["init_args"]["fold"] = 1  # that of another fold would be refused
    torch.save(checkpoint, alone.folder / "checkpoint_final.pth")
    alone.run(only_run_validation=True)
    assert [*alone.segmentations()] == [f"{case}.nii.gz" for case in VALIDATED[1]]
    assert (alone.folder / "validation" / "summary.json").is_file()


@pytest.mark.parametrize("trainer", slow_but([MOST_OWN]))
def test_processes_that_nnunet_starts_go_on_after_a_kill(trainer: str, stopped: Stopped) -> None:
    """Those of its `spawn` and pools, as its command starts them; data are loaded in them."""
    training = replace(stopped.training(trainer, FIRST), ranks=None)
    shutil.rmtree(training.folder, ignore_errors=True)
    with pytest.raises(ProcessExitedException, match="process 0 terminated with signal SIGKILL"):
        training.run(stop_at=1, kill=True)
    assert not (training.folder / "checkpoint_final.pth").exists()
    seen = training.run(continue_training=True)
    assert [rank["epoch"] for rank in seen] == [1, 1]
    assert_same(seen[0]["end"], seen[1]["end"])
    assert_ended(training)
