"""How `--help` is laid out: as wide as the terminal, words whole, examples as lines to paste."""

from __future__ import annotations

import argparse
import re

from nnunet_ext.cli.terminal import whole_words

_EXAMPLES = re.compile(r"examples?:")


class Formatter(argparse.HelpFormatter):
    """Fills paragraphs; of the one that begins with "example:" or "examples:" each line is a command."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return whole_words(text, width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = (paragraph.strip() for paragraph in text.split("\n\n"))
        return "\n\n".join(_filled(paragraph, width - len(indent)) for paragraph in paragraphs)


def _filled(paragraph: str, width: int) -> str:
    start = _EXAMPLES.match(paragraph)
    if start is None:
        return "\n".join(whole_words(paragraph, width))
    commands = paragraph[start.end() :].strip().split("\n")
    return "\n".join([start.group(), *(_command(command.strip(), width) for command in commands)])


def _command(command: str, width: int) -> str:
    r"""Lines that a shell reads as one, each but the last with "\" at its end."""
    return f"  {command}" if len(command) + 2 <= width else " \\\n".join(whole_words(command, width - 2, "  ", "    "))
