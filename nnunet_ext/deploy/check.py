"""Comparison of a fused network with the one that was trained, on random and on real images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nnunet_ext.doctor.case import Case, Rules, look
from nnunet_ext.errors import UsageError
from nnunet_ext.nnunet.setting import Setting
from nnunet_ext.printable import one_line

# Voxels per axis of the coarsest feature map: odd, and more than a kernel's half.
_COARSEST = 3
# Of the largest logit: in float32 fusing, folding and another order of sums change logits by rounding only.
TOLERANCE = 1e-4
FLOAT16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far two predictions are apart.

    Args:
        image: What was predicted, "random" or the name of a case.
        absolute: Largest difference of two logits.
        relative: The same, divided by the largest logit.
        voxels: Number of voxels whose label differs.
        total: Number of voxels.
    """

    image: str
    absolute: float
    relative: float
    voxels: int
    total: int

    @classmethod
    def of(cls, image: str, before: Tensor, after: Tensor, regions: bool) -> Difference:
        """Compare logits (1, num_classes, *patch)."""
        before, after = before.double(), after.double()
        absolute = float((after - before).abs().max())
        labels = [logits > 0 if regions else logits.argmax(1, keepdim=True) for logits in (before, after)]
        differs = (labels[0] != labels[1]).any(1)
        return cls(
            image=image,
            absolute=absolute,
            relative=absolute / max(float(before.abs().max()), 1e-12),
            voxels=int(differs.sum()),
            total=differs.numel(),
        )


def check_same(found: Difference, rule: str, cure: str) -> Difference:
    """See that only rounding differs.

    Raises:
        UsageError: `rule`, what was found, `cure`.
    """
    if not found.relative <= TOLERANCE:  # also where it is no number
        raise UsageError(
            f"{rule}; logits of the image {found.image} differ by {found.relative:.1e} of the largest: {cure}, and "
            "report this."
        )
    return found


def patches_of(setting: Setting, images: Path | None) -> dict[str, Tensor]:
    """What networks are compared on: noise, and with images the middle of the first."""
    patches = {"random": random_image(setting)}
    if images is not None:
        name, patch = real_patch(setting, images)
        patches[name] = patch
    return patches


def random_image(setting: Setting) -> Tensor:
    """Noise with an odd number of voxels at the coarsest stage, always the same: (1, C, *spatial)."""
    generator = torch.Generator().manual_seed(0)
    shape = [_COARSEST * stride for stride in setting.strides]
    return torch.randn(1, setting.input_channels, *shape, generator=generator)


def random_patch(setting: Setting) -> Tensor:
    """Noise of the plans' patch, always the same: (1, C, *patch)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, setting.input_channels, *setting.patch_size, generator=generator)


def real_patch(setting: Setting, folder: Path) -> tuple[str, Tensor]:
    """Preprocess the first case of a folder as nnU-Net does; return its name and a patch of its middle.

    Args:
        setting: Plans, data set and configuration.
        folder: Images in nnU-Net's format, CASE_0000.nii.gz.

    Raises:
        UsageError: there is no image, it is cut off or has other channels, or the configuration also needs the
            prediction of a previous stage.
    """
    from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

    configuration = setting.configuration_manager
    if configuration.previous_stage_name is not None:
        raise UsageError(
            f"-i can't check {setting.configuration}, which also needs predictions of "
            f"{configuration.previous_stage_name}: leave it out; a random image is checked."
        )
    ending = str(setting.dataset["file_ending"])
    listed = create_lists_from_splitted_dataset_folder(str(folder), ending) if folder.is_dir() else []
    cases = [case for case in listed if case and not Path(case[0]).name.startswith(".")]
    if not cases:
        raise UsageError(f"-i needs a folder of images CASE_0000{ending}, got {folder}: correct it, or leave it out.")
    name = Path(cases[0][0]).name.removesuffix(ending).rpartition("_")[0]
    rules = Rules(setting.plans_manager.image_reader_writer_class, setting.input_channels)
    for found in look((Case(name, tuple(map(Path, cases[0]))), rules)).findings:
        if found.level == "failure":
            raise UsageError(f"-i needs complete images, {name}: {found.detail}: {found.cure}.")
    preprocessor = configuration.preprocessor_class(verbose=False)
    try:
        data, *_ = preprocessor.run_case(cases[0], None, setting.plans_manager, configuration, dict(setting.dataset))
    except Exception as error:  # whatever nnU-Net meets in an image that it was not planned for
        raise UsageError(
            f"-i needs images that nnU-Net can preprocess, {name} is none ({one_line(error)}): correct it, or "
            "leave it out."
        ) from error
    return name, middle(torch.as_tensor(data).float()[None], setting)


def middle(image: Tensor, setting: Setting) -> Tensor:
    """Crop, or pad with zeros, to the patch: (1, C, *spatial) -> (1, C, *patch); 2D: of the slice in the middle."""
    patch = setting.patch_size
    if image.dim() > len(patch) + 2:
        image = image[:, :, image.shape[2] // 2]
    for axis, wanted in enumerate(patch, 2):
        have = image.shape[axis]
        image = image.narrow(axis, max(0, have - wanted) // 2, min(have, wanted))
    padding = [n for axis in range(len(patch), 0, -1) for n in (0, patch[axis - 1] - image.shape[axis + 1])]
    return nn.functional.pad(image, padding)


def predict_unfused(network: nn.Module, x: Tensor) -> Tensor:
    """Logits of a network as it was trained; without gradients it would fuse itself."""
    network.requires_grad_(False)
    with torch.enable_grad():
        logits: Tensor = network(x)
    return logits


def largest_activation(network: nn.Module, x: Tensor) -> float:
    """Largest number that any layer gives, which float16 must hold."""
    largest = 0.0

    def look(module: nn.Module, _: object, output: object) -> None:
        nonlocal largest
        if isinstance(output, Tensor) and not list(module.children()):
            largest = max(largest, float(output.abs().max()))

    hooks = [module.register_forward_hook(look) for module in network.modules()]
    try:
        with torch.inference_mode():
            network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return largest
