"""Two processes on one machine train as one does: the batch is shared out, and nothing else changes.

`test_worker` is what each process runs; `run_dirs` starts it with `torchrun`. As it, `test_worker_of_an_engine`:
what fails in one process ends all.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import SecondModel
from peft import LoraConfig, get_peft_model
from processes import launch, starter, task, worker
from runs import assert_identical, both_adapters, largest_difference, measured
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, TrainerCallback

from drorl.adapters import GENERATOR, SELECTOR
from drorl.callbacks import InterruptCallback
from drorl.engines.base import EngineError
from drorl.engines.sampler import EngineSampler
from drorl.errors import InvalidInputError
from drorl.trainer import DROTrainer

pytestmark = pytest.mark.slow
ROLES = (SELECTOR, GENERATOR)
CASES: dict[str, dict[str, Any]] = {
    "shared base": {},
    "separate bases, checkpointing, clipped": {
        "separate": True,
        "gradient_checkpointing": True,
        "max_grad_norm": 0.1,
    },
    "accumulation, a baseline and sft": {
        "baseline": "leave_one_out",
        "generator_objective": "sft",
        "gradient_accumulation_steps": 2,
    },
    "generator only": {"selector_objective": "none"},
}


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of processes -> the directory of the runs of all cases by so many."""
    work = tmp_path_factory.mktemp("processes")
    for processes in (1, 2):
        launch(f"{__file__}::test_worker", processes, "slow", run_dir=str(work / str(processes)), processes=processes)
    return {processes: work / str(processes) for processes in (1, 2)}


@worker
@pytest.mark.parametrize("case", CASES)
def test_worker(
    case: str,
    make_trainer: Callable[..., DROTrainer],
    rows: Callable[..., Any],
    tiny_model: Callable[..., LlamaForCausalLM],
    lora: LoraConfig,
) -> None:
    """Two steps of four queries each, in one process or shared by two; all first choices, so nothing is random."""
    given = task()
    settings, run_dir = dict(CASES[case]), Path(given["run_dir"]) / case
    models: dict[str, Any] = {}
    torch.manual_seed(int(os.environ["RANK"]))  # adapters that differ: those of the first process count
    if settings.pop("separate", False):
        models["model"] = get_peft_model(tiny_model(), lora, adapter_name=SELECTOR)
        models["generator_model"] = get_peft_model(tiny_model(seed=1), lora, adapter_name=GENERATOR)
    queries = 4 // given["processes"] // settings.get("gradient_accumulation_steps", 1)
    trainer = make_trainer(
        **models,
        train_rows=rows(8, 6),
        eval_rows=rows(3, 6),
        output_dir=str(run_dir),
        num_selected=1,
        num_generations=6,
        proposal="first_choices",
        per_device_train_batch_size=6 * queries,
        optim="sgd",  # Adam would blow rounding up wherever a gradient is about 0
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        seed=3,
        **({"max_grad_norm": 0.0} | settings),
    )
    assert trainer.accelerator.num_processes == given["processes"]
    trainer.train()
    metrics = trainer.evaluate()
    assert len(trainer.last_records) == 3
    if trainer.accelerator.is_main_process:
        numbers = {k: v for k, v in metrics.items() if k.startswith("eval_")}
        (run_dir / "metrics.json").write_text(json.dumps(numbers))


@starter
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case: str, run_dirs: dict[int, Path]) -> None:
    """Adapters after two steps and evaluation agree to float32 rounding; a checkpoint is whole for both processes."""
    alone, together = (run_dirs[processes] / case for processes in (1, 2))
    for role in ROLES:
        expected, actual = (
            load_file(run / "checkpoint-2" / role / "adapter_model.safetensors") for run in (alone, together)
        )
        # The adapters move by 1e-3 where gradients are clipped and by 1e-2 elsewhere, and agree to about 1e-9.
        assert largest_difference(actual, expected) < 1e-6
    one, two = (json.loads((run / "metrics.json").read_text()) for run in (alone, together))
    assert two == pytest.approx(one, abs=1e-4)
    assert sorted(path.name for path in together.glob("checkpoint-*")) == ["checkpoint-2"]
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (together / "checkpoint-2").iterdir()}
    assert not (together / ".incomplete").exists()


@worker
@pytest.mark.parametrize("fault", ["lost", "far off"])
def test_worker_of_an_engine(
    fault: str, make_trainer: Callable[..., DROTrainer], tiny_model: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    """After a step the second process loses its engine, or samples something else: both stop, and the run is saved.

    With `max_tokens_per_forward` one has more batches than the other, so they meet at the end of a step only.
    """
    rank, run_dir = int(os.environ["RANK"]), Path(task()["run_dir"]) / fault.replace(" ", "-")
    trainer = make_trainer(output_dir=str(run_dir), max_steps=3, max_tokens_per_forward=300 if rank else 3000)
    engine = SecondModel(tiny_model(), tmp_path / "engine")
    trainer.sampler = EngineSampler(trainer.args, trainer.pipeline, trainer.accelerator, engine)
    answer = engine.next_token_logps

    def failing(*arguments: Any) -> Any:
        version, logps = answer(*arguments)
        if trainer.state.global_step == 1 and rank == 1:
            if fault == "lost":
                raise EngineError("this one is gone")
            logps = [[logp - 5 * i for i, logp in enumerate(row)] for row in logps]
        return version, logps

    engine.next_token_logps = failing
    words = "this one is gone" if fault == "lost" else "not the policy that is being trained"
    with pytest.raises(EngineError, match=f"{words}.* The run is saved at step 1"):
        trainer.train()
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (run_dir / "checkpoint-1").iterdir()}


@starter
def test_an_engine_lost_by_one_process_ends_both(tmp_path: Path) -> None:
    """Neither waits for the other: both raise, and the checkpoint is whole."""
    launch(f"{__file__}::test_worker_of_an_engine", 2, "slow", run_dir=str(tmp_path))


class TermToOne(TrainerCallback):
    """The second process gets SIGTERM in its second step, the first one nothing."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


@worker
def test_worker_of_a_preemption(make_trainer: Callable[..., DROTrainer], rows: Callable[..., Any]) -> None:
    """Stopped in the middle of a buffer and gone on from, both processes end where an uninterrupted run does."""
    run_dir = Path(task()["run_dir"])
    settings = {
        "steps_per_generation": 2,
        "num_iterations": 2,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "logging_steps": 4,
        "max_steps": 4,
        "train_rows": rows(8, 6),
    }
    straight = make_trainer(output_dir=str(run_dir / "straight"), **settings)
    straight.train()
    interrupt = InterruptCallback()
    stopped = make_trainer(output_dir=str(run_dir / "run"), callbacks=[interrupt, TermToOne()], **settings)
    stopped.train()
    assert stopped.state.global_step == 2
    assert interrupt.exit_code == 143
    names = {path.name for path in (run_dir / "run" / "checkpoint-2").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "progress_0.pt", "progress_1.pt"} <= names
    resumed = make_trainer(output_dir=str(run_dir / "run"), **settings)
    with pytest.raises(InvalidInputError, match="there is no checkpoint"):  # in both, though one looks
        resumed.train(resume_from_checkpoint=str(run_dir / "checkpoint-7"))
    resumed.train(resume_from_checkpoint="last")
    assert_identical(both_adapters(resumed), both_adapters(straight))
    assert measured(resumed.state.log_history) == measured(straight.state.log_history)


@starter
def test_a_signal_to_one_process_stops_both(tmp_path: Path) -> None:
    """Neither goes on without the other; the checkpoint holds what each of them has drawn."""
    launch(f"{__file__}::test_worker_of_a_preemption", 2, "slow", run_dir=str(tmp_path))
