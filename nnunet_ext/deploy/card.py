"""The card beside every shipped model: what it was trained on, how well it does, and what it is not for."""

from __future__ import annotations

import math
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from nnunet_ext import __version__
from nnunet_ext.deploy.model import TrainedModel
from nnunet_ext.errors import UsageError
from nnunet_ext.escaping import markdown, markdown_cell, markdown_table
from nnunet_ext.files import read_json
from nnunet_ext.nnunet.checkpoints import FINAL_CHECKPOINT
from nnunet_ext.nnunet.training_log import read_log

NAME = "MODEL_CARD.md"
FUSED = "`nnUNetv2_predict_from_modelfolder -m FOLDER -i IN -o OUT -f {folds}`, with nnU-Net and nnunet-ext installed."
STOCK = "`nnUNetv2_predict_from_modelfolder -m FOLDER -i IN -o OUT -f {folds}`, with nnU-Net installed."
STANDALONE = "`pip install -r requirements.txt`, then `python predict.py -i IN -o OUT`. No nnU-Net, no PyTorch."
_LIMITS = (
    "Research software, no medical device. What it does on scanners, protocols, populations or findings that are not "
    "among its training cases is unknown: test it on labelled cases of your own before you rely on it. It gives each "
    "voxel a label and says nothing of how sure it is."
)


def text(model: TrainedModel, use: str) -> str:
    """Write the card, Markdown.

    Args:
        model: Trained.
        use: `FUSED`, `STOCK` or `STANDALONE`.
    """
    dataset, folds = model.setting.dataset, list(model.checkpoints)
    facts = {
        "data set": model.setting.plans["dataset_name"],
        "training cases": str(dataset.get("numTraining", "unknown")),
        "licence of the data": str(dataset.get("licence", dataset.get("license", "not stated in dataset.json"))),
        "reference": str(dataset.get("reference", "not stated in dataset.json")),
        "channels": ", ".join(map(str, dataset.get("channel_names", dataset.get("modality", {})).values())),
        "trainer, plans, configuration": f"{model.trainer}, {model.setting.plans['plans_name']}, "
        f"{model.setting.configuration}",
        "folds": ", ".join(folds),
        "checkpoints": ", ".join(dict.fromkeys(path.name for path in model.checkpoints.values())),
        "schedule": "; ".join(dict.fromkeys(_schedule(path.parent) for path in model.checkpoints.values())),
        "shipped": f"{date.today().isoformat()} by nnunet-ext {__version__}, nnU-Net {version('nnunetv2')}, PyTorch "
        f"{version('torch')}",
    }
    rows = [[key, markdown_cell(value)] for key, value in facts.items()]
    lines = [
        f"# {markdown(facts['data set'])}: {markdown(model.trainer)}",
        "",
        markdown_table(["", ""], rows),
        "",
        "## Use",
        "",
        use.format(folds=" ".join(folds)),
        "",
        "## Accuracy",
        "",
        _accuracy(model),
        "",
        "## Limits",
        "",
        _LIMITS,
        "",
        "## Files",
        "",
        "`sha256sum -c SHA256SUMS` in the folder tells whether they are those that were shipped.",
        "",
    ]
    return "\n".join(lines)


def _schedule(fold: Path) -> str:
    log = read_log(fold)[0]
    if log.trained is None:
        return "unknown"
    planned = "" if not log.is_unfinished else f", not finished: {log.epochs} epochs were planned"
    epochs = len(log.curves.dice) if log.curves else 0
    return f"{epochs} epochs of {log.iterations} iterations on {log.machine}{planned}"


def _accuracy(model: TrainedModel) -> str:
    """Table of validation Dice: each case predicted by the fold that was not trained on it."""
    if "all" in model.checkpoints:
        return "Not known: fold all was trained on every case, and its validation is on these."
    if any(path.name != FINAL_CHECKPOINT for path in model.checkpoints.values()):
        return f"Not known: nnU-Net validates {FINAL_CHECKPOINT}, another checkpoint is shipped."
    found: dict[str, list[float]] = {}
    cases = 0
    for path in model.checkpoints.values():
        summary = path.parent / "validation" / "summary.json"
        if not summary.is_file():
            continue
        cure = "validate the fold again (--val), or move the file away"
        content = read_json(summary, cure)
        try:
            for case in content["metric_per_case"]:
                cases += 1
                for label, metrics in case["metrics"].items():
                    found.setdefault(label, []).append(float(metrics["Dice"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{summary} must hold Dice of each case as nnU-Net writes it: {cure}.") from error
    if not cases:
        return "Not known: the folds have no validation."
    names = {_key(value): str(name) for name, value in model.setting.dataset["labels"].items()}
    rows = [[markdown_cell(names.get(label, label)), _mean(dice)] for label, dice in found.items()]
    return (
        f"Dice of nnU-Net's validation, mean of {cases} cases, each predicted by the fold that has not seen it. It is "
        "what to expect of cases like these; an ensemble of folds is often a little better.\n\n"
        + markdown_table(["structure", "Dice"], rows)
    )


def _mean(dice: list[float]) -> str:
    told = [d for d in dice if not math.isnan(d)]
    return f"{fmean(told):.3f}" if told else "never there"


def _key(label: Any) -> str:
    """The key of a label or region in summary.json."""
    return str(tuple(label)) if isinstance(label, list) else str(label)
