"""Writes a trained model as a folder that predicts without nnU-Net and PyTorch, and compares it with nnU-Net."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from nnunet_ext import __version__, extras
from nnunet_ext.architectures.deployed import NothingToFuseError, fused
from nnunet_ext.architectures.fusion.blocks import Form
from nnunet_ext.deploy import card, onnx
from nnunet_ext.deploy.check import Difference, check_same, patches_of, predict_unfused, random_patch
from nnunet_ext.deploy.folder import check_new, count, write_json, write_sums
from nnunet_ext.deploy.model import TrainedModel
from nnunet_ext.deploy.standalone import description, parity, predict, quantize
from nnunet_ext.errors import UsageError
from nnunet_ext.files import whole_folder
from nnunet_ext.nnunet.training_log import read_log, record
from nnunet_ext.protocols import RefinesAsAsked

_EQUAL = 0.999  # voxels that must have nnU-Net's label, of all images together
_OVERLAP, _FEW = 0.98, 3  # Dice of each label with nnU-Net's, where more than so many voxels differ
REQUIREMENTS = ("numpy>=1.24", "scipy>=1.10", "SimpleITK>=2.2.1")
_INT8 = "openvino-int8"


Engine = Literal["onnxruntime", "openvino", "openvino-bfloat16", "openvino-int8"]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Args:
        parameters_before, parameters: Weights of one fold, trained and exported.
        bytes: Size of the folder.
        differences: Largest differences of ONNX Runtime to the trained network, of each fold, by image.
        cases: Comparison with nnU-Net's own prediction; empty without images.
        postprocessing: Rules that go along.
    """

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
        images: Folder of images; all of them are predicted by the exported folder and by nnU-Net.
        references: Folder of their segmentations.
        calibration: Folder of images that calibrate int8; None: `images`.
    """

    engines: Sequence[Engine] = ("onnxruntime",)
    form: Form = "hybrid"
    images: Path | None = None
    references: Path | None = None
    calibration: Path | None = None

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
        if _INT8 in self.engines and self.calibrating is None:
            raise UsageError(f"--engines {_INT8} needs scans that calibrate it: give some by --calibrate, or by -i.")

    @property
    def calibrating(self) -> Path | None:
        """Folder of images that calibrate int8."""
        return self.calibration or self.images


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
    patches = {**patches_of(model.setting, options.images), "random": random_patch(model.setting)}
    with whole_folder(output) as folder:
        differences: dict[str, tuple[Difference, ...]] = {}
        networks = []
        for fold in model.checkpoints:
            show(f"fold {fold}")
            trained = model.trained_network(fold)
            network = _smallest(trained, options.form)
            if isinstance(trained, RefinesAsAsked):
                trained.assume_refined_share(1.0)  # the file decodes every voxel
            file = f"fold_{fold}.onnx"
            any_batch = onnx.export_any_batch(network, patches["random"], folder / file)
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
    if _INT8 in options.engines and options.calibrating is not None:
        show("calibrating int8")
        calibration = quantize.calibration_patches(options.calibrating, content)
        for network in content["networks"]:
            quantize.quantize(folder / network["file"], calibration)
    shutil.copyfile(predict.__file__, folder / "predict.py")
    packages = [{"onnxruntime": "onnxruntime>=1.20"}.get(engine, "openvino>=2024.4") for engine in options.engines]
    requirements = dict.fromkeys((*REQUIREMENTS, *packages))
    (folder / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
    (folder / card.NAME).write_text(card.text(model, card.STANDALONE), encoding="utf-8")
    write_sums(folder)


def _smallest(trained: nn.Module, form: Form) -> nn.Module:
    """The form that predicts, where there is another than that of training."""
    try:
        return fused(trained, form)
    except NothingToFuseError:
        return trained.eval()


def _differences(
    trained: nn.Module, patches: Mapping[str, Tensor], path: Path, model: TrainedModel
) -> tuple[Difference, ...]:
    regions = bool(model.setting.label_manager.has_regions)
    rule = f"ONNX Runtime must predict what PyTorch does, {path.stem} does not"
    pairs = ((name, predict_unfused(trained, patch), onnx.predict(path, patch)) for name, patch in patches.items())
    return tuple(
        check_same(Difference.of(*pair, regions), rule, "ship the model without --standalone") for pair in pairs
    )


def _check_equal(exported: Exported, engines: Sequence[Engine]) -> None:
    """In float32 only rounding may differ; what less precision changes is told, and for the user to judge."""
    for engine in set(engines) & {"onnxruntime", "openvino"}:
        cases = [case for case in exported.cases if case.engine == engine]
        lost = [case for case in cases if case.dice < _OVERLAP and case.different > _FEW]
        if exported.equal(engine) < _EQUAL or lost:
            worst = min(lost or cases, key=lambda case: case.dice)
            raise UsageError(
                f"The exported folder must predict what nnU-Net does; by {engine} {exported.equal(engine):.4%} of the "
                f"voxels have its label, in {worst.case} {worst.different:,} of {worst.voxels:,} have another and one "
                f"label overlaps by a Dice of {worst.dice:.3f}: a model that has learned little is unsure; else "
                "ship it without --standalone, and report this."
            )
