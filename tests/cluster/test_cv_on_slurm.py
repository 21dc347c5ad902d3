"""A cross-validation on a cluster that kills, preempts and limits its jobs: all go on, the report is complete."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from nnunet_ext.cluster.status import Row, rows
from nnunet_ext.cluster.training import Training
from nnunet_ext.demo.phantom import PhantomSpec, write_dataset
from tests.cluster import slurm
from tests.cluster.slurm import Cluster, one_node
from tests.cluster.test_slurm import use
from tests.conftest import console_script

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(slurm.why_not() is not None, reason=str(slurm.why_not()))]
EPOCHS, TRAINER = 60, "nnUNetTrainer_60epochs_4iters_NoMirroring"
DATASET = "Dataset801_Phantom"
PATIENCE = 900  # seconds for all that is waited for
log = logging.getLogger(__name__)


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch, one_node(tmp_path_factory.mktemp("slurm")) as running:
        use(running, patch)
        yield running


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a phantom of six small scans; return nnU-Net's variables as a shell sets them."""
    variables = {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}
    for name, value in {**variables, "OMP_NUM_THREADS": "1", "nnUNet_compile": "f"}.items():
        monkeypatch.setenv(name, value)
    small = PhantomSpec(n_training=6, n_test=1, field_of_view=(120.0, 100.0, 90.0), spacing=(6.0, 6.0, 6.0))
    (folder / "raw").mkdir()
    write_dataset(folder / "raw" / DATASET, small, lambda *_: None)
    return " ".join(f"{name}={value}" for name, value in variables.items())


@pytest.fixture
def call(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`nnunet-ext cv` with the phantom."""
    prepare(tmp_path, monkeypatch)

    def run(*words: str) -> str:
        command = [console_script("nnunet-ext"), "cv", *words, "-o", str(tmp_path / "cv")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_killed_preempted_and_limited_jobs_go_on_and_the_report_is_complete(
    call: Callable[..., str], cluster: Cluster, tmp_path: Path
) -> None:
    output = tmp_path / "cv"
    asked = ("-d", "801", "-c", "3d_fullres", "-tr", TRAINER, "-f", "0", "1", "--gpus", "0")
    limits = ("--executor", "slurm", "--partition", "normal", "--cpus", "1", "--mem", "2", "--time", "3")
    log.info("$ nnunet-ext cv %s", " ".join((*asked, *limits)))
    log.info(call(*asked, *limits).strip())

    at = waiting(output)
    at("both trainings run", lambda own: all((row.epoch or 0) >= 2 for row in own))
    (victim,) = training_processes(fold=0)
    log.info("killed: the training of fold 0, process %d, by SIGKILL", victim.pid)
    victim.send_signal(signal.SIGKILL)
    at("fold 0 goes on in its job", lambda own: len(begun(folder_of(own[0]))) == 2)

    log.info("preempted: a job of a partition with a higher priority takes the whole node")
    cluster.run("sbatch", "--partition=urgent", "--cpus-per-task=8", "--output=/dev/null", "--wrap=sleep 5")
    at("both are queued again", lambda own: all(row.what == "queued" and "again" in row.text for row in own))
    at("both run again", lambda own: [len(begun(folder_of(row))) for row in own] == [3, 2])
    at("all is done", lambda own: all(row.what == "done" for row in rows(output)))
    log.info(call("status").strip())

    for row in (row for row in rows(output) if isinstance(row.step, Training)):
        first = begun(row.step.folder)
        log.info("%s began at the epochs %s", row.step.title, ", ".join(map(str, first)))
        assert first == sorted(first)
        assert trained(row.step.folder) == [*range(EPOCHS)]
    notices = [text.read_text().count("Caught signal SIGUSR2") for text in (output / "submitit").glob("*.out")]
    log.info("notices of a time limit: %s", sum(notices) // 2)  # the logger writes each line twice
    assert sum(notices) > 0
    report = json.loads((output / DATASET / "comparison" / "report.json").read_text(encoding="utf-8"))
    assert TRAINER.removesuffix("_60epochs_4iters_NoMirroring") in json.dumps(report)
    assert "Jobs in the queue: 0." in call(*asked, *limits)


def waiting(output: Path) -> Callable[[str, Callable[[list[Row]], bool]], None]:
    """Gives a function that waits until something holds of the rows of the trainings, and says when."""
    start = time.monotonic()

    def until(what: str, holds: Callable[[list[Row]], bool]) -> None:
        while True:
            found = rows(output)
            own = [row for row in found if isinstance(row.step, Training)]
            if holds(own):
                said = "; ".join(f"fold {row.step.fold} {row.what} {row.epoch or '-'}" for row in own)
                log.info("after %.0f s: %s (%s)", time.monotonic() - start, what, said)
                return
            failed = [f"{row.step.title}: {row.text}" for row in found if row.what == "failed"]
            assert not failed, failed
            assert time.monotonic() < start + PATIENCE, f"not after {PATIENCE} s: {what}"
            time.sleep(0.5)

    return until


def training_processes(fold: int) -> list[psutil.Process]:
    """Processes of nnU-Net's command, without the data loaders that they start."""
    own = f"{DATASET} 3d_fullres {fold}"
    found = [process for process in psutil.process_iter(["cmdline"]) if own in " ".join(process.info["cmdline"] or ())]
    return [process for process in found if process.parent() not in found]


def folder_of(row: Row) -> Path:
    assert isinstance(row.step, Training)
    return row.step.folder


def logs(folder: Path) -> list[str]:
    paths = sorted(folder.glob("training_log_*.txt"), key=os.path.getmtime)
    return [path.read_text(encoding="utf-8") for path in paths]


def begun(folder: Path) -> list[int]:
    """Epochs that the runs of a training began at."""
    found = [re.search(r"Epoch (\d+) *$", text, flags=re.MULTILINE) for text in logs(folder)]
    return [int(match[1]) for match in found if match]


def trained(folder: Path) -> list[int]:
    """Epochs that ended, each once however often it was begun."""
    ends = r"Epoch (\d+) \n(?:(?!.*Epoch \d).*\n)*?.*Epoch time"
    return sorted({int(number) for text in logs(folder) for number in re.findall(ends, text)})


def test_the_script_of_the_page_goes_on_after_its_time_limit(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = prepare(tmp_path, monkeypatch)
    plan = [console_script("nnUNetv2_plan_and_preprocess"), "-d", "801", "-c", "3d_fullres", "-npfp", "1", "-np", "1"]
    subprocess.run(plan, check=True, capture_output=True, timeout=PATIENCE)
    page = Path(__file__).parents[2] / "docs" / "how-to" / "cluster.md"
    (script,) = re.findall(
        r"<!-- script:begin -->\n```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    for old, new in {
        "#SBATCH --gpus-per-node=1\n": "",
        "--cpus-per-task=8": "--cpus-per-task=1",
        "--mem=32G": "--mem=2G",
        "--time=24:00:00": "--time=2",
        "USR2@600": "USR2@30",
        ". /shared/nnunet/bin/activate": f"export PATH={Path(console_script('nnunet-ext')).parent}:$PATH",
        "nnUNet_raw=/shared/raw nnUNet_preprocessed=/shared/preprocessed nnUNet_results=/shared/results": variables,
        "nnUNet_n_proc_DA=7": "nnUNet_n_proc_DA=1",
        "Dataset004_Hippocampus": DATASET,
        "nnUNetTrainerHalfWidth": TRAINER,
        "-p $plans --c &": "-p $plans --c -device cpu &",
    }.items():
        assert old in script
        script = script.replace(old, new)
    (tmp_path / "fold.sh").write_text(script)
    cluster.run("sbatch", "--parsable", "--array=0", f"--chdir={tmp_path}", tmp_path / "fold.sh")

    folder = tmp_path / "results" / DATASET / f"{TRAINER}__nnUNetPlans__3d_fullres" / "fold_0"
    deadline = time.monotonic() + PATIENCE
    while not (folder / "validation" / "summary.json").exists():
        assert time.monotonic() < deadline, (tmp_path / "fold_0.log").read_text()
        time.sleep(1)
    first = begun(folder)
    log.info("the script's training began at the epochs %s", ", ".join(map(str, first)))
    assert len(first) > 1
    assert first == sorted(set(first))
    assert trained(folder) == [*range(EPOCHS)]
