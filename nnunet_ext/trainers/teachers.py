"""Networks of trained folds that say what they think of a batch, each of the cases that it has not been trained on."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import Tensor, nn

from nnunet_ext.architectures.common.plan_arguments import parameters_of
from nnunet_ext.errors import UsageError
from nnunet_ext.files import sha256
from nnunet_ext.memory.network import with_assumed_share
from nnunet_ext.nnunet.checkpoints import FINAL_CHECKPOINT, Trained, read_trained
from nnunet_ext.nnunet.model_folder import ModelFolder
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.nnunet.teacher import check_fits
from nnunet_ext.printable import one_line
from nnunet_ext.trainers.autocast import nnunet_autocast
from nnunet_ext.trainers.from_plans import build_from_plans
from nnunet_ext.trainers.unlabelled import is_unlabelled

_CURE = "copy it again, or train this fold of the teacher again"


class Teachers:
    """Folds of one trained model, in evaluation mode and without gradients.

    One network has the weights of one fold at a time; where several teach, those of all stay on the device.

    Args:
        network: Network of the teacher, with the weights of the last fold.
        weights: Fold -> its weights, on the device of the network; of the only one they may be left out.
        fold_of: Case -> fold that teaches it.
    """

    def __init__(
        self, network: nn.Module, weights: Mapping[str, Mapping[str, Tensor]], fold_of: Mapping[str, str]
    ) -> None:
        self._network, self._weights, self._fold_of = network.eval().requires_grad_(False), weights, fold_of
        self.folds = sorted(weights)
        self._loaded = list(weights)[-1]

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
        rows = {fold: [row for row, of in enumerate(folds) if of == fold] for fold in sorted(set(folds))}
        said = torch.cat([self._of(fold, images[of]) for fold, of in rows.items()])
        order = [row for of in rows.values() for row in of]
        return said[torch.tensor(order, device=said.device).argsort()]

    def _of(self, fold: str, images: Tensor) -> Tensor:
        if self._loaded != fold:
            self._network.load_state_dict(self._weights[fold])
            self._loaded = fold
        logits: Tensor = self._network(images)
        return logits

    def _folds_of(self, samples: int, keys: Sequence[str] | None) -> list[str]:
        if keys is None and len(self.folds) == 1:
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
        if len(self.folds) == 1:
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
    folds = sorted(set(fold_of.values()))
    read = {fold: _read(model, fold) for fold in folds}
    kinds = sorted({(trained.trainer, trained.configuration) for trained in read.values()})
    if len(kinds) > 1:
        raise UsageError(f"the folds of {model.folder} must be of one trainer and configuration, got {kinds}: {_CURE}.")
    network = _builder(model, read[folds[0]], student)()
    weights: dict[str, Mapping[str, Tensor]] = {}
    for fold, trained in read.items():
        try:
            network.load_state_dict(trained.weights)
        except RuntimeError as error:
            path = model.fold_folder(fold) / FINAL_CHECKPOINT
            raise UsageError(f"the weights of {path} don't fit its plans ({one_line(error)}): {_CURE}.") from error
        weights[fold] = _moved(trained.weights, device) if len(folds) > 1 else {}
    _try(network.to(device).eval(), student, model.folder, device)
    sums = {fold: sha256(model.fold_folder(fold) / FINAL_CHECKPOINT) for fold in folds}
    return Teachers(network, weights, fold_of), sums


def _read(model: ModelFolder, fold: str) -> Trained:
    path = model.fold_folder(fold) / FINAL_CHECKPOINT
    trained = read_trained(path, _CURE)
    if trained.fold != fold:
        raise UsageError(
            f"{path} must be the checkpoint of fold {fold}, it was trained as fold {trained.fold}: {_CURE}."
        )
    return trained


def _moved(weights: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The weights on a device, each once: nnU-Net's networks have several names for most of them."""
    moved: dict[tuple[int, torch.Size], Tensor] = {}
    for value in weights.values():
        if (value.data_ptr(), value.shape) not in moved:
            moved[value.data_ptr(), value.shape] = value.to(device)
    return {key: moved[value.data_ptr(), value.shape] for key, value in weights.items()}


def untrained(model: ModelFolder, student: Setting) -> Callable[[], nn.Module]:
    """Return a function that builds the network of a trained model, without its weights.

    Raises:
        UsageError: no fold of it is trained, or it is none of a teacher for this student.
    """
    folds = model.folds_with(FINAL_CHECKPOINT)
    if not folds:
        raise UsageError(f"the teacher must have {FINAL_CHECKPOINT} in a fold, {model.folder} has none: train it.")
    build = _builder(model, _read(model, folds[0]), student)
    return lambda: with_assumed_share(build())


def of_plans(student: Setting) -> Callable[[], nn.Module]:
    """Return a function that builds nnU-Net's own network, plain or residual, of the student's plans."""
    student.check_code()
    configuration = student.configuration_manager
    planned = configuration.network_arch_init_kwargs
    found = ResidualEncoderUNet if "n_blocks_per_stage" in planned else PlainConvUNet
    others = sorted(set(planned) - parameters_of(found))
    channels = student.input_channels, student.num_classes
    return lambda: build_from_plans(found, configuration, *channels, False, without=others)


def _builder(model: ModelFolder, trained: Trained, student: Setting) -> Callable[[], nn.Module]:
    setting = Setting(plans=model.plans, dataset=model.dataset, configuration=trained.configuration)
    check_fits(setting, student, model.folder)
    try:
        return setting.builder(trained.trainer, deep_supervision=False)
    except UsageError as error:
        reason = str(error).partition(": ")[0]
        raise UsageError(
            f"the teacher {model.folder} can't be built ({reason}): install the package that registers its trainer and "
            "its network (docs/how-to/add-a-method.md), or name another teacher."
        ) from error


def _try(network: nn.Module, student: Setting, folder: Path, device: torch.device) -> None:
    """See that the teacher takes a patch of the student's, before hours of training."""
    wanted = (1, student.num_classes, *student.patch_size)
    try:
        with torch.no_grad(), nnunet_autocast(device):
            said = network(torch.zeros(1, student.input_channels, *student.patch_size, device=device))
    except Exception as error:  # whatever a network finds wrong with a patch
        raise UsageError(
            f"the network of the teacher {folder} can't see a patch of {list(student.patch_size)} "
            f"({one_line(error)}): change patch_size of the student's plans, or name another teacher."
        ) from error
    if tuple(said.shape) != wanted or not said.isfinite().all():
        raise UsageError(
            f"the teacher {folder} must give finite logits of {wanted}, got {tuple(said.shape)}, finite: "
            f"{bool(said.isfinite().all())}: name another teacher."
        )
