"""`kill -9` twenty times in one run of the recipe: it ends as if nothing had happened."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stopping
import yaml
from runs import measured
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from drorl.manifest import MANIFEST, problem_of

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent
KILLS, STEPS, SAVE_STEPS = 20, 48, 2
MOMENTS = (
    "sampling",
    "backward",
    "optimizer",
    "adapters are saved",
    "half an optimizer",
    "no manifest yet",
    "not in its place yet",
    "not rotated yet",
    "half a rotation",
    "anywhere",
)
# Everything that a checkpoint may have to hold: a critic, a reference, rollouts that four updates train on, losses
# and metrics between two entries of the log, and an order of candidates and rows that is random.
SETTINGS: dict[str, Any] = {
    "proposal": "policy",
    "selector_objective": "ppo",
    "beta": 0.1,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "num_selected": 2,
    "identifiers": "number",
    "per_device_train_batch_size": 16,
    "max_steps": STEPS,
    "save_steps": SAVE_STEPS,
    "save_total_limit": 2,
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "lr_scheduler_type": "linear",
    "lora_first_layer": 0,
    "warmup_queries": 8,
    "dtype": "float32",
    "use_cpu": True,
}


@pytest.fixture
def recipe(
    tmp_path: Path,
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    rows: Callable[..., Any],
) -> Callable[..., list[str]]:
    """Makes the command line of a run in a directory: the demo's configuration, a tiny model, no budget of time."""
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    files = {}
    for split, count in (("train", 12), ("validation", 2), ("test", 2)):
        files[f"{split}_file"] = str(tmp_path / f"{split}.jsonl")
        Path(files[f"{split}_file"]).write_text("\n".join(json.dumps(row) for row in rows(count)))
    demo = yaml.safe_load((TESTS.parent / "recipes/configs/nq_demo.yaml").read_text())
    del demo["max_minutes"]  # it anneals the learning rate by the clock
    config = {**demo, **SETTINGS, **files, "model_name_or_path": str(tmp_path / "model")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return lambda run_dir: ["--config", str(tmp_path / "config.yaml"), "--output_dir", str(run_dir)]


def start(moment: str, step: int, arguments: list[str]) -> subprocess.Popen[str]:
    """Starts the recipe, which stands still at a moment of a step."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS.parent / "recipes"), str(TESTS)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    environment["PYTHONHASHSEED"] = "0"  # PEFT writes sets of names into adapter_config.json in the order of hashes
    command = [sys.executable, str(TESTS / "stopping.py"), moment, str(step), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill(moment: str, step: int, arguments: list[str], delay: float) -> None:
    """Runs the recipe up to a moment of a step, or from there a random time longer, and kills it (-9)."""
    process = start(moment, step, arguments)
    assert process.stdout is not None
    output = []
    for line in process.stdout:
        output.append(line)
        if line.strip() == stopping.REACHED:
            break
    assert output[-1].strip() == stopping.REACHED, f"not stopped in {moment}, step {step}: {''.join(output)[-5000:]}"
    time.sleep(delay)
    assert process.poll() is None
    process.kill()
    process.wait()


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of the checkpoints that are in place, damaged ones too."""
    return sorted(int(path.name.split("-")[1]) for path in run_dir.glob("checkpoint-*"))


def assert_same_end(run_dir: Path, expected_dir: Path) -> None:
    """Adapters, reference, critic, optimizer, schedule, random numbers, progress: the same bytes. The same log."""
    last = f"checkpoint-{STEPS}"
    actual, expected = (json.loads((run / last / MANIFEST).read_text())["sha256"] for run in (run_dir, expected_dir))
    assert {"optimizer.pt", "rng_state.pth", "critic.safetensors", "selector/adapter_model.safetensors"} <= set(actual)
    differ = {name for name in actual.keys() | expected.keys() if actual.get(name) != expected.get(name)}
    assert differ <= {"trainer_state.json"}  # with times in its log
    logs = [json.loads((run / "log_history.json").read_text()) for run in (run_dir, expected_dir)]
    assert measured(logs[0]) == measured(logs[1])
    steps = [entry["step"] for entry in logs[0] if "loss" in entry]
    assert steps == list(range(SETTINGS["logging_steps"], STEPS + 1, SETTINGS["logging_steps"]))
    figures = [json.loads((run / "summary.json").read_text())["systems"] for run in (run_dir, expected_dir)]
    assert figures[0] == figures[1]


def test_twenty_kills_leave_no_trace(recipe: Callable[..., list[str]], tmp_path: Path) -> None:
    """At random moments of random steps, some of them while saving; gone on from `last` each time, to the same end."""
    expected = tmp_path / "straight" / "run"  # a model card has its directory's name
    straight = start("never", 0, recipe(expected))
    output, _ = straight.communicate(timeout=600)
    assert straight.returncode == 0, output[-5000:]
    run, rng = tmp_path / "killed" / "run", random.Random(8)
    moments = [*MOMENTS, *MOMENTS]
    rng.shuffle(moments)
    assert len(moments) == KILLS
    killed = []
    for moment in moments:
        done = max(saved_steps(run), default=0)
        step = done + rng.randint(1, 2 * SAVE_STEPS - 1)
        assert step < STEPS, f"it is over before {KILLS} kills: {killed}"
        resume = ["--resume_from_checkpoint", "last"] if done else []
        kill(moment, step, recipe(run) + resume, rng.uniform(0, 0.2) if moment == "anywhere" else 0.0)
        killed.append((moment, step, done, saved_steps(run)))
    kill("trained", 0, [*recipe(run), "--resume_from_checkpoint", "last"], 0.0)  # the last one, when all is trained
    last = start("never", 0, [*recipe(run), "--resume_from_checkpoint", "last"])
    output, _ = last.communicate(timeout=600)
    assert last.returncode == 0, output[-5000:]
    assert len({done for _, _, done, _ in killed}) > KILLS / 4, f"it got on in between: {killed}"
    assert_same_end(run, expected)
    assert all(problem_of(path) is None for path in run.glob("checkpoint-*"))
