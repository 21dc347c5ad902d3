"""All figures of a comparison for programs: what report.json holds."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from nnunet_ext.comparison import statistics
from nnunet_ext.comparison.accuracy import MEAN, Evaluation
from nnunet_ext.comparison.compare import Comparison
from nnunet_ext.comparison.gate import Check


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All figures, for programs: Dice between 0 and 1, None for what is not defined."""
    request = comparison.request
    return _plain(
        {
            "first_line": comparison.gate.first_line(comparison.evaluations),
            "gate": [_check(comparison, check) for check in comparison.gate.checks],
            "baseline": request.baseline,
            "second_baseline": request.second,
            "margin_dice_points": request.margin,
            "nsd_tolerance_mm": request.tolerance,
            "interval": {"method": "Student's t of paired differences", "level": statistics.CONFIDENCE},
            "runs": [
                {
                    "label": run.label,
                    "trainer": run.trainer,
                    "plans": run.plans_name,
                    "configuration": run.configuration,
                    "folds": run.folds,
                    "cost": asdict(comparison.costs[run.label]),
                }
                for run in request.runs
            ],
            "evaluations": [_evaluation(comparison, evaluation) for evaluation in comparison.evaluations],
            "warnings": comparison.warnings,
        }
    )


def _check(comparison: Comparison, check: Check) -> dict[str, Any]:
    pairs = [c.pair for e in comparison.evaluations for c in e.comparands]
    return {
        **{"name": check.name, "rule": check.rule, "values": dict(check.values)},
        "holds": not any(check.failures(*pair) for pair in pairs),
        "accepted": check.name in comparison.gate.accepted,
    }


def _evaluation(comparison: Comparison, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "name": evaluation.name,
        "cases": evaluation.cases,
        "structures": evaluation.structures,
        "metrics": evaluation.metrics,
        "mean_of_structures": evaluation.name_of(MEAN),
        "means": [{**asdict(m), "structure": evaluation.name_of(m.structure)} for m in evaluation.means],
        "differences": [
            {
                **{"run": c.run, "baseline": c.baseline, "metric": c.metric},
                **{"structure": evaluation.name_of(c.structure)},
                **asdict(c.difference),
                **{"p_holm": c.p_holm, **_verdict(comparison.gate.judge(evaluation, c))},
            }
            for c in evaluation.comparands
        ],
        "ranks": {str(run): {str(k): int(n) for k, n in row.items()} for run, row in evaluation.ranks.iterrows()},
        "worst": {run: [{"case": case, "Dice": dice} for case, dice in rows] for run, rows in evaluation.worst.items()},
    }


def _verdict(verdict: statistics.Verdict | None) -> dict[str, Any]:
    return {"verdict": verdict and verdict.word, "note": (verdict and verdict.note) or None}


def _plain(value: Any) -> Any:
    """Turn NaN and infinity into None, tuples into lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
