"""What a network or a trainer may offer beyond nnU-Net's own contract, and what our mixins ask of nnU-Net's trainer.

Networks and trainers of other packages offer the same by having these methods: nothing of this has to be imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class DrawsInputs(Protocol):
    """A network that training gives more than the image, as points; used by `memory` and `benchmark`."""

    def training_inputs(self, x: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of `forward` for a batch x, (B, C, *patch)."""


@runtime_checkable
class RefinesAsAsked(Protocol):
    """A network whose prediction works as much as the image asks for; used by `memory` and `benchmark`."""

    def assume_refined_share(self, share: float | None) -> None:
        """Refine this share of a patch, whatever it holds; None: as the image asks for."""


@runtime_checkable
class Fusable(Protocol):
    """A network that predicts in another form than it trains in; used by `deploy`, `benchmark` and itself."""

    def fuse(self) -> nn.Module:
        """Return a new network that predicts; this one stays as it is. May take ``form``, a word."""


@runtime_checkable
class SeveralPasses(Protocol):
    """A training step of several backward passes; what a trainer's `training_form` may give."""

    def passes(self, x: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """Yield what has a backward pass of its own, in turn, with its input, for a batch x, (B, C, *patch)."""


class WrapsNetwork(Protocol):
    """A training step that is called by its network's name; found by the attribute, which may be a submodule."""

    trained_network: nn.Module


@runtime_checkable
class CompilesParts(Protocol):
    """What passes run, where it is not compiled as a whole."""

    def compile_levels(self, **options: Any) -> None:
        """Compile the parts, with options of `torch.compile`."""


@runtime_checkable
class HasTrainingForm(Protocol):
    """A trainer whose step is more than one pass of its network."""

    def training_form(self, network: nn.Module, configuration: Any) -> nn.Module:
        """What a step runs, as a module; a class method."""


@runtime_checkable
class HasTeacher(Protocol):
    """A trainer whose step asks another network about the batch first; all are class or static methods."""

    def teacher_builder(self, setting: Any) -> Callable[[], nn.Module]:
        """Return a function that builds the teacher's network, untrained."""

    def at_outputs(self, logits: Tensor, drawn: Mapping[str, Any]) -> Tensor:
        """The teacher's logits, (B, C, *patch), at what the student puts out with what it is given beside the image."""


@runtime_checkable
class OnlyPredicts(Protocol):
    """A trainer that no training uses."""

    predicts_only: bool


def only_predicts(trainer: Any) -> bool:
    """Whether a trainer's class says so."""
    return isinstance(trainer, OnlyPredicts) and trainer.predicts_only


class HostTrainer:
    """Attributes and methods of nnUNetTrainer that mixins use: their base for type checkers, never at run time."""

    plans_manager: Any
    configuration_manager: Any
    configuration_name: str
    label_manager: Any
    logger: Any
    dataset_class: Any
    dataset_json: dict[str, Any]
    device: Any
    fold: int | str
    my_init_kwargs: dict[str, Any]
    local_rank: int
    is_ddp: bool
    inference_allowed_mirroring_axes: Any  # tuple of int, or None
    is_cascaded: bool
    disable_checkpointing: bool
    was_initialized: bool
    enable_deep_supervision: bool
    output_folder: str
    preprocessed_dataset_folder: str
    preprocessed_dataset_folder_base: str
    folder_with_segs_from_previous_stage: Any  # a path in a cascade, else None
    initial_lr: float
    weight_decay: float
    num_epochs: int
    current_epoch: int
    save_every: int
    network: nn.Module
    loss: Any
    optimizer: Any
    grad_scaler: Any
    dataloader_val: Any
    _best_ema: float | None

    def initialize(self) -> None:
        """Make network, optimiser and loss."""
        raise NotImplementedError

    def configure_optimizers(self) -> tuple[Any, Any]:
        """Optimiser and schedule of its learning rate."""
        raise NotImplementedError

    def run_training(self) -> None:
        """Train."""
        raise NotImplementedError

    def on_train_start(self) -> None:
        """Make data loaders and folders."""
        raise NotImplementedError

    def on_epoch_end(self) -> None:
        """Log the epoch, save checkpoints."""
        raise NotImplementedError

    def on_train_epoch_start(self) -> None:
        """Prepare for training patches."""
        raise NotImplementedError

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One step of the optimiser."""
        raise NotImplementedError

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Loss and counts of one batch."""
        raise NotImplementedError

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log the epoch's losses."""
        raise NotImplementedError

    def on_validation_epoch_start(self) -> None:
        """Prepare for validation patches."""
        raise NotImplementedError

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Log the epoch's pseudo Dice."""
        raise NotImplementedError

    @staticmethod
    def get_training_transforms(*arguments: Any, **options: Any) -> Any:
        """Make the augmentation of training patches."""
        raise NotImplementedError

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict the fold's validation cases."""
        raise NotImplementedError

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint."""
        raise NotImplementedError

    def load_checkpoint(self, *arguments: Any, **options: Any) -> None:
        """Read a checkpoint."""
        raise NotImplementedError

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """Data sets of training and validation."""
        raise NotImplementedError

    def do_split(self) -> tuple[list[str], list[str]]:
        """Names of the training and validation cases."""
        raise NotImplementedError

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True) -> None:
        """Log a line."""
        raise NotImplementedError

    def _build_loss(self) -> nn.Module:
        raise NotImplementedError

    def _do_i_compile(self) -> bool:
        raise NotImplementedError
