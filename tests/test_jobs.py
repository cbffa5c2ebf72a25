"""Job files of recipes/: they lint, follow their schemas, and launch what they say.

There is no Slurm here. Commands of that name, on the path, start a job's tasks on this machine, one for each node.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
JOBS = sorted((ROOT / "recipes" / "slurm").glob("*.sbatch"))
MANIFEST = ROOT / "recipes" / "kubernetes" / "job.yaml"

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
if [[ $1 == pkill ]]; then kill -USR1 "$(cat launcher.pid)"; exit; fi
tasks=()
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || exit 1; done
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo localhost; else echo "$@" > requeued; fi
"""
LAUNCHER = """#!/bin/bash
trap 'exit 0' USR1
printf '%s\\n' "$@" > arguments
echo $$ > launcher.pid.tmp && mv launcher.pid.tmp launcher.pid
case $DOES in finish) touch "$OUTPUT/summary.json" ;; fail) exit 1 ;; train) sleep 60 & wait ;; esac
"""


def tool(name: str) -> Path:
    return Path(sys.executable).with_name(name)


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Where and with which environment a job starts: `Popen(["bash", JOB], **job(...))`."""

    def make(commands: dict[str, str], nodes: int = 1, **environment: str) -> dict[str, Any]:
        (tmp_path / "bin").mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, **commands}.items():
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)
        (tmp_path / "run").mkdir()
        (tmp_path / "recipes").symlink_to(ROOT / "recipes")
        slurm = {"JOB_ID": str(os.getpid()), "JOB_NODELIST": "n", "NNODES": str(nodes), "GPUS_ON_NODE": "1"}
        path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        given = {**os.environ, "PATH": path, "OUTPUT": "run", **{f"SLURM_{k}": v for k, v in slurm.items()}}
        return {"cwd": tmp_path, "env": given | environment}

    return make


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_shellcheck_has_nothing_to_say(path: Path) -> None:
    done = subprocess.run([tool("shellcheck"), path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_manifest_follows_its_schema() -> None:
    """Unknown keys are errors; what is mounted is there."""
    done = subprocess.run([tool("kubernetes-validate"), "--strict", MANIFEST], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for document in yaml.safe_load_all(MANIFEST.read_text()):
        if document["kind"] != "Service":
            pod = document["spec"]["template"]["spec"]
            [container] = pod["containers"]
            assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


@pytest.mark.parametrize(
    ("does", "status", "requeued"), [("finish", 0, False), ("fail", 1, False), ("stop early", 0, True)]
)
def test_a_job_is_queued_again_if_it_was_stopped(
    does: str, status: int, requeued: bool, job: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """A run that has ended or failed is not; the launcher's failure is the job's."""
    done = subprocess.run(["bash", JOBS[-1]], **job({"accelerate": LAUNCHER}, DOES=does), capture_output=True)
    assert (done.returncode, (tmp_path / "requeued").exists()) == (status, requeued), done.stderr


def test_a_preempted_job_warns_its_processes_and_goes_on(job: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """SIGUSR1 to the script reaches them, it waits for their end, and the next start resumes."""
    settings = job({"accelerate": LAUNCHER}, DOES="train")
    process = subprocess.Popen(["bash", JOBS[-1], "--seed", "7"], **settings)
    deadline = time.monotonic() + 30
    while not (tmp_path / "launcher.pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "--resume_from_checkpoint" not in (tmp_path / "arguments").read_text()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 0
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    (tmp_path / "run" / "checkpoint-1").mkdir()
    settings["env"] |= {"DOES": "finish"}
    subprocess.run(["bash", JOBS[-1], "--seed", "7"], **settings, check=True)
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[-4:] == ["--seed", "7", "--resume_from_checkpoint", "last"]
    assert arguments[arguments.index("--num_processes") + 1] == "1"


@pytest.mark.slow
def test_two_nodes_find_each_other(
    job: Callable[..., dict[str, Any]], tiny_model: Any, tokenizer: Any, rows: Any, tmp_path: Path
) -> None:
    """Accelerate's own launcher, once for each of two nodes with one process: they train one run to its end."""

    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows(4)))
    given = "--model_name_or_path model --train_file train.jsonl --test_file test.jsonl --use_cpu true --dtype float32"
    small = "--max_steps 1 --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --warmup_queries 0"
    settings = job({}, 2, CONFIG="recipes/configs/nq_demo.yaml", ENGINE="fsdp2", CUDA_VISIBLE_DEVICES="")
    settings["env"] |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["bash", JOBS[-1], *given.split(), *small.split()]
    done = subprocess.run(command, **settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["n_eval"] == 4
    assert not (tmp_path / "requeued").exists()
