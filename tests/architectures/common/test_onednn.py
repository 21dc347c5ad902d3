"""Who looks on while a network runs: an export, a compilation, or nobody."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nnunet_ext.architectures.common.onednn import is_exporting


class Tells(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if is_exporting() else x


def test_an_export_is_told_from_a_compilation() -> None:
    x = torch.zeros(2)
    assert torch.export.export(Tells(), (x,), strict=False).module()(x)[0] == 1
    assert torch.compile(Tells(), backend="eager")(x)[0] == 0
    assert Tells()(x)[0] == 0


@pytest.mark.skipif(not hasattr(torch.compiler, "_is_exporting_flag"), reason="before PyTorch 2.7")
def test_what_is_true_in_every_compilation_of_older_versions_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)  # as their compiler takes it
    assert not is_exporting()
