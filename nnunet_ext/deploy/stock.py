"""Writes a trained model as one of nnU-Net's own, which predicts without this package."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ext import __version__
from nnunet_ext.architectures.deployed import NothingToFuseError, fused
from nnunet_ext.deploy import card
from nnunet_ext.deploy.check import Difference, check_same, patches_of, predict_unfused
from nnunet_ext.deploy.folder import check_new, count, write_checkpoint, write_json, write_sums
from nnunet_ext.deploy.model import TrainedModel
from nnunet_ext.errors import UsageError
from nnunet_ext.files import whole_folder
from nnunet_ext.nnunet.training_log import read_log, record

STOCK = "nnUNetTrainer"
_HOME = "dynamic_network_architectures.architectures."


@dataclass(frozen=True, kw_only=True)
class Stocked:
    """One fold, before and after.

    Args:
        network: Class of the network that nnU-Net builds.
        is_folded: Whether its batch norms were folded.
        parameters_before, parameters: Numbers of weights, heads for deep supervision included.
        bytes_before, bytes: Size of the checkpoint's file, trained and stock.
        differences: Differences to the trained network; 0 where nothing was folded.
    """

    network: str
    is_folded: bool
    parameters_before: int
    parameters: int
    bytes_before: int
    bytes: int
    differences: tuple[Difference, ...]


def stock(
    model: TrainedModel, output: Path, images: Path | None = None, show: Callable[[str], None] = lambda what: None
) -> dict[str, Stocked]:
    """Write the model; return what became of each fold.

    Args:
        model: Trained.
        output: A folder that does not exist yet.
        images: Folder of real images to check with; None: only noise.
        show: Called before each piece of work.

    Raises:
        UsageError: `output` exists, or the network is none of nnU-Net's.
    """
    check_new(output)
    patches = patches_of(model.setting, images)
    with whole_folder(output) as folder:
        stocked, plans = {}, None
        for fold, path in model.checkpoints.items():
            show(f"fold {fold}")
            trained = model.trained_network(fold)
            found = _Stock.of(model, trained, patches)
            if plans not in (None, found.plans):
                raise UsageError(f"All folds must become one network, fold {fold} another: ship it alone by --folds.")
            plans = found.plans
            stocked[fold] = Stocked(
                network=type(found.network).__name__,
                is_folded=found.is_folded,
                parameters_before=count(trained),
                parameters=count(found.network),
                bytes_before=path.stat().st_size,
                bytes=write_checkpoint(folder / f"fold_{fold}", model, found.network, STOCK),
                differences=found.differences,
            )
        write_json(folder / "dataset.json", model.setting.dataset)
        write_json(folder / "plans.json", plans or {})
        (folder / card.NAME).write_text(card.text(model, card.STOCK), encoding="utf-8")
        trainings = {f: record(read_log(path.parent)[0]) for f, path in model.checkpoints.items()}
        report = {"nnunet_ext": __version__, "trainer": model.trainer, "images": list(patches)}
        folds = {fold: {**asdict(s), "training": trainings[fold]} for fold, s in stocked.items()}
        write_json(folder / "deployment.json", {**report, "folds": folds})
        write_sums(folder)
    return stocked


@dataclass(frozen=True, kw_only=True)
class _Stock:
    """A network of nnU-Net's own with the weights of a trained one."""

    network: nn.Module
    plans: Mapping[str, Any]
    is_folded: bool
    differences: tuple[Difference, ...]

    @classmethod
    def of(cls, model: TrainedModel, trained: nn.Module, patches: Mapping[str, Tensor]) -> _Stock:
        """Build it: batch norms folded, else as it was trained.

        Raises:
            UsageError: the network is none of nnU-Net's.
        """
        reason, regions = "", bool(model.setting.label_manager.has_regions)
        for kind, predicting, is_folded in _forms(trained):
            try:
                plans = _plans(model, kind, trained, is_folded)
                network = _build(model, plans)
                network.load_state_dict(predicting.state_dict())
            except (RuntimeError, TypeError, AttributeError) as error:
                # Other weights; arguments that the class does not have; residual networks, whose initialisation needs
                # norms.
                reason = str(error).splitlines()[-1].strip()
                continue
            logits = {name: predict_unfused(network, patch) for name, patch in patches.items()}
            if all(torch.equal(predict_unfused(predicting, patches[name]), after) for name, after in logits.items()):
                pairs = ((name, predict_unfused(trained, patches[name]), after) for name, after in logits.items())
                rule = "The stock network must predict what the trained one does"
                return cls(
                    network=network,
                    plans=plans,
                    is_folded=is_folded,
                    differences=tuple(
                        check_same(Difference.of(*pair, regions), rule, "ship the model without --stock")
                        for pair in pairs
                    ),
                )
            reason = "it computes something else"
        raise UsageError(
            f"--stock needs a network of dynamic_network_architectures, that of {model.trainer} "
            f"({type(trained).__name__}) is none that nnU-Net could build{f' ({reason})' if reason else ''}: use "
            "--standalone, which predicts without this package too, or leave --stock out."
        )


def _forms(trained: nn.Module) -> Iterator[tuple[type[nn.Module], nn.Module, bool]]:
    """The class of nnU-Net that the network is or comes from, with batch norms folded if there are any, and without."""
    for kind in type(trained).__mro__:
        if kind.__module__.startswith(_HOME):
            with suppress(NothingToFuseError):
                yield kind, fused(trained), True
            yield kind, trained, False
            return


def _plans(model: TrainedModel, kind: type[nn.Module], trained: nn.Module, is_folded: bool) -> dict[str, Any]:
    """Plans from which nnU-Net builds the network, with the features and norms that the trainer gave it."""
    encoder: Any = trained.get_submodule("encoder")
    architecture = model.setting.configuration_manager.configuration["architecture"]
    known = signature(kind).parameters
    arguments = {key: value for key, value in architecture["arch_kwargs"].items() if key in known}
    arguments["features_per_stage"] = list(encoder.output_channels)
    norm = None if is_folded else encoder.norm_op
    arguments["norm_op"] = None if norm is None else f"{norm.__module__}.{norm.__name__}"
    arguments["norm_op_kwargs"] = None if norm is None else dict(encoder.norm_op_kwargs or {})
    plans = copy.deepcopy(dict(model.setting.plans))
    plans["configurations"][model.setting.configuration]["architecture"] = {
        "network_class_name": f"{kind.__module__}.{kind.__name__}",
        "arch_kwargs": arguments,
        "_kw_requires_import": [key for key in architecture["_kw_requires_import"] if key in arguments],
    }
    return plans


def _build(model: TrainedModel, plans: Mapping[str, Any]) -> nn.Module:
    """Build as nnU-Net's predictor does."""
    return replace(model.setting, plans=plans).builder(STOCK, deep_supervision=False)().eval()
