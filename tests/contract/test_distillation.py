"""Distilled trainers with nnU-Net's own loader: who is asked about which case, what is stored, how it goes on."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor

from nnunet_ext import registry
from nnunet_ext.check.phantom import TEACHER
from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.checkpoints import FINAL_CHECKPOINT, read_checkpoint
from nnunet_ext.nnunet.teacher import KEY, VARIABLE
from nnunet_ext.nnunet.trainers import trainer_class
from nnunet_ext.protocols import HasTeacher
from nnunet_ext.trainers.distillation import DistillationMixin
from nnunet_ext.trainers.nnUNetTrainerMeUNet import nnUNetTrainerMeUNet
from nnunet_ext.trainers.teachers import Teachers
from nnunet_ext.trainers.unlabelled import is_unlabelled
from tests.contract.conftest import WORKSPACE, write_case

CPU = torch.device("cpu")
DISTILLED = [name for name in registry.names("trainers") if isinstance(trainer_class(name), HasTeacher)]
FIRST = DISTILLED[0]
ALL_FOLDS = ["0", "1", "2", "3", "4"]


@pytest.fixture(autouse=True)
def _small_and_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    for name in DISTILLED:
        if hasattr(trainer_class(name), "decoder_width"):
            monkeypatch.setattr(trainer_class(name), "decoder_width", 64)


@pytest.fixture
def teacher(dataset: Callable[[str], int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the untrained teacher of the data set with labels, which a test may spoil."""
    identifier = dataset("labels")
    (source,) = (WORKSPACE / "results").glob(f"Dataset{identifier}_*/{TEACHER}")
    shutil.copytree(source, tmp_path / "teacher")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "teacher"))
    return tmp_path / "teacher"


def trainer_of(
    dataset: int, name: str = FIRST, fold: int | str = 0, iterations: int = 2, continue_training: bool = False
) -> Any:
    name = f"{name}_1epochs_{iterations}iters"
    return get_trainer_from_args(str(dataset), "3d_fullres", fold, name, "nnUNetPlans", continue_training, CPU)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def memorise(teacher: Path) -> None:
    """Let fold f say the number f of every voxel: what it says tells who was asked."""
    for fold in ALL_FOLDS:

        def say(content: dict[str, Any], fold: str = fold) -> None:
            for key, value in content["network_weights"].items():
                if ".seg_layers." in key:
                    value.fill_(float(fold) if key.endswith("bias") else 0.0)

        rewrite(teacher / f"fold_{fold}" / FINAL_CHECKPOINT, say)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Case and speaking fold of each sample of a training, by what a teacher of `memorise` says."""
    found: list[tuple[str, str]] = []
    logits = Teachers.logits

    def noted(self: Teachers, images: Tensor, keys: Any) -> Tensor:
        said = logits(self, images, keys)
        found.extend((str(key), f"{float(row.mean()):g}") for key, row in zip(keys, said, strict=True))
        return said

    monkeypatch.setattr(Teachers, "logits", noted)
    return found


# ---------------------------------------------------------------------------------------------------- leakage
def test_a_teacher_that_knows_a_case_by_heart_is_never_asked_about_it(
    dataset: Callable[[str], int], teacher: Path, asked: list[tuple[str, str]]
) -> None:
    memorise(teacher)
    trainer = trainer_of(dataset("labels"), fold="all", iterations=16)
    trainer.perform_actual_validation = lambda *_: None
    trainer.run_training()
    held = {
        Path(row["prediction_file"]).name.removesuffix(".nii.gz"): fold
        for fold in ALL_FOLDS
        for row in json.loads((teacher / f"fold_{fold}/validation/summary.json").read_text())["metric_per_case"]
    }
    assert len(held) == 6
    assert len({case for case, _ in asked}) > 3
    assert {(case, fold) for case, fold in asked if held[case] != fold} == set()


def test_in_cross_validation_only_its_own_fold_speaks_and_only_of_training_cases(
    dataset: Callable[[str], int], teacher: Path, asked: list[tuple[str, str]]
) -> None:
    memorise(teacher)
    trainer = trainer_of(dataset("labels"), fold=3, iterations=4)
    training, validation = trainer.do_split()
    trainer.run_training()
    assert {fold for _, fold in asked} == {"3"}
    assert {case for case, _ in asked} <= set(training) - set(validation)
    with pytest.raises(ValueError, match=f"training cases alone, got {validation[0]}"):
        trainer._teachers.logits(torch.zeros(1, 2, 8, 8, 8), validation[:1])


def test_a_checkpoint_of_another_fold_is_refused(dataset: Callable[[str], int], teacher: Path) -> None:
    shutil.copy(teacher / "fold_1" / FINAL_CHECKPOINT, teacher / "fold_0" / FINAL_CHECKPOINT)
    trainer = trainer_of(dataset("labels"))
    with pytest.raises(UsageError, match="must be the checkpoint of fold 0, it was trained as fold 1"):
        trainer.run_training()
    assert trainer.network is None  # nothing was begun


def test_a_fold_that_has_validated_other_cases_is_refused(dataset: Callable[[str], int], teacher: Path) -> None:
    shutil.copy(teacher / "fold_1/validation/summary.json", teacher / "fold_0/validation/summary.json")
    with pytest.raises(UsageError, match="fold 0 of the teacher must have held back"):
        trainer_of(dataset("labels")).run_training()


def test_a_teacher_that_was_validated_again_after_its_split_had_changed_is_refused(
    dataset: Callable[[str], int], teacher: Path
) -> None:
    """What nnU-Net's --val leaves in the folder: cases of the old split beside those of the new one."""
    trainer = trainer_of(dataset("labels"))
    path = teacher / "fold_0/validation/summary.json"
    summary = json.loads(path.read_text())
    summary["metric_per_case"].append({"prediction_file": f"{trainer.do_split()[0][0]}.nii.gz"})
    path.write_text(json.dumps(summary))
    with pytest.raises(UsageError, match=r"must not have validated training cases of .*, it has 1 case"):
        trainer.run_training()


def test_folds_of_two_trainers_are_refused(dataset: Callable[[str], int], teacher: Path) -> None:
    rewrite(teacher / "fold_1" / FINAL_CHECKPOINT, lambda content: content.update(trainer_name="nnUNetTrainerMeUNet"))
    with pytest.raises(UsageError, match="must be of one trainer and configuration, got"):
        trainer_of(dataset("labels"), fold="all").run_training()


def test_a_teacher_that_says_nothing_finite_is_refused(dataset: Callable[[str], int], teacher: Path) -> None:
    def spoil(content: dict[str, Any]) -> None:
        next(iter(content["network_weights"].values())).fill_(torch.nan)

    rewrite(teacher / "fold_0" / FINAL_CHECKPOINT, spoil)
    with pytest.raises(UsageError, match="must give finite logits of"):
        trainer_of(dataset("labels")).run_training()


def test_a_teacher_whose_plans_hold_code_is_refused(dataset: Callable[[str], int], teacher: Path) -> None:
    plans = json.loads((teacher / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "os.system"
    (teacher / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(UsageError, match=r"can't be built \(plans of others may name .*os.system.*\): install the"):
        trainer_of(dataset("labels")).run_training()


def test_the_mixin_after_its_trainer_is_refused() -> None:
    with pytest.raises(TypeError, match="must name DistillationMixin before its trainer"):
        type("nnUNetTrainerWrong", (nnUNetTrainer, DistillationMixin), {})


def test_weights_of_another_network_are_refused(dataset: Callable[[str], int], teacher: Path) -> None:
    rewrite(teacher / "fold_0" / FINAL_CHECKPOINT, lambda content: content["network_weights"].popitem())
    with pytest.raises(UsageError, match=r"the weights of .*checkpoint_final.pth don't fit its plans"):
        trainer_of(dataset("labels")).run_training()


def test_without_a_teacher_a_training_says_how_to_name_one(
    dataset: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(UsageError, match="needs a teacher, none is named: set nnUNet_teacher to the folder"):
        trainer_of(dataset("labels")).run_training()


# ---------------------------------------------------------------------------------------------------- the step
@pytest.mark.parametrize("kind", ["labels", "regions", "ignore"])
def test_a_step_has_the_loss_of_its_parts(kind: str, dataset: Callable[[str], int]) -> None:
    """Against a teacher asked by hand and the divergence of PyTorch's distributions."""
    trainer = trainer_of(dataset(kind))
    trainer.temperature, trainer.soft_weight = 3.0, 0.4
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    (folder,) = (WORKSPACE / "results").glob(f"Dataset{dataset(kind)}_*/{TEACHER}")
    predictor = nnUNetPredictor(device=CPU)
    predictor.initialize_from_trained_model_folder(str(folder), (0,), FINAL_CHECKPOINT)
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    with torch.no_grad():
        said = predictor.network.eval()(batch["data"])[:, :]
        copied = copy.deepcopy(trainer.network).train()
        output = copied(batch["data"])
        hard = nnUNetTrainer._build_loss(trainer)(output, batch["target"])
        if kind == "regions":
            to_distribution = lambda x: torch.distributions.Bernoulli(logits=x.movedim(1, -1) / 3)  # noqa: E731
        else:
            to_distribution = lambda x: torch.distributions.Categorical(logits=x.movedim(1, -1) / 3)  # noqa: E731
        parts = torch.distributions.kl_divergence(to_distribution(said), to_distribution(output[0]))
        soft = (parts.sum(-1) if kind == "regions" else parts).mean()
    found = trainer.train_step(batch)["loss"]
    assert float(found) == pytest.approx(float(0.6 * hard + 0.4 * 9 * soft), rel=1e-4)


@pytest.mark.parametrize("name", DISTILLED)
@pytest.mark.parametrize("kind", ["regions", "ignore"])
def test_trains_and_validates_with_regions_and_ignore_label(
    name: str, kind: str, dataset: Callable[[str], int]
) -> None:
    trainer = trainer_of(dataset(kind), name)
    trainer.run_training()
    trainer.perform_actual_validation()
    assert np.isfinite(trainer.logger.get_value("train_losses", step=-1))
    assert Path(trainer.output_folder, "validation", "summary.json").is_file()


@pytest.mark.parametrize(("weight", "times"), [(0.0, 1), (0.2, 1.25), (0.5, 2), (0.9, 2), (1.0, 1)])
@pytest.mark.parametrize("name", DISTILLED)
def test_labels_keep_their_step_under_sgd(
    name: str, weight: float, times: float, dataset: Callable[[str], int]
) -> None:
    alone = trainer_of(dataset("labels"), name.removesuffix("Distilled"))
    alone.initialize()
    trainer = trainer_of(dataset("labels"), name)
    trainer.plans_manager.plans[KEY] = {"weight": weight}
    trainer.initialize()
    times = times if isinstance(trainer.optimizer, torch.optim.SGD) else 1
    for epoch in (0, 1):
        for of in (alone, trainer):
            of.lr_scheduler.step(epoch)
        found, own = (of.optimizer.param_groups[0]["lr"] for of in (trainer, alone))
        assert found == pytest.approx(times * own)


def test_the_teacher_learns_nothing_and_stays_in_evaluation(dataset: Callable[[str], int], teacher: Path) -> None:
    trainer = trainer_of(dataset("labels"))
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    network = trainer._teachers._network
    before = copy.deepcopy(network.state_dict())
    trainer.train_step(next(trainer.dataloader_train))
    assert not network.training
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert not {id(p) for p in network.parameters()} & {id(p) for p in trainer.network.parameters()}


def test_trainer_of_several_passes_is_refused() -> None:
    class nnUNetTrainerMeUNetDistilled(DistillationMixin, nnUNetTrainerMeUNet):
        pass

    trainer = object.__new__(nnUNetTrainerMeUNetDistilled)
    trainer.current_epoch, trainer.num_epochs = 0, 1
    with pytest.raises(NotImplementedError, match=r"trains in several passes .* distil a trainer with one pass"):
        trainer.on_train_start()


def test_a_third_partys_trainer_is_distilled_by_the_mixin(
    dataset: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class nnUNetTrainerTheirs(DistillationMixin, nnUNetTrainer):
        pass

    monkeypatch.setattr(nnUNetTrainerTheirs, "__module__", FIRST)
    plain = trainer_of(dataset("labels"), "nnUNetTrainer")
    plans = {**copy.deepcopy(plain.plans_manager.plans), "continue_training": False}
    trainer = nnUNetTrainerTheirs(plans, "3d_fullres", 0, plain.dataset_json, CPU)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 1, 1
    trainer.run_training()
    assert Path(trainer.output_folder, FINAL_CHECKPOINT).is_file()


# ---------------------------------------------------------------------------------------------------- what is stored
def test_a_student_is_as_large_as_without_a_teacher_and_predicts_without_it(
    dataset: Callable[[str], int], teacher: Path
) -> None:
    trainer = trainer_of(dataset("labels"))
    trainer.run_training()
    shutil.rmtree(teacher)
    path = Path(trainer.output_folder, FINAL_CHECKPOINT)
    content = read_checkpoint(path, "")
    alone = trainer_of(dataset("labels"), FIRST.removesuffix("Distilled"))
    alone.initialize()
    assert content["network_weights"].keys() == alone.network.state_dict().keys()
    note = content["init_args"][KEY]
    assert note["teacher"] == str(teacher.resolve())
    assert (note["temperature"], note["weight"], list(note["checkpoints"])) == (2.0, 0.5, ["0"])
    predictor = nnUNetPredictor(device=CPU)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,), FINAL_CHECKPOINT)
    assert torch.isfinite(predictor.predict_logits_from_preprocessed_data(torch.randn(2, 16, 16, 16))).all()
    maybe_load_checkpoint(trainer_of(dataset("labels")), continue_training=False, validation_only=True)


@pytest.fixture
def interrupted(dataset: Callable[[str], int], teacher: Path) -> int:
    """A student that was stopped after its first epoch, with temperature 4."""
    trainer = trainer_of(dataset("labels"))
    for earlier in Path(trainer.output_folder).glob("checkpoint_*"):
        earlier.unlink()
    trainer.num_epochs, trainer.temperature = 2, 4.0
    trainer.save_every = 1
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end([trainer.train_step(next(trainer.dataloader_train))])
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    trainer.on_epoch_end()
    return dataset("labels")


def resumed(dataset: int) -> Any:
    trainer = trainer_of(dataset, continue_training=True)
    trainer.num_epochs = 2
    maybe_load_checkpoint(trainer, continue_training=True, validation_only=False)
    assert trainer.current_epoch == 1
    return trainer


def test_a_resumed_student_finds_its_teacher_and_how_it_was_taught(
    interrupted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE)
    trainer = resumed(interrupted)
    trainer.run_training()
    assert (trainer.temperature, trainer.loss.temperature) == (4.0, 4.0)
    assert read_checkpoint(Path(trainer.output_folder, FINAL_CHECKPOINT), "")["init_args"][KEY]["temperature"] == 4.0


def test_a_resumed_student_takes_its_teacher_from_another_place_but_no_other_teacher(
    interrupted: int, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = teacher.with_name("moved")
    teacher.rename(moved)
    monkeypatch.setenv(VARIABLE, str(moved))
    resumed(interrupted)._read_teachers()
    memorise(moved)
    with pytest.raises(UsageError, match="goes on with the checkpoints of distillation that it began with"):
        resumed(interrupted).run_training()


def test_a_student_that_has_ended_is_validated_without_its_teacher(
    dataset: Callable[[str], int], teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer_of(dataset("labels")).run_training()
    shutil.rmtree(teacher)
    trainer = trainer_of(dataset("labels"), continue_training=True)
    maybe_load_checkpoint(trainer, continue_training=True, validation_only=False)
    trainer.run_training()  # nnUNetv2_train --c, which only validates what has ended


def test_a_resumed_student_gets_no_other_images(interrupted: int, unlabelled: Path) -> None:
    trainer = resumed(interrupted)
    trainer.plans_manager.plans[KEY] = {"unlabelled": str(unlabelled)}
    with pytest.raises(UsageError, match=r"goes on with the unlabelled of distillation .* None .* got .*imagesTr"):
        trainer.run_training()


# ---------------------------------------------------------------------------------------------------- unlabelled images
@pytest.fixture
def unlabelled(tmp_path: Path) -> Path:
    """Three images without labels."""
    folder = tmp_path / "more"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for i in range(3):
        write_case(folder, f"new{i}", 50 + i, ignore=False)
    return folder / "imagesTr"


def link_own(images: Path, channel: int) -> None:
    (own,) = (WORKSPACE / "raw").glob(f"Dataset*_labels/imagesTr/case0_{channel:04d}.nii.gz")
    (images / f"other_{channel:04d}.nii.gz").symlink_to(own)


def with_images(dataset: int, images: Path, **options: Any) -> Any:
    trainer = trainer_of(dataset, iterations=12)
    trainer.plans_manager.plans[KEY] = {"unlabelled": str(images), **options}
    return trainer


@pytest.mark.parametrize("kind", ["labels", "regions", "ignore"])
def test_images_without_labels_are_mixed_in_by_their_share(
    kind: str, dataset: Callable[[str], int], unlabelled: Path
) -> None:
    trainer = with_images(dataset(kind), unlabelled, unlabelled_share=0.5)
    trainer.on_train_start()
    names = trainer.get_tr_and_val_datasets()[0].identifiers
    share = np.mean([is_unlabelled(name) for name in names])
    assert share == pytest.approx(0.5, abs=0.02)
    assert {name for name in names if is_unlabelled(name)} == {f"unlabelled:new{i}" for i in range(3)}
    seen: set[int] = set()
    trainer.on_train_epoch_start()
    for _ in range(12):
        batch = next(trainer.dataloader_train)
        seen.add(sum(map(is_unlabelled, map(str, batch["keys"]))))
        assert np.isfinite(trainer.train_step(batch)["loss"])
    assert len(seen) > 1
    assert trainer.my_init_kwargs[KEY]["unlabelled_share"] == 0.5


def test_images_are_preprocessed_once_and_beside_those_of_running_trainings(
    dataset: Callable[[str], int], unlabelled: Path
) -> None:
    def made(patch: int = 24) -> dict[Path, int]:
        trainer = with_images(dataset("labels"), unlabelled)
        trainer.plans_manager.plans["configurations"]["3d_fullres"]["patch_size"] = [patch] * 3
        trainer._read_teachers()
        return {path: path.stat().st_mtime_ns for path in trainer._unlabelled[0].glob("*.b2nd")}

    first = made()
    assert len(first) == 6  # image and mask of three
    assert made() == made(patch=16) == first
    image = sitk.ReadImage(str(unlabelled / "new0_0000.nii.gz"))
    sitk.WriteImage(image * 2, str(unlabelled / "new0_0000.nii.gz"))
    assert made().keys().isdisjoint(first)
    assert {path: path.stat().st_mtime_ns for path in first} == first
    for path in first:
        path.with_suffix(".pkl").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda images: (images / "new0_0000.nii.gz").unlink(), r"2 channel\(s\) each, .* got new0: complete"),
        (lambda images: [path.unlink() for path in images.iterdir()], "got none: complete"),
        (lambda images: images.rename(images.with_name("gone")), "an existing folder of images, got"),
        (
            lambda images: [p.rename(p.with_name(p.name.replace("new0", "case0"))) for p in images.glob("new0_*")],
            "must not be cases of the data set, some of which are held back for tests, got case0",
        ),
        (
            lambda images: [link_own(images, channel) for channel in (0, 1)],
            "must not be cases of the data set, some of which are held back for tests, got other",
        ),
        (
            lambda images: (images / "new0_0000.nii.gz").write_bytes(b"no image"),
            "new0_0000.nii.gz can't be preprocessed",
        ),
    ],
)
def test_images_that_can_not_be_used_are_refused(
    spoil: Callable[[Path], Any], message: str, dataset: Callable[[str], int], unlabelled: Path
) -> None:
    spoil(unlabelled)
    with pytest.raises(UsageError, match=message):
        with_images(dataset("labels"), unlabelled).run_training()
