"""What is started, and what is told of it, with Slurm's commands replaced by stand-ins."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nnunet_ext.cluster import local, slurm
from nnunet_ext.cluster.request import CrossValidation, Method
from nnunet_ext.cluster.start import start_here, start_on_slurm, stop
from nnunet_ext.cluster.states import STOP, State, read_job, write_job, write_state
from nnunet_ext.cluster.status import Row, rows, wait
from nnunet_ext.cluster.steps import make_steps
from nnunet_ext.cluster.work import held
from nnunet_ext.cluster.worker import living_workers
from nnunet_ext.errors import UsageError
from tests.cluster.conftest import DATASET, Asked
from tests.cluster.test_job import job
from tests.cluster.test_steps import Fake, training

PLAN = f"{DATASET}__plan__nnUNetPlans"
_CLIENT = """\
import os, pathlib, sys
folder, name = pathlib.Path({folder!r}), os.path.basename(sys.argv[0])
with (folder / "calls.txt").open("a") as stream:
    stream.write(" ".join([name, *sys.argv[1:]]) + "\\n")
if name == "sbatch":
    if (folder / "refuse").exists():
        sys.exit("sbatch: error: Batch job submission failed: Invalid account")
    number = len(list(folder.glob("*.sh"))) + 1
    (folder / f"{{number}}.sh").write_text(pathlib.Path(sys.argv[-1]).read_text())
    print(f"Submitted batch job {{number}}")
elif (folder / name).exists():
    print((folder / name).read_text())
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with what Slurm's commands answer, files of their names, and the scripts that were submitted."""
    pytest.importorskip("submitit")
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name in ("sbatch", "squeue", "scancel", "sinfo", "srun"):
        command = tmp_path / "clients" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!{sys.executable}\n{_CLIENT.format(folder=str(folder))}")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "clients"))
    (folder / "sinfo").write_text("gpu*\nlong")
    return folder


def wish(**options: object) -> slurm.Slurm:
    defaults = {"partition": "long", "cpu_partition": None, "minutes": 90, "notice": 300, "memory": 2.5, "cpus": 3}
    return slurm.Slurm(**(defaults | {"setup": ("module load cuda",), "more": {"account": "lab"}} | options))


def submitted(folder: Path, number: int) -> str:
    return (folder / f"{number}.sh").read_text()


def found(made: CrossValidation) -> dict[str, Row]:
    return {row.step.name: row for row in rows(made.output)}


def test_each_step_is_a_job_after_those_that_it_needs(asked: Asked, cluster: Path) -> None:
    made, said = asked(folds=(0, 1), device="cuda", gpus=2), []
    assert start_on_slurm(made, wish(), said.append) == 4
    assert len(said) == 4
    plan, first, second, last = (submitted(cluster, number) for number in range(1, 5))
    assert "--dependency" not in plan
    assert "--gpus-per-node" not in plan
    assert all("--dependency=afterany:1\n" in text for text in (first, second))
    assert "--gpus-per-node=2\n" in first
    assert "--dependency=afterany:2:3\n" in last
    for line in ("--partition=long", "--time=90", "--mem=2560MB", "--signal=USR2@300", "--requeue", "--account=lab"):
        assert f"#SBATCH {line}\n" in first
    assert "\nmodule load cuda\n" in first
    assert "--cpus-per-task=3" in re.findall("srun .*", first)[0]


def test_planners_of_one_data_set_are_jobs_one_after_the_other(asked: Asked, cluster: Path) -> None:
    plans = ("nnUNetPlans", "nnUNetHalfWidthPlans")
    made = asked(methods=tuple(Method(trainer="nnUNetTrainer", plans=name) for name in plans), folds=(0,))
    start_on_slurm(made, wish(), lambda _: None)
    assert "--dependency=afterany:1\n" in submitted(cluster, 2)
    assert "--dependency=afterany:2\n" in submitted(cluster, 4)


def test_the_same_call_submits_only_what_is_missing(asked: Asked, cluster: Path, fake: Fake) -> None:
    made = asked(folds=(0, 1))
    job(made, PLAN)()
    write_job(made.output, training(1), "77")
    (cluster / "squeue").write_text("77|RUNNING|None\n78|PENDING|Priority")
    write_state(made.output, training(0), State(what="failed", message="it was so"))
    assert found(made)[training(0)].what == "failed"
    assert start_on_slurm(made, wish(), lambda _: None) == 3
    assert sorted(path.name for path in cluster.glob("*.sh")) == ["1.sh", "2.sh"]
    assert "--dependency=afterany:1:77\n" in submitted(cluster, 2)
    assert read_job(made.output, training(0)) == "1"
    (cluster / "squeue").write_text("77|RUNNING|None\n1|PENDING|Resources\n2|PENDING|Dependency")
    assert found(made)[training(0)].what == "queued"


@pytest.mark.parametrize(
    ("queue", "state", "what", "text"),
    [
        ("5|PENDING|Priority", None, "queued", r"^pending \(Priority\)$"),
        ("5|PENDING|BeginTime", State(what="requeued"), "queued", r"^again, pending"),
        ("5|RUNNING|None", None, "running", "job 5 begins"),
        ("5|RUNNING|None", State(what="running", host="node7"), "running", "node7"),
        ("", State(what="running", host="node7"), "failed", r"job 5 on node7 ended without a word .*log: "),
        ("", None, "failed", "job 5 ended without a word"),
        ("", State(what="failed", message="the reason"), "failed", "the reason"),
        ("5|COMPLETING|None", State(what="failed", message="the reason"), "failed", "the reason"),
    ],
)
def test_the_state_of_a_job_is_what_slurm_and_the_job_say(
    queue: str, state: State | None, what: str, text: str, asked: Asked, cluster: Path
) -> None:
    made = asked(folds=(0,))
    (cluster / "squeue").write_text(queue)
    write_job(made.output, training(0), "5")
    if state:
        write_state(made.output, training(0), state)
    row = found(made)[training(0)]
    assert row.what == what
    assert re.search(text, row.text)
    assert found(made)[f"{DATASET}__compare"].what == ("blocked" if what == "failed" else "not started")


def test_a_machine_without_slurm_does_not_call_jobs_lost(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    made = asked(folds=(0,))
    monkeypatch.setenv("PATH", "")
    write_job(made.output, training(0), "5")
    assert found(made)[training(0)].what == "not started"


def test_a_training_that_runs_tells_its_epochs(asked: Asked, cluster: Path) -> None:
    made = asked(folds=(0,))
    (cluster / "squeue").write_text("5|RUNNING|None")
    write_job(made.output, training(0), "5")
    write_state(made.output, training(0), State(what="running"))
    folder = make_steps(made)[training(0)].folder
    folder.mkdir(parents=True)
    (folder / "debug.json").write_text('{"num_epochs": "10"}')
    (folder / "training_log_1.txt").write_text("now: Epoch 3 \nnow: Epoch time: 90.0 s \n")
    row = found(made)[training(0)]
    assert (row.epoch, row.epochs, row.seconds_left) == (4, 10, 540.0)


def test_an_unknown_partition_is_refused_before_anything_is_submitted(asked: Asked, cluster: Path) -> None:
    with pytest.raises(UsageError, match="got nope: choose among gpu, long"):
        start_on_slurm(asked(), wish(partition="nope"), lambda _: None)
    assert not list(cluster.glob("*.sh"))
    start_on_slurm(asked(), wish(partition="gpu,long"), lambda _: None)


def test_what_slurm_refuses_is_told_in_its_words(asked: Asked, cluster: Path) -> None:
    (cluster / "refuse").touch()
    with pytest.raises(UsageError, match=r"Slurm refuses plan nnUNetPlans .*Invalid account"):
        start_on_slurm(asked(), wish(), lambda _: None)


def test_without_slurm_the_cure_is_named(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="sbatch is not on PATH: call this on a login node"):
        start_on_slurm(asked(), wish(), lambda _: None)


def test_gpus_that_are_asked_for_otherwise_are_asked_for_once(asked: Asked, cluster: Path) -> None:
    made = asked(folds=(0,), device="cuda", gpus=1)
    more = {"gres": "gpu:a100:1", "exclusive": ""}
    start_on_slurm(made, wish(more=more, cpu_partition="gpu"), lambda _: None)
    plan, train, compare = (submitted(cluster, number) for number in (1, 2, 3))
    assert "#SBATCH --gres=gpu:a100:1\n" in train
    assert "gpus-per-node" not in train
    assert "gres" not in plan + compare
    assert "#SBATCH --exclusive\n" in train
    assert [re.findall("--partition=(.*)", text) for text in (plan, train, compare)] == [["gpu"], ["long"], ["gpu"]]


@pytest.mark.parametrize("option", ["time", "dependency", "mem-per-cpu", "cpus-per-task"])
def test_options_that_cv_sets_can_not_be_set_otherwise(option: str, asked: Asked, cluster: Path) -> None:
    with pytest.raises(UsageError, match=f"--slurm can't set {option}, which cv does"):
        start_on_slurm(asked(), wish(more={option: "1"}), lambda _: None)


@pytest.fixture
def silent(cluster: Path, tmp_path: Path) -> None:
    """Slurm does not answer what stands in the queue."""
    squeue = tmp_path / "clients" / "squeue"
    squeue.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1\n")


def test_a_slurm_that_does_not_answer_is_not_one_without_jobs(asked: Asked, cluster: Path, silent: None) -> None:
    made = asked(folds=(0,))
    write_job(made.output, PLAN, "4")
    acts = (lambda: start_on_slurm(made, wish(), lambda _: None), lambda: stop(made.output), lambda: rows(made.output))
    for act in acts:
        with pytest.raises(UsageError, match=r"Slurm does not answer squeue .*Unable to contact"):
            act()
    assert not list(cluster.glob("*.sh"))


def test_waiting_goes_on_where_slurm_does_not_answer_for_a_moment(
    asked: Asked, cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, answers = asked(folds=(0,)), iter([slurm.NoAnswerError("not now"), {"4": ("RUNNING", "")}, {}])
    write_job(made.output, PLAN, "4")

    def queue() -> dict[str, tuple[str, str]]:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("nnunet_ext.cluster.status._PAUSE", 0.0)
    monkeypatch.setattr(slurm, "queue", queue)
    seen: list[list[str]] = []
    wait(made.output, lambda found: seen.append([row.what for row in found]))
    assert [whats[0] for whats in seen] == ["running", "failed"]


def test_jobs_that_are_ending_are_submitted_again_unless_they_said_so(asked: Asked, cluster: Path) -> None:
    made = asked(folds=(0, 1))
    for name, job_number in ((PLAN, "4"), (training(0), "5"), (training(1), "6")):
        write_job(made.output, name, job_number)
    (cluster / "squeue").write_text("4|RUNNING|None\n5|COMPLETING|None\n6|COMPLETING|None")
    write_state(made.output, training(1), State(what="requeued"))
    start_on_slurm(made, wish(), lambda _: None)
    assert [read_job(made.output, name) for name in (PLAN, training(0), training(1))] == ["4", "1", "6"]


def test_what_was_stopped_is_told_as_stopped_until_it_is_started_again(asked: Asked, cluster: Path) -> None:
    made = asked(folds=(0,))
    start_on_slurm(made, wish(), lambda _: None)
    (cluster / "squeue").write_text("1|RUNNING|None\n2|PENDING|Dependency\n3|PENDING|Dependency")
    write_state(made.output, PLAN, State(what="running"))
    assert stop(made.output) == "Stopped; jobs cancelled: 3."
    (cluster / "squeue").write_text("1|COMPLETING|None")
    assert {row.what for row in rows(made.output)} == {"stopped"}
    start_on_slurm(made, wish(), lambda _: None)
    (cluster / "squeue").write_text("4|PENDING|None\n5|PENDING|Dependency\n6|PENDING|Dependency")
    assert {row.what for row in rows(made.output)} == {"queued"}


def test_data_that_are_gone_are_made_again(asked: Asked, fake: Fake) -> None:
    made = asked(folds=(0,))
    job(made, PLAN)()
    shutil.rmtree(made.preprocessed)
    assert found(made)[PLAN].what == "done"  # by its word, until something is started
    start_here(made, [[]])
    assert {row.what for row in wait(made.output, lambda _: None)} == {"done"}
    assert (made.preprocessed / DATASET / "splits_final.json").exists()


def test_a_lock_that_others_hold_does_not_make_a_step_run(asked: Asked) -> None:
    made = asked(folds=(0,))
    with held(make_steps(made)[PLAN].lock):
        assert found(made)[PLAN].what == "not started"
        write_state(made.output, PLAN, State(what="running"))
        assert found(made)[PLAN].what == "running"


def test_a_folder_that_may_only_be_read_can_be_looked_at(asked: Asked) -> None:
    made = asked(folds=(0,))
    lock = make_steps(made)[PLAN].lock
    with held(lock):
        pass
    opened = os.open

    def read_only(path: str, flags: int, *rest: int) -> int:
        assert not flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT), path
        return opened(path, flags, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", read_only)
        assert found(made)[PLAN].what == "not started"


def test_jobs_are_cancelled(asked: Asked, cluster: Path) -> None:
    made = asked(folds=(0,))
    write_job(made.output, training(0), "5")
    write_job(made.output, PLAN, "4")
    (cluster / "squeue").write_text("5|RUNNING|None")
    assert stop(made.output) == "Stopped; jobs cancelled: 1."
    assert "scancel 5" in (cluster / "calls.txt").read_text().splitlines()


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:30", 90), ("24:00:00", 1440), ("1-12", 2160), ("1-12:30", 2190), ("2-00:00:00", 2880)],
)
def test_times_are_those_of_slurm(text: str, minutes: int) -> None:
    assert slurm.minutes_of(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "0", "00:00:30", "-5", "1h"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--time must"):
        slurm.minutes_of(text)


@pytest.mark.parametrize(("text", "size"), [("32", 32), ("32G", 32), ("512M", 0.5), ("0.5GB", 0.5), ("1t", 1024)])
def test_sizes_are_gibibytes_unless_they_say_otherwise(text: str, size: float) -> None:
    assert slurm.gibibytes_of(text) == size


@pytest.mark.parametrize("text", ["", "much", "0", "-3", "3K"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--mem must"):
        slurm.gibibytes_of(text)


@pytest.mark.parametrize(
    ("gpus", "each", "jobs", "groups"),
    [
        (["0", "1", "2"], 1, None, [["0"], ["1"], ["2"]]),
        (["0", "1", "2"], 1, 2, [["0"], ["1"]]),
        (["a", "b", "c"], 2, None, [["a", "b"]]),
        (["0"], 0, None, [[]]),
        ([], 0, 3, [[], [], []]),
    ],
)
def test_gpus_are_shared_out(gpus: list[str], each: int, jobs: int | None, groups: list[list[str]]) -> None:
    assert local.shared_out(gpus, each, jobs) == groups


@pytest.mark.parametrize(("each", "jobs"), [(1, None), (2, None), (1, 2)])
def test_more_gpus_than_there_are_are_refused(each: int, jobs: int | None) -> None:
    gpus = ["0"] * (each * (jobs or 1) - 1)
    with pytest.raises(UsageError, match=f"needs {each * (jobs or 1)} GPUs, this machine shows {len(gpus)}"):
        local.shared_out(gpus, each, jobs)


def test_gpus_are_those_that_the_user_lets_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8")
    assert local.visible_gpus() == ["3", "GPU-8"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.visible_gpus() == []


@pytest.fixture
def ended(asked: Asked) -> Callable[[CrossValidation], None]:
    def until(made: CrossValidation) -> None:
        end = time.monotonic() + 60
        while living_workers(made.output):
            assert time.monotonic() < end
            time.sleep(0.1)

    return until


def test_workers_of_this_machine_outlive_the_call_and_finish(
    asked: Asked, fake: Fake, ended: Callable[[CrossValidation], None]
) -> None:
    pytest.importorskip("submitit")
    made, seen = asked(folds=(0, 1)), []
    assert start_here(made, [[], []]) == [0, 1]
    assert start_here(made, [[], []]) == []  # they live
    assert {row.what for row in wait(made.output, seen.append)} == {"done"}
    assert seen
    ended(made)
    assert start_here(made, [[]]) == []  # nothing is left to do


def test_workers_that_live_keep_their_gpus(asked: Asked, fake: Fake, ended: Callable[[CrossValidation], None]) -> None:
    pytest.importorskip("submitit")
    made = asked(folds=(0,))
    fake({"fold_0": "slow"})
    start_here(made, [[]])
    with pytest.raises(UsageError, match="worker 0 lives with other GPUs, cores or device"):
        start_here(replace(made, device="cuda", gpus=1), [["0"]])
    assert stop(made.output) == "Stopped; workers that end in a moment: 1."
    ended(made)


def test_workers_need_locks(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnunet_ext.cluster.local.has_locks", lambda folder: False)
    with pytest.raises(UsageError, match="workers need a file system with locks"):
        start_here(asked(), [[]])


def test_failed_steps_are_done_again_by_the_same_call(
    asked: Asked, fake: Fake, ended: Callable[[CrossValidation], None]
) -> None:
    pytest.importorskip("submitit")
    made = asked(folds=(0, 1))
    fake({"fold_1": "crash"})
    start_here(made, [[]])
    assert [row.what for row in wait(made.output, lambda _: None)] == ["done", "done", "failed", "blocked"]
    ended(made)
    fake({})
    start_here(made, [[]])
    assert {row.what for row in wait(made.output, lambda _: None)} == {"done"}
    ended(made)


def test_a_killed_worker_is_named_and_replaced(
    asked: Asked, fake: Fake, ended: Callable[[CrossValidation], None]
) -> None:
    pytest.importorskip("submitit")
    import psutil

    made = asked(folds=(0,))
    fake({"fold_0": "slow"})
    start_here(made, [[]])
    while found(made)[training()].epoch is None:
        time.sleep(0.1)
    for process in psutil.process_iter(["cmdline"]):
        if str(made.output) in " ".join(process.info["cmdline"] or ()):
            process.kill()
    # The training that the worker has left alone goes on, and is told.
    assert found(made)[training()].what == "running"
    ended(made)
    assert stop(made.output) == "Stopped; commands ended that a killed worker had left: 1."
    (made.output / STOP).unlink()
    row = found(made)[training()]
    assert row.what == "failed"
    assert "its worker on" in row.text
    fake({})
    start_here(made, [[]])
    assert {row.what for row in wait(made.output, lambda _: None)} == {"done"}
    ended(made)
