"""Write the ratios of `nnunet-ext benchmark -o FOLDER` into nnunet_ext/measured.json, which the README's table shows.

python benchmarks/record.py FOLDER/benchmark.json --date 2026-11-21

Of several trainers of one network the first counts; times that were not measured stay as they are.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

from nnunet_ext.files import write_text

MEASURED = Path(__file__).parents[1] / "nnunet_ext" / "measured.json"
QUANTITIES = {
    "parameters": "parameters",
    "held_bytes": "held",
    "peak_bytes": "peak",
    "step_seconds": "step_time",
}


def records(benchmark: dict[str, Any], when: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for method in benchmark["methods"][1:]:
        ratios = {
            name: round(method["ratios"][key], 2)
            for key, name in QUANTITIES.items()
            if method["ratios"].get(key) is not None
        }
        source = {"device": benchmark["device"], "date": when, "command": benchmark["command"]}
        found.setdefault(method["network"], {**ratios, **source})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", type=Path)
    parser.add_argument("--date", default=date.today().isoformat())
    parser.add_argument("--networks", nargs="+", help="of the file; default: all")
    options = parser.parse_args()
    stored = json.loads(MEASURED.read_text())
    for network, record in records(json.loads(options.benchmark.read_text()), options.date).items():
        if not options.networks or network in options.networks:
            stored[network] = record
    write_text(MEASURED, json.dumps(stored, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
