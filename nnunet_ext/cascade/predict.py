"""Both predictions of a trained cascade, one after the other, with nnU-Net's own predictor."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ext.cascade.stage import TRAIN, Stage
from nnunet_ext.doctor.case import Case, Rules, look
from nnunet_ext.errors import UsageError
from nnunet_ext.files import locked, read_json, write_text, writing
from nnunet_ext.parallel import mapped
from nnunet_ext.printable import counted, one_line
from nnunet_ext.whole import check_whole, is_whole

NOTE = "cascade_predict.json"
LOCK = "cascade_predict.lock"
_FEW = 12  # cases that are read before other processes would have started


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to predict; names as in nnUNetv2_predict.

    Args:
        device: "cuda", "cpu" or "mps".
        step_size: Step of the sliding window, as a share of the patch.
        mirroring: Whether to average over mirrored images.
        save_probabilities: Whether to keep the probabilities of stage 2.
        preprocessing, export: Number of processes.
        keep_going: Keep what an interrupted call with the same settings has finished.
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
            raise UsageError(f"-npp and -nps must be at least 1, got {self.preprocessing} and {self.export}: use 1.")


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
        stages: See `find_stages`.
        images: Folder of new scans, named as in imagesTs.
        output: Folder of the result; holds what nnUNetv2_predict writes.
        keep: Folder of stage 1's predictions; None: beside `output`, called <output>_<configuration of stage 1>.
        options: Options of both predictions.
        report: Gets one line for each step.

    Raises:
        UsageError: folders that can't be used together, incomplete input, or a continuation with other settings.
    """
    first, second = stages
    output = _real(output)
    keep = _real(output.with_name(f"{output.name}_{first.configuration}") if keep is None else keep)
    _check_folders(_real(images), output, keep)
    options.check()
    files = _input_files(images, first.dataset)
    report(f"reading {counted(len(files), 'case')} of {images}")
    good = _Good.of(first, files, options.preprocessing)
    with writing(keep):
        keep.mkdir(parents=True, exist_ok=True)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    with locked(keep / LOCK):
        _continue_or_start(stages, files, output, keep, options, good)
        report(f"stage 1, {first.configuration}: {counted(len(files), 'case')} to {keep}")
        _run(first, images, keep, None, options)
        _see_whole(files, keep, good)
        report(f"stage 2: {counted(len(files), 'case')} to {output}")
        _run(second, images, output, keep, options)
        _see_whole(files, output, good, options.save_probabilities)
    return keep


def _real(path: Path) -> Path:
    """Where a path leads; `Path.resolve` raises where links lead in a circle."""
    return Path(os.path.realpath(path))


def _check_folders(images: Path, output: Path, keep: Path) -> None:
    if not images.is_dir():
        raise UsageError(f"-i needs an existing folder of scans, got {images}: correct the path.")
    if len({images, output, keep}) < 3:
        raise UsageError(f"-i, -o and --keep must be three folders, got {images}, {output} and {keep}: choose others.")


def _input_files(images: Path, dataset: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Files of each case, by nnU-Net's rule; how many channels they hold is for its reader to say."""
    ending = str(dataset["file_ending"])
    found: dict[str, list[Path]] = {}
    for path in sorted(path for path in images.iterdir() if path.name.endswith(ending)):
        match = re.fullmatch(r"(.+)_\d{4}", path.name[: -len(ending)])
        if match is None or path.name.startswith("."):
            raise UsageError(
                f"-i needs scans called CASE_0000{ending}, {images} has {path.name}, which nnU-Net takes for one "
                "too: rename it as in imagesTs, or move it away."
            )
        found.setdefault(match[1], []).append(path)
    if not found:
        raise UsageError(f"-i needs scans called CASE_0000{ending}, {images} has none: rename them as in imagesTs.")
    return found


@dataclass(frozen=True)
class _Good:
    """What a prediction must be like to be taken as finished.

    Args:
        reader: Reader of nnU-Net.
        ending: Ending of its files.
        labels: Values that it may hold.
        shapes: Shapes of the scans, by case.
    """

    reader: Any
    ending: str
    labels: tuple[int, ...]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, stage: Stage, files: Mapping[str, Sequence[Path]], processes: int) -> _Good:
        """Read all scans.

        Raises:
            UsageError: one is cut off, holds NaN or infinity, or has other channels than the model was trained with.
        """
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        plans, dataset = PlansManager(deepcopy(stage.plans)), stage.dataset
        reader = plans.image_reader_writer_class
        channels = len(dataset.get("channel_names") or dataset.get("modality") or ())
        rules = Rules(reader, channels)
        shapes = {}
        bad = []
        jobs = [(Case(name, tuple(paths)), rules) for name, paths in files.items()]
        for seen in mapped(look, jobs, processes if len(jobs) > _FEW else 1):
            shapes[seen.name] = seen.shape
            bad += [found for found in seen.findings if found.level == "failure"]
        if bad:
            more = f" ({len(bad) - 1} more like this)" if len(bad) > 1 else ""
            raise UsageError(f"{bad[0].subject}: {bad[0].detail}: {bad[0].cure}{more}.")
        labels = tuple(plans.get_label_manager(dataset).all_labels)
        return cls(reader(), str(dataset["file_ending"]), labels, shapes)

    def is_finished(self, folder: Path, case: str, with_probabilities: bool = False) -> bool:
        """Whether a case's prediction can be read to its end and is one of its scan."""
        import numpy as np

        path = folder / f"{case}{self.ending}"
        beside = [folder / f"{case}{ending}" for ending in (".npz", ".pkl")] if with_probabilities else []
        if not path.is_file() or not all(map(is_whole, beside)):
            return False
        try:
            check_whole(path)
            segmentation, _ = self.reader.read_seg(str(path))
        except Exception:  # what a file cut short raises depends on its format
            return False
        fits = tuple(segmentation.shape[1:]) == tuple(self.shapes[case])
        return fits and bool(np.isin(segmentation, self.labels).all())


def _continue_or_start(
    stages: tuple[Stage, Stage],
    files: Mapping[str, Sequence[Path]],
    output: Path,
    keep: Path,
    options: Options,
    good: _Good,
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
        noted = read_json(path, "delete it to start again")
        if noted.get("settings") != settings:
            raise UsageError(
                f"--continue_prediction needs the models, folds and settings of the interrupted call, {keep} was "
                "made with others: repeat that call, choose another --keep, or leave --continue_prediction out."
            )
        earlier = noted.get("scans", {})
    for case in files:
        kept = earlier.get(case) == scans[case] and good.is_finished(keep, case)
        both = kept and good.is_finished(output, case, options.save_probabilities)
        for folder, finished in ((keep, kept), (output, both)):
            if not finished:
                (folder / f"{case}{good.ending}").unlink(missing_ok=True)
    write_text(path, json.dumps({"settings": settings, "scans": scans}, indent=2) + "\n")


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
    folds = [fold if fold == "all" else int(fold) for fold in stage.checkpoints]
    checkpoint = next(iter(stage.checkpoints.values())).name
    try:
        predictor.initialize_from_trained_model_folder(str(stage.folder), folds, checkpoint)
    except Exception as error:  # whatever nnU-Net meets in plans and weights that don't belong together
        raise UsageError(
            f"nnU-Net's predictor can't load {stage.folder} ({one_line(error)}): {TRAIN}, or copy it again."
        ) from error
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
    except (OSError, RuntimeError) as error:
        if "workers died" in str(error):
            raise UsageError(
                f"a process that reads or writes scans of {images} ended, its message is above: repair the scan, or "
                "use -npp 1 -nps 1 where memory is short, then call again with --continue_prediction."
            ) from error
        if not isinstance(error, OSError) and "ImageFileWriter" not in str(error):  # ITK's only kind of error
            raise
        free = shutil.disk_usage(output).free // 2**20
        raise UsageError(
            f"can't write to {output} ({one_line(error)}; {free} MB are free): make room or choose another folder, "
            "then call again with --continue_prediction."
        ) from error


def _see_whole(files: Mapping[str, Any], folder: Path, good: _Good, with_probabilities: bool = False) -> None:
    missing = [case for case in files if not good.is_finished(folder, case, with_probabilities)]
    if missing:
        raise UsageError(
            f"{folder} must now hold all predictions, complete: {', '.join(missing[:5])} is missing or cut off "
            f"({len(missing)} in all); see the messages above and the free space, then call again with "
            "--continue_prediction."
        )
