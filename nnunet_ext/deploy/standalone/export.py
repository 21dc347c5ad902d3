"""Writes a trained model as a folder that predicts without nnU-Net and PyTorch, and compares it with nnU-Net."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_ext import __version__, extras
from nnunet_ext.architectures.deployed import NothingToFuseError, fused
from nnunet_ext.architectures.fusion.blocks import Form
from nnunet_ext.deploy import card, onnx
from nnunet_ext.deploy.check import Difference, predict_unfused, real_patch
from nnunet_ext.deploy.folder import check_new, count, write_json, write_sums
from nnunet_ext.deploy.model import TrainedModel
from nnunet_ext.deploy.standalone import description, parity, predict, quantize
from nnunet_ext.errors import UsageError
from nnunet_ext.files import whole_folder
from nnunet_ext.nnunet.training_log import read_log, record
from nnunet_ext.protocols import RefinesAsAsked

_TOLERANCE = 1e-4  # of the largest logit, in float32
_EQUAL = 0.999  # voxels that must have nnU-Net's label, of all images together
_REQUIREMENTS = ("numpy>=1.24", "scipy>=1.10", "SimpleITK>=2.2.1")
_INT8 = "openvino-int8"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Args:
        fused: Whether the networks predict in another form than they were trained in.
        parameters_before, parameters: Weights of one fold, trained and exported.
        bytes: Size of the folder.
        differences: Largest differences of ONNX Runtime to the trained network, of each fold, by image.
        cases: Comparison with nnU-Net's own prediction; empty without images.
        postprocessing: Rules that go along.
    """

    fused: bool
    parameters_before: int
    parameters: int
    bytes: int
    differences: Mapping[str, tuple[Difference, ...]]
    cases: tuple[parity.CaseParity, ...]
    postprocessing: tuple[Mapping[str, Any], ...]

    def equal(self, engine: str) -> float:
        """Share of voxels with nnU-Net's label, in all images together; 1 without images."""
        cases = [case for case in self.cases if case.engine == engine]
        voxels = sum(case.voxels for case in cases)
        return 1 - sum(case.different for case in cases) / voxels if voxels else 1.0


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is written and checked.

    Args:
        engines: Keys of `predict.ENGINES` to check; the first is the folder's default.
        form: Form of fused FasterFusion blocks.
        images: Folder of images; all of them are predicted by the exported folder and by nnU-Net. They calibrate int8.
        references: Folder of their segmentations.
    """

    engines: Sequence[str] = ("onnxruntime",)
    form: Form = "hybrid"
    images: Path | None = None
    references: Path | None = None

    def check(self) -> None:
        """See that nothing is missing.

        Raises:
            UsageError: names what.
        """
        extras.need("onnx", "--standalone")
        if self.images is None and self.references is not None:
            raise UsageError("-ref needs the images that it is of: give them by -i.")
        if any(engine.startswith("openvino") for engine in self.engines):
            extras.need("openvino", "--engines openvino")
        if _INT8 in self.engines and self.images is None:
            raise UsageError(f"--engines {_INT8} needs images that calibrate it: give some of your scans by -i.")


def export(
    model: TrainedModel, output: Path, options: ExportOptions, show: Callable[[str], None] = lambda what: None
) -> Exported:
    """Write the folder.

    Args:
        model: Trained, by any trainer.
        output: A folder that does not exist yet.
        options: See there.
        show: Called before each piece of work.

    Raises:
        UsageError: `output` exists, the model asks for what `predict.py` does not know, or the result is not the same.
    """
    check_new(output)
    options.check()
    description.check_supported(model.setting)
    rules = description.postprocessing(model)
    patches = {"noise": _noise(model)}
    if options.images is not None:
        name, patch = real_patch(model.setting, options.images)
        patches[name] = patch
    with whole_folder(output) as folder:
        differences: dict[str, tuple[Difference, ...]] = {}
        networks = []
        for fold in model.checkpoints:
            show(f"fold {fold}")
            trained = model.trained_network(fold)
            network = _smallest(trained, options.form)
            file = f"fold_{fold}.onnx"
            any_batch = onnx.export_any_batch(network, patches["noise"], folder / file)
            networks.append({"fold": fold, "file": file, "any_batch": any_batch})
            differences[fold] = _differences(trained, patches, folder / file, model)
        content = {**description.describe(model, networks, rules), "engines": list(options.engines)}
        _write(folder, model, content, options, show)
        cases: tuple[parity.CaseParity, ...] = ()
        if options.images is not None:
            cases = parity.compare(
                folder, model, options.images, engines=options.engines, references=options.references, show=show
            )
        exported = Exported(
            fused=network is not trained,
            parameters_before=count(trained),
            parameters=count(network),
            bytes=sum(path.stat().st_size for path in folder.iterdir()),
            differences=differences,
            cases=cases,
            postprocessing=tuple(rules),
        )
        _check_equal(exported, options.engines)
        trainings = {f: record(read_log(path.parent)[0]) for f, path in model.checkpoints.items()}
        report = {"nnunet_ext": __version__, "trainer": model.trainer, **asdict(exported), "trainings": trainings}
        write_json(folder / "deployment.json", report)
        write_sums(folder)
    return exported


def _write(
    folder: Path, model: TrainedModel, content: Mapping[str, Any], options: ExportOptions, show: Callable[[str], None]
) -> None:
    """Write what lies beside the ONNX files."""
    write_json(folder / predict.MODEL, content)
    if _INT8 in options.engines and options.images is not None:
        show("calibrating int8")
        calibration = quantize.calibration_patches(options.images, content)
        for network in content["networks"]:
            quantize.quantize(folder / network["file"], calibration)
    shutil.copyfile(predict.__file__, folder / "predict.py")
    packages = [{"onnxruntime": "onnxruntime>=1.20"}.get(engine, "openvino>=2024.4") for engine in options.engines]
    requirements = dict.fromkeys((*_REQUIREMENTS, *packages))
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    (folder / card.NAME).write_text(card.text(model, card.STANDALONE), encoding="utf-8")
    write_sums(folder)


def _noise(model: TrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, model.setting.input_channels, *model.setting.patch_size, generator=generator)


def _smallest(trained: nn.Module, form: Form) -> nn.Module:
    """The form that predicts, where there is another than that of training."""
    try:
        return fused(trained, form)
    except NothingToFuseError:
        return trained.eval()


def _differences(
    trained: nn.Module, patches: Mapping[str, Tensor], path: Path, model: TrainedModel
) -> tuple[Difference, ...]:
    if isinstance(trained, RefinesAsAsked):
        trained.assume_refined_share(1.0)  # the file decodes every voxel
    regions = bool(model.setting.label_manager.has_regions)
    found = []
    for name, patch in patches.items():
        found.append(Difference.of(name, predict_unfused(trained, patch), onnx.predict(path, patch), regions))
        if not found[-1].relative <= _TOLERANCE:
            raise UsageError(
                f"ONNX Runtime must predict what PyTorch does; in {path.stem} logits of the image {name} differ by "
                f"{found[-1].relative:.1e} of the largest: ship the model without --standalone, and report this."
            )
    return tuple(found)


def _check_equal(exported: Exported, engines: Sequence[str]) -> None:
    """In float32 only rounding may differ; what less precision changes is told, and for the user to judge."""
    for engine in set(engines) & {"onnxruntime", "openvino"}:
        if exported.equal(engine) < _EQUAL:
            cases = [case for case in exported.cases if case.engine == engine]
            worst = max(cases, key=lambda case: case.different / case.voxels)
            raise UsageError(
                f"The exported folder must predict what nnU-Net does; by {engine} {exported.equal(engine):.4%} of the "
                f"voxels have its label, in {worst.case} {worst.different:,} of {worst.voxels:,} have another: a model "
                "that has learned little is unsure of many; else ship it without --standalone, and report this."
            )
