r"""Trains a selector and a generator jointly with DRO on open-domain questions, and compares systems on held-out ones.

On a bare machine, with the embedded model and data (2 CPU cores, no GPU, no hub):

    accelerate launch recipes/nq.py --config recipes/configs/nq_demo.yaml --max_minutes 25

With the paper's settings on GPUs (nobody has run this yet); nq, hotpotqa, 2wiki, musique and wow each begin with the
commands that make their rows:

    accelerate launch recipes/nq.py --config recipes/configs/nq.yaml

The command line beats the YAML file. Three steps: a supervised warm-up from the retriever's order alone (of both
adapters, or of the generator's if `warmup_selector` is false), DRO, and an evaluation of the warm-up, of DRO and of
the retriever's order on the same held-out questions.

Differences from the paper (arXiv 2505.03075): LoRA adapters on one base instead of two full models; E- and M-step
alternate per batch; the selector's policy is normalised over valid permutations; the selector's warm-up imitates the
retriever's order instead of RankZephyr's rankings.
"""

import json
import logging
import sys
import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drorl.errors import UserError
from drorl.settings import DROSettings, help_text

if TYPE_CHECKING:
    from drorl import DROConfig

logger = logging.getLogger("drorl.recipe")

EMBEDDED_DATA = ("vitalqa", "vitalhop")


@dataclass
class ScriptArguments:
    """What the recipe needs beside [`drorl.DROConfig`]."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Base; smollm2-135m is embedded."})
    generator_model_name_or_path: str | None = field(default=None, metadata={"help": "A separate generator."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the base; auto measures on a CPU."})
    embedded_data: str = field(default="vitalqa", metadata={"help": "vitalqa, or vitalhop: questions of two hops."})
    train_file: str | None = field(default=None, metadata={"help": "Rows: whatever drorl prepare reads."})
    validation_file: str | None = field(default=None, metadata={"help": "Rows for early stopping."})
    test_file: str | None = field(default=None, metadata={"help": "Rows for the final table."})
    num_eval_questions: int | None = field(default=None, metadata={"help": "Held-out questions; default: all."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters."})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Default: all linear layers."})
    lora_first_layer: int = field(default=0, metadata={"help": "No adapters, and no backward pass, below it."})
    warmup_queries: int = field(default=0, metadata={"help": "Queries of the supervised warm-up."})
    warmup_learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate of the warm-up."})
    warmup_selector: bool = field(
        default=True, metadata={"help": "Warm up the selector too, not the generator alone."}
    )
    em_patience: int | None = field(default=None, metadata={"help": "EM iterations without gain before stopping."})
    max_minutes: float | None = field(default=None, metadata={"help": "Wall-clock time for the whole recipe."})
    license: str | None = field(
        default=None, metadata={"help": "Of the adapters, for the model card, as the hub calls it: apache-2.0."}
    )
    clock_of: str | None = field(
        default=None, metadata={"help": "A run whose readings of the clock stand for max_minutes: drorl reproduce."}
    )

    @property
    def warmup(self) -> tuple[int, float, bool]:
        """What `warmup_config` takes."""
        return self.warmup_queries, self.warmup_learning_rate, self.warmup_selector

    def __post_init__(self) -> None:
        if self.model_name_or_path is None:
            raise ValueError("model_name_or_path is not set; use smollm2-135m, a folder or a name on the hub")
        if self.embedded_data not in EMBEDDED_DATA:
            raise ValueError(f"embedded_data must be one of {', '.join(EMBEDDED_DATA)}, not {self.embedded_data!r}")
        if self.lora_first_layer and not self.lora_target_modules:
            raise ValueError("lora_first_layer needs lora_target_modules, such as q_proj v_proj")
        if any((self.train_file, self.validation_file, self.test_file)):
            if not (self.train_file and self.test_file):
                raise ValueError("train_file and test_file belong together; without any file embedded_data is used")
            if self.em_patience is not None and self.validation_file is None:
                raise ValueError("em_patience needs a validation_file")


def load_data(script: ScriptArguments):
    """Returns the rows by split and what is known about them; without files, those of an embedded data set."""
    files = {"train": script.train_file, "validation": script.validation_file, "test": script.test_file}
    files = {split: path for split, path in files.items() if path is not None}
    if files:
        from drorl.data.load import load_rows

        return {split: load_rows(path, split) for split, path in files.items()}, {"name": script.train_file}
    from rich.console import Console

    name, data = script.embedded_data, _embedded(script)
    rows = getattr(data, f"load_{name}")()
    data.print_facts(Console(stderr=True))
    return rows, getattr(data, f"{name}_facts")()


def parse(arguments: list[str] | None = None) -> tuple[ScriptArguments, "DROConfig"]:
    """Returns the settings of a command line, by default of this process."""
    from trl import TrlParser

    from drorl import DROConfig

    return TrlParser((ScriptArguments, DROConfig)).parse_args_and_config(arguments)


def described(script: ScriptArguments, config: "DROConfig") -> dict[str, Any]:
    """Returns the content of `run.json`."""
    from drorl.provenance import describe_run

    files = {"train": script.train_file, "validation": script.validation_file, "test": script.test_file}
    sources = {split: path for split, path in files.items() if path is not None}
    embedded = {} if sources else {script.embedded_data: _embedded(script).build_key()}
    models = [script.model_name_or_path, script.generator_model_name_or_path]
    settings = {**vars(script), **config.to_dict()}
    return describe_run(settings, sources, embedded, filter(None, models), [Path(__file__)])


def _embedded(script: ScriptArguments):
    return import_module(f"drorl.data.{script.embedded_data}")


def load_model(script: ScriptArguments, **init: Any):
    """Returns the base with an adapter for each role, the tokenizer, and the separate generator if there is one."""
    from peft import LoraConfig

    from drorl.adapters import GENERATOR, ROLES, SELECTOR, add_adapters
    from drorl.models import load_model_and_tokenizer

    def adapted(name, roles):
        base, tokenizer = load_model_and_tokenizer(name, script.dtype, **init)
        first = script.lora_first_layer
        config = LoraConfig(
            r=script.lora_r,
            lora_alpha=script.lora_alpha,
            target_modules=script.lora_target_modules or "all-linear",
            layers_to_transform=list(range(first, base.config.num_hidden_layers)) if first else None,
            task_type="CAUSAL_LM",
        )
        return add_adapters(base, config, roles), tokenizer

    if script.generator_model_name_or_path is None:
        return *adapted(script.model_name_or_path, ROLES), None, None
    model = adapted(script.model_name_or_path, (SELECTOR,))
    return *model, *adapted(script.generator_model_name_or_path, (GENERATOR,))


def main(script: ScriptArguments, config: "DROConfig") -> int:
    start = time.monotonic()
    import torch
    from rich.console import Console
    from transformers import PrinterCallback, ProgressCallback

    from drorl import DROTrainer
    from drorl.callbacks import EMIterationCallback, InterruptCallback, RichProgressCallback, TimeBudgetCallback
    from drorl.clock import BudgetReadings
    from drorl.experiment import Experiment, before_after, example_table, last_checkpoint, set_aside, warmup_config
    from drorl.manifest import check_writable
    from drorl.models import choose_dtype
    from drorl.provenance import keep_record
    from drorl.report import summary_table, write_report

    torch.manual_seed(config.seed)
    run_dir, budget = Path(config.output_dir), script.max_minutes and 60 * script.max_minutes
    check_writable(run_dir)
    repeated = None if script.clock_of is None else Path(script.clock_of)
    checkpoint = last_checkpoint(config)
    rows, facts = load_data(script)
    script.dtype = str(choose_dtype(script.dtype)).removeprefix("torch.")  # a measurement: once, and kept
    record = described(script, config)
    model, tokenizer, generator, generator_tokenizer = load_model(script, **(config.model_init_kwargs or {}))
    interrupt = InterruptCallback()

    def trainer_for(title, config, *callbacks):
        trainer = DROTrainer(
            model,
            config,
            rows["train"],
            rows.get("validation"),
            tokenizer,
            generator,
            generator_tokenizer,
            callbacks=[interrupt, *callbacks],
        )
        trainer.add_callback(RichProgressCallback(title, trainer=trainer))
        for printed in (PrinterCallback, ProgressCallback):  # the live view shows what they would print
            trainer.remove_callback(printed)
        return trainer

    # Everything is built, and so checked, before the first step is made or an earlier run is touched.
    callbacks = [] if script.em_patience is None else [EMIterationCallback("eval_f1", script.em_patience)]
    trainer = trainer_for("DRO", config, *callbacks)
    asked = script.num_eval_questions or len(rows["test"])
    if repeated is not None:  # as many as its clock allowed
        asked = json.loads((repeated / "summary.json").read_text(encoding="utf-8"))["n_eval"]
    test = Experiment(config, rows["test"].select(range(min(asked, len(rows["test"])))))
    warm = None
    if script.warmup_queries:
        warm = trainer_for("warm-up", warmup_config(config, *script.warmup))
        if budget is not None:
            warm.add_callback(TimeBudgetCallback(0.12 * budget, BudgetReadings(run_dir, "warm-up", repeated)))
    if checkpoint is None:
        set_aside(run_dir)
    keep_record(run_dir, record, resumed=checkpoint is not None)

    if warm is not None and checkpoint is None:
        warm.train()
        if interrupt.interrupted:
            logger.warning("Stopped in the warm-up, which is not resumed: start again")
            return interrupt.exit_code
        warm.save_model()
    elif warm is not None:
        warm.load_adapters(warm.args.output_dir)

    seconds = None if budget is None or repeated is not None else 0.17 * budget
    test.evaluate("warmup", "warm-up", trainer.pipeline, seconds=seconds)
    before = test.examples("warmup", trainer.pipeline)
    test.evaluate("retriever_sft", "retriever's order, SFT generator", trainer.pipeline, "retriever")
    with trainer.pipeline.without_adapters():
        test.evaluate("retriever_zero_shot", "retriever's order, zero-shot", trainer.pipeline, "retriever")

    if budget is not None:
        left = budget - (time.monotonic() - start) - 1.1 * test.seconds["warmup"] - 30
        if left < 60:
            logger.warning("max_minutes=%.0f leaves no time for DRO: it gets one minute", script.max_minutes)
        trainer.add_callback(TimeBudgetCallback(max(left, 60), BudgetReadings(run_dir, "DRO", repeated)))
    trainer.train(resume_from_checkpoint=checkpoint)
    if interrupt.interrupted:
        logger.warning("Stopped at step %d. To go on: add --resume_from_checkpoint last", trainer.state.global_step)
        return interrupt.exit_code
    trainer.save_model()
    test.evaluate("dro", "DRO", trainer.pipeline)
    after = test.examples("dro", trainer.pipeline)
    examples = [before_after(*pair) for pair in zip(before, after, strict=True)]
    minutes = (time.monotonic() - start) / 60
    summary = test.write("warmup", "dro", vars(script), trainer.state.log_history, examples, minutes, facts)
    if trainer.is_world_process_zero():
        console = Console()
        console.print(summary_table(summary))
        for example in examples:
            console.print(example_table(example))
        console.print(f"{minutes:.1f} minutes. Report: {write_report(run_dir)}, figures: {run_dir / 'summary.json'}")
    trainer.create_model_card(license=script.license, summary=summary)
    if config.push_to_hub:
        trainer.push_to_hub(license=script.license, summary=summary)
    return 0


def run() -> int:
    """Runs the recipe; a user's mistake is one line on stderr and exit code 2, a signal's is `InterruptCallback`'s."""
    if {"-h", "--help"} & set(sys.argv):
        sys.stdout.write(help_text(__doc__ or "", ScriptArguments, DROSettings))
        return 0
    sys.argv = ["--help" if argument == "--help_all" else argument for argument in sys.argv]
    from drorl.callbacks import leaving_on_signals

    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("drorl").setLevel(logging.INFO)
    try:
        arguments = parse()
    except ValueError as error:
        logger.error("%s", error)
        return 2
    try:
        with leaving_on_signals():
            return main(*arguments)
    except UserError as error:
        logger.error("%s", error)
        return 2
    except KeyboardInterrupt:
        logger.warning("Interrupted. To go on from the last checkpoint: add --resume_from_checkpoint last")
        return 130


if __name__ == "__main__":
    sys.exit(run())
