"""meU-net compared with U-Nets of its small and its large patch: memory, time, and a volume of micro-CT size predicted.

python benchmarks/me_unet.py --output docs/benchmarks/DATE-me-unet [--parts memory time volume]

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
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_ext.architectures.expanded.partial_pass import ExpandedPass, centre_crop
from nnunet_ext.architectures.reversible_unet import ReversibleUNet
from nnunet_ext.escaping import markdown_table
from nnunet_ext.memory.network import measure_step, surrogate_loss
from nnunet_ext.memory.tracker import GIB
from nnunet_ext.trainers.nnUNetTrainerMeUNet import nnUNetTrainerMeUNet
from nnunet_ext.trainers.passes import TwoPasses

FEATURES, P = [32, 64, 128, 256, 320, 320], 128
KS = (1.0, 1.25, 1.5, 1.75, 2.0)
VOLUME, VOLUME_PATCH = (1072, 470, 470), (240, 240, 240)
Row = dict[str, Any]


def arguments(features: list[int], resenc: bool = False, convs: int = 2) -> dict[str, Any]:
    """What nnU-Net plans for an isotropic 3D data set."""
    n = len(features)
    depth = {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6][:n]} if resenc else {"n_conv_per_stage": [convs] * n}
    return {
        "input_channels": 1,
        "num_classes": 3,
        "n_stages": n,
        "features_per_stage": features,
        "conv_op": nn.Conv3d,
        "kernel_sizes": [[3, 3, 3]] * n,
        "strides": [[1, 1, 1]] + [[2, 2, 2]] * (n - 1),
        **depth,
        "n_conv_per_stage_decoder": [1 if resenc else convs] * (n - 1),
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": True,
    }


def networks(features: list[int]) -> dict[str, Callable[[], nn.Module]]:
    return {
        "default nnU-Net": lambda: PlainConvUNet(**arguments(features)),
        "ResEnc": lambda: ResidualEncoderUNet(**arguments(features, resenc=True)),
        "ReversibleUNet": lambda: ReversibleUNet(**arguments(features)),
    }


def memory() -> list[Row]:
    """Peak of a step against k; P fixed, so kP grows. Then both savings at the same large patch."""
    rows = []
    for name, build in networks(FEATURES).items():
        for dtype in (None, torch.bfloat16):
            small = measure_step(build, 1, [P] * 3, 2, dtype).peak
            for k in KS:
                size = int(k * P)
                large = measure_step(build, 1, [size] * 3, 2, dtype).peak
                rows.append(memory_row(name, build, size, P, dtype, small, large))
    default = networks(FEATURES)["default nnU-Net"]
    for size, standard in ((192, 128), (256, 160)):
        for name, build in networks(FEATURES).items():
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
        "U-Net(P) [GiB]": round(small / GIB, 2),
        "U-Net(kP) [GiB]": round(large / GIB, 2),
        "expanded pass [GiB]": round(expanded / GIB, 2),
        "step [GiB]": round(peak / GIB, 2),
        "to U-Net(P)": round(peak / small, 3),
        "to U-Net(kP)": round(peak / large, 3),
    }


def step_seconds(repeats: int, names: list[str], ks: list[float]) -> list[Row]:
    """CPU time of forward and backward passes, four stages, batch 2."""
    features, p = FEATURES[:4], 32
    rows = []
    for name in names:
        network = networks(features)[name]().train()
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
    dataset = {
        "labels": {"background": 0, "a": 1, "b": 2},
        "channel_names": {"0": "CT"},
        "file_ending": ".nii.gz",
    }
    network = nnUNetTrainerMeUNet.build_network_architecture(plans, configuration, 1, 3, False)
    predictor = nnUNetPredictor(
        use_mirroring=False,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    weights = [network.state_dict()]
    predictor.manual_initialization(
        network, plans, configuration, weights, dataset, "nnUNetTrainerMeUNet", None
    )
    image = np.random.default_rng(0).standard_normal((1, *VOLUME), dtype=np.float32)
    before, start = rss(), time.monotonic()
    labels = predictor.predict_single_npy_array(image, {"spacing": [1.0, 1.0, 1.0]})
    if labels.shape != VOLUME:
        raise RuntimeError(f"The prediction must have the shape {VOLUME} of the image, got {labels.shape}.")
    return [
        {
            "volume": "x".join(map(str, VOLUME)),
            "kP": "x".join(map(str, VOLUME_PATCH)),
            "before [GiB]": round(before, 2),
            "peak of the process [GiB]": round(rss(), 2),
            "wall [s]": round(time.monotonic() - start),
        }
    ]


def rss() -> float:
    """Largest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def volume_plans() -> dict[str, Any]:
    """Plans of a small network: four stages, one convolution in each."""
    options = {**arguments([4, 8, 16, 32], convs=1)}
    for name in ("input_channels", "num_classes", "deep_supervision"):
        del options[name]
    types = {"conv_op": "torch.nn.modules.conv.Conv3d", "norm_op": "torch.nn.InstanceNorm3d"}
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "none",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(VOLUME_PATCH),
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {**options, **types, "nonlin": "torch.nn.LeakyReLU"},
            "_kw_requires_import": ["conv_op", "norm_op", "nonlin"],
        },
        "batch_dice": False,
        "me_unet": {"k": 1.5, "standard_patch_size": [160, 160, 160]},
    }
    for kind in ("data", "seg", "probabilities"):
        configuration[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{kind}_kwargs"] = {**resampling, "is_seg": kind == "seg"}
    return {
        "dataset_name": "Dataset000_Volume",
        "plans_name": "nnUNetMePlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": {}},
    }


def markdown(rows: list[Row]) -> str:
    titles = list(rows[0])
    return markdown_table(titles, ([str(row[title]) for title in titles] for row in rows)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--parts", nargs="+", default=["memory", "time"], choices=["memory", "time", "volume"]
    )
    parser.add_argument("--repeats", type=int, default=5, help="of each time")
    parser.add_argument("--networks", nargs="+", default=list(networks(FEATURES)), help="that are timed")
    parser.add_argument("--ks", nargs="+", type=float, default=list(KS[1:]), help="that are timed")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    measure = {
        "memory": memory,
        "time": lambda: step_seconds(options.repeats, options.networks, options.ks),
        "volume": volume,
    }
    for part in options.parts:
        rows = measure[part]()
        machine = {"torch": torch.__version__, "processor": platform.machine(), "threads": 1}
        (options.output / f"{part}.json").write_text(
            json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n"
        )
        (options.output / f"{part}.md").write_text(markdown(rows))
        print(markdown(rows), flush=True)


if __name__ == "__main__":
    main()
