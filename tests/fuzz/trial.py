"""What must become of a network whatever its plans say: it works, or a sentence says what does not fit."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nnunet_ext.trainers.from_plans import build_from_plans
from tests.fuzz.plans import Drawn

HOST = "dynamic_network_architectures.architectures.unet."
_REFUSALS = (ValueError, NotImplementedError)
_FOREIGN = ("/torch/", "/dynamic_network_architectures/", "/nnunetv2/")


def configuration_of(drawn: Drawn, network_class: str | None = None) -> ConfigurationManager:
    """The configuration whose architecture was drawn, with a patch and a batch."""
    return ConfigurationManager(
        {
            "patch_size": list(drawn.patch),
            "batch_size": drawn.batch,
            "architecture": {
                "network_class_name": network_class
                or HOST + ("ResidualEncoderUNet" if drawn.residual else "PlainConvUNet"),
                "arch_kwargs": drawn.arguments,
                "_kw_requires_import": drawn.imported,
            },
        }
    )


def built(network_class: type[nn.Module], drawn: Drawn, deep_supervision: bool) -> nn.Module:
    """The network, as trainers build it from plans."""
    return build_from_plans(network_class, configuration_of(drawn), drawn.channels, drawn.classes, deep_supervision)


def refusal_of(network_class: type[nn.Module], drawn: Drawn) -> str | None:
    """Run the whole life of a network; return the sentence by which it refuses, or None where all was right."""
    torch.manual_seed(0)
    with quiet():
        try:
            network = built(network_class, drawn, drawn.deep_supervision).train()
            image = torch.randn(drawn.batch, drawn.channels, *drawn.patch)
            outputs = tree_leaves(network(image))
        except _REFUSALS as error:
            check_sentence(error)
            return str(error)
        check_levels(drawn, outputs, hasattr(network, "decoder") and drawn.deep_supervision)
        sum(output.abs().mean() for output in outputs).backward()
        check_gradients(network, drawn.deep_supervision)
        check_round_trip(network, lambda deep: built(network_class, drawn, deep), image, drawn.classes)
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings: plans may ask for what PyTorch finds unusual."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_sentence(error: Exception) -> None:
    """See that a refusal is ours, of one line, and holds the value received and a rule or a cure."""
    text = str(error)
    frames = []
    traceback = error.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame.f_code.co_filename)
        traceback = traceback.tb_next
    where = Path(frames[-1]).as_posix()
    assert not any(part in where for part in _FOREIGN), f"raised in {where}: {text}"
    assert text.endswith("."), text
    assert "\n" not in text, text
    assert len(text) < 600, text
    assert "np." not in text, text
    assert re.search(r"\bgot |\bhas |\bhold |\[\d|= \d", text), f"no value received: {text}"
    assert ": " in text or "must" in text or "need" in text, f"no cure: {text}"


def check_levels(drawn: Drawn, outputs: list[Any], several: bool) -> None:
    """See that logits have the sizes of nnU-Net's levels, largest first, and that all is finite."""
    strides = [s if isinstance(s, list) else [s] * len(drawn.patch) for s in drawn.arguments["strides"]]
    scales = list(accumulate(strides, lambda a, b: [m * n for m, n in zip(a, b, strict=True)]))
    wanted = [
        (drawn.batch, drawn.classes, *(n // s for n, s in zip(drawn.patch, scale, strict=True)))
        for scale in (scales[:-1] if several else [[1] * len(drawn.patch)])
    ]
    assert [tuple(output.shape) for output in outputs[: len(wanted)]] == wanted
    assert all(isinstance(output, Tensor) and output.isfinite().all() for output in outputs)


def check_gradients(network: nn.Module, deep_supervision: bool) -> None:
    """See that all weights got finite gradients; without deep supervision heads of coarse levels get none."""
    for name, parameter in network.named_parameters():
        if parameter.grad is None:
            assert not parameter.requires_grad or (not deep_supervision and ".seg_layers." in name), name
        else:
            assert parameter.grad.isfinite().all(), name


def check_round_trip(network: nn.Module, build: Callable[[bool], nn.Module], image: Tensor, classes: int) -> None:
    """See that weights stored in any mode load strictly into a new network, which then predicts the same."""
    keys = list(network.state_dict())
    network.eval()
    if hasattr(network, "decoder"):
        network.decoder.deep_supervision = False
    stored = io.BytesIO()
    torch.save(network.state_dict(), stored)
    stored.seek(0)
    twin = build(False)
    assert list(network.state_dict()) == keys == list(twin.state_dict()) == list(build(True).state_dict())
    twin.load_state_dict(torch.load(stored, weights_only=True), strict=True)
    with torch.inference_mode():
        logits = network(image)
        assert tuple(logits.shape) == (len(image), classes, *image.shape[2:])
        assert logits.isfinite().all()
        torch.testing.assert_close(twin.eval()(image), logits, rtol=0, atol=0)
