"""Builds a network of this package from any plans that describe a U-Net, default or ResEnc."""

from __future__ import annotations

import pydoc
from collections.abc import Mapping, Sequence
from typing import Any, cast

from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from nnunet_ext.architectures.common.operations import check_conv
from nnunet_ext.architectures.common.plan_arguments import parameters_of
from nnunet_ext.architectures.common.plan_sizes import check_channels
from nnunet_ext.architectures.common.plan_values import check_finite, check_values

_OPTIONS = ("norm_op_kwargs", "dropout_op_kwargs", "nonlin_kwargs")
_ARCHITECTURE: dict[str, Any] = {
    "network_class_name": str,
    "arch_kwargs": Mapping[str, Any],
    "_kw_requires_import": Sequence[str],
}


def builds(network_class: type[nn.Module] | None, **options: Any) -> staticmethod[..., nn.Module]:
    """Make a trainer's `build_network_architecture`: `network_class` from the plans, for training and prediction.

    Args:
        network_class: Built by `build_from_plans`; None: the plans' own network.
        options: Options of the network, stronger than those of the plans; a function is called with the configuration.
    """

    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        values = {k: v(configuration_manager) if callable(v) else v for k, v in options.items()}
        return build_from_plans(
            network_class,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
            **values,
        )

    return staticmethod(build_network_architecture)


def build_from_plans(
    network_class: type[nn.Module] | None,
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    enable_deep_supervision: bool,
    without: Sequence[str] = (),
    **options: Any,
) -> nn.Module:
    """Build a network with the sizes, strides and options that the configuration holds, and `options`.

    Args:
        network_class: Network to build; None: the plans' own.
        configuration_manager: Plans of the configuration.
        num_input_channels, num_output_channels: Of images and logits.
        enable_deep_supervision: Whether it gives logits of all resolutions.
        without: Arguments of the plans that it does not take.
        options: Arguments that are stronger than those of the plans.

    Raises:
        ValueError: the plans belong to a network whose arguments `network_class` does not have; see `network_of`.
    """
    planned = planned_arguments(configuration_manager)
    arguments: dict[str, Any] = {**{k: v for k, v in planned.items() if k not in without}, **options}
    name = configuration_manager.network_arch_class_name
    if network_class is not None and (unknown := sorted(set(arguments) - parameters_of(network_class))):
        raise ValueError(
            f"{network_class.__name__} is built from plans of a U-Net, but these plans are for {name} and hold "
            f"{', '.join(unknown)}: use plans of nnU-Net's default planner, of its ResEnc planners, or of this "
            "network's own planner (-p)."
        )
    named = configuration_manager.network_arch_init_kwargs_req_import
    return network_of(
        f"{network_class.__module__}.{network_class.__name__}" if network_class else name,
        arguments,
        [key for key in named if key not in without],
        num_input_channels,
        num_output_channels,
        enable_deep_supervision,
    )


def planned_arguments(configuration_manager: ConfigurationManager) -> Mapping[str, Any]:
    """The keyword arguments that plans hold for their network.

    Raises:
        ValueError: the plans hold no network as nnU-Net writes it.
    """
    architecture = configuration_manager.configuration["architecture"]
    check_values({"architecture": Mapping[str, Any]}, {"architecture": architecture})
    check_values(_ARCHITECTURE, {name: architecture.get(name) for name in _ARCHITECTURE})
    arguments: Mapping[str, Any] = configuration_manager.network_arch_init_kwargs
    return arguments


def network_of(
    name: str,
    arguments: Mapping[str, Any],
    imported: Sequence[str],
    num_input_channels: int,
    num_output_channels: int,
    enable_deep_supervision: bool,
) -> nn.Module:
    """Build a network by nnU-Net's own builder, once what it would fail at without a sentence is refused.

    Args:
        name: Dotted path of the network.
        arguments: Its keyword arguments, classes by their dotted paths.
        imported: Which of them are classes.
        num_input_channels, num_output_channels: Of images and logits.
        enable_deep_supervision: Whether it gives logits of all resolutions.

    Raises:
        ValueError: the arguments name a class that is none, hold a number that is not finite or a norm that residual
            blocks can't have; channels or classes that can't be.
    """
    check_channels(input_channels=num_input_channels, num_classes=num_output_channels)
    _check_named_classes(arguments, imported)
    for options in _OPTIONS:
        check_values({options: Mapping[str, Any] | None}, arguments)
        check_finite(options, arguments.get(options) or {})
    check_residual_norm(name, arguments)
    return get_network_from_plans(
        name,
        arguments,
        list(dict.fromkeys(imported)),
        num_input_channels,
        num_output_channels,
        allow_init=True,
        deep_supervision=enable_deep_supervision,
    )


def convolution_of(arguments: Mapping[str, Any]) -> type[nn.Module]:
    """The class of the plans' convolution.

    Args:
        arguments: Keyword arguments of the plans' network.

    Raises:
        ValueError: it is none of two or three axes.
    """
    _check_named_classes(arguments, ["conv_op"])
    found: Any = _located(arguments["conv_op"])
    check_values({"conv_op": type[Any]}, {"conv_op": found})
    check_conv(found)
    return cast("type[nn.Module]", found)


def check_residual_norm(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse plans that nnU-Net's residual U-Net can't be initialised with: it sets norms before a sum to zero.

    Args:
        name: Dotted path of the plans' network.
        arguments: Its keyword arguments in the plans.

    Raises:
        ValueError: the norm is none of PyTorch's with weights.
    """
    norm = _located(arguments.get("norm_op"))
    is_torchs = isinstance(norm, type) and issubclass(norm, _NormBase)
    if not name.endswith("ResidualEncoderUNet") or not (norm is None or is_torchs):
        return
    options = arguments.get("norm_op_kwargs") or {}
    if norm is None or not options.get("affine", issubclass(norm, _BatchNorm)):
        raise ValueError(
            f"nnU-Net's ResidualEncoderUNet needs a norm with weights, got norm_op {arguments.get('norm_op')!r:.80} "
            f"with {dict(options)!r:.80}: use what nnU-Net plans, instance norm with affine true."
        )


def _check_named_classes(arguments: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse names of classes that nnU-Net would take for none, or fail at without a word of the plans.

    Raises:
        ValueError: names the argument and its value.
    """
    for name in names:
        if name not in arguments:
            raise ValueError(
                f"_kw_requires_import must name arguments of arch_kwargs, got {name!r}, which is none of "
                f"{', '.join(arguments) or 'them'}: plan the data set again."
            )
        path = arguments[name]
        if path is not None and not callable(_located(path)):
            raise ValueError(
                f"{name} must be null or the dotted path of a class, got {path!r:.80}: correct the plans, or plan the "
                "data set again."
            )


def _located(path: Any) -> Any:
    try:
        return pydoc.locate(path) if isinstance(path, str) else None
    except pydoc.ErrorDuringImport:
        return None
