"""Checks dataset.json by nnU-Net's own rules: keys, labels, regions, ignore label, file ending."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_ext.doctor.finding import Finding, failure, warning
from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.datasets import read_dataset
from nnunet_ext.printable import typed_line

SUBJECT = "dataset.json"
_NEEDED = ("channel_names", "labels", "numTraining", "file_ending")


def describe(path: Path) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Content of a dataset.json, None where no data can be read by it, and what is wrong with it."""
    try:
        content = read_dataset(path, "correct it", needed=())
    except UsageError as error:
        return None, [failure(SUBJECT, str(error), "see nnU-Net's documentation/dataset_format.md")]
    findings = [*_twice(path), *_keys(content)]
    if any(found.level == "failure" and found.detail.startswith("lacks") for found in findings):
        return None, findings
    if not _ending_is_read(content):
        findings.append(
            failure(
                SUBJECT,
                f"file_ending is {content['file_ending']!r}, which no reader of nnU-Net takes",
                "give it with its dot as the files have it; convert other formats",
            )
        )
        return None, findings
    try:
        findings += _labels(content)
    except Exception as error:  # nnU-Net asserts, and fails over what it does not expect
        findings.append(failure(SUBJECT, f"nnU-Net refuses labels: {typed_line(error)}", "correct labels"))
        return None, findings
    return content, findings


def label_manager(content: Mapping[str, Any]) -> Any:
    """nnU-Net's own, as it checks a data set before there are plans."""
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    return LabelManager(content["labels"], regions_class_order=content.get("regions_class_order"))


def _twice(path: Path) -> list[Finding]:
    """Keys that stand twice in one object, of which JSON keeps the last."""
    found: list[Finding] = []

    def look(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        names = [key for key, _ in pairs]
        for name in sorted({key for key in names if names.count(key) > 1}):
            found.append(failure(SUBJECT, f"has {name!r} twice, the last one counts", "give each its own name"))
        return dict(pairs)

    json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=look)
    return found


def _keys(content: Mapping[str, Any]) -> Iterator[Finding]:
    for key in _NEEDED:
        if key in content:
            continue
        if key == "channel_names" and "modality" in content:
            yield warning(SUBJECT, "has 'modality', the old name", "rename it to channel_names")
        elif key == "numTraining":
            yield failure(SUBJECT, "has no numTraining", "add the number of training cases")
        else:
            yield failure(SUBJECT, f"lacks {key}", "add it, see nnU-Net's documentation/dataset_format.md")
    channels = content.get("channel_names", content.get("modality", {}))
    if list(channels) != [str(i) for i in range(len(channels))]:
        yield warning(
            SUBJECT,
            f"numbers channels {', '.join(channels)}; nnU-Net takes the files in the order of their names",
            "number channel_names 0, 1, 2, ... in the order of the files",
        )


def _ending_is_read(content: Mapping[str, Any]) -> bool:
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    try:
        determine_reader_writer_from_dataset_json(content, verbose=False)
    except RuntimeError:
        return False
    return True


def _labels(content: Mapping[str, Any]) -> Iterator[Finding]:
    manager = label_manager(content)
    labels = [*manager.all_labels, *([manager.ignore_label] if manager.has_ignore_label else [])]
    if any(np.diff(labels) != 1):
        yield failure(
            SUBJECT,
            f"labels must be consecutive, got {', '.join(map(str, labels))}",
            "number them 0, 1, 2, ..., in the label maps too",
        )
    if len(labels) < 2 + manager.has_ignore_label:
        yield failure(SUBJECT, "has no label but the background", "add what is to be found")
    if manager.has_regions:
        yield from _regions(manager)
    elif len(set(manager.label_dict.values())) < len(manager.label_dict):
        yield warning(SUBJECT, f"labels give one number to several names: {manager.label_dict}", "see which is meant")
    if not manager.has_regions and content.get("regions_class_order") is not None:
        yield warning(SUBJECT, "has regions_class_order, but no region", "remove it, or make a label a list")


def _regions(manager: Any) -> Iterator[Finding]:
    """Play the export of regions: what nnU-Net writes last must lie in the same regions as what it stands for."""
    order = manager.regions_class_order
    regions = [set(np.atleast_1d(region).tolist()) for region in manager.foreground_regions]
    unknown = [label for label in order if label not in manager.all_labels]
    if unknown:
        yield failure(SUBJECT, f"regions_class_order has {unknown}, labels have not", "correct it")
        return
    for label in manager.foreground_labels:
        found = [i for i, region in enumerate(regions) if label in region]
        written = order[found[-1]] if found else 0
        if [i for i, region in enumerate(regions) if written in region] != found:
            yield warning(
                SUBJECT,
                f"regions_class_order {list(order)} writes voxels of label {label} as {written}, which lies in other "
                "regions",
                "order labels and regions_class_order from the largest region to the smallest",
            )
