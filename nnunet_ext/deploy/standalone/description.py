"""What `predict.py` needs to know of a model: the content of model.json, see docs/reference/standalone.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_ext import __version__
from nnunet_ext.deploy.model import TrainedModel
from nnunet_ext.deploy.standalone.predict import FORMAT, VERSION
from nnunet_ext.errors import UsageError
from nnunet_ext.files import read_json
from nnunet_ext.nnunet.setting import Setting

_NUMBERS = ("mean", "std", "percentile_00_5", "percentile_99_5")  # of the data set, which CTNormalization takes
_READERS = ("SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient", "NaturalImage2DIO")
_NORMALIZATIONS = (
    "ZScoreNormalization",
    "CTNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
)
_LARGEST_COMPONENT = "remove_all_but_largest_component_from_segmentation"
_INSTEAD = "ship it without --standalone"


def check_supported(setting: Setting) -> None:
    """See that `predict.py` computes what the plans ask for.

    Raises:
        UsageError: names what it does not know, and what to use instead.
    """
    configuration, plans = setting.configuration_manager, setting.plans
    if configuration.previous_stage_name is not None:
        raise UsageError(
            f"--standalone needs a configuration that predicts from images alone, {setting.configuration} also takes "
            f"the prediction of {configuration.previous_stage_name}: {_INSTEAD}, and predict both stages with nnU-Net."
        )
    wanted = [
        ("readers", plans["image_reader_writer"], _READERS),
        ("preprocessors", configuration.preprocessor_name, ("DefaultPreprocessor",)),
        ("label managers", plans.get("label_manager", "LabelManager"), ("LabelManager",)),
        *(("normalisations", scheme, _NORMALIZATIONS) for scheme in configuration.normalization_schemes),
    ]
    for what, found, known in wanted:
        if found not in known:
            raise UsageError(f"--standalone knows the {what} {', '.join(known)}, the plans name {found}: {_INSTEAD}.")


def describe(
    model: TrainedModel, networks: Sequence[Mapping[str, Any]], rules: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Make the content of model.json.

    Args:
        model: Trained.
        networks: Of each fold its name, its file and whether that takes batches of any size.
        rules: See `postprocessing`.

    Raises:
        UsageError: the plans ask for what `predict.py` does not know.
    """
    setting = model.setting
    check_supported(setting)
    plans, configuration, labels = setting.plans, setting.configuration_manager, setting.label_manager
    return {
        "format": FORMAT,
        "version": VERSION,
        "nnunet_ext": __version__,
        "dataset_name": plans["dataset_name"],
        "trainer": model.trainer,
        "plans_name": plans["plans_name"],
        "configuration": setting.configuration,
        "channels": _channels(setting.dataset),
        "file_ending": setting.dataset["file_ending"],
        "reader": plans["image_reader_writer"],
        "transpose_forward": plans["transpose_forward"],
        "transpose_backward": plans["transpose_backward"],
        "spacing": [float(s) for s in configuration.spacing],
        "normalization": _normalization(setting),
        "resampling": {
            kind: _resampling(configuration.configuration, kind, setting) for kind in ("data", "probabilities")
        },
        "patch_size": list(setting.patch_size),
        "step_size": 0.5,
        "mirroring_axes": list(model.mirroring_axes or ()),
        "labels": setting.dataset["labels"],
        "regions_class_order": setting.dataset["regions_class_order"] if labels.has_regions else None,
        "num_outputs": setting.num_classes,
        "networks": list(networks),
        "postprocessing": list(rules),
    }


def _channels(dataset: Mapping[str, Any]) -> list[str]:
    names = dataset["channel_names"] if "channel_names" in dataset else dataset["modality"]
    return [str(names[key]) for key in sorted(names, key=int)]


def _normalization(setting: Setting) -> list[dict[str, Any]]:
    configuration = setting.configuration_manager
    intensities = setting.plans["foreground_intensity_properties_per_channel"]
    pairs = zip(configuration.normalization_schemes, configuration.use_mask_for_norm, strict=True)
    return [
        {
            "scheme": scheme,
            "use_mask": bool(use_mask),
            **({n: float(intensities[str(i)][n]) for n in _NUMBERS} if scheme == "CTNormalization" else {}),
        }
        for i, (scheme, use_mask) in enumerate(pairs)
    ]


def _resampling(configuration: Mapping[str, Any], kind: str, setting: Setting) -> dict[str, Any]:
    """How nnU-Net resamples images ("data") or logits ("probabilities")."""
    function = configuration[f"resampling_fn_{kind}"]
    options = configuration[f"resampling_fn_{kind}_kwargs"]
    common = {
        "force_separate_z": options.get("force_separate_z", None if "torch" in function else False),
        "separate_z_anisotropy_threshold": options.get("separate_z_anisotropy_threshold", 3),
    }
    if function == "resample_data_or_seg_to_shape":
        # In float64, rounded to the type of what it was given.
        dtype = "float16" if kind == "probabilities" else "float32"
        orders = {"order": options.get("order", 3), "order_z": options.get("order_z", 0)}
        return {"function": function, **orders, **common, "dtype": dtype}
    modes = (options.get("mode", "linear"), options.get("aniso_axis_mode", "nearest-exact"))
    if function == "resample_torch_fornnunet" and modes == ("linear", "nearest-exact"):
        return {"function": function, "order": 1, "order_z": 0, **common, "dtype": "float32"}
    raise UsageError(
        f"--standalone knows resample_data_or_seg_to_shape, and resample_torch_fornnunet with its own modes, the plans "
        f"resample {kind} of {setting.configuration} by {function} {dict(options)}: {_INSTEAD}."
    )


def postprocessing(model: TrainedModel) -> list[dict[str, Any]]:
    """Read what `nnUNetv2_find_best_configuration` found to be better for the folds of the model.

    Returns:
        Rules {"labels": [...], "background": 0}: of the labels together only the largest component stays. Empty where
        it found none, or was not run for these folds.

    Raises:
        UsageError: the file is damaged, or asks for something else.
    """
    folds = sorted(model.checkpoints, key=lambda fold: (len(fold), fold))
    path = model.folder / f"crossval_results_folds_{'_'.join(folds)}" / "postprocessing.json"
    if not path.is_file():
        return []
    cure = "run nnUNetv2_find_best_configuration again, or move the file away"
    found = read_json(path, cure)
    names, options = found.get("postprocessing_fns", ()), found.get("postprocessing_kwargs", ())
    if len(names) != len(options) or any(name != _LARGEST_COMPONENT for name in names):
        raise UsageError(f"--standalone knows the postprocessing {_LARGEST_COMPONENT}, {path} has {names}: {cure}.")
    try:
        return [
            {"labels": _flat(option["labels_or_regions"]), "background": int(option.get("background_label", 0))}
            for option in options
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{path} must hold labels_or_regions as nnU-Net writes them, got {options}: {cure}."
        ) from error


def _flat(labels: Any) -> list[int]:
    """Labels of a label, a region or a list of them."""
    return [int(labels)] if not isinstance(labels, list) else sorted({x for one in labels for x in _flat(one)})
