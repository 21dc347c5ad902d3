"""What turns any trainer into one that learns from a trained model too: knowledge distillation without leakage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from nnunet_ext.errors import UsageError
from nnunet_ext.files import read_json
from nnunet_ext.nnunet.datasets import number_of
from nnunet_ext.nnunet.model_folder import ModelFolder
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.teacher import KEY, VARIABLE, Request, find_teacher, teaching_folds
from nnunet_ext.protocols import HasTrainingForm
from nnunet_ext.trainers.autocast import nnunet_autocast
from nnunet_ext.trainers.distillation_loss import DistillationLoss, Lesson
from nnunet_ext.trainers.teachers import Teachers, of_plans, read_teachers, untrained
from nnunet_ext.trainers.unlabelled import MixedDataset, is_unlabelled, preprocess

if TYPE_CHECKING:
    from nnunet_ext.protocols import HostTrainer
else:
    HostTrainer = object

_FASTEST = 2.0  # times the trainer's learning rate


class DistillationMixin(HostTrainer):
    """Trains a network on labels and on what a trained model says of each patch; place it before the trainer.

    The teacher is named by the environment variable `nnUNet_teacher` or by "distillation" in the plans, see `Request`.
    Fold k is taught by the teacher's fold k; of "all", each case by the fold that has held it back. What taught is
    stored in the checkpoint; prediction and validation need no teacher.

    Attributes:
        temperature, soft_weight: T and a of `DistillationLoss`, where the plans don't say.
    """

    temperature: float = 2.0
    soft_weight: float = 0.5
    _teachers: Teachers | None = None
    _unlabelled: tuple[Path, float] | None = None  # preprocessed images, share of the samples

    @staticmethod
    def at_outputs(logits: Tensor, drawn: Mapping[str, Any]) -> Tensor:
        """The teacher's logits at what the student puts out.

        Args:
            logits: (B, C, *patch).
            drawn: What the student's network is given in addition to the image.
        """
        return logits

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        bases = cls.__mro__
        if nnUNetTrainer in bases and bases.index(nnUNetTrainer) < bases.index(DistillationMixin):
            raise TypeError(f"{cls.__name__} must name DistillationMixin before its trainer: nobody would teach it.")

    @classmethod
    def teacher_builder(cls, setting: Setting) -> Callable[[], nn.Module]:
        """Return a function that builds the teacher's network, untrained: the named one's, else nnU-Net's own.

        Raises:
            UsageError: the named one is none of a teacher for these plans.
        """
        name, dataset = Request.of(setting.plans).teacher, str(setting.plans.get("dataset_name"))
        if name is None or number_of(dataset) is None:  # plans that are made for a patch are of no data set
            return of_plans(setting)
        return untrained(find_teacher(name, dataset), setting)

    def _build_loss(self) -> nn.Module:
        return DistillationLoss(
            super()._build_loss(),
            self.label_manager.has_regions,
            self.temperature,
            self.soft_weight,
            lambda logits: self.at_outputs(logits, getattr(self, "drawn", {})),
        )

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """Optimiser of the trainer; where it is SGD, with a larger learning rate, so that labels keep their step.

        They weigh 1 - a, and nnU-Net's Dice loss has no part in what the teacher adds: at the trainer's own rate
        students learned more slowly than without a teacher (docs/methods/distillation.md). At most twice the rate;
        Adam's step does not depend on the size of the loss.
        """
        optimizer, scheduler = super().configure_optimizers()
        if isinstance(optimizer, torch.optim.SGD):
            weight = Request.of(self.plans_manager.plans, weight=self.soft_weight).weight
            self.initial_lr *= min(1 / (1 - weight), _FASTEST) if weight < 1 else 1
            optimizer, scheduler = super().configure_optimizers()
        return optimizer, scheduler

    def on_train_start(self) -> None:
        """Read the teacher, then begin as nnU-Net does; a training that has ended is only validated.

        Raises:
            UsageError: there is none, it does not fit, it may not teach this fold, or it is not the one that a
                continued training began with.
            NotImplementedError: the trainer's step is more than one pass, or unlabelled images can't be used.
        """
        if self.current_epoch < self.num_epochs:
            self._read_teachers()
        super().on_train_start()
        if not isinstance(self.loss, DistillationLoss):
            raise TypeError(
                f"{type(self).__name__} must take its loss from _build_loss, where the teacher comes in, got a "
                f"{type(self.loss).__name__}: override _build_loss instead of setting the loss."
            )

    def _read_teachers(self) -> Teachers:
        if isinstance(type(self), HasTrainingForm):
            raise NotImplementedError(
                f"{type(self).__name__} trains in several passes of its network, which can't be distilled: distil a "
                "trainer with one pass, as nnUNetTrainerHalfWidthBNDistilled."
            )
        plans, before = self.plans_manager.plans, self.my_init_kwargs.get(KEY, {})  # of the checkpoint that goes on
        setting = Setting(plans=plans, dataset=self.dataset_json, configuration=self.configuration_name, trusted=True)
        own = {"temperature": self.temperature, "weight": self.soft_weight}
        asked: dict[str, Any] = {**own, **{key: before[key] for key in before if key != "checkpoints"}}
        request = Request.of(plans, **asked)
        model = find_teacher(request.teacher, plans["dataset_name"])
        fold_of = teaching_folds(model, self.fold, *self.do_split(), self._splits())
        teachers, sums = read_teachers(model, fold_of, setting, self.device)
        note: dict[str, Any] = {
            "teacher": str(model.folder),
            "checkpoints": sums,
            "temperature": float(request.temperature),
            "weight": float(request.weight),
        }
        if request.unlabelled is not None:
            images = Path(request.unlabelled).expanduser().absolute()
            self._unlabelled = self._preprocessed(images, setting), request.unlabelled_share
            note |= {"unlabelled": str(images), "unlabelled_share": float(request.unlabelled_share)}
        _check_same(before, note)
        self.my_init_kwargs[KEY] = note
        self.temperature, self.soft_weight = note["temperature"], note["weight"]
        if self._do_i_compile():
            teachers.compile()
        self._teachers = teachers
        self.print_to_log_file(
            f"Distillation: taught by {model.folder}, fold {', '.join(teachers.folds)}, temperature "
            f"{self.temperature:g}, weight {self.soft_weight:g}; patch of the teacher: {_patch(model, setting)}"
        )
        return teachers

    def _splits(self) -> list[Any]:
        path = Path(self.preprocessed_dataset_folder_base, "splits_final.json")
        return read_json(path, "restore it", list) if path.is_file() else []

    def _preprocessed(self, images: Path, setting: Setting) -> Path:
        if self.is_cascaded:
            raise NotImplementedError(
                "A cascade's second stage needs the first one's prediction of every case, which images without labels "
                'don\'t have: leave "unlabelled" out, or distil a configuration without previous stage.'
            )
        if self.is_ddp and self.configuration_manager.batch_dice:
            raise NotImplementedError(
                "With batch_dice several GPUs share one Dice loss, in which a GPU whose patches have no labels has no "
                'part: train on one GPU, set batch_dice to false in the plans, or leave "unlabelled" out.'
            )
        cases = self.dataset_class.get_identifiers(self.preprocessed_dataset_folder)
        return preprocess(images, setting, Path(self.preprocessed_dataset_folder), cases)

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """nnU-Net's data sets, the one for training mixed with images without labels where the plans name some."""
        training, validation = super().get_tr_and_val_datasets()
        if self._unlabelled is not None:
            folder, share = self._unlabelled
            images = infer_dataset_class(str(folder))(str(folder))
            training = MixedDataset(training, images, share, self.label_manager.all_labels)
        return training, validation

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ask the teacher, then train as the trainer does."""
        images, keys = batch["data"].to(self.device, non_blocking=True), batch.get("keys")
        teachers = self._teachers or self._read_teachers()
        with nnunet_autocast(self.device):
            logits = teachers.logits(images, keys)
        with self._lesson(logits, keys):
            result: dict[str, Any] = super().train_step({**batch, "data": images})
            return result

    @contextmanager
    def _lesson(self, logits: Tensor, keys: Any) -> Iterator[None]:
        unlabelled = [sample for sample, key in enumerate(() if keys is None else keys) if is_unlabelled(str(key))]
        self.loss.temperature, self.loss.weight = self.temperature, self.soft_weight
        self.loss.lesson = Lesson(logits, unlabelled)
        try:
            yield
        finally:
            self.loss.lesson = None

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log the terms of the loss apart."""
        super().on_train_epoch_end(train_outputs)
        if (means := self.loss.epoch_means()) is not None:
            self.print_to_log_file(f"loss on the labels {means[0]:.4f}, divergence from the teacher {means[1]:.4f}")


def _patch(model: ModelFolder, student: Setting) -> str:
    """Patch that a teacher was trained with, and that it sees."""
    patches = [list(c["patch_size"]) for c in model.plans["configurations"].values() if "patch_size" in c]
    seen = list(student.patch_size)
    return f"{seen}" if seen in patches else f"{seen}, another than it was trained with"


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """See that a continued training goes on as it began; its teacher may have moved."""
    for key in ("checkpoints", "temperature", "weight", "unlabelled", "unlabelled_share"):
        if before and before.get(key) != now.get(key):
            raise UsageError(
                f"a training goes on with the {key} of distillation that it began with, {before.get(key)} (teacher "
                f"{before.get('teacher')}), got {now.get(key)} (teacher {now['teacher']}): restore it ({VARIABLE}, "
                "plans), or begin anew."
            )
