"""What a run costs: size and operations of its network, memory and time of training and prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_ext.comparison.run_folders import Run
from nnunet_ext.comparison.training import Training
from nnunet_ext.errors import UsageError
from nnunet_ext.files import read_json
from nnunet_ext.nnunet.model_folder import DEPLOYED
from nnunet_ext.printable import one_line

if TYPE_CHECKING:
    from nnunet_ext.nnunet.setting import Setting


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of one run; None where not known.

    Args:
        parameters: Number of weights.
        macs: Multiply-accumulate operations of a forward pass of one patch.
        patch_size, batch_size, spacing, network: Values of the plans; spacing in mm.
        epochs, iterations: Number of epochs (of all folds the same, else None), training iterations per epoch.
        seconds_per_epoch: Value that the trainings logged.
        machine: Machine of the trainings.
        held, peak: Bytes of the trainer's step in float16 autocast, counted (`memory.count`).
        inference_peak: Bytes of the prediction of a patch in float16 autocast, weights included, counted.
        measured_peak, measured_inference_peak: The same as `nnunet-ext benchmark` measured them on a GPU.
        case_seconds: Prediction of a case with mirroring.
        measured_on: Device and precision of what the benchmark measured.
    """

    parameters: int | None
    macs: int | None
    patch_size: tuple[int, ...]
    batch_size: int | None
    spacing: tuple[float, ...]
    network: str
    epochs: int | None
    iterations: int | None
    seconds_per_epoch: float | None
    machine: str
    held: int | None
    peak: int | None
    inference_peak: int | None
    measured_peak: int | None
    measured_inference_peak: int | None
    case_seconds: float | None
    measured_on: str


def read_cost(
    run: Run, training: Training, benchmark: Mapping[str, Any] | None, trusted: bool = False
) -> tuple[Cost, list[str]]:
    """Cost of a run, and warnings about what could not be found.

    Args:
        run: Its folder.
        training: What it logged.
        benchmark: Content of `nnunet-ext benchmark`'s JSON, where there is one.
        trusted: Build whatever code the run's plans name.
    """
    settings, warnings = run.settings, []
    measured = benchmarked(run, benchmark)
    counted: dict[str, int] = {}
    missing = "its network can't be built here, size and memory are missing"
    try:
        counted = count_size(run, trusted)
        if run.deployed is None:
            missing = "its training step can't be counted here, its memory is missing"
            counted |= count_memory(run, trusted)
    except UsageError as error:
        warnings.append(f"{run.label}: {missing} ({error})")
    return (
        Cost(
            parameters=counted.get("parameters"),
            macs=counted.get("macs"),
            patch_size=tuple(settings.get("patch_size", ())),
            batch_size=settings.get("batch_size"),
            spacing=tuple(round(float(step), 4) for step in settings.get("spacing", ())),
            network=str(settings.get("architecture", {}).get("network_class_name", "unknown")).rpartition(".")[2],
            epochs=training.epochs[0] if len(training.epochs) == 1 else None,
            iterations=training.iterations,
            seconds_per_epoch=training.seconds_per_epoch,
            machine="; ".join(training.machines),
            held=counted.get("held"),
            peak=counted.get("peak"),
            inference_peak=counted.get("inference_peak"),
            measured_peak=measured.get("measured_peak_bytes"),
            measured_inference_peak=measured.get("measured_inference_peak_bytes"),
            case_seconds=measured.get("case_seconds_mirrored"),
            measured_on=f"{benchmark.get('device')}, {benchmark.get('precision')}" if benchmark and measured else "",
        ),
        warnings,
    )


def count_size(run: Run, trusted: bool = False) -> dict[str, int]:
    """Parameters, operations and memory of prediction of the run's network, on shapes only.

    Raises:
        UsageError: the trainer isn't installed here, or its network can't or may not be built.
    """
    import torch

    from nnunet_ext.memory.network import measure_inference, measure_size

    with _as_usage_error():
        setting = _setting(run, trusted)
        trainer = DEPLOYED if run.deployed else run.trainer
        build, channels = setting.builder(trainer, False), setting.input_channels
        size = measure_size(build, channels, setting.patch_size)
        inference = measure_inference(build, channels, setting.patch_size, torch.float16) + 4 * size.parameters
    return {"parameters": size.parameters, "macs": size.macs, "inference_peak": inference}


def count_memory(run: Run, trusted: bool = False) -> dict[str, int]:
    """Memory of a step of the run's trainer, on shapes only.

    Raises:
        UsageError: its step can't be run here.
    """
    from nnunet_ext.memory.count import training_memory

    with _as_usage_error():
        step = training_memory(_setting(run, trusted), run.trainer)
    return {"held": step.held, "peak": step.peak}


def _setting(run: Run, trusted: bool) -> Setting:
    from nnunet_ext.nnunet.setting import Setting

    return Setting(plans=run.plans, dataset=run.dataset, configuration=run.configuration, trusted=trusted)


@contextmanager
def _as_usage_error() -> Iterator[None]:
    """Networks and trainers of other packages may raise anything."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(one_line(error)) from error


def benchmarked(run: Run, benchmark: Mapping[str, Any] | None) -> dict[str, Any]:
    """The run's record in the benchmark's JSON, empty where it is of other plans, patch or trainer."""
    if benchmark is None:
        return {}
    settings = run.settings
    same = (
        benchmark.get("configuration") == run.configuration
        and list(benchmark.get("patch_size", [])) == list(settings.get("patch_size", []))
        and benchmark.get("batch_size") == settings.get("batch_size")
        and benchmark.get("plans") == run.plans_name
    )
    records = benchmark.get("methods", []) if same else []
    names = {run.trainer, _base(run.trainer)}
    return next(
        ({k: v for k, v in record.items() if v is not None} for record in records if record["trainer"] in names), {}
    )


def _base(trainer: str) -> str:
    from nnunet_ext import registry

    schedule = registry.parse_schedule(trainer)
    return schedule.base if schedule else trainer


def read_benchmark(path: Path | None, beside: Path | None) -> dict[str, Any] | None:
    """Read the JSON of `nnunet-ext benchmark`: `path`, else benchmark.json in the folder `beside`, else None.

    Raises:
        UsageError: the file is cut off or something else.
    """
    if path is None:
        path = beside / "benchmark.json" if beside is not None else None
        if path is None or not path.is_file():
            return None
    cure = "write it again by `nnunet-ext benchmark ... -o FOLDER`"
    content = read_json(path, cure)
    if not isinstance(content.get("methods"), list):
        raise UsageError(f"{path} must be the JSON of `nnunet-ext benchmark`, it has no methods: {cure}.")
    return content


def plan_differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Settings in which the runs' configurations differ: name -> text for each run."""
    described = [_described(run) for run in runs]
    keys = dict.fromkeys(key for one in described for key in one)
    rows = {key: [one.get(key, "-") for one in described] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def _described(run: Run) -> dict[str, str]:
    settings = run.settings
    architecture = settings.get("architecture", {})
    flat = {k: v for k, v in settings.items() if k != "architecture"}
    # A network may call an argument as nnU-Net calls a setting.
    arguments = architecture.get("arch_kwargs", {})
    flat |= {(f"network: {key}" if key in flat else key): value for key, value in arguments.items()}
    flat["network_class_name"] = architecture.get("network_class_name", settings.get("UNet_class_name", ""))
    return {key: str(value) for key, value in sorted(flat.items())}
