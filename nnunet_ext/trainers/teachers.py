"""Networks of trained folds that say what they think of a batch, each of the cases that it has not been trained on."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ext.errors import UsageError
from nnunet_ext.files import sha256
from nnunet_ext.nnunet.checkpoints import FINAL_CHECKPOINT, read_trained
from nnunet_ext.nnunet.model_folder import ModelFolder
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.teacher import check_fits
from nnunet_ext.printable import one_line
from nnunet_ext.trainers.unlabelled import is_unlabelled

_CURE = "copy it again, or train this fold of the teacher again"


class Teachers:
    """Folds of one trained model, in evaluation mode and without gradients.

    One network has the weights of one fold at a time; those of all folds stay on the device.

    Args:
        network: Network of the teacher.
        weights: Fold -> its weights, on the device of the network.
        fold_of: Case -> fold that teaches it.
    """

    def __init__(
        self, network: nn.Module, weights: Mapping[str, Mapping[str, Tensor]], fold_of: Mapping[str, str]
    ) -> None:
        self._network, self._weights, self._fold_of = network.eval().requires_grad_(False), weights, fold_of
        self._loaded: str | None = None

    @property
    def folds(self) -> list[str]:
        """Names of the folds."""
        return sorted(self._weights)

    @torch.no_grad()
    def logits(self, images: Tensor, keys: Sequence[str] | None) -> Tensor:
        """What the folds say, each sample in one forward pass of one fold.

        Args:
            images: (B, C, *patch).
            keys: Case of each sample, as nnU-Net's loader gives them; None where one fold teaches all.

        Returns:
            Logits (B, classes, *patch) in the dtype of the network.

        Raises:
            ValueError: a case is none of those that may be taught.
        """
        folds = self._folds_of(len(images), keys)
        if len(set(folds)) == 1:
            return self._of(folds[0], images)
        logits: Tensor | None = None
        for fold in sorted(set(folds)):
            rows = [row for row, of in enumerate(folds) if of == fold]
            found = self._of(fold, images[rows])
            logits = found.new_empty(len(images), *found.shape[1:]) if logits is None else logits
            logits[rows] = found
        assert logits is not None
        return logits

    def _of(self, fold: str, images: Tensor) -> Tensor:
        if self._loaded != fold:
            self._network.load_state_dict(self._weights[fold])
            self._loaded = fold
        logits: Tensor = self._network(images)
        return logits

    def _folds_of(self, samples: int, keys: Sequence[str] | None) -> list[str]:
        if keys is None and len(self._weights) == 1:
            return self.folds * samples
        folds = [self._fold_of_case(str(key)) for key in (() if keys is None else keys)]
        if len(folds) != samples:
            raise ValueError(
                f"A batch must name the case of each of its {samples} samples in 'keys', got {len(folds)}: take "
                "nnU-Net's data loader, or name them in yours."
            )
        return folds

    def _fold_of_case(self, case: str) -> str:
        if is_unlabelled(case):  # no fold has seen it: in the mean it is taught by all of them, as by the ensemble
            return random.choice(self.folds)
        if case not in self._fold_of:
            raise ValueError(
                f"A student's batches must hold its training cases alone, got {case}, which no fold of the teacher "
                "may teach: train on the cases of the fold."
            )
        return self._fold_of[case]

    def compile(self) -> None:
        """Compile the network, where one fold teaches whole batches; else their sizes differ from step to step."""
        if len(self._weights) == 1:
            self._network.compile()


def read_teachers(
    model: ModelFolder, fold_of: Mapping[str, str], student: Setting, device: torch.device
) -> tuple[Teachers, dict[str, str]]:
    """Read the folds that teach, and see that they fit the student.

    Args:
        model: The teacher.
        fold_of: Case -> fold that teaches it.
        student: Plans, data set and configuration of the student.
        device: Where they are to teach.

    Returns:
        The teachers, and the SHA-256 of each fold's checkpoint.

    Raises:
        UsageError: a checkpoint is cut off, of another fold, or none of a teacher for this student.
    """
    weights: dict[str, Mapping[str, Tensor]] = {}
    sums: dict[str, str] = {}
    network: nn.Module | None = None
    for fold in sorted(set(fold_of.values())):
        path = model.fold_folder(fold) / FINAL_CHECKPOINT
        trained = read_trained(path, _CURE)
        if trained.fold != fold:
            raise UsageError(
                f"{path} must be the checkpoint of fold {fold}, it was trained as fold {trained.fold}: {_CURE}."
            )
        if network is None:
            setting = Setting(plans=model.plans, dataset=model.dataset, configuration=trained.configuration)
            check_fits(setting, student, model.folder)
            network = setting.builder(trained.trainer, deep_supervision=False)()
        _load(network, trained.weights, path)
        weights[fold] = {key: value.to(device) for key, value in trained.weights.items()}
        sums[fold] = sha256(path)
    assert network is not None
    _try(network.to(device).eval(), student, model.folder, device)
    return Teachers(network, weights, fold_of), sums


def untrained(model: ModelFolder) -> Callable[[], nn.Module]:
    """Return a function that builds the network of a trained model, without its weights.

    Raises:
        UsageError: no fold of it is trained.
    """
    folds = model.folds_with(FINAL_CHECKPOINT)
    if not folds:
        raise UsageError(f"the teacher must have {FINAL_CHECKPOINT} in a fold, {model.folder} has none: train it.")
    trained = read_trained(model.fold_folder(folds[0]) / FINAL_CHECKPOINT, _CURE)
    setting = Setting(plans=model.plans, dataset=model.dataset, configuration=trained.configuration)
    return setting.builder(trained.trainer, deep_supervision=False)


def _load(network: nn.Module, weights: Mapping[str, Any], path: Path) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(f"the weights of {path} don't fit its plans ({one_line(error)}): {_CURE}.") from error


def _try(network: nn.Module, student: Setting, folder: Path, device: torch.device) -> None:
    """See that the teacher takes a patch of the student's, before hours of training."""
    wanted = (1, student.num_classes, *student.patch_size)
    try:
        with torch.no_grad(), mixed_precision(device):
            found = tuple(network(torch.zeros(1, student.input_channels, *student.patch_size, device=device)).shape)
    except Exception as error:  # whatever a network finds wrong with a patch
        raise UsageError(
            f"the network of the teacher {folder} can't see a patch of {list(student.patch_size)} "
            f"({one_line(error)}): change patch_size of the student's plans, or name another teacher."
        ) from error
    if found != wanted:
        raise UsageError(f"the teacher {folder} must give logits of {wanted}, got {found}: name another teacher.")


def mixed_precision(device: torch.device) -> torch.autocast:
    """Autocast as nnU-Net trains: in float16 on CUDA, else off."""
    return torch.autocast(device.type, enabled=device.type == "cuda")
