"""Size, operations, memory and time of the Implicit U-Net compared with default nnU-Net, in one run.

python benchmarks/implicit.py --output docs/benchmarks/2026-11-21-implicit [--device cpu|cuda] [--repeats 3]

Size, operations and memory are counted on shapes at 128x128x128, 30,000 points, batch 2; on the CPU times are of a
patch of 64x64x64 with the points scaled alike (3,750). Times are medians of interleaved repeats with their spread; on
one thread of a CPU they are the time of the process. Sparse prediction is timed with a set share of refined cells,
because random weights would refine everything.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from reversible import BASELINE, add_ratios, builder, markdown
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nnunet_ext.architectures.implicit.decoder import PointDecoder
from nnunet_ext.architectures.implicit_unet import ImplicitUNet
from nnunet_ext.memory.network import measure_inference, measure_step, surrogate_loss, training_outputs
from nnunet_ext.memory.tracker import GIB

PATCH, POINTS = (128, 128, 128), 30_000
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2)
Build = Callable[[], nn.Module]
baseline = builder("PlainConvUNet")
implicit = partial(builder, "ImplicitUNet")


def variants(n_points: int = POINTS) -> dict[str, Build]:
    return {
        BASELINE: baseline,
        "implicit, 512": implicit(n_points=n_points),
        "implicit, 512, concatenated": implicit(n_points=n_points, split=False),
        "implicit, 256 (Lite)": implicit(n_points=n_points, decoder_width=256),
    }


def memory_table() -> list[dict[str, Any]]:
    rows = []
    for name, build in variants().items():
        step, half = measure_step(build, 1, PATCH, 2), measure_step(build, 1, PATCH, 2, torch.bfloat16)
        rows.append(
            {
                "network": name,
                "parameters": sum(p.numel() for p in build().parameters()),
                "held": step.held / GIB,
                "peak": step.peak / GIB,
                "held_bf16": half.held / GIB,
                "peak_bf16": half.peak / GIB,
                "prediction": measure_inference(build, 1, PATCH) / GIB,
            }
        )
    add_ratios(rows, ["parameters", "held", "peak", "held_bf16", "peak_bf16", "prediction"])
    return rows


def macs(build: Build, share: float | None, sparse: bool = True) -> float:
    """Multiply-accumulate operations of the prediction of one patch, 1e9."""
    with FakeTensorMode(), torch.no_grad():
        network = build().eval()
        if isinstance(network, ImplicitUNet):
            network.sparse = sparse
            network.assume_refined_share(share)
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 1, *PATCH))
        return counter.get_total_flops() / 2e9


def operations_table() -> list[dict[str, Any]]:
    default = macs(baseline, None)
    rows = [{"decoder": BASELINE, "GMAC": default, "dense": 1.0}]
    for width in (512, 256, 128):
        build = implicit(decoder_width=width)
        row = {"decoder": str(width), "GMAC": macs(build, None, sparse=False)}
        row["dense"] = row["GMAC"] / default
        row |= {f"refine {share:.0%}": macs(build, share) / default for share in SHARES}
        rows.append(row)
    rows[0] |= {key: "" for key in rows[1] if key not in rows[0]}
    return rows


def timed(works: dict[str, Callable[[], Any]], repeats: int, cuda: bool) -> list[dict[str, Any]]:
    """Seconds of each piece of work, in turns; the first round warms up."""
    # Where others use the CPU too, wall time says little: with one thread, process time is what the work takes.
    clock = time.process_time if not cuda and torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            start = clock()
            work()
            if cuda:
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(clock() - start)
    return [{"network": name, "seconds": median(s), "min": min(s), "max": max(s)} for name, s in seconds.items()]


def train_step(network: nn.Module, x: torch.Tensor) -> None:
    network.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, enabled=x.is_cuda):
        loss = surrogate_loss(training_outputs(network, x))
    loss.backward()


def predict(network: nn.Module, x: torch.Tensor) -> None:
    with torch.inference_mode(), torch.autocast(x.device.type, enabled=x.is_cuda):
        network(x)


def step_times(device: str, patch: tuple[int, ...], n_points: int, repeats: int) -> list[dict[str, Any]]:
    x = torch.randn(2, 1, *patch, device=device)
    works = {name: partial(train_step, build().to(device).train(), x) for name, build in variants(n_points).items()}
    rows = timed(works, repeats, device == "cuda")
    add_ratios(rows, ["seconds"])
    return rows


def prediction_times(device: str, patch: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    x = torch.randn(1, 1, *patch, device=device)
    works: dict[str, Callable[[], Any]] = {BASELINE: partial(predict, baseline().to(device).eval(), x)}
    for width in (512, 256):
        for share in SHARES[1:]:
            network = implicit(decoder_width=width)().to(device).eval()
            network.assume_refined_share(share)
            works[f"implicit, {width}, {share:.0%} refined"] = partial(predict, network, x)
    rows = timed(works, repeats, device == "cuda")
    add_ratios(rows, ["seconds"])
    return rows


def decoder_times(
    device: str, patch: tuple[int, ...], n_points: int, repeats: int, training: bool
) -> list[dict[str, Any]]:
    """Times of the decoder on given maps: split against concatenation.

    Args:
        training: Whether forward and backward with dropout are timed, and not prediction.
    """
    strides = [(2**i,) * 3 for i in range(5)]
    channels = [32, 64, 128, 256, 320]
    maps = [
        torch.randn(2, c, *(n // s[0] for n in patch), device=device, requires_grad=True)
        for c, s in zip(channels, strides, strict=True)
    ]
    points = torch.stack([torch.randint(n, (2, n_points), device=device) for n in patch], -1)

    def work(decoder: PointDecoder) -> None:
        with torch.set_grad_enabled(training):
            logits = decoder(maps, points, patch)
        if training:
            logits.logsumexp(1).mean().backward()

    works = {}
    for width in (512, 256):
        for split in (False, True):
            decoder = PointDecoder(
                channels, strides, 3, width=width, depth=8, frequencies=None, dropout=0.2, split=split
            )
            name = f"{width}, {'split' if split else 'concatenated'}"
            works[name] = partial(work, decoder.to(device).train(training))
    rows = timed(works, repeats, device == "cuda")
    for concat, split in zip(rows[::2], rows[1::2], strict=True):
        concat["faster"], split["faster"] = 1.0, concat["seconds"] / split["seconds"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON and Markdown files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3, help="0: counts only")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    patch, n_points = (PATCH, POINTS) if cuda else ((64, 64, 64), POINTS // 8)
    sections: dict[str, list[dict[str, Any]]] = {
        "Training step and prediction, 128x128x128, 30,000 points, batch 2 (GB, fake tensors)": memory_table(),
        "Operations of prediction, 128x128x128, ratios to default nnU-Net": operations_table(),
    }
    if options.repeats:
        size = "x".join(map(str, patch))
        where = f"{size}, {n_points:,} points (seconds)"
        sections |= {
            f"Training step, batch 2, {where}": step_times(options.device, patch, n_points, options.repeats),
            f"Only the decoder, forward and backward, batch 2, {where}": decoder_times(
                options.device, patch, n_points, 3 * options.repeats, training=True
            ),
            f"Only the decoder, prediction of a tenth of {size}, batch 2 (seconds)": decoder_times(
                options.device, patch, prod(patch) // 10, options.repeats, training=False
            ),
            f"Prediction of a patch of {size} (seconds)": prediction_times(options.device, patch, options.repeats),
        }
    command = f"python benchmarks/implicit.py --output {options.output} --device {options.device}"
    device = torch.cuda.get_device_name() if cuda else f"CPU, threads: {torch.get_num_threads()}"
    header = {"date": date.today().isoformat(), "command": command, "repeats": options.repeats}
    header |= {"device": device, "torch": torch.__version__, "python": platform.python_version()}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "implicit.json").write_text(json.dumps({**header, **sections}, indent=2) + "\n")
    text = f"# Implicit U-Net, {header['date']}\n\n`{command}` · {device} · torch {torch.__version__}\n"
    text += "".join(f"\n## {title}\n\n{markdown(rows)}\n" for title, rows in sections.items())
    (options.output / "implicit.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
