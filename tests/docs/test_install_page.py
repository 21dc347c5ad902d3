"""The page about installing, the container file and the metadata name the same parts."""

from __future__ import annotations

import re
from pathlib import Path

from nnunet_ext import extras

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "how-to" / "install.md").read_text(encoding="utf-8")
CONTAINERFILE = (REPOSITORY / "Containerfile").read_text(encoding="utf-8")
METADATA = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")


def test_container_file_copies_what_a_wheel_is_built_from() -> None:
    copied = [
        name for line in re.findall(r"^COPY (.+)$", CONTAINERFILE, flags=re.MULTILINE) for name in line.split()[:-1]
    ]
    assert [name for name in copied if not (REPOSITORY / name).exists()] == []
    needed = re.findall(r'^(?:readme|license-files) = \[?"(.+?)"', METADATA, flags=re.MULTILINE)
    needed += re.findall(r'"(.+?)"', re.search(r"^only-include = (.+)$", METADATA, flags=re.MULTILINE)[1])  # type: ignore[index]
    assert {"pyproject.toml", *needed} <= set(copied)


def test_page_names_every_extra_and_no_other() -> None:
    known = set(
        re.findall(r"^(\w+) = \[", METADATA.partition("[project.optional-dependencies]")[2], flags=re.MULTILINE)
    )
    named = {name for part in re.findall(r"\.\[([\w,]+)\]", PAGE) for name in part.split(",")}
    assert extras.MODULES.keys() <= named <= known


def test_container_without_a_gpu_takes_the_index_of_the_page() -> None:
    assert "https://download.pytorch.org/whl/cpu" in CONTAINERFILE
    assert "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu" in PAGE
