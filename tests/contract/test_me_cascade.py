"""meU-net's cascade in the real trainer: what each stage trains, and what stage 2 says when stage 1 is not ready."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

from nnunet_ext.architectures.me_unet import DualMeUNet
from nnunet_ext.architectures.post_concat_unet import PostConcatUNet
from nnunet_ext.memory.tracker import StorageTracker
from nnunet_ext.plans.me_cascade_planner import MeCascadePlanner
from nnunet_ext.trainers.nnUNetTrainerMeCascade import nnUNetTrainerMeCascade
from nnunet_ext.trainers.nnUNetTrainerMeCascadeCheckpointing import nnUNetTrainerMeCascadeCheckpointing
from nnunet_ext.trainers.nnUNetTrainerMeCascadeOnePass import nnUNetTrainerMeCascadeOnePass
from nnunet_ext.trainers.nnUNetTrainerMeUNet import nnUNetTrainerMeUNet
from nnunet_ext.trainers.priors import FirstStage
from tests.contract.gradients import gradients_of
from tests.contract.plans import sizes
from tests.contract.test_me_unet import batch_of, targets

CPU = torch.device("cpu")
CONTEXT, POST = "3d_me_context", "3d_post_concat"
Dataset = Callable[[str], int]
SMALL = sizes([4, 8, 16], convs=1)


@pytest.fixture(autouse=True)
def _augment_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")


@pytest.fixture
def trainer_of(dataset: Dataset, workspace: Path) -> Callable[..., Any]:
    """Make a trainer: ``trainer_of(POST, "regions", trainer_class=..., fusion="pre")``; options are of its network."""

    def make(
        configuration: str,
        kind: str = "labels",
        trainer_class: type = nnUNetTrainerMeCascade,
        name: str = "nnUNetCascadeTest",
        patch: int = 24,
        residual: bool = False,
        **options: Any,
    ) -> Any:
        (folder,) = (workspace / "preprocessed").glob(f"Dataset{dataset(kind)}_*")
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        dataset_json = json.loads((folder / "dataset.json").read_text())
        full = plans["configurations"]["3d_fullres"]
        arguments = full["architecture"]["arch_kwargs"]
        arguments.update(SMALL)
        if residual:
            arguments["n_blocks_per_stage"] = arguments.pop("n_conv_per_stage")
        planned = {**full, "patch_size": [patch] * 3, "me_unet": {"standard_patch_size": [16, 16, 16]}}
        plans["configurations"] = MeCascadePlanner.with_stages({"3d_fullres": planned}, dataset_json)
        plans["configurations"][CONTEXT]["me_unet"] = {"k": 1.5 if patch == 24 else patch / 16}
        plans["configurations"][configuration]["architecture"]["arch_kwargs"].update(options)
        plans["plans_name"] = name
        torch.manual_seed(0)
        return trainer_class({**plans, "continue_training": False}, configuration, 0, dataset_json, CPU)

    return make


def ready(trainer: Any) -> Any:
    trainer.initialize()
    trainer.set_deep_supervision_enabled(True)
    trainer.network.train()
    return trainer


@pytest.mark.parametrize(
    ("kind", "cascade", "alone_class"),
    [
        ("labels", nnUNetTrainerMeCascade, nnUNetTrainerMeUNet),
        ("regions", nnUNetTrainerMeCascade, nnUNetTrainerMeUNet),
        ("ignore", nnUNetTrainerMeCascade, nnUNetTrainerMeUNet),
        ("labels", nnUNetTrainerMeCascadeOnePass, nnUNetTrainer),
    ],
)
def test_each_branch_gets_the_gradients_of_a_network_of_its_own(
    kind: str, cascade: type, alone_class: type, trainer_of: Callable[..., Any]
) -> None:
    ours = ready(trainer_of(CONTEXT, kind, cascade, patch=28))
    assert [branch.patch for branch in ours.branches] == [(24, 24, 24), (28, 28, 28)]
    batch = batch_of(ours)
    ours.network.double()
    batch["data"] = batch["data"].double()
    by_parameter = dict(zip(ours.network.parameters(), gradients_of(ours, batch), strict=True))
    for branch in ours.branches:
        alone = trainer_of(CONTEXT, kind, alone_class, patch=branch.patch[0])
        alone.plans_manager.plans["configurations"][CONTEXT]["architecture"]["network_class_name"] = (
            "dynamic_network_architectures.architectures.unet.PlainConvUNet"
        )
        alone.plans_manager.plans["configurations"][CONTEXT]["architecture"]["arch_kwargs"].pop("regions")
        alone.configuration_manager = alone.plans_manager.get_configuration.__wrapped__(alone.plans_manager, CONTEXT)
        ready(alone)
        alone.network.load_state_dict(branch.network.state_dict())
        alone.network.double()
        margin = (28 - branch.patch[0]) // 2
        centre = (..., *[slice(margin, 28 - margin)] * 3)
        cropped = {"data": batch["data"][centre], "target": targets(alone, batch["target"][0][centre])}
        for parameter, wanted in zip(branch.network.parameters(), gradients_of(alone, cropped), strict=True):
            torch.testing.assert_close(by_parameter[parameter], wanted, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("configuration", [CONTEXT, POST])
def test_checkpointing_needs_less_and_changes_no_gradient(configuration: str, trainer_of: Callable[..., Any]) -> None:
    found, peaks = [], []
    for trainer_class in (nnUNetTrainerMeCascade, nnUNetTrainerMeCascadeCheckpointing):
        network = ready(trainer_of(configuration, trainer_class=trainer_class)).network
        network = getattr(network, "branches", [network])[0]
        torch.manual_seed(1)
        x = torch.randn(2, 4 if configuration == POST else 2, 24, 24, 24)
        with StorageTracker() as tracker:
            sum(z.square().mean() for z in network(x)).backward()
        peaks.append(tracker.peak)
        found.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert peaks[1] < 0.9 * peaks[0]


def test_gradients_are_clipped_branch_by_branch(trainer_of: Callable[..., Any]) -> None:
    def norms(clip: bool) -> list[float]:
        found = dict(zip(trainer.network.parameters(), gradients_of(trainer, batch, clip), strict=True))
        of_branches = ([found[p].flatten() for p in branch.network.parameters()] for branch in trainer.branches)
        return [float(torch.cat(gradients).norm()) for gradients in of_branches]

    trainer = ready(trainer_of(CONTEXT))
    batch = batch_of(trainer)
    for branch, norm, wanted in zip(trainer.branches, norms(clip=False), (100, 1), strict=True):
        for parameter in branch.network.parameters():
            parameter.register_hook(lambda gradient, factor=wanted / norm: gradient * factor)
    assert norms(clip=False) == pytest.approx([100, 1], rel=1e-3)
    assert norms(clip=True) == pytest.approx([12, 1], rel=1e-3)


def test_a_step_of_two_branches_peaks_like_one_branch(trainer_of: Callable[..., Any]) -> None:
    trainer = ready(trainer_of(CONTEXT, patch=28))
    batch = batch_of(trainer)
    trainer.train_step(batch)  # makes the optimiser's state

    def peak(branches: list[Any]) -> int:
        trainer.branches = branches
        with StorageTracker() as tracker:
            trainer.train_step(batch)
        return tracker.peak

    both = trainer.branches
    assert peak(both) <= 1.05 * max(peak([branch]) for branch in both)


@pytest.mark.parametrize("kind", ["labels", "regions", "ignore"])
def test_online_validation_scores_the_mean_of_both_branches(kind: str, trainer_of: Callable[..., Any]) -> None:
    trainer = ready(trainer_of(CONTEXT, kind))
    trainer.network.eval()
    assert trainer.network.regions is (kind == "regions")
    with torch.no_grad():
        found = trainer.validation_step(batch_of(trainer))
        expected = nnUNetTrainer.validation_step(trainer, batch_of(trainer))
    for key in ("tp_hard", "fp_hard", "fn_hard"):
        assert (found[key] == expected[key]).all()
    assert np.isfinite(found["loss"])


def test_regions_reach_the_network_that_predicts_through_the_checkpoint(
    trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = ready(trainer_of(CONTEXT, "regions"))
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    del trainer.configuration_manager.network_arch_init_kwargs["regions"]  # as nnU-Net's own plans
    network = nnUNetTrainerMeCascade.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 2, 2, enable_deep_supervision=False
    )
    assert not network.regions
    network.load_state_dict(torch.load(tmp_path / "checkpoint.pth", weights_only=False)["network_weights"], strict=True)
    assert network.regions


def test_the_plans_tell_the_stages_apart(trainer_of: Callable[..., Any]) -> None:
    for configuration, network in ((CONTEXT, DualMeUNet), (POST, PostConcatUNet)):
        trainer = ready(trainer_of(configuration))
        assert type(trainer.network) is network
        assert trainer.is_expanded is (configuration == CONTEXT)
    assert trainer.network.prior_channels == 2
    assert trainer.network.encoder.stages[0][0].convs[0].conv.in_channels == 2
    pre = ready(trainer_of(POST, fusion="pre")).network
    assert pre.encoder.stages[0][0].convs[0].conv.in_channels == 4


def test_stage_two_takes_nnunets_own_step(trainer_of: Callable[..., Any]) -> None:
    ours = ready(trainer_of(POST))
    host = ready(trainer_of(POST, trainer_class=nnUNetTrainer))
    host.network.load_state_dict(ours.network.state_dict())
    for trainer in (ours, host):
        batch = batch_of(trainer)
        batch["data"] = torch.cat((batch["data"], batch["data"][:, :2].sign()), dim=1)
        trainer.train_step(batch)
    torch.testing.assert_close(ours.network.state_dict(), host.network.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "residual"), [("labels", False), ("regions", False), ("ignore", False), ("labels", True)]
)
def test_both_stages_train_validate_and_predict(
    kind: str, residual: bool, trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    name = f"nnUNetWhole{kind}{residual}"

    def short(configuration: str, fold: int = 0) -> Any:
        trainer = trainer_of(configuration, kind, name=name, residual=residual)
        trainer.fold, trainer.output_folder = fold, f"{trainer.output_folder_base}/fold_{fold}"
        Path(trainer.output_folder).mkdir(parents=True, exist_ok=True)
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 1, 1
        return trainer

    first = short(CONTEXT)
    first.initialize()
    pretrained = copy.deepcopy(first.network)
    pretrained.regions = kind != "regions"
    torch.save({"network_weights": pretrained.state_dict()}, tmp_path / "pretrained.pth")
    load_pretrained_weights(first.network, str(tmp_path / "pretrained.pth"))
    first.run_training()
    assert first.network.regions is (kind == "regions")
    first.perform_actual_validation()
    priors = Path(first.output_folder_base) / "predicted_next_stage" / POST
    _, validated = first.do_split()
    assert {path.name for path in priors.iterdir()} == {f"{case}.b2nd" for case in validated}

    second = short(POST)
    with pytest.raises(ValueError, match=r"4 of 6 have none in .*: folds 1, 2, 3, 4, run first: nnUNetv2_train"):
        second.run_training()
    write_priors(second, second.do_split()[0])
    second = short(POST)
    second.run_training()
    second.perform_actual_validation()
    assert (Path(second.output_folder) / "validation" / "summary.json").is_file()

    predictor = nnUNetPredictor(use_mirroring=False, device=CPU, perform_everything_on_device=False)
    image = torch.randn(2, 26, 24, 30)
    predictor.initialize_from_trained_model_folder(first.output_folder_base, (0,), "checkpoint_final.pth")
    logits = predictor.predict_logits_from_preprocessed_data(image)
    assert predictor.network.regions is (kind == "regions")
    heads = second.label_manager.num_segmentation_heads
    assert logits.shape == (heads, 26, 24, 30)
    labels = second.label_manager.convert_logits_to_segmentation(logits).numpy()
    prior = convert_labelmap_to_one_hot(labels, second.label_manager.foreground_labels, np.float32)
    predictor.initialize_from_trained_model_folder(second.output_folder_base, (0,), "checkpoint_final.pth")
    both = torch.cat((image, torch.from_numpy(prior)))
    assert predictor.predict_logits_from_preprocessed_data(both).shape == (heads, 26, 24, 30)
    with pytest.raises(ValueError, match="-prev_stage_predictions"):
        predictor.predict_logits_from_preprocessed_data(image)


def write_priors(trainer: Any, cases: list[str], value: int = 1) -> Path:
    """Predictions of stage 1 as its validation writes them."""
    dataset_class = infer_dataset_class(trainer.preprocessed_dataset_folder)
    folder = Path(trainer.folder_with_segs_from_previous_stage)
    folder.mkdir(parents=True, exist_ok=True)
    dataset = dataset_class(trainer.preprocessed_dataset_folder, list(cases))
    for case in cases:
        labels = np.zeros(dataset.load_case(case)[0].shape[1:], dtype=np.uint8)
        labels[4:8] = value
        dataset_class.save_seg(labels, str(folder / case))
    return folder


@pytest.fixture
def stage_two(trainer_of: Callable[..., Any], request: pytest.FixtureRequest) -> Any:
    """A trainer of stage 2 whose priors are all there, in a folder of this test's own."""
    trainer = trainer_of(POST, name=f"nnUNetPriors{abs(hash(request.node.name))}")
    write_priors(trainer, [case for keys in trainer.do_split() for case in keys])
    return trainer


def test_complete_priors_pass(stage_two: Any) -> None:
    stage_two.initialize()
    stage_two.get_tr_and_val_datasets()


def test_missing_folds_are_named_with_their_commands(stage_two: Any) -> None:
    stage_two.initialize()
    folder = Path(stage_two.folder_with_segs_from_previous_stage)
    splits = json.loads((Path(stage_two.preprocessed_dataset_folder_base) / "splits_final.json").read_text())
    for fold in (1, 3):
        for case in splits[fold]["val"]:
            (folder / f"{case}.b2nd").unlink()
    checkpoint = folder.parent.parent / "fold_3" / "checkpoint_final.pth"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    with pytest.raises(ValueError, match="folds 1, 3, run first") as error:
        stage_two.get_tr_and_val_datasets()
    name = Path(stage_two.preprocessed_dataset_folder_base).name
    command = f"nnUNetv2_train {name} {CONTEXT} %d -p {stage_two.plans_manager.plans_name} -tr nnUNetTrainerMeCascade"
    assert f"{command % 1} -device cpu;" in str(error.value)
    assert f"{command % 3} -device cpu --val." in str(error.value)
    assert "\n" not in str(error.value)


def test_cases_that_no_fold_validates_are_named(tmp_path: Path) -> None:
    splits = [["a"], ["b"]]
    stage = FirstStage(
        command="nnUNetv2_train D C", options="-p P", model=tmp_path, configuration="C", priors=tmp_path, splits=splits
    )
    with pytest.raises(ValueError, match="3 of 3 have none") as error:
        stage.check([SimpleNamespace(identifiers=["a", "z", "y"])], [1])
    assert "fold 0, run first: nnUNetv2_train D C 0 -p P; no fold of splits_final.json validates y, z (2 in" in str(
        error.value
    )


def test_validation_alone_checks_its_priors_too(stage_two: Any) -> None:
    stage_two.initialize()
    shutil.rmtree(stage_two.folder_with_segs_from_previous_stage)
    with pytest.raises(ValueError, match="fold 0, run first"):
        stage_two.perform_actual_validation()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_half_written_prior_is_named(stage_two: Any, share: float) -> None:
    stage_two.initialize()
    case = stage_two.do_split()[0][1]
    path = Path(stage_two.folder_with_segs_from_previous_stage) / f"{case}.b2nd"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=f"prediction of {case} in .* can't be read .*run first: nnUNetv2_train"):
        stage_two.get_tr_and_val_datasets()


def test_a_prior_with_other_labels_is_refused(stage_two: Any) -> None:
    stage_two.initialize()
    case = stage_two.do_split()[1][0]
    write_priors(stage_two, [case], value=3)
    with pytest.raises(ValueError, match=rf"{case} must hold labels of \[1, 2\], got \[3\]"):
        stage_two.get_tr_and_val_datasets()


def test_a_prior_of_another_shape_is_refused(stage_two: Any) -> None:
    stage_two.initialize()
    case = stage_two.do_split()[0][0]
    folder = Path(stage_two.folder_with_segs_from_previous_stage)
    stage_two.dataset_class.save_seg(np.zeros((5, 6, 7), dtype=np.uint8), str(folder / case))
    with pytest.raises(ValueError, match=rf"{case} must have the shape .* got \[5, 6, 7\]"):
        stage_two.get_tr_and_val_datasets()


@pytest.mark.parametrize("change", [{"labels": {"background": 0, "b": 1, "a": 2}}, {"regions_class_order": [1]}])
def test_labels_changed_since_stage_one_are_refused(stage_two: Any, change: dict[str, Any]) -> None:
    stage_two.initialize()
    model = Path(stage_two.folder_with_segs_from_previous_stage).parent.parent
    (model / "dataset.json").write_text(json.dumps({**stage_two.dataset_json, **change}))
    with pytest.raises(ValueError, match=f"Both stages need the same {next(iter(change))}, but stage 1"):
        stage_two.get_tr_and_val_datasets()


def test_labels_changed_since_planning_are_refused(trainer_of: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"got 5, but dataset.json has 2 of them: plan again"):
        trainer_of(POST, prior_channels=5).initialize()


def test_plans_that_link_the_stages_one_way_are_refused(stage_two: Any) -> None:
    stage_two.initialize()
    plans = copy.deepcopy(stage_two.plans_manager.plans)
    del plans["configurations"][CONTEXT]["next_stage"]
    stage_two.plans_manager = type(stage_two.plans_manager)(plans)
    with pytest.raises(ValueError, match="which must name it as next_stage, got None: add it to the plans"):
        stage_two.get_tr_and_val_datasets()


@pytest.mark.parametrize("augment", [False, True])
def test_the_prior_is_shown_as_it_was_predicted_unless_asked_otherwise(augment: bool) -> None:
    class Cascade(nnUNetTrainerMeCascade):
        augment_prior = augment or nnUNetTrainerMeCascade.augment_prior

    options = {
        "patch_size": (16, 16, 16),
        "rotation_for_DA": (-0.1, 0.1),
        "deep_supervision_scales": None,
        "mirror_axes": (0, 1, 2),
        "do_dummy_2d_data_aug": False,
        "use_mask_for_norm": [False],
        "is_cascaded": True,
        "foreground_labels": [1, 2],
    }

    def names(trainer: type) -> list[str]:
        transforms = trainer.get_training_transforms(**options).transforms
        return [type(getattr(transform, "transform", transform)).__name__ for transform in transforms]

    left_out = ["ApplyRandomBinaryOperatorTransform", "RemoveRandomConnectedComponentFromOneHotEncodingTransform"]
    stock = names(nnUNetTrainer)
    assert set(left_out) < set(stock)
    assert names(Cascade) == (stock if augment else [name for name in stock if name not in left_out])
