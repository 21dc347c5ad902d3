"""What the fixtures themselves promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import console_script


def test_missing_console_script_is_a_skip_with_its_cure() -> None:
    with pytest.raises(pytest.skip.Exception, match=r"no_such_command is missing: pip install -e \.\[test\]"):
        console_script("no_such_command")


def test_script_of_this_environment_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_command").touch()
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    assert console_script("some_command") == str(tmp_path / "some_command")
