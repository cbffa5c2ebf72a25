"""The trained system as a user meets it: select passages, answer from them, save, load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise_adapters
from peft import LoraConfig, PeftModel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from drorl.adapters import GENERATOR, SELECTOR, activate, add_adapters
from drorl.models import load_model_and_tokenizer
from drorl.pipeline import PipelineSettings, RAGPipeline
from drorl.policy import Decisions, SelectorPolicy

Rows = list[dict[str, Any]]
MakePipeline = Callable[..., RAGPipeline]


@pytest.fixture
def make_pipeline(adapted_model: Callable[..., PeftModel], tokenizer: PreTrainedTokenizerFast) -> MakePipeline:
    """Makes a pipeline of a tiny model with random adapters: N = 6, K = 3; keywords are settings."""

    def make(**settings: Any) -> RAGPipeline:
        defaults = {"num_candidates": 6, "num_selected": 3, "max_answer_length": 5}
        return RAGPipeline(adapted_model(randomise=True), tokenizer, PipelineSettings(**(defaults | settings)))

    return make


@pytest.mark.parametrize("identifiers", ["number", "letter", "title"])
def test_selected_passages_are_distinct_and_their_logps_add_up(
    identifiers: str, make_pipeline: MakePipeline, rows: Callable[..., Rows]
) -> None:
    """K distinct candidates come back, each the likeliest at its place, and the log-probabilities sum to log p_s(z).

    They differ between the places: three numbers whose sum is right by accident are not taken for the right ones.
    """
    pipeline = make_pipeline(identifiers=identifiers)
    for row in rows(3, 6):
        chosen = pipeline.select(row["query"], row["candidates"])
        indices = tuple(row["candidates"].index(c.passage) for c in chosen)
        assert len(set(indices)) == 3
        activate(pipeline.model, SELECTOR)
        prompt = pipeline.prompts.selector(row["query"], row["candidates"])
        with torch.no_grad():
            asked = Decisions(SelectorPolicy(), pipeline.model, [prompt])
            [decisions] = asked.logps([[indices[:t] for t in range(3)]])
            total = asked.permutation_logps([[indices]])[0][0].sum()
        assert tuple(decisions.argmax(dim=1).tolist()) == indices
        # Float32, the same tokens packed differently.
        assert [c.logp for c in chosen] == pytest.approx(decisions.max(dim=1).values.tolist(), abs=1e-5)
        assert sum(c.logp for c in chosen) == pytest.approx(total.item(), abs=1e-5)
        assert pipeline.select(row["query"], row["candidates"], k=2) == chosen[:2]


@pytest.mark.parametrize("k", [0, 4, -1])
def test_k_is_within_what_was_trained(k: int, make_pipeline: MakePipeline, rows: Callable[..., Rows]) -> None:
    """More passages than K, or none, is an error that names both numbers."""
    row = rows(1, 6)[0]
    with pytest.raises(ValueError, match=rf"k must be between 1 and num_selected=3, not {k}"):
        make_pipeline().select(row["query"], row["candidates"], k=k)


def test_fewer_candidates_than_are_selected_is_an_error(
    make_pipeline: MakePipeline, rows: Callable[..., Rows]
) -> None:
    """Two candidates cannot be ranked into three places."""
    row = rows(1, 6)[0]
    with pytest.raises(ValueError, match="cannot select 3 passages from 2 candidates"):
        make_pipeline().select(row["query"], row["candidates"][:2])


def test_candidates_beyond_n_are_not_read(make_pipeline: MakePipeline, rows: Callable[..., Rows]) -> None:
    """The selector sees the first N candidates; what comes after them changes nothing and is never chosen."""
    row = rows(1, 12)[0]
    pipeline = make_pipeline()
    assert pipeline.select(row["query"], row["candidates"]) == pipeline.select(row["query"], row["candidates"][:6])


def test_an_answer_is_the_generators_from_the_passages_it_cites(
    make_pipeline: MakePipeline, rows: Callable[..., Rows], tokenizer: PreTrainedTokenizerFast
) -> None:
    """The citations are the selection, and the text is the generator's greedy one from them, token by token."""
    pipeline = make_pipeline()
    texts = set()
    for row in rows(3, 6):
        answer = pipeline.answer(row["query"], row["candidates"])
        assert answer.citations == pipeline.select(row["query"], row["candidates"])
        ids = pipeline.generator_prompts.generator(row["query"], [c.passage for c in answer.citations])
        activate(pipeline.model, GENERATOR)
        written: list[int] = []
        while len(written) < 5 and tokenizer.eos_token_id not in written:
            with torch.no_grad():
                logits = pipeline.model(input_ids=torch.tensor([ids + written]), use_cache=False).logits
            written.append(int(logits[0, -1].argmax()))
        assert answer.text == tokenizer.decode(written, skip_special_tokens=True).strip()
        texts.add(answer.text)
    assert len(texts) > 1


def test_answers_do_not_depend_on_the_batch(make_pipeline: MakePipeline, rows: Callable[..., Rows]) -> None:
    """Contexts of different lengths, padded into one batch, give what each gives alone."""
    pipeline = make_pipeline()
    data = rows(4, 6)
    contexts = [pipeline.prompts.generator(r["query"], r["candidates"][: i + 1]) for i, r in enumerate(data)]
    assert len({len(context) for context in contexts}) == 4
    alone = [pipeline.generate([context])[0] for context in contexts]
    assert pipeline.generate(contexts) == alone
    assert len(set(alone)) > 1


def test_a_shuffle_depends_on_seed_and_query_alone(make_pipeline: MakePipeline, rows: Callable[..., Rows]) -> None:
    """The order shown is the same for the same seed and query, whatever was drawn before, and another for others."""
    pipeline = make_pipeline(shuffle_candidates=True)
    row = rows(1, 12)[0]
    torch.manual_seed(0)
    shown = pipeline.present(row["query"], row["candidates"], seed=1)
    torch.manual_seed(1)
    pipeline.present("another", row["candidates"], seed=1)
    assert pipeline.present(row["query"], row["candidates"], seed=1) == shown
    titles = sorted(c["title"] for c in shown)
    assert titles == sorted(c["title"] for c in row["candidates"][:6])
    others = [pipeline.present(row["query"], row["candidates"], seed=seed) for seed in range(2, 8)]
    others += [pipeline.present(f"{row['query']} {i}", row["candidates"], seed=1) for i in range(6)]
    # Of 12 random orders of 6 passages, the chance that more than two are this one is below 1e-6.
    assert sum(order == shown for order in others) <= 2
    assert make_pipeline().present(row["query"], row["candidates"], seed=1) == row["candidates"][:6]


def test_without_adapters_the_base_answers(
    make_pipeline: MakePipeline, tiny_model: Callable[..., LlamaForCausalLM], rows: Callable[..., Rows]
) -> None:
    """Inside `without_adapters` the logits are the bare base's, and afterwards the trained model's again."""
    pipeline, ids = make_pipeline(), torch.arange(5, 45)[None]
    with torch.no_grad():
        trained = pipeline.role(GENERATOR)(input_ids=ids).logits
        with pipeline.without_adapters():
            bare = pipeline.role(GENERATOR)(input_ids=ids).logits
        again = pipeline.role(GENERATOR)(input_ids=ids).logits
        base = tiny_model()(input_ids=ids).logits
    assert torch.equal(bare, base)
    assert torch.equal(again, trained)
    assert (trained - bare).abs().max() > 0.1


def test_a_saved_pipeline_is_the_same_pipeline(
    tmp_path: Path,
    tiny_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    lora: LoraConfig,
    rows: Callable[..., Rows],
) -> None:
    """Written and read back, it selects and answers identically, settings that are not the defaults included."""
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base, loaded_tokenizer = load_model_and_tokenizer(str(tmp_path / "base"), dtype="float32")
    model = add_adapters(base, lora).eval()
    randomise_adapters(model)
    settings = PipelineSettings(6, 2, True, "title", 0.7, 0.5, 20, 400, 5)
    pipeline = RAGPipeline(model, loaded_tokenizer, settings)
    pipeline.save_pretrained(tmp_path / "run")
    loaded = RAGPipeline.from_pretrained(tmp_path / "run", dtype="float32", device="cpu")
    assert loaded.settings == settings
    for row in rows(3, 6):
        assert loaded.answer(row["query"], row["candidates"]) == pipeline.answer(row["query"], row["candidates"])
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_directory_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    """The message names the directory and the file that it lacks."""
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name} is not a drorl run: it has no drorl.json"):
        RAGPipeline.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="drorl.json"):
        RAGPipeline.from_pretrained(tmp_path / "missing")


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"window": 99}, TypeError, "'transformers' takes no window"),
        ({"backend": "vllm", "device": "cuda:1"}, ValueError, "device='cuda:1'"),
        ({"backend": "vllm", "windows": 99}, TypeError, "windows"),
        ({"backend": "jax"}, ValueError, "'jax'"),
    ],
)
def test_a_keyword_that_a_backend_does_not_have_is_an_error(
    keywords: dict[str, Any], error: type[Exception], words: str, make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    """It is not ignored, as a misspelt one would be."""
    make_pipeline().save_pretrained(tmp_path)
    with pytest.raises(error, match=words):
        RAGPipeline.from_pretrained(tmp_path, **keywords)
