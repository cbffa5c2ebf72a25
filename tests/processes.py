"""Tests of several processes: workers that a test starts under `torchrun`, and programs that are killed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

CONFIGS = Path(__file__).parent.parent / "recipes" / "accelerate"
_TASK = "DRORL_TEST_TASK"
worker = pytest.mark.skipif(_TASK not in os.environ, reason="runs inside the processes that another test starts")
starter = pytest.mark.skipif(_TASK in os.environ, reason="this is a worker")
deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def task() -> dict[str, Any]:
    """What the worker was given to do."""
    return json.loads(os.environ[_TASK])


def run_worker(test: str, marker: str, python: Sequence[str], /, **given: Any) -> None:
    """Runs a worker, `file::name`, by a Python that is started so, on CPUs and one thread."""
    command = [*python, "-m", "pytest", "-m", marker, "-q", "-p", "no:cacheprovider", test]
    on_cpus = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environment = os.environ | on_cpus | {_TASK: json.dumps(given)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert finished.returncode == 0, finished.stdout[-5000:] + finished.stderr[-3000:]


def launched(engine: str, processes: int) -> list[str]:
    """`accelerate launch` with `recipes/accelerate/<engine>.yaml`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={CONFIGS / engine}.yaml"]
    return [*command, f"--num_processes={processes}", "--main_process_port=0"]


def launch(test: str, processes: int, marker: str, /, engine: str = "ddp", **given: Any) -> None:
    """Runs a worker in so many processes under an engine."""
    run_worker(test, marker, launched(engine, processes), **given)


def kill_once(reached: Callable[[], bool], command: Sequence[Any], seconds: float) -> None:
    """Runs a program until it has got so far, or the time is over, and kills it (-9)."""
    process, deadline = subprocess.Popen(list(map(str, command))), time.monotonic() + seconds
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
