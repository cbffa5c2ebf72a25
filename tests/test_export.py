"""An exported role is an ordinary checkpoint, and computes what the adapter on its base computes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from runs import config
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from drorl.adapters import GENERATOR, ROLES, SELECTOR
from drorl.cli import app
from drorl.errors import InvalidInputError, OutputError
from drorl.export import export_role
from drorl.pipeline import RAGPipeline
from drorl.trainer import DROTrainer

IDS = torch.arange(3, 40)[None]
# (W + s B A) x and W x + s B (A x) are the same sums in another order. In float32 (2^-24 a sum), through two layers of
# 32 dimensions, that is some 1e-6 of the logits; a role that is mistaken for the other differs in the first digit.
SAME = 1e-5


@pytest.fixture
def run(
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    lora: LoraConfig,
    rows: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Path:
    """A trained run, on one base in bfloat16 or, with the parameter `True`, on a base for each role."""
    for name, sizes in (("selector", {}), ("generator", {"seed": 1, "hidden_size": 16})):
        tiny_model(torch.bfloat16, **sizes).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    separate = getattr(request, "param", False)
    settings = {"model_init_kwargs": {"dtype": "float32"}, "learning_rate": 0.1, "max_answer_length": 7}
    trainer = DROTrainer(
        str(tmp_path / "selector"),
        config(tmp_path / "run", **settings),
        rows(8, 6),
        generator_model=str(tmp_path / "generator") if separate else None,
        peft_config=lora,
    )
    trainer.train()
    trainer.save_model()
    return tmp_path / "run"


def export(run: Path, output: Path, *options: str) -> None:
    done = CliRunner().invoke(app, ["export", str(run), "--output", str(output), *options])
    assert done.exit_code == 0, done.exception


@torch.no_grad()
def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize("run", [False, True], indirect=True, ids=["one base", "two bases"])
def test_the_merged_models_are_the_adapters_models(run: Path, tmp_path: Path) -> None:
    """In float32, `AutoModelForCausalLM` alone has each role's logits, and generates what the run answers."""
    export(run, tmp_path / "merged", "--dtype", "float32")
    pipeline = RAGPipeline.from_pretrained(run, dtype="float32", device="cpu")
    for role, other in zip(ROLES, reversed(ROLES), strict=True):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / role)
        assert type(merged) is LlamaForCausalLM and merged.dtype == torch.float32
        with torch.no_grad():
            logits = merged(input_ids=IDS).logits
            assert distance(logits, pipeline.role(role)(input_ids=IDS).logits) < SAME
            assert distance(logits, pipeline.role(other)(input_ids=IDS).logits) > 1000 * SAME
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged" / role)
        assert tokenizer.get_vocab() == pipeline.tokenizer.get_vocab()
        assert tokenizer.chat_template == pipeline.tokenizer.chat_template
    passages = [{"title": "Rhine", "text": "The Rhine flows through Basel."}] * 2
    prompt = pipeline.generator_prompts.generator("Which river flows through Basel?", passages)
    written = merged.generate(torch.tensor([prompt]))[0, len(prompt) :]
    assert len(written) <= 7
    assert tokenizer.decode(written, skip_special_tokens=True).strip() == pipeline.generate([prompt])[0]


def test_weights_have_the_bases_type_unless_another_is_asked_for(run: Path, tmp_path: Path) -> None:
    """A base in bfloat16 gives merged weights in bfloat16: the exact sums, rounded once."""
    export(run, tmp_path / "merged", "--role", GENERATOR)
    assert not (tmp_path / "merged" / SELECTOR).exists()
    export(run, tmp_path / "exact", "--role", GENERATOR, "--dtype", "float32")
    rounded, exact = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / GENERATOR) for name in ("merged", "exact")
    )
    assert json.loads((tmp_path / "merged" / GENERATOR / "config.json").read_text())["dtype"] == "bfloat16"
    for name, weight in exact.state_dict().items():
        assert torch.equal(rounded.state_dict()[name], weight.to(torch.bfloat16)), name


def test_what_is_no_run_is_not_exported(tmp_path: Path) -> None:
    """The error is the one of every command that loads a run, and nothing is written."""
    done = CliRunner().invoke(app, ["export", str(tmp_path), "--output", str(tmp_path / "merged")])
    assert "is not a drorl run" in str(done.exception)
    gone = str(tmp_path / "gone")  # a path, which is no name on the hub
    done = CliRunner().invoke(app, ["export", gone, "--output", str(tmp_path / "merged")])
    assert str(done.exception) == f"{gone} is not a drorl run: it has no drorl.json"
    assert not (tmp_path / "merged").exists()


def test_an_output_that_cannot_be_written_is_found_first(run: Path, tmp_path: Path) -> None:
    """Even before the base is missed, which is gone here as well."""
    shutil.rmtree(tmp_path / "selector")
    (tmp_path / "merged").write_text("a file")
    with pytest.raises(OutputError, match=r"merged.*: Not a directory") as caught:
        export_role(run, SELECTOR, tmp_path / "merged" / SELECTOR)
    assert "\n" not in str(caught.value)


def test_a_write_that_fails_is_one_line(run: Path, tmp_path: Path) -> None:
    """What stands in the way of the weights is told with the place of the model."""
    (tmp_path / "merged" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"the merged selector cannot be written to .*merged: ") as caught:
        export_role(run, SELECTOR, tmp_path / "merged")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_loaded_is_one_line(run: Path, tmp_path: Path) -> None:
    """An adapter that was cut off, and a base that is gone, are named."""
    weights = run / GENERATOR / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InvalidInputError, match=r"the generator of .*run on its base .* cannot be loaded: Safetensor"):
        export_role(run, GENERATOR, tmp_path / "merged")
    shutil.rmtree(tmp_path / "selector")
    with pytest.raises(InvalidInputError, match=r"the selector of .*run on its base .*cannot be loaded: ") as caught:
        export_role(run, SELECTOR, tmp_path / "merged")
    assert "\n" not in str(caught.value)
