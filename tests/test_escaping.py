"""Names are shown as they are, whatever they mean to a document."""

from __future__ import annotations

import pytest

from nnunet_ext.escaping import code_block, csv_cell, drawn, html, latex, markdown, markdown_cell


@pytest.mark.parametrize("text", ["nnUNetTrainer_3epochs", "p < 0.001", "a & b", "0.9 ± 0.1", "+1.20 to 2.5"])
def test_ordinary_text_stays_readable_in_tables(text: str) -> None:
    assert markdown_cell(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a|b", r"a\|b"),
        ("*a* `b` [c](d) $e$ ~f~", r"\*a\* \`b\` \[c\](d) \$e\$ \~f\~"),
        ("_a_ b_", r"\_a\_ b\_"),
        ("<script>", "&#60;script>"),
        ("</td>", "&#60;/td>"),
        ("&lt;", "&#38;lt;"),
        ("a\\", r"a\\"),
        ("a\nb\x1b[2J\u202e", r"a\\nb\\x1b\[2J\\u202e"),
    ],
)
def test_markup_is_text_in_markdown(text: str, shown: str) -> None:
    assert markdown_cell(text) == shown
    assert markdown(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [("- a", "&#45; a"), ("# a", "&#35; a"), ("> a", "&#62; a"), ("1. a", "1&#46; a"), ("1.5 a", "1.5 a")],
)
def test_no_line_of_markdown_becomes_a_list_or_heading(text: str, shown: str) -> None:
    assert markdown(text) == shown


def test_a_command_stays_in_its_block() -> None:
    assert code_block("a ```\nb") == "````bash\na ```\nb\n````"


def test_tags_and_quotes_are_text_in_a_page() -> None:
    assert html("<a b=\"c\" d='e'>&\nf\ud800") == "&lt;a b=&quot;c&quot; d=&#x27;e&#x27;&gt;&amp;\nf\\ud800"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a_b & 5 % $x^2$ #1 {c} ~", r"a\_b \& 5 \% \$x\textasciicircum{}2\$ \#1 \{c\} \textasciitilde{}"),
        (r"\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
        ("[2cm]", "{[}2cm{]}"),  # at the start of a row the space above it
        ("*", "{*}"),
        ("a---b ''", "a-{}-{}-b '{}'"),
        ("< 0.001 |>", r"\textless{} 0.001 \textbar{}\textgreater{}"),
        ('`a`, "b"', r"\textasciigrave{}a\textasciigrave{}, \char34{}b\char34{}"),
        ("\N{MINUS SIGN}1 ± 2\N{MULTIPLICATION SIGN}", r"$-$1 $\pm$ 2$\times$"),
        ("a\nb", r"a\textbackslash{}nb"),
    ],
)
def test_commands_and_ligatures_are_text_in_latex(text: str, shown: str) -> None:
    assert latex(text) == shown


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\N{FULLWIDTH EQUALS SIGN}1", "'=1"])
def test_no_cell_is_a_formula(text: str) -> None:
    assert csv_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "a=1", "liver", "3d-1"])
def test_ordinary_cells_stay(text: str) -> None:
    assert csv_cell(text) == text


def test_names_in_figures_are_short_and_not_hidden() -> None:
    assert drawn("_a") == " _a"
    long = drawn("a" * 300 + "end")
    assert len(long) == 40
    assert long.endswith("end")
    assert drawn("a\nb") == r"a\nb"


def test_names_that_differ_in_their_middle_are_told_apart_in_figures() -> None:
    trainers = [f"nnUNetTrainer{name}, nnUNetPlans, 3d_fullres" for name in ("Reversible", "ReversibleDistilled")]
    assert len({drawn(name) for name in trainers}) == 1
    assert [drawn(name, trainers) for name in trainers] == trainers
    assert len(drawn(trainers[0], [trainers[0], "other"])) == 40
