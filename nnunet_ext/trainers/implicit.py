"""What trainers of the Implicit U-Net share: points for the loss, AdamW, checks of sparse prediction in the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_ext.architectures.implicit.point_sampling import PointSampler, at_points
from nnunet_ext.architectures.implicit_unet import ImplicitUNet
from nnunet_ext.trainers.adamw import AdamWMixin
from nnunet_ext.trainers.dense_check import check_against_dense
from nnunet_ext.trainers.from_plans import build_from_plans, planned_arguments
from nnunet_ext.trainers.several_gpus import is_first
from nnunet_ext.trainers.unwrapped import unwrapped

# Attributes of the trainer that are arguments of the network.
NETWORK_OPTIONS = ("decoder_width", "decoder_depth", "frequencies", "mesh_spacing", "dropout", "n_points")


class ImplicitTrainerMixin(AdamWMixin):
    """Trains the Implicit U-Net on points of each patch; place it before nnUNetTrainer.

    nnU-Net's own loss takes logits and labels of the points, (B, C, K) each. Validation and prediction use dense
    logits. All hyper-parameters are attributes. Those of the network (`NETWORK_OPTIONS`) give way to the plans where
    these hold an option of the same name, in training and prediction alike.

    Attributes:
        network_class: Network that is trained.
        n_points: Points per patch (paper: k = 30,000), at most a quarter of the voxels.
        boundary_share: Share of them at label boundaries (paper: alpha = 0.5).
        boundary_sigma: Standard deviation of their displacement from the boundary, in voxels of the finest axis
            (paper: sigma = 5); the same length in mm along the other axes.
        class_balanced: Give every label the same number of boundary points (not in the paper).
        decoder_width: Units of a hidden layer of the decoder (paper: 512).
        decoder_depth: Hidden layers of the decoder (paper: 8).
        frequencies: Octaves of the positional encoding per axis (paper: L = 10); None: as many as differ on the patch.
        mesh_spacing: Voxels between the mesh points of prediction (paper: 4).
        dropout: Probability in the decoder (paper: 0.2).
        learning_rate: Learning rate of AdamW at the start of nnU-Net's polynomial decay (paper: 1e-4, AdamW).
        adamw_weight_decay: See `AdamWMixin` (not in the paper).
        dense_check_cases: Validation cases that are predicted densely too, to tell in the log what sparse prediction
            loses. 0: none.
    """

    network_class: type[ImplicitUNet]
    n_points: int = 30_000
    boundary_share: float = 0.5
    boundary_sigma: float = 5.0
    class_balanced: bool = False
    decoder_width: int = 512
    decoder_depth: int = 8
    frequencies: int | None = None
    mesh_spacing: int = 4
    dropout: float = 0.2
    learning_rate = 1e-4
    dense_check_cases: int = 3
    drawn: Mapping[str, Any] = {}  # what the network is given in this step, in addition to the image

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the network from the plans, for training and prediction."""
        planned = planned_arguments(configuration_manager)
        options = {name: getattr(cls, name) for name in NETWORK_OPTIONS if name not in planned}
        return build_from_plans(
            cls.network_class,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
            **options,
        )

    def initialize(self) -> None:
        """Switch deep supervision off, and tell the network how its logits are meant."""
        self.enable_deep_supervision = False
        super().initialize()
        network = implicit_network(self.network)
        network.point_decoder.seg_layers.regions = self.label_manager.has_regions
        self.sampler = PointSampler.for_spacing(
            network.n_points,
            self.boundary_share,
            self.boundary_sigma,
            self.configuration_manager.spacing,
            self.class_balanced,
        )

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Do nothing: there is no deep supervision."""

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Train as nnU-Net does, on points of the patches: network and loss get only these."""
        target = batch["target"].to(self.device, non_blocking=True)
        manager = self.label_manager
        self.drawn = {"points": self.sampler(target, manager.ignore_label, manager.has_regions)}

        def with_points(_: nn.Module, images: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return images, {**options, **self.drawn}

        # On the outermost module, so that the points pass through DDP and torch.compile as an argument.
        hook = self.network.register_forward_pre_hook(with_points, with_kwargs=True)
        try:
            result: dict[str, Any] = super().train_step({**batch, "target": at_points(target, self.drawn["points"])})
            return result
        finally:
            hook.remove()

    def on_validation_epoch_start(self) -> None:
        """Count what is refined from here on."""
        super().on_validation_epoch_start()
        implicit_network(self.network).refined_share(reset=True)

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Log the refined share."""
        super().on_validation_epoch_end(val_outputs)
        self._log_refined_share("of the validation patches")

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate as nnU-Net does, log the refined share and what a few cases lose by sparse prediction."""
        implicit_network(self.network).refined_share(reset=True)
        super().perform_actual_validation(save_probabilities)
        self._log_refined_share("of the validation cases")
        if is_first(self) and implicit_network(self.network).sparse:
            self._log_dense_check()

    def _log_dense_check(self) -> None:
        _, cases = self.do_split()
        cases = cases[: self.dense_check_cases]
        if not cases:
            return
        try:
            lines = check_against_dense(self, implicit_network(self.network), cases).lines()
        except Exception as error:  # whatever it is, the validation is done and must not be lost
            lines = [f"sparse prediction was not compared with dense prediction: {type(error).__name__}: {error}"]
        for line in lines:
            self.print_to_log_file(line)

    def _log_refined_share(self, of_what: str) -> None:
        share = implicit_network(self.network).refined_share(reset=True)
        if share is not None:
            self.print_to_log_file(f"refined share {of_what}: {share:.4f}")


def implicit_network(network: nn.Module) -> ImplicitUNet:
    """The network itself, see `unwrapped`."""
    network = unwrapped(network)
    if not isinstance(network, ImplicitUNet):
        raise TypeError(f"The trainer of the Implicit U-Net needs an ImplicitUNet, got {type(network).__name__}.")
    return network
