"""Memory, time and accuracy of inversion of the reversible U-Net compared with default nnU-Net.

python benchmarks/reversible.py --output docs/benchmarks [--device cpu|cuda]

Memory at full size is measured without a GPU (nnunet_ext/memory/network.py); times are medians of interleaved
repeats; everything is reported as a ratio too.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from nnunet_ext.api import create
from nnunet_ext.architectures.reversible.coupling import AdditiveCoupling
from nnunet_ext.architectures.reversible.sequence import ReversibleSequence
from nnunet_ext.escaping import markdown_table
from nnunet_ext.memory.network import measure_step
from nnunet_ext.memory.tracker import GIB

PATCH, BATCH, CLASSES = (128, 128, 128), 2, 3
BASELINE = "default nnU-Net"


def builder(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Builder of a network with what nnU-Net plans for an isotropic 3D data set at 8 GB."""
    return partial(create, name, 1, CLASSES, PATCH, deep_supervision=True, **options)


def networks() -> dict[str, Callable[[], nn.Module]]:
    reversible = partial(builder, "ReversibleUNet")
    return {
        BASELINE: builder("PlainConvUNet"),
        "ReversibleUNet": reversible(),
        "ReversibleUNet, exact": reversible(exact=True),
        "ReversibleUNet, 8 blocks per stage": reversible(blocks_per_stage=8),
        "ReversibleUNet, reversible=False": reversible(reversible=False),
        "ReversibleUNet, 8 blocks, reversible=False": reversible(blocks_per_stage=8, reversible=False),
    }


def memory_table() -> list[dict[str, Any]]:
    rows = []
    for name, build in networks().items():
        single = measure_step(build, 1, PATCH, BATCH)
        half = measure_step(build, 1, PATCH, BATCH, torch.bfloat16)
        parameters = sum(p.numel() for p in build().parameters())
        row = {"network": name, "parameters": parameters, "held": single.held / GIB, "peak": single.peak / GIB}
        rows.append({**row, "held_bf16": half.held / GIB, "peak_bf16": half.peak / GIB})
    return rows


def train_step(network: nn.Module, x: torch.Tensor) -> float:
    """Seconds of forward and backward; under autocast on CUDA, as nnU-Net trains."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    network.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, enabled=x.is_cuda):
        loss = sum(output.float().logsumexp(1).mean() for output in network(x))
    loss.backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_table(device: str, patch: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    built = {name: build().to(device).train() for name, build in networks().items()}
    x = torch.randn(BATCH, 1, *patch, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in built}
    for repeat in range(repeats + 1):
        for name, network in built.items():
            elapsed = train_step(network, x)
            if repeat:  # the first round warms up
                seconds[name].append(elapsed)
    rows = []
    for name, network in built.items():
        row = {"network": name, "seconds": median(seconds[name]), "min": min(seconds[name]), "max": max(seconds[name])}
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            train_step(network, x)
            row["cuda_allocated_gib"] = (torch.cuda.max_memory_allocated() - before) / GIB
        rows.append(row)
    return rows


def stack(n: int, exact: bool = False, reversible: bool = True) -> ReversibleSequence:
    def shift() -> nn.Module:
        return nn.Sequential(nn.GroupNorm(4, 16), nn.LeakyReLU(), nn.Conv3d(16, 16, 3, padding=1, bias=False))

    torch.manual_seed(0)
    return ReversibleSequence([AdditiveCoupling(shift(), shift(), exact) for _ in range(n)], reversible=reversible)


def stack_table() -> list[dict[str, Any]]:
    """Only the engine: bytes at 1x32x48^3, and the largest error of inversion and relative error of gradients."""
    rows = []
    for n in (1, 4, 16, 64):
        ours = measure_step(lambda n=n: stack(n), 32, (48,) * 3, 1)
        plain = measure_step(lambda n=n: stack(n, reversible=False), 32, (48,) * 3, 1)
        row: dict[str, Any] = {"blocks": n, "held": ours.held / 2**20, "peak": ours.peak / 2**20}
        row |= {"plain_held": plain.held / 2**20, "plain_peak": plain.peak / 2**20}
        for exact in (False, True):
            x = torch.round(torch.randn(1, 32, 12, 12, 12) * 4096) / 4096
            module = stack(n, exact)
            with torch.no_grad():
                row[f"inversion_error_{'exact' if exact else 'plain'}"] = (
                    (module.inverse(module(x)) - x).abs().max().item()
                )
            grads = []
            for reversible in (True, False):
                module = stack(n, exact, reversible)
                module(x).square().mean().backward()
                grads.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
            row[f"gradient_error_{'exact' if exact else 'plain'}"] = (
                (grads[0] - grads[1]).norm() / grads[1].norm()
            ).item()
        rows.append(row)
    return rows


def add_ratios(rows: list[dict[str, Any]], keys: list[str], name: str = BASELINE) -> None:
    baseline = next(row for row in rows if row["network"] == name)
    for row in rows:
        row |= {f"{key}_ratio": row[key] / baseline[key] for key in keys}


def markdown(rows: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    return markdown_table(list(rows[0]), ([cell(value) for value in row.values()] for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON and Markdown files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    patch = PATCH if options.device == "cuda" else (64, 64, 64)
    cuda = options.device == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    command = f"python benchmarks/reversible.py --output docs/benchmarks --device {options.device}"

    memory, times, stacks = memory_table(), time_table(options.device, patch, options.repeats), stack_table()
    add_ratios(memory, ["parameters", "held", "peak", "held_bf16", "peak_bf16"])
    add_ratios(times, ["seconds"])
    result = {
        "date": date.today().isoformat(),
        "command": command,
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "memory": memory,
        "times": times,
        "stacks": stacks,
    }
    name = f"{result['date']}-reversible-{options.device}"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    text = f"""# Reversible U-Net, {result["date"]}

`{command}` · {device} · torch {torch.__version__}

## Memory of a training step, {"x".join(map(str, PATCH))}, batch {BATCH}, {CLASSES} classes (GiB, fake tensors)

held: alive after the forward pass; peak: of forward and backward, gradients of the weights included.

{markdown(memory)}

## Training step, {"x".join(map(str, patch))}, batch {BATCH} (seconds, medians of {options.repeats} interleaved repeats)

{markdown(times)}

## Only the engine, blocks of 32 channels (MiB at 48^3; errors at 12^3 in float32, against plain autograd)

{markdown(stacks)}
"""
    (options.output / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
