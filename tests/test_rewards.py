"""The generator's answer likelihood as a reward that TRL's own trainers can use."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from runs import adapter_state, assert_identical, near_permutations, smallest_move
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from drorl.adapters import GENERATOR, activate
from drorl.prompts import GENERATOR_HEAD, GENERATOR_TAIL, PromptBuilder
from drorl.rewards import AnswerLikelihoodReward

Rows = list[dict[str, Any]]


@pytest.fixture
def generator(adapted_model: Callable[..., PeftModel]) -> PeftModel:
    """A model with the generator's adapter active."""
    model = adapted_model(randomise=True)
    activate(model, GENERATOR)
    return model


def naive_logp(model: torch.nn.Module, tokenizer: Any, row: dict[str, Any], chosen: list[int], answer: str) -> float:
    """log p(answer | query, chosen passages), written out: one prompt, one pass over it, one sum over the answer."""
    passages = [row["candidates"][i] for i in chosen]
    prompt = GENERATOR_HEAD.format(query=row["query"])
    prompt += "".join(f"{p['title']}: {p['text']}\n" for p in passages) + GENERATOR_TAIL
    messages = [{"role": "user", "content": prompt}]
    start = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    context = PromptBuilder(tokenizer).generator(row["query"], passages)
    assert tokenizer.decode(context, skip_special_tokens=False) == start
    target = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + target]), use_cache=False).logits[0].double()
    logps = torch.log_softmax(logits[len(context) - 1 : -1], dim=-1)
    return logps[torch.arange(len(target)), target].sum().item()


def test_the_reward_is_the_answers_log_likelihood(
    generator: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: Callable[..., Rows]
) -> None:
    """The value is the sum of the answer's token log-probabilities under the passages named, in the order named.

    Float32 sums of some ten terms of about 5 nats: 1e-4 is ten times their rounding; the orders differ by more.
    """
    row = rows(1, 6)[0]
    reward = AnswerLikelihoodReward(generator, tokenizer, "number", num_selected=2)
    texts = {"[3] > [1]": [2, 0], "[1] > [3]": [0, 2], "[5], then [9] or [5]": [4, 0]}
    expected = [naive_logp(generator, tokenizer, row, chosen, row["answers"][0]) for chosen in texts.values()]
    columns = {name: [row[name]] * len(texts) for name in ("query", "answers", "candidates")}
    assert reward(list(texts), **columns) == pytest.approx(expected, abs=1e-4)
    assert min(abs(a - b) for i, a in enumerate(expected) for b in expected[:i]) > 0.01
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(messages, **columns) == pytest.approx(expected, abs=1e-4)


def test_the_likelihoods_of_all_answers_add_up(
    generator: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: Callable[..., Rows]
) -> None:
    """With `answer_target="marginal"` the reward is the log of the summed probabilities of the distinct answers."""
    row = rows(1, 6)[0] | {"answers": ["Rhine", "the Rhine", "Rhine"]}
    reward = AnswerLikelihoodReward(generator, tokenizer, "number", 2, answer_target="marginal")
    each = [naive_logp(generator, tokenizer, row, [1, 0], answer) for answer in ("Rhine", "the Rhine")]
    value = reward(["[2] > [1]"], [row["query"]], [row["answers"]], [row["candidates"]])
    assert value == pytest.approx([torch.tensor(each).logsumexp(0).item()], abs=1e-4)


@pytest.mark.parametrize(
    ("identifiers", "text"), [("number", "I cannot tell."), ("number", "[7]"), ("letter", "[3]"), ("title", "Nile")]
)
def test_a_text_without_a_permutation_has_no_reward(
    identifiers: str, text: str, generator: PeftModel, tokenizer: PreTrainedTokenizerFast, rows: Callable[..., Rows]
) -> None:
    """No identifier of the row's: `None`, which TRL leaves out, and its neighbour keeps its own reward."""
    row = rows(1, 6)[0]
    reward = AnswerLikelihoodReward(generator, tokenizer, identifiers, 2)
    first, second = (c["title"] for c in row["candidates"][:2])
    good = {"number": "[2] > [1]", "letter": "[B] > [A]", "title": f"{second} > {first}"}
    columns = {name: [row[name]] * 2 for name in ("query", "answers", "candidates")}
    values = reward([text, good[identifiers]], **columns)
    expected = naive_logp(generator, tokenizer, row, [1, 0], row["answers"][0])
    assert values == [None, pytest.approx(expected, abs=1e-4)]


def test_it_works_in_trls_own_trainer(
    tmp_path: Path,
    generator: PeftModel,
    tiny_model: Callable[..., LlamaForCausalLM],
    lora: LoraConfig,
    tokenizer: PreTrainedTokenizerFast,
    rows: Callable[..., Rows],
) -> None:
    """An unmodified `GRPOTrainer` trains on the reward, logs it under its name, and leaves the generator alone."""
    settings: dict[str, Any] = {"num_generations": 4, "per_device_train_batch_size": 8, "max_steps": 2}
    quiet: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    config = GRPOConfig(
        str(tmp_path),
        bf16=False,
        learning_rate=1e-2,
        max_completion_length=12,
        generation_kwargs=near_permutations(tokenizer) | {"min_new_tokens": 12},
        logging_steps=1,
        **settings,
        **quiet,
    )
    data = [{"prompt": [{"role": "user", "content": row["query"]}], **row} for row in rows(4, 6)]
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    reward = AnswerLikelihoodReward(generator, tokenizer, "number", num_selected=2)
    torch.manual_seed(0)
    dataset = Dataset.from_list(data)
    trainer = GRPOTrainer(tiny_model(seed=1), reward, config, dataset, None, tokenizer, peft_config=lora)
    start = adapter_state(trainer.model, "default")
    trainer.train()
    logged = [e["rewards/answer_likelihood/mean"] for e in trainer.state.log_history if "loss" in e]
    assert len(logged) == 2
    assert all(-100 < value < 0 for value in logged)
    assert smallest_move(adapter_state(trainer.model, "default"), start) > 1e-3
    assert_identical(generator.state_dict(), before)
