from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nnunet_ext.cluster import job as jobs
from nnunet_ext.cluster import worker as workers_module
from nnunet_ext.cluster.job import Means, StepJob
from nnunet_ext.cluster.planning import Planning
from nnunet_ext.cluster.request import CrossValidation, Method
from nnunet_ext.cluster.states import STOP, read_state
from nnunet_ext.cluster.status import rows
from nnunet_ext.cluster.steps import make_steps
from nnunet_ext.cluster.work import StepError, held
from nnunet_ext.cluster.worker import Worker, living_workers, without_needs
from tests.cluster.conftest import DATASET, Asked
from tests.cluster.test_steps import Fake, calls, training
from tests.conftest import RunPython

PLAN = f"{DATASET}__plan__nnUNetPlans"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "_PAUSE", 0.1)
    monkeypatch.setattr(jobs, "_REQUEUED", 0.1)


def means(**options: Any) -> Means:
    return Means(**{"device": "cpu", "gpus": 0, "cores": 2, **options})


def job(made: CrossValidation, name: str) -> StepJob:
    return StepJob(made.output, name, means())


def states(asked: CrossValidation) -> dict[str, str]:
    return {row.step.name: row.what for row in rows(asked.output)}


def test_a_job_does_its_step_and_says_so(asked: Asked, fake: Fake) -> None:
    made = asked(folds=(0,))
    for name in make_steps(made):
        job(made, name)()
    assert set(states(made).values()) == {"done"}
    assert (made.output / DATASET / "comparison" / "report.json").is_file()


def test_a_job_without_what_it_needs_fails_and_names_it(asked: Asked, fake: Fake) -> None:
    made = asked(folds=(0,))
    with pytest.raises(StepError, match="it needs plan nnUNetPlans, which is not done"):
        job(made, training())()
    assert states(made)[training()] == "failed"


def test_a_failure_is_kept_in_one_line(asked: Asked, fake: Fake) -> None:
    made = asked(folds=(0,))
    fake({"fold_0": "full"})
    job(made, PLAN)()
    with pytest.raises(StepError, match="No space left"):
        job(made, training())()
    state = read_state(made.output, training())
    assert state is not None
    assert state.message == "OSError: [Errno 28] No space left on device: 'x'"


def test_a_step_that_somebody_else_does_is_left_to_it(asked: Asked, fake: Fake, quick: None) -> None:
    made = asked(folds=(0,))
    job(made, PLAN)()
    with held(make_steps(made)[training()].lock):
        assert not job(made, training()).run(wait=0)
        assert states(made)[training()] == "running"
        with pytest.raises(StepError, match="another process is at work on it"):
            job(made, training())()


def test_a_worker_goes_on_after_failures_and_blocks_only_what_needs_them(asked: Asked, fake: Fake, quick: None) -> None:
    trainers = ("nnUNetTrainer_3epochs", "nnUNetTrainerHalfWidth_3epochs")
    made = asked(methods=tuple(Method(trainer=name, plans="nnUNetPlans") for name in trainers), folds=(0, 1))
    fake({"fold_1": "crash"})
    Worker(made.output, 0, means())()
    found = states(made)
    assert found[f"{DATASET}__compare"] == "blocked"
    assert [found[f"{DATASET}__{name}__nnUNetPlans__3d_fullres__fold_{i}"] for name in trainers for i in (0, 1)] == [
        *("done", "failed"),
        *("done", "failed"),
    ]


def test_workers_share_the_steps(asked: Asked, fake: Fake, quick: None) -> None:
    made = asked()
    workers = [threading.Thread(target=Worker(made.output, number, means())) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert set(states(made).values()) == {"done"}
    steps = make_steps(made)
    assert [len(calls(steps[training(fold)])) for fold in range(5)] == [1] * 5
    assert living_workers(made.output) == []


def test_workers_see_the_gpus_that_are_theirs(asked: Asked, fake: Fake, quick: None, tmp_path: Path) -> None:
    made, seen = asked(folds=(0,)), []

    class Noted(StepJob):
        def run(self, wait: float) -> bool:
            seen.append(self.means.variables)
            return super().run(wait)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers_module, "StepJob", Noted)
        Worker(made.output, 0, means(variables={"CUDA_VISIBLE_DEVICES": "GPU-5,3"}))()
    assert seen
    assert all(variables == {"CUDA_VISIBLE_DEVICES": "GPU-5,3"} for variables in seen)


def test_a_cascade_is_done_by_workers(asked: Asked, fake: Fake, quick: None) -> None:
    made = asked(configurations=("3d_cascade_fullres",), folds=(0,))
    Worker(made.output, 0, means())()
    found = rows(made.output)
    assert [(row.what, row.text) for row in found if row.what != "done"] == []
    assert len(found) == 1 + 5 + 1 + 1


def test_a_stopped_worker_ends(asked: Asked, fake: Fake, quick: None) -> None:
    made = asked(folds=(0,))
    fake({"fold_0": "slow"})
    worker = threading.Thread(target=Worker(made.output, 0, means()))
    worker.start()
    while states(made)[training()] != "running":
        time.sleep(0.05)
    (made.output / STOP).touch()
    worker.join()
    assert states(made)[training()] == "stopped"
    assert states(made)[f"{DATASET}__compare"] == "stopped"


def test_two_planners_at_once_work_one_after_the_other(asked: Asked, fake: Fake) -> None:
    methods = tuple(Method(trainer="nnUNetTrainer", plans=plans) for plans in ("nnUNetPlans", "nnUNetHalfWidthPlans"))
    each = [asked(methods=(method,)) for method in methods]  # two cross-validations of one data set
    failures = []

    def plan(made: CrossValidation) -> None:
        try:
            job(made, next(iter(make_steps(made))))()
        except StepError as error:
            failures.append(error)

    planners = [threading.Thread(target=plan, args=(made,)) for made in each]
    for planner in planners:
        planner.start()
    for planner in planners:
        planner.join()
    assert failures == []
    folder = each[0].preprocessed / DATASET
    assert {path.stem for path in folder.glob("*Plans.json")} == {"nnUNetPlans", "nnUNetHalfWidthPlans"}
    assert (folder / "data" / "made.txt").read_text().count("preprocessed") == 1


def running(made: CrossValidation, limit: float, then: Callable[[StepJob], None]) -> None:
    """Ask a job for its checkpoint while its training runs."""
    folder = make_steps(made)[training()].folder
    logs = len(list(folder.glob("training_log*")))
    running_job = StepJob(made.output, training(), means(limit=limit, notice=0.3))

    def stopped() -> None:
        with pytest.raises(StepError, match="stopped by"):
            running_job()

    work = threading.Thread(target=stopped)
    work.start()
    try:
        while len(list(folder.glob("training_log*"))) == logs:
            time.sleep(0.05)
        then(running_job)
    finally:
        (made.output / STOP).touch()
        work.join()
        (made.output / STOP).unlink()


def test_a_preempted_job_saves_and_is_submitted_again_as_it_was(asked: Asked, fake: Fake) -> None:
    pytest.importorskip("submitit")
    made = asked(folds=(0,))
    job(made, PLAN)()
    fake({"fold_0": "slow"})
    step = make_steps(made)[training()]

    def preempt(job: StepJob) -> None:
        again = job.checkpoint()
        assert (step.folder / "checkpoint_latest.pth").is_file()
        assert not (step.folder / "save_checkpoint").exists()
        assert read_state(made.output, training()).what == "requeued"
        copied = pickle.loads(pickle.dumps(again.function))
        assert (copied.output, copied.name, copied.means) == (job.output, job.name, job.means)

    running(made, 1000.0, preempt)
    fake({})
    job(made, training())()
    assert calls(step)[-1].endswith("--c")


def test_a_job_that_saves_nothing_until_its_limit_fails(asked: Asked, fake: Fake) -> None:
    pytest.importorskip("submitit")
    made = asked(folds=(0,))
    job(made, PLAN)()
    fake({"fold_0": "deaf"})

    def fail(job: StepJob) -> None:
        with pytest.raises(StepError, match="reached its limit of 0 min and has saved nothing"):
            job.checkpoint()

    running(made, 0.1, fail)


def test_a_job_that_was_preempted_before_may_reach_its_limit_at_the_same_epoch(asked: Asked, fake: Fake) -> None:
    pytest.importorskip("submitit")
    made = asked(folds=(0,))
    job(made, PLAN)()
    fake({"fold_0": "deaf"})
    running(made, 1000.0, lambda job: job.checkpoint())  # preempted
    fake({"fold_0": "slow"})
    running(made, 0.1, lambda job: job.checkpoint())


def test_data_that_setup_has_copied_are_used_by_trainings_alone(
    asked: Asked, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = asked(folds=(0,))
    monkeypatch.setenv("nnUNet_preprocessed", "/local/disk")
    for name, expected in ((PLAN, str(made.preprocessed)), (training(), "/local/disk")):
        done = job(made, name)
        done()
        assert done._commands is not None
        assert done._commands.variables["nnUNet_preprocessed"] == expected


def test_planning_that_does_not_fit_the_limit_is_not_repeated_for_ever(asked: Asked) -> None:
    pytest.importorskip("submitit")
    made = asked()
    late = StepJob(made.output, PLAN, means(limit=0.0))
    late._step = make_steps(made)[PLAN]
    with pytest.raises(StepError, match="give more --time"):
        late.checkpoint()


def test_a_planner_that_fails_does_not_stop_the_next_one(
    asked: Asked, fake: Fake, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = ("nnUNetPlans", "nnUNetHalfWidthPlans")
    methods = tuple(Method(trainer="nnUNetTrainer_3epochs", plans=plans) for plans in both)
    made = asked(methods=methods, folds=(0,))
    work = Planning.work

    def fail(step: Planning, commands: Any) -> None:
        if step.plans == "nnUNetPlans":
            raise StepError("refused")
        work(step, commands)

    monkeypatch.setattr(Planning, "work", fail)
    Worker(made.output, 0, means())()
    found = states(made)
    assert (found[PLAN], found[training()]) == ("failed", "blocked")
    assert found[f"{DATASET}__nnUNetTrainer_3epochs__nnUNetHalfWidthPlans__3d_fullres__fold_0"] == "done"


def test_what_waits_in_vain_is_found_through_several_steps(asked: Asked) -> None:
    steps = make_steps(asked(configurations=("3d_cascade_fullres",), folds=(0,)))
    found = without_needs(steps.values(), {training(3, "3d_lowres")})
    assert found == {training(3, "3d_lowres"), training(0, "3d_cascade_fullres"), f"{DATASET}__compare"}


@pytest.mark.parametrize(("device", "cores", "expected"), [("cuda", 9, "8"), ("cuda", 64, "12"), ("cpu", 64, "2")])
def test_workers_of_nnunet_follow_the_cores(
    device: str, cores: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("nnUNet_n_proc_DA", raising=False)
    assert means(device=device, cores=cores).workers()["nnUNet_n_proc_DA"] == expected
    monkeypatch.setenv("nnUNet_n_proc_DA", "5")
    assert means(device=device, cores=cores).workers()["nnUNet_n_proc_DA"] == "5"


def test_a_job_keeps_the_device_that_it_was_started_for(asked: Asked, fake: Fake) -> None:
    made = asked(folds=(0,), device="cuda", gpus=2)
    for name in (PLAN, training()):
        job(made, name)()
    assert calls(make_steps(made)[training()])[0].endswith("-device cpu")


def test_a_stage_that_the_plans_have_not_is_a_failure_of_one_line(asked: Asked) -> None:
    made = asked(folds=(0,))
    with pytest.raises(StepError, match="have no such stage"):
        job(made, training(0, "3d_lowres"))()


def test_a_data_set_that_can_not_be_read_does_not_stop_the_others(asked: Asked, fake: Fake, quick: None) -> None:
    made = asked(folds=(0,), datasets=(DATASET, "Dataset802_Damaged"))
    (made.preprocessed / "Dataset802_Damaged").mkdir(parents=True)
    (made.preprocessed / "Dataset802_Damaged" / "nnUNetPlans.json").write_text("{")
    Worker(made.output, 0, means())()
    found = states(made)
    assert found[f"{DATASET}__compare"] == "done"
    assert found["Dataset802_Damaged__read"] == "failed"


def test_an_error_that_nobody_foresaw_is_told_too(
    asked: Asked, fake: Fake, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = asked(folds=(0,))
    monkeypatch.setattr(Planning, "work", lambda *_: {}["odd"])
    Worker(made.output, 0, means())()
    state = read_state(made.output, PLAN)
    assert state is not None
    assert state.message == "KeyError('odd')"


def test_the_job_of_a_training_takes_no_memory_for_pytorch(asked: Asked, fake: Fake, run_python: RunPython) -> None:
    made = asked(folds=(0,))
    job(made, PLAN)()
    found = run_python(
        f"import sys\nfrom pathlib import Path\nfrom nnunet_ext.cluster.job import Means, StepJob\n"
        f"StepJob(Path({str(made.output)!r}), {training()!r}, Means(device='cpu', gpus=0, cores=1))()\n"
        "print('torch' in sys.modules)"
    )
    assert found.stdout.strip() == "False"
