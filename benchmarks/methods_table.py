"""Count all trainers and their rivals, and write the README's table of them.

python benchmarks/methods_table.py docs/benchmarks/2026-11-27-methods              # counts, some minutes without a GPU
python benchmarks/methods_table.py docs/benchmarks/2026-11-27-methods --counted    # takes its benchmark.json as it is
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_ext import cli, registry
from nnunet_ext.escaping import markdown_table
from nnunet_ext.files import write_text
from nnunet_ext.memory.tracker import GIB

REPOSITORY = Path(__file__).parents[1]
BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
COMMAND = ("benchmark", "--patch", "128", "128", "128", "--repeats", "0")
MISSING = "\N{EN DASH}"
# Ratios of a benchmark -> column. Counted, but for the last.
COLUMNS = {
    "held_bytes": "held",
    "peak_bytes": "peak",
    "float32_peak_bytes": "peak in float32",
    "parameters": "weights",
    "step_seconds": "step time",
}
MEMORY, SMALL = "memory of training", "small and fast in prediction"
# What a trainer of this package is for, by the beginning of its name.
PURPOSES = {
    "nnUNetTrainerActivationCheckpointing": MEMORY,
    "nnUNetTrainerFasterFusion": SMALL,
    "nnUNetTrainerImplicit": MEMORY,
    "nnUNetTrainerInvertible": MEMORY,
    "nnUNetTrainerMe": MEMORY,
    "nnUNetTrainerPartiallyInvertible": MEMORY,
    "nnUNetTrainerReversible": MEMORY,
}
# What users would take instead, without a method of a paper; name in the rows that are behind it.
RIVALS = {
    "nnUNetTrainerActivationCheckpointing": "checkpointing",
    "nnUNetTrainerHalfWidth": "half width",
    "nnUNetTrainerHalfWidthBN": "half width, norm folded",
}
# Purpose -> quantities that tell who is ahead, with their words; rivals in it.
JUDGED = {
    MEMORY: ({"peak_bytes": "peak"}, ("nnUNetTrainerActivationCheckpointing", "nnUNetTrainerHalfWidth")),
    SMALL: ({"parameters_deployed": "weights", "macs": "operations"}, ("nnUNetTrainerHalfWidthBN",)),
}


def planners() -> dict[str, list[str]]:
    """Names of the planners of this package, by the trainer that they plan for."""
    found: dict[str, list[str]] = {}
    for name in registry.names("planners"):
        planner = registry.resolve("planners", name)
        if planner.__module__.startswith("nnunet_ext."):
            found.setdefault(planner.trainer, []).append(name)
    return found


def purpose(method: Mapping[str, Any], methods: Sequence[Mapping[str, Any]]) -> str:
    """What a method is for, and the rivals that it is behind in that."""
    trainer = method["trainer"]
    if method.get("budget") or trainer in RIVALS:
        return "rival"
    found = next((text for start, text in PURPOSES.items() if trainer.startswith(start)), None)
    if found is None:
        return MISSING
    quantities, rivals = JUDGED[found]
    by_trainer = {other["trainer"]: other for other in methods if not other.get("budget")}
    lost = [
        f"**behind {RIVALS[rival]}**{'' if len(behind) == len(quantities) else ' in ' + ' and '.join(behind)}"
        for rival in rivals
        if rival in by_trainer and (behind := list(_behind(method, by_trainer[rival], quantities)))
    ]
    return "; ".join([found, *lost])


def _behind(method: Mapping[str, Any], rival: Mapping[str, Any], quantities: Mapping[str, str]) -> Iterator[str]:
    """Words of the quantities in which the method needs more than the rival."""
    for key, word in quantities.items():
        ours, theirs = method["ratios"].get(key), rival["ratios"].get(key)
        if ours is not None and theirs is not None and ours > theirs:
            yield word


def table(benchmark: Mapping[str, Any]) -> str:
    """Default nnU-Net, then rivals, then methods, each with its planners, its purpose and ratios to the first row."""
    first, *others = benchmark["methods"]
    others.sort(key=lambda method: purpose(method, others) != "rival")  # stable
    columns = {
        key: title for key, title in COLUMNS.items() if any(m["ratios"].get(key) is not None for m in (first, *others))
    }
    by_trainer = planners()
    rows = []
    for method in (first, *others):
        budget = method.get("budget")
        name = f"`{method['trainer']}`" + (f", compiled with a memory budget of {budget:g}" if budget else "")
        named = [] if budget else by_trainer.get(method["trainer"], [])
        ratios = [method["ratios"].get(key) for key in columns]
        shown = [MISSING if ratio is None else f"{ratio:.2f}\N{MULTIPLICATION SIGN}" for ratio in ratios]
        listed = ", ".join(f"`{name}`" for name in named) or MISSING
        rows.append([name, f"`{method['network']}`", listed, purpose(method, others), *shown])
    return markdown_table(["trainer", "network", "planner", "for", *columns.values()], rows)


def caption(benchmark: Mapping[str, Any], folder: str) -> str:
    """What the ratios are to and of, with the figures of default nnU-Net."""
    first = benchmark["methods"][0]
    held, peak, full = (first[key] / GIB for key in ("held_bytes", "peak_bytes", "float32_peak_bytes"))
    patch = "x".join(map(str, benchmark["patch_size"]))
    text = (
        "Ratios to default nnU-Net, below one is better. [Held and peak](docs/how-to/benchmark.md#the-words-of-memory) "
        f"of a training step in float16 autocast, as nnU-Net trains on every GPU: patch {patch}, batch "
        f"{benchmark['batch_size']}, where default nnU-Net holds {held:.2f} GB and peaks at {peak:.2f} GB, in float32 "
        f"at {full:.2f} GB; of meU-net this is the large patch. 1 GB is 2**30 bytes. Counted by `nnunet-ext "
        f"{' '.join(COMMAND)}`, [all figures]({folder}/benchmark.md)."
    )
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def inserted(readme: str, benchmark: Mapping[str, Any], folder: str) -> str:
    """The README with caption and table between its markers.

    Args:
        readme: Its text.
        benchmark: Content of benchmark.json.
        folder: Where that lies, from the README.

    Raises:
        ValueError: it does not have each marker once.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"the README needs one {BEGIN} and one {END}")
    before, after = readme.partition(BEGIN)[0], readme.partition(END)[2]
    return f"{before}{BEGIN}\n{caption(benchmark, folder)}\n\n{table(benchmark)}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--counted", action="store_true", help="take the folder's benchmark.json as it is")
    options = parser.parse_args()
    if not options.counted and (status := cli.main([*COMMAND, "-o", str(options.folder)])):
        raise SystemExit(status)
    benchmark = json.loads((options.folder / "benchmark.json").read_text(encoding="utf-8"))
    folder = options.folder.resolve().relative_to(REPOSITORY.resolve()).as_posix()
    readme = REPOSITORY / "README.md"
    write_text(readme, inserted(readme.read_text(encoding="utf-8"), benchmark, folder))


if __name__ == "__main__":
    main()
