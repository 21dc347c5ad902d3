"""Checkpoints are read whichever NumPy wrote them, and only where they hold numbers and tensors."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.checkpoints import read_checkpoint

CONTENT: dict[str, Any] = {
    "network_weights": {"weight": torch.arange(6.0).reshape(2, 3)},
    "_best_ema": np.float32(0.5),
    "logging": {"mean_fg_dice": [np.float64(0.25), np.float16(2)], "epoch": np.int64(3), "n": np.int32(4)},
    "finished": np.bool_(True),
}


def written_by(numpy_major: int, path: Path) -> Path:
    """Write `CONTENT` with the name that this major version of NumPy pickles its numbers by."""
    torch.save(CONTENT, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = b"cnumpy.core.multiarray\n" if numpy_major == 1 else b"cnumpy._core.multiarray\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for member, data in members.items():
            renamed = re.sub(rb"cnumpy\._?core\.multiarray\n", name, data)
            assert (renamed == data) or member.endswith("data.pkl")
            archive.writestr(member, renamed)
    return path


@pytest.mark.parametrize("numpy_major", [1, 2])
def test_checkpoint_of_either_numpy_is_read(tmp_path: Path, numpy_major: int) -> None:
    content = read_checkpoint(written_by(numpy_major, tmp_path / "checkpoint.pth"), "copy it again")
    torch.testing.assert_close(content.pop("network_weights"), CONTENT["network_weights"])
    assert content == {key: value for key, value in CONTENT.items() if key != "network_weights"}
    assert type(content["_best_ema"]) is np.float32


def test_numbers_are_read_where_numpy_has_stubs_of_its_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written_by(2, tmp_path / "checkpoint.pth")
    for name in ("core", "_core"):
        monkeypatch.setattr(np, name, object(), raising=False)
    assert read_checkpoint(path, "copy it again")["_best_ema"] == 0.5


@pytest.mark.parametrize("harmful", [os.system, np.dtype(object), np.zeros(1, dtype=object), print])
def test_anything_but_numbers_and_tensors_is_refused(tmp_path: Path, harmful: object) -> None:
    torch.save({"network_weights": {}, "init_args": harmful}, tmp_path / "checkpoint.pth")
    with pytest.raises(UsageError, match=r"not a complete checkpoint of nnU-Net .*: copy it again\.$"):
        read_checkpoint(tmp_path / "checkpoint.pth", "copy it again")


def test_cut_off_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save(CONTENT, tmp_path / "checkpoint.pth")
    whole = (tmp_path / "checkpoint.pth").read_bytes()
    (tmp_path / "checkpoint.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="not a complete checkpoint"):
        read_checkpoint(tmp_path / "checkpoint.pth", "copy it again")


def test_a_torchscript_archive_is_refused_before_pytorch_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save(CONTENT, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr("checkpoint/constants.pkl", b"")  # by this PyTorch knows one, and runs it before 2.6
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("it has run"))
    with pytest.raises(UsageError, match="it is a TorchScript archive, a program"):
        read_checkpoint(path, "copy it again")
