"""Both predictions of a trained cascade, one after the other, with nnU-Net's own predictor."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ext.errors import UsageError
from nnunet_ext.files import locked, read_json, write_text, writing

NOTE = "cascade_predict.json"
LOCK = "cascade_predict.lock"
RESULTS = "nnUNet_results"
_TRAIN = "train both stages first (docs/how-to/cascade.md)"


@dataclass(frozen=True)
class Stage:
    """A trained model and the folds that predict.

    Args:
        model: folder TRAINER__PLANS__CONFIGURATION.
        folds: names.
        checkpoint: name of the file in each fold's folder.
    """

    model: Path
    folds: tuple[str, ...]
    checkpoint: str

    @property
    def dataset(self) -> dict[str, Any]:
        """The dataset.json that the model was trained with."""
        found: dict[str, Any] = read_json(self.model / "dataset.json", _TRAIN)
        return found

    def check(self) -> None:
        """See that everything is there.

        Raises:
            UsageError: it is not.
        """
        if not self.model.is_dir():
            raise UsageError(f"the cascade needs the trained model {self.model}, there is none: {_TRAIN}.")
        for name in ("plans.json", "dataset.json"):
            read_json(self.model / name, _TRAIN)
        missing = [f for f in self.folds if not (self.model / f"fold_{f}" / self.checkpoint).is_file()]
        if missing:
            there = sorted(path.parent.name[5:] for path in self.model.glob(f"fold_*/{self.checkpoint}"))
            raise UsageError(
                f"{self.model} must have {self.checkpoint} for the folds {' '.join(self.folds)}, it lacks "
                f"{' '.join(missing)} (there is {' '.join(there) or 'none'}): train them, or choose folds by -f."
            )

    def note(self) -> dict[str, Any]:
        """What a continued prediction must have in common with the first one."""
        stamps = [(self.model / f"fold_{fold}" / self.checkpoint).stat() for fold in self.folds]
        return {
            "model": str(self.model.resolve()),
            "folds": list(self.folds),
            "checkpoint": self.checkpoint,
            "written": [[stamp.st_size, stamp.st_mtime_ns] for stamp in stamps],
        }


@dataclass(frozen=True)
class Options:
    """How to predict; names as in nnUNetv2_predict.

    Args:
        device: "cuda", "cpu" or "mps".
        step_size: of the sliding window, as a share of the patch.
        mirroring: whether to average over mirrored images.
        save_probabilities: of stage 2.
        preprocessing, export: number of processes.
        keep_going: keep what an interrupted call with the same settings has finished.
    """

    device: str = "cuda"
    step_size: float = 0.5
    mirroring: bool = True
    save_probabilities: bool = False
    preprocessing: int = 3
    export: int = 3
    keep_going: bool = False

    def check(self) -> None:
        """See that the numbers make sense.

        Raises:
            UsageError: they do not.
        """
        if not 0 < self.step_size <= 1:
            raise UsageError(f"-step_size is a share of the patch, got {self.step_size}: use 0.5.")
        if min(self.preprocessing, self.export) < 1:
            raise UsageError(
                f"-npp and -nps must be at least 1, got {self.preprocessing} and {self.export}: use 1."
            )


def find_stages(
    dataset: str,
    plans: str,
    trainer: str,
    configuration: str,
    folds: Sequence[Sequence[str]],
    checkpoint: str,
) -> tuple[Stage, Stage]:
    """Find both trained stages below nnUNet_results.

    Args:
        dataset: number or name.
        plans, trainer: names.
        configuration: of stage 2.
        folds: of stage 1 and of stage 2.
        checkpoint: name of the file in a fold's folder.

    Raises:
        UsageError: one is missing or incomplete, the configuration has no stage before it, or their labels differ.
    """
    folder = _results_of(dataset)
    second = Stage(folder / f"{trainer}__{plans}__{configuration}", tuple(folds[1]), checkpoint)
    second.check()
    configurations = read_json(second.model / "plans.json", _TRAIN)["configurations"]
    previous = configurations.get(configuration, {}).get("previous_stage")
    if previous is None:
        linked = [name for name, values in configurations.items() if "previous_stage" in values]
        raise UsageError(
            f"-c must be the second stage of a cascade, {configuration} has no previous_stage in {plans}: "
            f"{'use ' + ' or '.join(linked) if linked else 'plan with -pl MeCascadePlanner'}."
        )
    first = Stage(folder / f"{trainer}__{plans}__{previous}", tuple(folds[0]), checkpoint)
    first.check()
    for key in ("labels", "regions_class_order", "channel_names", "file_ending"):
        one, two = first.dataset.get(key), second.dataset.get(key)
        if one != two:
            raise UsageError(
                f"both stages must be trained with the same {key}, got {one} in stage 1 ({first.model}) and {two} in "
                "stage 2: train stage 1 anew, validate all its folds, then train stage 2."
            )
    return first, second


def predict(
    stages: tuple[Stage, Stage],
    images: Path,
    output: Path,
    keep: Path | None,
    options: Options,
    report: Callable[[str], None],
) -> Path:
    """Predict with stage 1, then with stage 2; return the folder of stage 1's predictions.

    Args:
        stages: see `find_stages`.
        images: folder of new scans, named as in imagesTs.
        output: folder of the result; holds what nnUNetv2_predict writes.
        keep: folder of stage 1's predictions; None: beside `output`, called <output>_<configuration of stage 1>.
        options: of both predictions.
        report: gets one line for each step.

    Raises:
        UsageError: folders that can't be used together, incomplete input, or a continuation with other settings.
    """
    first, second = stages
    configuration = first.model.name.rpartition("__")[2]
    output = output.resolve()
    keep = (output.with_name(f"{output.name}_{configuration}") if keep is None else keep).resolve()
    _check_folders(images.resolve(), output, keep)
    options.check()
    files = _input_files(images, first.dataset)
    with writing(keep):
        keep.mkdir(parents=True, exist_ok=True)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    with locked(keep / LOCK):
        _continue_or_start(stages, files, output, keep, options)
        report(f"stage 1, {configuration}: {len(files)} cases to {keep}")
        _run(first, images, keep, None, options)
        _see_whole(files, keep, str(first.dataset["file_ending"]))
        report(f"stage 2: {len(files)} cases to {output}")
        _run(second, images, output, keep, options)
        _see_whole(files, output, str(second.dataset["file_ending"]))
    return keep


def _results_of(dataset: str) -> Path:
    root = os.environ.get(RESULTS)
    if not root:
        raise UsageError(
            f"the environment variable {RESULTS} must name the folder of trained models: set it."
        )
    prefix = f"Dataset{int(dataset):03d}_" if dataset.isdecimal() else dataset
    found = sorted(path for path in Path(root).glob("Dataset*") if path.is_dir())
    found = [path for path in found if path.name.startswith(prefix)]
    found = [path for path in found if dataset.isdecimal() or path.name == dataset]
    if len(found) != 1:
        raise UsageError(
            f"-d must be one data set with results in {root}, {dataset} is "
            f"{' and '.join(path.name for path in found) or 'none'}: give its number or whole name."
        )
    return found[0]


def _check_folders(images: Path, output: Path, keep: Path) -> None:
    if not images.is_dir():
        raise UsageError(f"-i needs an existing folder of scans, got {images}: correct the path.")
    if len({images, output, keep}) < 3:
        raise UsageError(
            f"-i, -o and --keep must be three folders, got {images}, {output} and {keep}: choose others."
        )


def _input_files(images: Path, dataset: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Files of each case, complete."""
    ending = str(dataset["file_ending"])
    channels = len(dataset.get("channel_names") or dataset.get("modality") or ())
    found: dict[str, list[Path]] = {}
    for path in sorted(images.glob(f"*{ending}")):
        stem = path.name[: -len(ending)]
        if len(stem) > 5 and stem[-5] == "_" and stem[-4:].isdecimal():
            found.setdefault(stem[:-5], []).append(path)
    if not found:
        raise UsageError(
            f"-i needs scans called CASE_0000{ending}, {images} has none: rename them as in imagesTs."
        )
    for case, paths in found.items():
        wanted = [f"{case}_{channel:04d}{ending}" for channel in range(channels)]
        if [path.name for path in paths] != wanted:
            raise UsageError(
                f"{case} needs the files {', '.join(wanted)} (channel_names in dataset.json), {images} has "
                f"{', '.join(path.name for path in paths)}: add or remove files."
            )
    return found


def _continue_or_start(
    stages: tuple[Stage, Stage],
    files: Mapping[str, Sequence[Path]],
    output: Path,
    keep: Path,
    options: Options,
) -> None:
    """Note the settings; keep of both folders what an interrupted call has finished, or nothing."""
    settings = {
        "stage 1": stages[0].note(),
        "stage 2": stages[1].note(),
        "output": str(output),
        "step_size": options.step_size,
        "mirroring": options.mirroring,
    }
    scans = {
        case: [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
        for case, paths in files.items()
    }
    path, earlier = keep / NOTE, {}
    if options.keep_going and path.is_file():
        noted = read_json(path, "delete it to start anew")
        if noted.get("settings") != settings:
            raise UsageError(
                f"--continue_prediction needs the models, folds and settings of the interrupted call, {keep} was "
                "made with others: repeat that call, choose another --keep, or leave --continue_prediction out."
            )
        earlier = noted.get("scans", {})
    ending = str(stages[0].dataset["file_ending"])
    reader = _reader(stages[0])
    for case in files:
        one, two = keep / f"{case}{ending}", output / f"{case}{ending}"
        kept = earlier.get(case) == scans[case] and _is_whole(one, reader)
        for found, good in ((one, kept), (two, kept and _is_whole(two, reader))):
            if not good:
                found.unlink(missing_ok=True)
    write_text(path, json.dumps({"settings": settings, "scans": scans}, indent=2) + "\n")


def _reader(stage: Stage) -> Any:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    return PlansManager(str(stage.model / "plans.json")).image_reader_writer_class()


def _is_whole(path: Path, reader: Any) -> bool:
    """Whether a prediction is there and can be read to its end."""
    if not path.is_file():
        return False
    try:
        reader.read_seg(str(path))
    except Exception:  # what a file cut short raises depends on its format
        return False
    return True


def _run(stage: Stage, images: Path, output: Path, prior: Path | None, options: Options) -> None:
    """Predict as nnUNetv2_predict does."""
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    device = torch.device(options.device)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise UsageError("-device cuda needs a GPU that PyTorch sees, there is none: use -device cpu.")
        torch.set_num_threads(1)  # as nnU-Net does
    predictor = nnUNetPredictor(
        tile_step_size=options.step_size, use_mirroring=options.mirroring, device=device, allow_tqdm=False
    )
    folds = [fold if fold == "all" else int(fold) for fold in stage.folds]
    predictor.initialize_from_trained_model_folder(str(stage.model), folds, stage.checkpoint)
    try:
        predictor.predict_from_files(
            str(images),
            str(output),
            save_probabilities=options.save_probabilities and prior is not None,
            overwrite=False,  # what is not to be kept has been deleted
            num_processes_preprocessing=options.preprocessing,
            num_processes_segmentation_export=options.export,
            folder_with_segs_from_prev_stage=None if prior is None else str(prior),
        )
    except RuntimeError as error:
        if "workers died" not in str(error):
            raise
        raise UsageError(
            f"a process that reads or writes scans of {images} ended, its message is above: repair the scan, or use "
            "-npp 1 -nps 1 where memory is short, then call again with --continue_prediction."
        ) from error
    except OSError as error:
        free = shutil.disk_usage(output).free // 2**20
        raise UsageError(
            f"can't write to {output} ({error}; {free} MiB are free): make room or choose another folder, then call "
            "again with --continue_prediction."
        ) from error


def _see_whole(files: Mapping[str, Any], folder: Path, ending: str) -> None:
    missing = [case for case in files if not (folder / f"{case}{ending}").is_file()]
    if missing:
        raise UsageError(
            f"{folder} must now hold all predictions, {', '.join(missing[:5])} is missing ({len(missing)} in all): "
            "see the messages above, then call again with --continue_prediction."
        )
