"""Count all trainers and their rivals; write the tables of docs/methods/README.md: of them, and of those to take.

python benchmarks/methods_table.py docs/benchmarks/2026-11-29-methods              # counts, some minutes without a GPU
python benchmarks/methods_table.py docs/benchmarks/2026-11-29-methods --counted    # takes its benchmark.json as it is
"""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_ext import aims, cli, registry
from nnunet_ext.escaping import markdown_table
from nnunet_ext.files import write_text
from nnunet_ext.memory.tracker import GIB

REPOSITORY = Path(__file__).parents[1]
METHODS = REPOSITORY / "docs" / "methods" / "README.md"
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
# Aim -> quantities that tell who is ahead in it, with their words.
JUDGED: dict[aims.Aim, dict[str, str]] = {
    "context": {"peak_bytes": "peak"},
    "memory": {"peak_bytes": "peak"},
    "size": {"parameters_deployed": "weights", "macs": "operations"},
    "speed": {"parameters_deployed": "weights", "macs": "operations"},
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
    """What a method is for, whether it is the one to take, else whether the one to take is ahead of it."""
    known = None if method.get("budget") else aims.of(method["trainer"])
    if known is None:
        return "rival" if method.get("budget") else MISSING
    served = ", ".join(f"**{aim}**" if aim in known.recommended else aim for aim in known.aims)
    if known.recommended:
        return f"{served}: recommended"
    role = "" if known.standing == "method" else f": {known.standing}"
    best = aims.recommended(known.aims[0]).trainer
    quantities = JUDGED[known.aims[0]]
    by_trainer = {other["trainer"]: other for other in methods if not other.get("budget")}
    behind = list(_behind(method, by_trainer[best], quantities)) if best in by_trainer else []
    in_what = "" if len(behind) == len(quantities) else " in " + " and ".join(behind)
    return f"{served}{role}" + (f"; behind {best.removeprefix(aims.DEFAULT)}{in_what}" if behind else "")


def _behind(method: Mapping[str, Any], rival: Mapping[str, Any], quantities: Mapping[str, str]) -> Iterator[str]:
    """Words of the quantities in which the method needs more than the rival, by the two digits that are shown."""
    for key, word in quantities.items():
        ours, theirs = method["ratios"].get(key), rival["ratios"].get(key)
        if ours is not None and theirs is not None and round(ours, 2) > round(theirs, 2):
            yield word


def rank(method: Mapping[str, Any]) -> int:
    """Place of a method's row among the kinds of rows."""
    known = None if method.get("budget") else aims.of(method["trainer"])
    if known is None:
        return 1 if method.get("budget") else 4
    return 0 if known.recommended else {"rival": 1, "method": 2, "research": 3}[known.standing]


def choices() -> str:
    """The trainer to take for each aim."""
    rows = []
    for aim, title in aims.TITLES.items():
        method = aims.recommended(aim)
        rows.append([f"**{aim}**: {title}", f"`{method.trainer}`", method.recommended[aim]])
    return markdown_table(["you want", "take", "because"], rows)


def table(benchmark: Mapping[str, Any]) -> str:
    """Default nnU-Net, recommended, rivals, methods, research switches, with planners, purpose, ratios to default."""
    first, *others = benchmark["methods"]
    others.sort(key=rank)  # stable
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
        said = MISSING if method is first else purpose(method, others)
        rows.append([name, f"`{method['network']}`", listed, said, *shown])
    return markdown_table(["trainer", "network", "planner", "for", *columns.values()], rows)


def caption(benchmark: Mapping[str, Any], folder: str) -> str:
    """What the ratios are to and of, with the figures of default nnU-Net."""
    first = benchmark["methods"][0]
    held, peak, full = (first[key] / GIB for key in ("held_bytes", "peak_bytes", "float32_peak_bytes"))
    patch = "x".join(map(str, benchmark["patch_size"]))
    text = (
        "Ratios to default nnU-Net, below one is better. [Held and peak](../reference/memory.md#words) "
        f"of a training step in float16 autocast, as nnU-Net trains on every GPU: patch {patch}, batch "
        f"{benchmark['batch_size']}, where default nnU-Net holds {held:.2f} GB and peaks at {peak:.2f} GB, in float32 "
        f"at {full:.2f} GB; of meU-net this is the large patch. 1 GB is 2**30 bytes. Counted by `nnunet-ext "
        f"{' '.join(COMMAND)}`, [all figures]({folder}/benchmark.md)."
    )
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def inserted(page: str, name: str, text: str) -> str:
    """A page with a text between the markers of a name.

    Raises:
        ValueError: it does not have each marker once.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page needs one {begin} and one {end}")
    before, after = page.partition(begin)[0], page.partition(end)[2]
    return f"{before}{begin}\n{text}\n{end}{after}"


def pages(benchmark: Mapping[str, Any], folder: str) -> dict[Path, str]:
    """The pages with their tables as they have to be.

    Args:
        benchmark: Content of benchmark.json.
        folder: Where that lies, from the methods' page.
    """
    methods = f"{caption(benchmark, folder)}\n\n{table(benchmark)}"
    page = inserted(METHODS.read_text(encoding="utf-8"), "choices", choices())
    return {METHODS: inserted(page, "methods", methods)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--counted", action="store_true", help="take the folder's benchmark.json as it is")
    options = parser.parse_args()
    if not options.counted and (status := cli.main([*COMMAND, "-o", str(options.folder)])):
        raise SystemExit(status)
    benchmark = json.loads((options.folder / "benchmark.json").read_text(encoding="utf-8"))
    folder = Path(os.path.relpath(options.folder, METHODS.parent)).as_posix()
    for page, text in pages(benchmark, folder).items():
        write_text(page, text)


if __name__ == "__main__":
    main()
