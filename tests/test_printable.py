"""Text of others can't steer a terminal."""

from __future__ import annotations

import pytest

from nnunet_ext.printable import first_few, one_line, printable, printable_lines, typed_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Größe 3 × 3, 日本, 🧠", "Größe 3 × 3, 日本, 🧠"),  # noqa: RUF001
        ("\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
        ("one\r\ntwo\tthree\x0b", r"one\r\ntwo\tthree\x0b"),
        ("\x9b31m", r"\x9b31m"),
        ("name\u202egnp.exe\u2066", r"name\u202egnp.exe\u2066"),
        ("\ud800", r"\ud800"),
        ("it's", "it's"),
        ("", ""),
    ],
)
def test_characters_that_are_none_to_look_at_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_lines_of_a_log_stay_lines() -> None:
    assert printable_lines("one\n\x1b[2Jtwo\r\n") == "one\n\\x1b[2Jtwo\\r\n"


def test_what_an_error_says_is_one_line_that_steers_no_terminal() -> None:
    assert one_line(ValueError("no\n\tlayer \x1b[2J")) == "no layer \\x1b[2J"


def test_the_first_names_stand_for_all() -> None:
    assert first_few(["a", "b", "c"], 3) == "a, b, c"
    assert first_few(["a", "b", "c", "d"], 2) == "a, b and 2 more"


def test_type_and_first_line_of_an_error() -> None:
    assert typed_line(ValueError("\none\ntwo")) == "ValueError: one"
    assert typed_line(ValueError()) == "ValueError"
