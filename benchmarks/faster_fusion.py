"""Time of FasterFusion blocks and networks in prediction, compared with plain ones and half width.

python benchmarks/faster_fusion.py --output docs/benchmarks/2026-11-21-faster-fusion [--device cpu|cuda] [--patch 128]

On the CPU: one thread, seconds of the process. On CUDA: seconds by events. Medians of interleaved repeats.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn

from nnunet_ext.architectures.faster_fusion_unet import FasterFusionUNet
from nnunet_ext.architectures.fusion.blocks import FasterFusionBlock, Geometry
from nnunet_ext.architectures.fusion.folding import fold_batch_norms
from nnunet_ext.escaping import markdown_table
from nnunet_ext.nnunet.patch_plans import setting_of_patch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}
# input channels, output channels, voxels per axis, stride
BLOCKS = [(256, 256, 16, 1), (320, 320, 8, 1), (512, 256, 16, 1), (128, 256, 32, 2)]
# The networks of the trainers.
PRESETS: dict[str, dict[str, Any]] = {
    "FasterFusion": {},
    "FasterFusionBN": {"threshold": 128, "batch_norm": True},
    "FasterFusionFast": {"threshold": 32, "batch_norm": True},
}
OPTION = "Fast, divisor 8 from 128 channels on"


def arguments(patch: int) -> dict[str, Any]:
    """What nnU-Net plans for an isotropic 3D image."""
    dataset = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1, "b": 2}}
    configuration = setting_of_patch([patch] * 3, dataset).configuration_manager
    kwargs = dict(configuration.network_arch_init_kwargs)
    modules = {"conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU}
    return {**kwargs, **modules, "input_channels": 1, "num_classes": 3}


def plain(kwargs: dict[str, Any], divisor: int = 1, batch_norm: bool = False) -> nn.Module:
    """nnU-Net's network at a share of its width; with batch norm folded."""
    features = [n // divisor for n in kwargs["features_per_stage"]]
    norm = nn.BatchNorm3d if batch_norm else nn.InstanceNorm3d
    network = PlainConvUNet(**{**kwargs, "features_per_stage": features, "norm_op": norm}).eval()
    fold_batch_norms(network)
    return network


def networks(patch: int, dtype: torch.dtype, device: str) -> dict[str, tuple[nn.Module, str]]:
    """Networks by name, each with the layout that it runs in."""
    kwargs = arguments(patch)
    divisors = [8 if features >= 128 else 4 for features in kwargs["features_per_stage"]]
    presets = {**PRESETS, OPTION: {**PRESETS["FasterFusionFast"], "divisor": divisors}}
    fused = {name: FasterFusionUNet(**kwargs, **options).fuse() for name, options in presets.items()}
    layout = "channels_last"
    made = {
        "default nnU-Net": (plain(kwargs), "contiguous"),
        "default nnU-Net, channels_last": (plain(kwargs), layout),
        "default nnU-Net, batch norm folded": (plain(kwargs, batch_norm=True), layout),
        "half width": (plain(kwargs, 2), "contiguous"),
        "half width, channels_last": (plain(kwargs, 2), layout),
        "half width, batch norm folded": (plain(kwargs, 2, batch_norm=True), layout),
        "paper: from 160 channels on, fused to a T, pooled": (
            FasterFusionUNet(**kwargs, downsample="maxpool").fuse("t"),
            "contiguous",
        ),
        **{name: (network, layout if network.batch_norm else "contiguous") for name, network in fused.items()},
    }
    return {
        name: (network.to(device, dtype, memory_format=LAYOUTS[layout]), layout)
        for name, (network, layout) in made.items()
    }


def blocks(sizes: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> dict[str, tuple[nn.Module, str]]:
    """A plain convolution of nnU-Net, the block as trained, and its forms; "paper" pools after the block."""
    inputs, outputs, _, stride = sizes

    def block(downsample: Any = "stride") -> FasterFusionBlock:
        geometry = Geometry(
            conv_op=nn.Conv3d,
            input_channels=inputs,
            output_channels=outputs,
            kernel_size=3,
            stride=stride,
            downsample=downsample,
        )
        return FasterFusionBlock(geometry, nonlin=nn.LeakyReLU(inplace=True)).eval()

    norm = nn.InstanceNorm3d(outputs, affine=True)
    conv = nn.Sequential(nn.Conv3d(inputs, outputs, 3, stride, 1), norm, nn.LeakyReLU(inplace=True))
    made = {
        "plain": conv.eval(),
        "trained": block(),
        "hybrid": block().fuse(),
        "t": block().fuse("t"),
        "dense": block().fuse("dense"),
        "paper": block("maxpool").fuse("t"),
    }
    layout = "contiguous" if dtype == torch.float32 else "channels_last"
    return {name: (module.to(device, dtype, memory_format=LAYOUTS[layout]), layout) for name, module in made.items()}


def clock(run: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    run()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


def timed(modules: Mapping[str, tuple[nn.Module, str]], x: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Medians of interleaved repeats, and ratios to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    images = {layout: x.to(memory_format=memory_format) for layout, memory_format in LAYOUTS.items()}
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            for name, (module, layout) in modules.items():
                elapsed = clock(lambda m=module, x=images[layout]: m(x), x.device.type)
                if repeat:  # the first round warms up
                    seconds[name].append(elapsed)
    first = median(next(iter(seconds.values())))
    return [
        {
            "name": name,
            "parameters": sum(p.numel() for p in modules[name][0].parameters()),
            "seconds": median(values),
            "min": min(values),
            "max": max(values),
            "faster": first / median(values),
        }
        for name, values in seconds.items()
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            row["name"],
            f"{row['parameters'] / 1e6:.3g}",
            f"{row['seconds'] * 1e3:.3g}",
            f"{row['min'] * 1e3:.3g}-{row['max'] * 1e3:.3g}",
            f"{row['faster']:.2f}x",
        ]
        for row in rows
    ]
    return markdown_table(["", "parameters [M]", "ms", "range", "faster"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON and Markdown files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--patch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device, patch = options.device, options.patch
    shown = torch.cuda.get_device_name() if device == "cuda" else "CPU, one thread"
    command = f"python benchmarks/faster_fusion.py --output OUT --device {device} --patch {patch}"
    text = [f"# FasterFusion in prediction\n\n`{command}` · {shown} · torch {torch.__version__}"]
    result: dict[str, Any] = {"command": command, "device": shown, "torch": torch.__version__}
    for name, dtype in DTYPES.items():
        for sizes in BLOCKS:
            x = torch.randn(1, sizes[0], *[sizes[2]] * 3).to(device, dtype)
            key = f"block {sizes[0]} to {sizes[1]} channels at {sizes[2]}^3, stride {sizes[3]}, {name}"
            result[key] = timed(blocks(sizes, dtype, device), x, 2 * options.repeats)
            text.append(f"## {key.capitalize()}\n\n{markdown(result[key])}")
        key = f"networks at {patch}^3, {name}"
        x = torch.randn(1, 1, *[patch] * 3).to(device, dtype)
        result[key] = timed(networks(patch, dtype, device), x, options.repeats)
        text.append(f"## {key.capitalize()}\n\n{markdown(result[key])}")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"faster-fusion-{device}.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.output / f"faster-fusion-{device}.md").write_text("\n\n".join(text) + "\n")
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
