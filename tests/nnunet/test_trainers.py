"""A trainer that nobody has is said in the last line, with the names that resemble it."""

from __future__ import annotations

import pytest

from nnunet_ext import cli


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nnUNetTrainerRevesibel", "Did you mean nnUNetTrainerReversible"),
        ("nnUNetTrainerRevesibel_3epochs", "Did you mean nnUNetTrainerReversible_3epochs"),
        ("Elsewhere", "`nnunet-ext list` shows all names."),
    ],
)
def test_an_unknown_trainer_is_one_line_with_the_names_that_it_resembles(
    name: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["estimate", "--patch", "16", "16", "16", "-tr", name]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert f"got {name}: correct it" in lines[-1]
    assert hint in lines[-1]
    assert not any(name in line for line in lines[:-1])
