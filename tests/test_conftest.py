"""What the fixtures and settings of the tests promise."""

from __future__ import annotations

import warnings
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


@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning, ResourceWarning, UserWarning])
@pytest.mark.parametrize("module", ["nnunet_ext.registry", "_nnunet_ext_hook", "tests.conftest"])
def test_warning_of_our_own_code_is_an_error(kind: type[Warning], module: str) -> None:
    with pytest.raises(kind):
        warnings.warn_explicit("ours", kind, f"{module}.py", 1, module=module)


@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning, ResourceWarning])
def test_warning_of_nnunets_own_code_is_none(kind: type[Warning]) -> None:
    warnings.warn_explicit("theirs", kind, "file.py", 1, module="nnunetv2.training")
