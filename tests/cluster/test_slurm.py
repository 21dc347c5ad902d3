"""The cluster does what jobs meet on a real one: restarts, limits, preemption, and an end without remains."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster import slurm
from tests.cluster.slurm import Cluster, one_node

submitit = pytest.importorskip("submitit")

pytestmark = pytest.mark.cluster
needs_slurm = pytest.mark.skipif(slurm.why_not() is not None, reason=str(slurm.why_not()))

LIMIT = 120  # seconds that anything may take


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch, one_node(tmp_path_factory.mktemp("slurm")) as running:
        use(running, patch)
        yield running


def use(cluster: Cluster, patch: pytest.MonkeyPatch) -> None:
    """Let this process submit to a cluster jobs that can import this file."""
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        patch.delenv(name)
    for name, value in cluster.environment.items():
        patch.setenv(name, value)
    patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)


def executor(folder: Path, **parameters: Any) -> submitit.AutoExecutor:
    made = submitit.AutoExecutor(folder / "jobs", cluster="slurm")
    made.update_parameters(**{"slurm_partition": "normal", "cpus_per_task": 1, "timeout_min": 10} | parameters)
    return made


def until(holds: Callable[[], bool], what: str, job: submitit.Job[Any] | None = None) -> None:
    deadline = time.monotonic() + LIMIT
    while not holds():
        logs = f"\n{job.stdout()}\n{job.stderr()}" if job else ""
        assert time.monotonic() < deadline, f"Not after {LIMIT} s: {what}{logs}"
        time.sleep(0.2)


def result(job: submitit.Job[Any]) -> Any:
    """Result of a job; without accounting its own wait would not see that a job has died."""
    until(job.paths.result_pickle.exists, f"job {job.job_id} has a result", job)
    return job.result()


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def note(file: Path) -> None:
    with file.open("a") as stream:
        stream.write(f"start {restarts()}\n")


def wait_at_first(file: Path) -> int:
    """Wait in the first run, which something else has to end; return the number of restarts in a later one."""
    note(file)
    if not restarts():
        time.sleep(10 * LIMIT)
    return restarts()


class Counter:
    """Counts on until its checkpoint has been called."""

    def __init__(self, file: Path, resumed: bool = False) -> None:
        self.file = file
        self.resumed = resumed

    def __call__(self) -> tuple[bool, int]:
        note(self.file)
        if not self.resumed:
            time.sleep(10 * LIMIT)
        return self.resumed, restarts()

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        return submitit.helpers.DelayedSubmission(Counter(self.file, resumed=True))


def leave_a_process(file: Path) -> None:
    """Start a process that is out of this one's session and of its tree, then wait."""
    command = "setsid sleep 1200 > /dev/null & echo $!"
    file.write_text(subprocess.check_output(["sh", "-c", command], text=True))
    time.sleep(10 * LIMIT)


@needs_slurm
def test_job_returns_its_result(cluster: Cluster, tmp_path: Path) -> None:
    assert result(executor(tmp_path).submit(divmod, 17, 5)) == (3, 2)


@needs_slurm
def test_four_jobs_run_at_once(cluster: Cluster, tmp_path: Path) -> None:
    made = executor(tmp_path)
    jobs = [made.submit(wait_at_first, tmp_path / "starts") for _ in range(4)]
    until(lambda: cluster.run("squeue", "--noheader", "--format=%T").split() == ["RUNNING"] * 4, "four jobs run")
    for job in jobs:
        job.cancel()


@needs_slurm
def test_requeued_job_runs_again_from_its_start(cluster: Cluster, tmp_path: Path) -> None:
    job = executor(tmp_path).submit(wait_at_first, tmp_path / "starts")
    until((tmp_path / "starts").exists, "the job starts")
    cluster.run("scontrol", "requeue", job.job_id)
    assert result(job) == 1
    assert (tmp_path / "starts").read_text().splitlines() == ["start 0", "start 1"]


@needs_slurm
def test_job_is_warned_before_its_limit_and_resumes_from_its_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    job = executor(tmp_path, timeout_min=1, slurm_signal_delay_s=10).submit(Counter(tmp_path / "starts"))
    assert result(job) == (True, 1)
    assert "Caught signal SIGUSR2" in job.stdout() + job.stderr()
    assert (tmp_path / "starts").read_text().splitlines() == ["start 0", "start 1"]


@needs_slurm
def test_urgent_job_preempts_a_normal_one_which_runs_again(cluster: Cluster, tmp_path: Path) -> None:
    normal = executor(tmp_path).submit(wait_at_first, tmp_path / "starts")
    until((tmp_path / "starts").exists, "the normal job starts")
    urgent = executor(tmp_path, slurm_partition="urgent", cpus_per_task=slurm.CPUS).submit(os.getpid)
    assert result(urgent) > 0
    assert result(normal) == 1
    assert "DUE TO PREEMPTION" in normal.stderr()


@needs_slurm
def test_grace_begins_with_the_signal_that_the_job_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with one_node(tmp_path / "slurm", grace=60) as cluster:
        use(cluster, monkeypatch)
        normal = executor(tmp_path).submit(Counter(tmp_path / "starts"))
        until((tmp_path / "starts").exists, "the normal job starts")
        urgent = executor(tmp_path, slurm_partition="urgent", cpus_per_task=slurm.CPUS).submit(os.getpid)
        assert result(urgent) > 0
        assert result(normal) == (True, 1)
        assert "Caught signal SIGUSR2" in normal.stdout() + normal.stderr()


@needs_slurm
def test_dependent_job_starts_within_seconds_of_the_first_ones_end(cluster: Cluster, tmp_path: Path) -> None:
    first = executor(tmp_path).submit(time.sleep, 3)
    second = executor(tmp_path, slurm_dependency=f"afterany:{first.job_id}").submit(time.time)
    assert result(first) is None
    ended = first.paths.result_pickle.stat().st_mtime
    assert ended < result(second) < ended + 20


@needs_slurm
def test_nothing_outlives_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with one_node(tmp_path / "slurm") as cluster:
        use(cluster, monkeypatch)
        job = executor(tmp_path).submit(leave_a_process, tmp_path / "pid")
        until(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()), "the job starts", job)
        processes = cluster.processes()
        assert len(processes) > 6  # three daemons, two steps of the job, its processes
        assert int((tmp_path / "pid").read_text()) in [process.pid for process in processes]
    assert [process for process in processes if lives(process)] == []
    for port in cluster.ports:
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections linger
            again.bind(("127.0.0.1", port))


@needs_slurm
def test_daemons_listen_to_this_machine_alone_and_write_below_the_folder_alone(cluster: Cluster) -> None:
    daemons = {process.pid: process for process in cluster.processes()}
    listening = [one for one in psutil.net_connections("inet") if one.pid in daemons and one.status == "LISTEN"]
    assert {one.laddr.ip for one in listening} == {socket.gethostbyname(socket.gethostname())}
    assert {one.laddr.port for one in listening} == set(cluster.ports)
    files = [Path(file.path) for process in daemons.values() for file in process.open_files()]
    assert files
    assert [file for file in files if not file.is_relative_to(cluster.folder)] == []


@needs_slurm
def test_folder_in_use_is_refused_and_its_cluster_lives_on(cluster: Cluster) -> None:
    with pytest.raises(FileExistsError, match="must be empty"):
        slurm.start(cluster.folder)
    assert cluster.run("sinfo", "--noheader", "--partition=normal", "--format=%D").strip() == "1"


@needs_slurm
def test_long_path_is_refused_with_its_length(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"70 characters, got \d+: .*xxx"):
        slurm.start(tmp_path / ("x" * 70))


def test_missing_programs_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program, path: None if program in ("munged", "squeue") else program)
    assert slurm.why_not() == (
        "Slurm cannot be started: munged, squeue not found (on Debian: apt install munge slurm-client)."
    )


def test_machine_whose_name_is_on_the_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program, path: program)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "192.0.2.7")
    assert "is 192.0.2.7" in str(slurm.why_not())
