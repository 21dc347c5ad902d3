"""A Slurm cluster of one node on this machine: munge, controller and node, all of it below one folder.

As a context manager for tests, and by hand: ``python -m tests.cluster.slurm start FOLDER`` and ``... stop FOLDER``.
It needs neither root nor systemd, control groups or accounting (so ``sacct`` does not work), and listens to 127.0.0.1
alone. The node claims eight cores, whatever the machine has. Jobs of the partition `urgent` preempt those of `normal`.
"""

from __future__ import annotations

import argparse
import getpass
import ipaddress
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

CPUS = 8
PACKAGES = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    **dict.fromkeys(("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun"), "slurm-client"),
}
_DAEMONS = ("munged", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd")
_START, _END = 60, 20  # seconds that the node may take until it is idle, and jobs to end when they are cancelled
_LONGEST = 70  # characters of a folder's path: the sockets below it may have 107

# cred_expire, 5 at least, is also how many seconds a requeued job waits (120 unless told). The controller looks at
# time limits every 30 s, which no setting changes.
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny,DisableIPv6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1,sched_min_interval=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
OverTimeLimit=0
NodeName={host} NodeAddr={address} CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace} MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs.

    Args:
        folder: That all its files are below.
        ports: Of the controller and the node.
    """

    folder: Path
    ports: tuple[int, int]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that sbatch, squeue and the others need."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str | Path) -> str:
        """Output of a client's command.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        environment = _environment(self.folder)
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    def processes(self) -> list[psutil.Process]:
        """Daemons and processes of jobs that live."""
        found: set[psutil.Process] = set()
        for process in psutil.process_iter():
            try:
                if _belongs(process, self.environment["SLURM_CONF"]):
                    found |= {process, *process.children(recursive=True)}
            except (OSError, psutil.Error):  # it has ended, or is another user's
                continue
        return [process for process in found if _lives(process)]


def why_not() -> str | None:
    """Why no cluster can be started on this machine; None if one can be."""
    missing = [program for program in PACKAGES if _which(program) is None]
    if missing:
        packages = " ".join(dict.fromkeys(PACKAGES[program] for program in missing))
        return f"Slurm cannot be started: {', '.join(missing)} not found (on Debian: apt install {packages})."
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return f"Slurm cannot be started: this machine's name, {host}, has no address (add it to /etc/hosts)."
    if not ipaddress.ip_address(address).is_loopback:
        return f"Slurm cannot be started: {host} is {address}, and Slurm would listen to the network, not to 127.0.0.1."
    return None


@contextmanager
def one_node(folder: Path, *, grace: int = 0) -> Iterator[Cluster]:
    """Cluster that lives as long as the context; its jobs and daemons end with it. Arguments and errors: start()."""
    cluster = start(folder, grace=grace)
    try:
        yield cluster
    finally:
        stop(folder)


def start(folder: Path, *, grace: int = 0) -> Cluster:
    """Start the daemons and wait until the node is idle.

    Args:
        folder: Empty or not there yet. Its path has at most 70 characters.
        grace: Seconds, and up to 30 more, that a preempted job goes on. They begin with the signal that it asked for by
            ``--signal``, or else with SIGTERM. With 0 it gets SIGTERM and, five seconds later, SIGKILL.

    Raises:
        RuntimeError: why_not(), or the node has not become idle; the message holds the ends of the logs.
        ValueError: the folder's path is too long.
        FileExistsError: the folder is not empty.
    """
    reason = why_not()
    if reason:
        raise RuntimeError(reason)
    folder = folder.resolve()
    if len(str(folder)) > _LONGEST:
        raise ValueError(f"The folder of a cluster may have {_LONGEST} characters, got {len(str(folder))}: {folder}")
    cluster = Cluster(folder, _free_ports())
    _write(cluster, grace)
    try:
        _launch(cluster)
    except BaseException:
        stop(folder)
        raise
    return cluster


def stop(folder: Path) -> None:
    """Cancel all jobs, end all daemons, and leave no process behind; files stay where they are.

    Raises:
        RuntimeError: a process does not end.
    """
    cluster = Cluster(folder.resolve(), (0, 0))
    if any(process.name() == "slurmctld" for process in cluster.processes()):  # else the clients try for long
        with suppress(subprocess.CalledProcessError):
            cluster.run("scancel", "--user", getpass.getuser())
            _until(lambda: not cluster.run("squeue", "--noheader"), _END)
    _signal(cluster, signal.SIGTERM)
    _until(lambda: not cluster.processes(), 5)
    _signal(cluster, signal.SIGKILL)
    if not _until(lambda: not cluster.processes(), 5):
        raise RuntimeError(f"Processes of {folder} do not end: {cluster.processes()}")


def _write(cluster: Cluster, grace: int) -> None:
    folder = cluster.folder
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"The folder of a cluster must be empty: {folder}")
    for name in ("munge", "state", "spool", "log"):
        (folder / name).mkdir()
        (folder / name).chmod(0o755)  # munged refuses what a group may write
    key = folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    host = socket.gethostname().partition(".")[0]
    text = _CONFIG.format(
        host=host,
        address=socket.gethostbyname(host),
        ports=cluster.ports,
        user=getpass.getuser(),
        folder=folder,
        cpus=CPUS,
        memory=psutil.virtual_memory().total >> 20,
        grace=grace,
    )
    if grace:
        text += "SlurmctldParameters=preempt_send_user_signal\n"
    (folder / "slurm.conf").write_text(text, encoding="utf-8")


def _free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


def _launch(cluster: Cluster) -> None:
    munge = cluster.folder / "munge"
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "../log/munged"}
    # --force: parents of the folder may be closed to other users
    _run_daemon(cluster, "munged", "--force", *(f"--{option}={munge / name}" for option, name in files.items()))
    _run_daemon(cluster, "slurmctld", "-c")
    _run_daemon(cluster, "slurmd")
    if not _until(lambda: _state(cluster) == "idle", _START):
        message = f"The node is {_state(cluster) or 'unknown'}, not idle, after {_START} s."
        raise RuntimeError(f"{message}\n{_logs(cluster)}")


def _run_daemon(cluster: Cluster, daemon: str, *options: str) -> None:
    done = subprocess.run(
        [_which(daemon) or daemon, *options],
        cwd=cluster.folder,
        env=_environment(cluster.folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_START,
    )
    if done.returncode:
        raise RuntimeError(f"{daemon} has ended with {done.returncode}: {done.stderr}\n{_logs(cluster)}")


def _signal(cluster: Cluster, number: signal.Signals) -> None:
    for process in cluster.processes():
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            process.send_signal(number)


def _environment(folder: Path) -> dict[str, str]:
    """Ours, without what a job that this process may run in has set."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return ours | {"SLURM_CONF": str(folder / "slurm.conf")}  # the last one: the daemons write over the first ones


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))


def _state(cluster: Cluster) -> str:
    """State of the node; empty if the controller does not answer."""
    try:
        return cluster.run("sinfo", "--noheader", "--partition=normal", "--format=%T").strip()
    except subprocess.CalledProcessError:
        return ""


def _belongs(process: psutil.Process, config: str) -> bool:
    # psutil finds nothing in a daemon that has written its title over the first variables
    variables = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    ours = f"SLURM_CONF={config}".encode() in variables
    return ours and (process.name() in _DAEMONS or any(one.startswith(b"SLURM_JOB_ID=") for one in variables))


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _until(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (done := holds()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return done


def _logs(cluster: Cluster) -> str:
    """The last lines of each log."""
    logs = {path: path.read_text(encoding="utf-8", errors="replace") for path in cluster.folder.glob("log/*")}
    return "\n".join(f"{path}:\n" + "\n".join(text.splitlines()[-15:]) for path, text in logs.items())


def _main() -> None:
    parser = argparse.ArgumentParser(description="Slurm on this machine, all of it below one folder.")
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--grace", type=int, default=0, help="seconds that a preempted job goes on")
    arguments = parser.parse_args()
    if arguments.action == "stop":
        stop(arguments.folder)
        return
    cluster = start(arguments.folder, grace=arguments.grace)
    print(*(f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()), sep="\n")


if __name__ == "__main__":
    _main()
