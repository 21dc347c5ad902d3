"""meU-net compared with U-Nets of its small and its large patch: memory, time, and a volume of micro-CT size predicted.

python benchmarks/me_unet.py --output docs/benchmarks/DATE-me-unet [--parts memory time steps volume]

Memory at full size is measured without a GPU (nnunet_ext/benchmark); times are CPU seconds of one thread, medians of
interleaved repeats. Each part writes PART.json and PART.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from faster_fusion import arguments
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnunet_ext.api import create
from nnunet_ext.architectures.checkpointed.unet import CheckpointedPlainConvUNet
from nnunet_ext.architectures.expanded.partial_pass import ExpandedPass, centre_crop
from nnunet_ext.escaping import markdown_table
from nnunet_ext.memory.network import measure_step, surrogate_loss
from nnunet_ext.memory.tracker import GIB
from nnunet_ext.nnunet.patch_plans import narrow
from nnunet_ext.nnunet.source import Source
from nnunet_ext.trainers.nnUNetTrainerMeUNet import nnUNetTrainerMeUNet
from nnunet_ext.trainers.passes import TwoPasses

P, SMALL_P = 128, 32
KS = (1.0, 1.25, 1.5, 1.75, 2.0)
VOLUME, VOLUME_PATCH = (1072, 470, 470), (240, 240, 240)
Row = dict[str, Any]


def networks(patch: int) -> dict[str, Callable[[], nn.Module]]:
    """Builders by name, with what nnU-Net plans for such a patch of an isotropic 3D data set."""
    options: Any = {"input_channels": 1, "num_classes": 3, "patch_size": [patch] * 3, "deep_supervision": True}
    return {
        "default nnU-Net": partial(create, "PlainConvUNet", **options),
        "ResEnc": partial(residual_encoder_unet, patch),
        "ReversibleUNet": partial(create, "ReversibleUNet", **options),
    }


def residual_encoder_unet(patch: int) -> nn.Module:
    options = arguments(patch)
    del options["n_conv_per_stage"]
    n = options["n_stages"]
    depth = {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6][:n], "n_conv_per_stage_decoder": [1] * (n - 1)}
    return ResidualEncoderUNet(**{**options, **depth, "deep_supervision": True})


def memory() -> list[Row]:
    """Peak of a step against k; P fixed, so kP grows. Then both savings at the same large patch."""
    rows = []
    for name, build in networks(P).items():
        for dtype in (None, torch.bfloat16):
            small = measure_step(build, 1, [P] * 3, 2, dtype).peak
            for k in KS:
                size = int(k * P)
                large = measure_step(build, 1, [size] * 3, 2, dtype).peak
                rows.append(memory_row(name, build, size, P, dtype, small, large))
    default = networks(P)["default nnU-Net"]
    for size, standard in ((192, 128), (256, 160)):
        for name, build in networks(P).items():
            small, large = (measure_step(default, 1, [n] * 3).peak for n in (standard, size))
            row = memory_row(name, build, size, standard, None, small, large)
            rows.append({**row, "network": f"{name}, compared with default nnU-Net"})
    return rows


def memory_row(
    name: str,
    build: Callable[[], nn.Module],
    size: int,
    standard: int,
    dtype: torch.dtype | None,
    small: int,
    large: int,
) -> Row:
    expanded = measure_step(lambda: ExpandedPass(build()), 1, [size] * 3, 2, dtype).peak
    peak = measure_step(lambda: TwoPasses(build(), lambda _: [standard] * 3), 1, [size] * 3, 2, dtype).peak
    return {
        "network": name,
        "precision": "float32" if dtype is None else "mixed",
        "k": round(size / standard, 3),
        "kP": size,
        "P": standard,
        "U-Net(P) [GB]": round(small / GIB, 2),
        "U-Net(kP) [GB]": round(large / GIB, 2),
        "expanded pass [GB]": round(expanded / GIB, 2),
        "step [GB]": round(peak / GIB, 2),
        "to U-Net(P)": round(peak / small, 3),
        "to U-Net(kP)": round(peak / large, 3),
    }


def step_seconds(repeats: int, names: list[str], ks: list[float]) -> list[Row]:
    """CPU time of forward and backward passes, four stages, batch 2."""
    p = SMALL_P
    rows = []
    for name in names:
        network = networks(p)[name]().train()
        expanded = ExpandedPass(network)
        for k in ks:
            data = torch.randn(2, 1, *[int(k * p)] * 3)
            small = centre_crop(data, [p] * 3)
            steps = {
                "meU-net [s]": [(expanded, data), (network, small)],
                "U-Net(P) [s]": [(network, small)],
                "U-Net(kP) [s]": [(network, data)],
            }
            seconds: dict[str, list[float]] = {title: [] for title in steps}
            for _ in range(repeats):
                for title, passes in steps.items():
                    seconds[title].append(timed(network, passes))
            medians = {title: round(median(values), 3) for title, values in seconds.items()}
            ratios = {
                f"to {other}": round(medians["meU-net [s]"] / medians[f"{other} [s]"], 3)
                for other in ("U-Net(P)", "U-Net(kP)")
            }
            rows.append({"network": name, "k": k, "kP": int(k * p), "P": p, **medians, **ratios})
    return rows


def steps(repeats: int) -> list[Row]:
    """Steps of the default network with the context of kP, k = 1.5: memory in float16 at kP = 192, others at 48."""

    def network(patch: int, recompute: Any = None) -> nn.Module:
        kind = PlainConvUNet if recompute is None else partial(CheckpointedPlainConvUNet, recompute=recompute)
        return kind(**{**arguments(patch), "deep_supervision": True})

    def two_passes(patch: int) -> nn.Module:
        return TwoPasses(network(patch), lambda size: [2 * n // 3 for n in size])

    builders: dict[str, Callable[[int], nn.Module]] = {
        "U-Net(kP)": network,
        "two passes": two_passes,
        "one pass": partial(network, recompute="finest"),
        "U-Net(kP), all levels recomputed": partial(network, recompute="stages"),
        "U-Net(kP), norms recomputed": partial(network, recompute="norms"),
    }
    peaks = {
        name: measure_step(partial(build, P), 1, [192] * 3, 2, torch.float16).peak for name, build in builders.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in builders}
    trained = {name: build(SMALL_P).train() for name, build in builders.items()}
    data = torch.randn(2, 1, *[48] * 3)
    operations = {}
    for name, module in trained.items():
        with FlopCounterMode(display=False) as counter:
            timed(module, [(module, data)])
        operations[name] = counter.get_total_flops()
    for _ in range(repeats):
        for name, module in trained.items():
            seconds[name].append(timed(module, [(module, data)]))
    whole = "U-Net(kP)"
    return [
        {
            "step": name,
            "peak [GB]": round(peaks[name] / GIB, 2),
            "to U-Net(kP)": round(peaks[name] / peaks[whole], 3),
            "operations": round(operations[name] / operations[whole], 2),
            "time to U-Net(kP)": round(median(seconds[name]) / median(seconds[whole]), 2),
        }
        for name in builders
    ]


def timed(network: nn.Module, passes: list[tuple[nn.Module, torch.Tensor]]) -> float:
    network.zero_grad(set_to_none=True)
    start = time.process_time()
    for part, data in passes:
        surrogate_loss(part(data)).backward()
    return time.process_time() - start


def volume() -> list[Row]:
    """Predict one synthetic volume with nnU-Net's own predictor at kP, from the image to the labels."""
    plans = PlansManager(volume_plans())
    configuration = plans.get_configuration("3d_fullres")
    dataset = {"labels": {"background": 0, "a": 1, "b": 2}, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
    network = nnUNetTrainerMeUNet.build_network_architecture(plans, configuration, 1, 3, False)
    predictor = nnUNetPredictor(
        use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    weights = [network.state_dict()]
    predictor.manual_initialization(network, plans, configuration, weights, dataset, "nnUNetTrainerMeUNet", None)
    image = np.random.default_rng(0).standard_normal((1, *VOLUME), dtype=np.float32)
    before, start = rss(), time.monotonic()
    labels = predictor.predict_single_npy_array(image, {"spacing": [1.0, 1.0, 1.0]})
    if labels.shape != VOLUME:
        raise RuntimeError(f"The prediction must have the shape {VOLUME} of the image, got {labels.shape}.")
    return [
        {
            "volume": "x".join(map(str, VOLUME)),
            "kP": "x".join(map(str, VOLUME_PATCH)),
            "before [GB]": round(before, 2),
            "peak of the process [GB]": round(rss(), 2),
            "wall [s]": round(time.monotonic() - start),
        }
    ]


def rss() -> float:
    """Largest resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def volume_plans() -> dict[str, Any]:
    """Plans of a small network: four stages, one convolution in each."""
    setting = narrow(Source(patch=(SMALL_P,) * 3).setting(), [4, 8, 16, 32])
    configuration = setting.plans["configurations"][setting.configuration]
    configuration["architecture"]["arch_kwargs"].update(n_conv_per_stage=[1] * 4, n_conv_per_stage_decoder=[1] * 3)
    configuration.update(
        data_identifier="none",
        preprocessor_name="DefaultPreprocessor",
        patch_size=list(VOLUME_PATCH),
        me_unet={"k": 1.5, "standard_patch_size": [160, 160, 160]},
    )
    resampling = {"order": 1, "order_z": 0, "force_separate_z": None}
    for kind in ("data", "seg", "probabilities"):
        configuration[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{kind}_kwargs"] = {**resampling, "is_seg": kind == "seg"}
    return {**setting.plans, "foreground_intensity_properties_per_channel": {"0": {}}}


def markdown(rows: list[Row]) -> str:
    titles = list(rows[0])
    return markdown_table(titles, ([str(row[title]) for title in titles] for row in rows)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--parts", nargs="+", default=["memory", "time"], choices=["memory", "time", "steps", "volume"])
    parser.add_argument("--repeats", type=int, default=5, help="of each time")
    parser.add_argument("--networks", nargs="+", default=list(networks(P)), help="that are timed")
    parser.add_argument("--ks", nargs="+", type=float, default=list(KS[1:]), help="that are timed")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    measure = {
        "memory": memory,
        "time": lambda: step_seconds(options.repeats, options.networks, options.ks),
        "steps": lambda: steps(options.repeats),
        "volume": volume,
    }
    for part in options.parts:
        rows = measure[part]()
        machine = {"torch": torch.__version__, "processor": platform.machine(), "threads": 1}
        (options.output / f"{part}.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        (options.output / f"{part}.md").write_text(markdown(rows))
        print(markdown(rows), flush=True)


if __name__ == "__main__":
    main()
