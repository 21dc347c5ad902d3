"""Parameters and training memory of both stages of meU-net's cascade compared with default nnU-Net, without a GPU.

Default network (32-64-128-256-320-320), P = 128, kP = 224, batch 2; peak of a training step without the weights.

example: python benchmarks/cascade_size.py --output docs/benchmarks/2026-11-21-cascade
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from nnunet_ext.api import create
from nnunet_ext.escaping import markdown_table
from nnunet_ext.memory.network import measure_step
from nnunet_ext.trainers.nnUNetTrainerMeCascade import nnUNetTrainerMeCascade
from nnunet_ext.trainers.nnUNetTrainerMeUNet import nnUNetTrainerMeUNet

P, CONTEXT, LABELS = 128, 224, (1, 2, 14)
create_at_p = partial(create, input_channels=1, patch_size=[P] * 3, deep_supervision=True)
PLAN: Any = SimpleNamespace(
    patch_size=[CONTEXT] * 3,
    pool_op_kernel_sizes=[[1, 1, 1]] + [[2, 2, 2]] * 5,
    configuration={"me_unet": {"k": CONTEXT / P}},
    previous_stage_name=None,
)


def default(labels: int) -> nn.Module:
    return create_at_p("PlainConvUNet", num_classes=labels + 1)


def stage_one(labels: int) -> nn.Module:
    return nnUNetTrainerMeCascade.training_form(create_at_p("DualMeUNet", num_classes=labels + 1), PLAN)


def one_branch(labels: int) -> nn.Module:
    return nnUNetTrainerMeUNet.training_form(default(labels), PLAN)


def stage_two(labels: int, fusion: Any = "post") -> nn.Module:
    options = {"input_channels": 1 + labels, "prior_channels": labels, "fusion": fusion}
    return create_at_p("PostConcatUNet", num_classes=labels + 1, **options)


def parameters(build: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def peaks(build: Callable[[], nn.Module], channels: int, patch: int) -> list[float]:
    """GB at the peak of a step, in float32 and mixed precision."""
    return [
        measure_step(build, channels, [patch] * 3, 2, autocast_dtype=dtype).peak / 2**30
        for dtype in (None, torch.bfloat16)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of size.md and size.json")
    options = parser.parse_args()
    lines = ["# Size of meU-net's cascade", "", "`python benchmarks/cascade_size.py --output FOLDER`", ""]
    sizes, memory = [], []
    found: dict[str, Any] = {"parameters": {}, "peak_gib": {}}
    for labels in LABELS:
        host = parameters(lambda labels=labels: default(labels))
        ours = [parameters(lambda f=f, labels=labels: stage_two(labels, f)) for f in ("post", "pre")]
        found["parameters"][labels] = {"default": host, "post": ours[0], "pre": ours[1]}
        sizes.append([str(labels), f"{host:,}", *(f"{n:,} ({n / host - 1:+.3%})" for n in ours)])
    rows = {
        f"default nnU-Net at {P}": (lambda: default(2), 1, P),
        f"stage 1, both branches, {CONTEXT}": (lambda: stage_one(2), 1, CONTEXT),
        f"one meU-net, {CONTEXT}": (lambda: one_branch(2), 1, CONTEXT),
        f"stage 2 at {P}, 2 labels": (lambda: stage_two(2), 3, P),
        f"default nnU-Net at {P}, 14 labels": (lambda: default(14), 1, P),
        f"stage 2 at {P}, 14 labels": (lambda: stage_two(14), 15, P),
    }
    for name, (build, channels, patch) in rows.items():
        found["peak_gib"][name] = peaks(build, channels, patch)
        base = found["peak_gib"][f"default nnU-Net at {P}{', 14 labels' if '14' in name else ''}"]
        pairs = zip(found["peak_gib"][name], base, strict=True)
        memory.append([name, *(f"{gib:.2f} GB ({gib / to:.2f}x)" for gib, to in pairs)])
    lines += [
        markdown_table(["labels", "default nnU-Net", "post-concatenation", "pre-concatenation"], sizes),
        "",
        markdown_table(["peak of a training step", "float32", "mixed precision"], memory),
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "size.md").write_text("\n".join(lines) + "\n")
    (options.output / "size.json").write_text(json.dumps(found, indent=2) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
