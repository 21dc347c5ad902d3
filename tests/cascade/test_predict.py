"""What `nnunet-ext cascade-predict` runs, keeps, continues and refuses; the predictor itself is replaced."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_ext import cli
from nnunet_ext.cascade import predict as cascade_predict
from nnunet_ext.cascade.predict import Options
from nnunet_ext.cascade.stage import Stage
from nnunet_ext.errors import UsageError
from tests.comparison.conftest import CONFIGURATION

REAL_RUN = cascade_predict._run  # other tests replace it

DATASET = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
CONFIGURATIONS = {
    "3d_fullres": CONFIGURATION,
    "3d_me_context": {"inherits_from": "3d_fullres", "next_stage": "3d_post_concat"},
    "3d_post_concat": {"inherits_from": "3d_fullres", "previous_stage": "3d_me_context"},
}
MODEL = "nnUNetTrainerMeCascade__nnUNetMeCascadePlans__"
COMMAND = ["cascade-predict", "-i", "in", "-o", "out", "-d", "7", "-f", "0", "1", "-device", "cpu"]


def write_checkpoint(folder: Path, configuration: str, **changes: Any) -> None:
    content = {
        "trainer_name": "nnUNetTrainerMeCascade",
        "init_args": {"configuration": configuration},
        "network_weights": {},
        **changes,
    }
    torch.save(content, folder / "checkpoint_final.pth")


def write_scan(path: Path, value: int = 0, shape: tuple[int, ...] = (3, 4, 5)) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(np.full(shape, value, dtype=np.uint8)), str(path))


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both stages trained in two folds, and two scans in the current folder's `in`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    folder = tmp_path / "results" / "Dataset007_Toy"
    for configuration in ("3d_me_context", "3d_post_concat"):
        model = folder / f"{MODEL}{configuration}"
        for fold in (0, 1):
            (model / f"fold_{fold}").mkdir(parents=True)
            write_checkpoint(model / f"fold_{fold}", configuration)
        named = {"image_reader_writer": "SimpleITKIO", "label_manager": "LabelManager"}
        plans = {"configurations": CONFIGURATIONS, **named}
        (model / "plans.json").write_text(json.dumps(plans))
        (model / "dataset.json").write_text(json.dumps(DATASET))
    Path("in").mkdir()
    for case in ("one", "two"):
        for channel in (0, 1):
            write_scan(Path("in") / f"{case}_{channel:04d}.nii.gz")
    return folder


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Stages that ran and the cases they predicted: those that were not there."""
    found: list[tuple[str, list[str]]] = []

    def predict(stage: Stage, images: Path, output: Path, prior: Path | None, options: Options) -> None:
        cases = [case for case in ("one", "two") if not (output / f"{case}.nii.gz").is_file()]
        for case in cases:
            assert prior is None or (prior / f"{case}.nii.gz").is_file()
            write_scan(output / f"{case}.nii.gz", 1)
        found.append((stage.folder.name.removeprefix(MODEL), cases))

    monkeypatch.setattr(cascade_predict, "_run", predict)
    return found


Runs = list[tuple[str, list[str]]]
BOTH = ["one", "two"]
FIRST, SECOND = "3d_me_context", "3d_post_concat"


def test_both_stages_run_and_the_first_is_kept_beside_the_result(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(COMMAND) == 0
    assert runs == [(FIRST, BOTH), (SECOND, BOTH)]
    assert {path.name for path in Path("out").iterdir()} == {"one.nii.gz", "two.nii.gz"}
    kept = Path("out_3d_me_context").resolve()
    assert {"one.nii.gz", "two.nii.gz"} <= {path.name for path in kept.iterdir()}
    assert capsys.readouterr().out == f"Stage 1: {kept}\nResult: out\n"


def test_called_again_it_predicts_everything_anew(runs: Runs) -> None:
    for _ in range(2):
        assert cli.main([*COMMAND, "--keep", "mine"]) == 0
    assert runs[2:] == [(FIRST, BOTH), (SECOND, BOTH)]
    assert Path("mine", "one.nii.gz").is_file()
    assert not Path("out_3d_me_context").exists()


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def spoil_with_nan(path: Path) -> None:
    image = np.zeros((3, 4, 5), dtype=np.float32)
    image[0, 0, :2] = np.nan, np.inf
    sitk.WriteImage(sitk.GetImageFromArray(image), str(path))


@pytest.mark.parametrize(
    ("happens", "first", "second"),
    [
        (lambda: None, [], []),
        (lambda: Path("out/one.nii.gz").unlink(), [], ["one"]),
        (lambda: cut(Path("out/two.nii.gz"), 0.02), [], ["two"]),
        (lambda: cut(Path("out/two.nii.gz"), 0.9), [], ["two"]),
        (lambda: write_scan(Path("out/two.nii.gz"), 1, (3, 4, 6)), [], ["two"]),
        (lambda: write_scan(Path("out/two.nii.gz"), 7), [], ["two"]),
        (lambda: cut(Path("out_3d_me_context/two.nii.gz"), 0.9), ["two"], ["two"]),
        (lambda: write_scan(Path("in/one_0001.nii.gz"), 9), ["one"], ["one"]),
    ],
    ids=["nothing", "missing", "2 %", "90 %", "other scan", "other labels", "prior cut", "scan replaced"],
)
def test_continued_it_predicts_what_is_missing_broken_or_replaced(
    happens: Callable[[], Any], first: list[str], second: list[str], runs: Runs
) -> None:
    cli.main(COMMAND)
    happens()
    assert cli.main([*COMMAND, "--continue_prediction"]) == 0
    assert runs[2:] == [(FIRST, first), (SECOND, second)]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], runs: Runs, already: int = 0) -> str:
    assert cli.main(arguments) == 2
    assert len(runs) == already
    error = capsys.readouterr().err
    return error.splitlines()[-1]


def test_a_continuation_with_other_settings_is_refused(
    runs: Runs, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(COMMAND)
    again = [*COMMAND, "--continue_prediction"]
    assert "was made with others" in refused([*again, "--disable_tta"], capsys, runs, 2)
    write_checkpoint(results / f"{MODEL}{FIRST}" / "fold_1", FIRST, network_weights={"trained": "again"})
    assert "was made with others" in refused(again, capsys, runs, 2)


def test_folds_of_stage_one_may_be_others(runs: Runs, results: Path) -> None:
    (results / f"{MODEL}{SECOND}" / "fold_1" / "checkpoint_final.pth").unlink()
    assert cli.main([*COMMAND[:8], "0", "-f1", "0", "1", "-device", "cpu"]) == 0
    note = json.loads((Path("out_3d_me_context") / cascade_predict.NOTE).read_text())
    assert note["settings"]["stage 1"]["checkpoints"] == [f"fold_{fold}/checkpoint_final.pth" for fold in "01"]


def test_what_is_not_trained_is_named(runs: Runs, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / f"{MODEL}{FIRST}" / "fold_1" / "checkpoint_final.pth").unlink()
    message = refused(COMMAND, capsys, runs)
    assert f"{MODEL}{FIRST} must have checkpoint_final.pth for the folds 0 1, it lacks 1 (there is 0)" in message
    assert "the cascade needs an existing folder" in refused([*COMMAND, "-p", "other"], capsys, runs)
    assert "-d must be one data set" in refused([*COMMAND, "-d", "8"], capsys, runs)


@pytest.mark.parametrize("configuration", ["3d_fullres", FIRST])
def test_a_configuration_without_a_stage_before_it_is_refused(
    configuration: str, runs: Runs, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = results / f"{MODEL}3d_fullres"
    model.symlink_to(results / f"{MODEL}{FIRST}")
    message = refused([*COMMAND, "-c", configuration], capsys, runs)
    assert f"{configuration} has no previous_stage in nnUNetMeCascadePlans: use {SECOND}" in message


def test_stages_with_other_labels_are_refused(runs: Runs, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = {**DATASET, "labels": {"background": 0, "b": 1}}
    (results / f"{MODEL}{FIRST}" / "dataset.json").write_text(json.dumps(changed))
    assert "both stages must be trained with the same labels" in refused(COMMAND, capsys, runs)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda: Path("in/two_0001.nii.gz").unlink(), "two: has 1 channel in two_0000.nii.gz, dataset.json has 2"),
        (lambda: write_scan(Path("in/one_0002.nii.gz")), "one: has 3 channels in one_0000.nii.gz, one_0001.nii.gz, "),
        (lambda: cut(Path("in/one_0001.nii.gz"), 0.5), "one: in/one_0001.nii.gz can't be read: it is cut off"),
        (lambda: spoil_with_nan(Path("in/two_0000.nii.gz")), "two: in/two_0000.nii.gz holds NaN or infinity in 2"),
        (lambda: Path("in/._one_0000.nii.gz").write_bytes(b"Mac"), "has ._one_0000.nii.gz, which nnU-Net takes"),
        (lambda: write_scan(Path("in/three.nii.gz")), "has three.nii.gz, which nnU-Net takes for one too"),
        (lambda: [path.unlink() for path in Path("in").iterdir()], "needs scans called CASE_0000.nii.gz"),
        (lambda: Path("in").rename("elsewhere"), "-i needs an existing folder of scans"),
    ],
    ids=["channel missing", "too many", "cut off", "NaN", "hidden", "no channel number", "empty", "no folder"],
)
def test_incomplete_input_is_refused_before_anything_is_predicted(
    spoil: Callable[[], Any], message: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil()
    assert message in refused(COMMAND, capsys, runs)


@pytest.mark.parametrize("folders", [["-o", "in"], ["--keep", "in"], ["--keep", "out"]])
def test_folders_that_are_one_are_refused(folders: list[str], runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert "must be three folders" in refused([*COMMAND, *folders], capsys, runs)
    assert len(list(Path("in").iterdir())) == 4


@pytest.mark.parametrize(
    ("option", "message"),
    [(["-step_size", "0"], "share of the patch, got 0.0"), (["-nps", "0"], "must be at least 1, got 3 and 0")],
)
def test_numbers_that_make_no_sense_are_refused(
    option: list[str], message: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused([*COMMAND, *option], capsys, runs)


def test_a_stage_that_leaves_cases_out_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cascade_predict, "_run", lambda *_: None)
    assert cli.main(COMMAND) == 2
    assert (
        "must now hold all predictions, complete: one, two is missing or cut off (2 in all)" in capsys.readouterr().err
    )


def test_a_stage_that_cuts_a_prediction_off_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(stage: Stage, images: Path, output: Path, prior: Path | None, options: Options) -> None:
        for case in BOTH:
            write_scan(output / f"{case}.nii.gz", 1)
        cut(output / "two.nii.gz", 0.5)

    monkeypatch.setattr(cascade_predict, "_run", full_disk)
    assert cli.main(COMMAND) == 2
    assert "complete: two is missing or cut off (1 in all)" in capsys.readouterr().err


def test_probabilities_that_were_cut_off_are_predicted_again(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = cascade_predict._run

    def with_probabilities(stage: Stage, images: Path, output: Path, prior: Path | None, options: Options) -> None:
        predict(stage, images, output, prior, options)
        for case in BOTH if prior else ():
            np.savez_compressed(output / f"{case}.npz", probabilities=np.random.rand(2, 3, 4, 5))
            (output / f"{case}.pkl").write_bytes(pickle.dumps({"spacing": (1, 1, 1)}))

    monkeypatch.setattr(cascade_predict, "_run", with_probabilities)
    command = [*COMMAND, "--save_probabilities"]
    assert cli.main(command) == 0
    cut(Path("out/one.npz"), 0.9)
    assert cli.main([*command, "--continue_prediction"]) == 0
    cut(Path("out/two.pkl"), 0.9)
    assert cli.main([*command, "--continue_prediction"]) == 0
    assert runs[2:] == [(FIRST, []), (SECOND, ["one"]), (FIRST, []), (SECOND, ["two"])]


def test_channels_of_one_file_are_taken_as_nnunet_takes_them(runs: Runs) -> None:
    for case in BOTH:
        Path(f"in/{case}_0001.nii.gz").unlink()
        both = sitk.GetImageFromArray(np.zeros((2, 3, 4, 5), dtype=np.uint8), isVector=False)
        sitk.WriteImage(both, f"in/{case}_0000.nii.gz")
    assert cli.main(COMMAND) == 0


@pytest.mark.parametrize("name", ["Dataset1234_Toy.v2", "Dataset1234"])
def test_the_number_of_a_data_set_is_found_as_nnunet_finds_it(name: str, runs: Runs, results: Path) -> None:
    results.rename(results.with_name(name))
    command = [word if word != "7" else "1234" for word in COMMAND]
    assert cli.main(command) == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "can't write to .*No space left on device"),
        (RuntimeError("Exception thrown in SimpleITK ImageFileWriter_Execute:\nFile too large"), "can't write to"),
        (RuntimeError("Some background workers died"), "a process that reads or writes scans"),
    ],
)
def test_what_a_predictor_can_not_write_is_one_sentence(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Predictor:
        def __init__(self, **_: object) -> None: ...

        def initialize_from_trained_model_folder(self, *_: object) -> None: ...

        def predict_from_files(self, *_: object, **__: object) -> None:
            raise error

    monkeypatch.setattr("nnunetv2.inference.predict_from_raw_data.nnUNetPredictor", Predictor)
    stage = Stage(folder=tmp_path, plans={}, dataset={}, checkpoints={"0": tmp_path / "checkpoint_final.pth"})
    with pytest.raises(UsageError, match=message) as caught:
        REAL_RUN(stage, tmp_path, tmp_path, None, Options(device="cpu"))
    assert "\n" not in str(caught.value)
    assert "--continue_prediction" in str(caught.value)
