"""Runs nnU-Net's integration scenarios for every registered trainer: `make test-integration`.

Prints and writes integration.md and integration.json; the exit status is 1 where a cell fails. What is done with the
same code is not done again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nnunet_ext.errors import UsageError
from tests.integration.forms import FORMS
from tests.integration.matrix import Matrix, all_trainers
from tests.integration.outcome import Outcome
from tests.integration.report import write_report
from tests.integration.scenario import Scenario


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the matrix; return the exit status."""
    matrix, report_only = parse(arguments)
    matrix.output.mkdir(parents=True, exist_ok=True)
    try:
        if not report_only:
            matrix.run(tell)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text, failed = write_report(matrix)
    print(text)
    return int(failed > 0)


def parse(arguments: Sequence[str] | None) -> tuple[Matrix, bool]:
    """Read the options: what is to be run, and whether only to tell what is done."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.integration", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [form.name for form in FORMS]
    parser.add_argument("--data", type=Path, help="folder with Dataset004_Hippocampus, Dataset015_BraTS or both")
    parser.add_argument("--output", type=Path, default=Path("integration-output"), help="folder of all that is made")
    parser.add_argument("--forms", nargs="+", metavar="FORM", choices=names, help=f"of {', '.join(names)}")
    parser.add_argument("--trainers", nargs="+", metavar="TRAINER", choices=all_trainers(), help="default: all")
    parser.add_argument("--report", action="store_true", help="run nothing, tell what is done")
    asked = parser.parse_args(arguments)
    data = _data_folder(asked.data)
    there = [form for form in FORMS if not form.source.folder or (data and (data / form.source.folder).is_dir())]
    forms = [form for form in FORMS if form.name in asked.forms] if asked.forms else there
    if data and there == [form for form in FORMS if not form.source.folder]:
        parser.error(f"--data must be a folder that holds Dataset004_Hippocampus or Dataset015_BraTS, got {data}")
    trainers = tuple(asked.trainers or all_trainers())
    return Matrix(output=asked.output.resolve(), data=data, forms=tuple(forms), trainers=trainers), asked.report


def _data_folder(named: Path | None) -> Path | None:
    """The folder that holds the data sets; one of these may be named itself."""
    if named is None:
        return None
    folder = named.expanduser().resolve()
    return folder.parent if folder.name in {form.source.folder for form in FORMS} else folder


def tell(scenario: Scenario, step: str, outcome: Outcome) -> None:
    """Print a cell as it ends."""
    place = f"{scenario.form.name} {scenario.trainer} {step}"
    print(f"{place}: {outcome.status} ({outcome.seconds:.1f} s) {outcome.text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
