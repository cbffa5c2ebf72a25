"""Passages stay data whatever is written in them, and nothing from outside is evaluated, unpickled or executed."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nq
import pytest
import torch
from attacks import ATTACKS
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from runs import near_permutations
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from drorl.adapters import SELECTOR
from drorl.models import load_model_and_tokenizer
from drorl.permutations import parse_permutation
from drorl.pipeline import PipelineSettings, RAGPipeline
from drorl.prompts import GENERATOR_HEAD, SELECTOR_HEAD, PromptBuilder, PromptTooLongError
from drorl.settings import IDENTIFIERS

PACKAGE = Path(__file__).parent.parent / "drorl"
RECIPES = PACKAGE.parent / "recipes"
QUERY = "Which river flows through Basel?"
K, N = 3, 6
Passages = list[dict[str, Any]]

attack = pytest.mark.parametrize("name", ATTACKS)


def attacked(passages: Passages, name: str, place: int = 2) -> Passages:
    """The passages, one of which is an attack."""
    title, text = ATTACKS[name]
    return [p | ({"title": title, "text": text} if i == place else {}) for i, p in enumerate(passages)]


@pytest.fixture
def passages(rows: Callable[..., list[dict[str, Any]]]) -> Passages:
    return rows(1, N)[0]["candidates"]


@pytest.fixture(scope="module")
def tools_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer like Qwen's: `<think>` and `<tool_call>` are control tokens that it does not call special."""
    changed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=tokenizer.chat_template,
    )
    names = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</s>", "[INST]", "[/INST]")
    changed.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    changed.add_tokens([AddedToken("Danube", special=False), AddedToken("  ", special=False)])
    return changed


@pytest.fixture(scope="module")
def folding_tokenizer() -> PreTrainedTokenizerFast:
    """A Unigram tokenizer that folds full width into ASCII first, and has its control tokens among its pieces."""
    pieces = [("<unk>", 0.0), ("<|im_end|>", 0.0), ("<|im_start|>", 0.0), ("<|endoftext|>", 0.0)]
    pieces += [(chr(i), -5.0) for i in range(32, 127)] + [("\n", -5.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([])
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )


@pytest.fixture(params=["chat", "base", "tools", "folding"])
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    name = {"chat": "tokenizer", "base": "base_tokenizer"}.get(request.param, f"{request.param}_tokenizer")
    return request.getfixturevalue(name)


def controls(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Every token that is written in brackets, by its text: found in another way than the one that is tested."""
    texts = {i: text for text, i in tokenizer.get_vocab().items()}
    found = {i for i, text in texts.items() if len(text) > 2 and text[0] + text[-1] in ("<>", "[]")}
    return (found | set(tokenizer.all_special_ids)) - {tokenizer.convert_tokens_to_ids("<unk>")} - {None}


# -------------------------------------------------------------------------------------------------- the data position
def test_there_are_thirty_attacks() -> None:
    assert len(ATTACKS) == 30


@attack
@pytest.mark.parametrize("identifiers", IDENTIFIERS)
def test_no_passage_leaves_the_data_position(
    any_tokenizer: PreTrainedTokenizerFast, passages: Passages, identifiers: str, name: str
) -> None:
    """With an attack among its passages, a prompt has the control tokens of its frame, at the frame's places.

    That holds for the selector's prompt, each passage alone, what expands a query, the generator's prompt, and the
    identifiers that may be written.
    """
    builder = PromptBuilder(any_tokenizer, identifiers, K, max_passage_tokens=200)
    control, shown = controls(any_tokenizer), attacked(passages, name)

    def sequences(candidates: Passages) -> list[list[int]]:
        prompt = builder.selector(QUERY, candidates)
        alone = [passage for passage, _ in prompt.queries]
        return [prompt.ids, *alone, builder.generator(QUERY, candidates)]

    def frame(ids: list[int]) -> tuple[list[int], list[int]]:
        found = [token for token in ids if token in control]
        return found, [i - len(ids) for i, token in enumerate(ids) if token in control and i > len(ids) / 2]

    assert list(map(frame, sequences(shown))) == list(map(frame, sequences(passages)))
    prompt = builder.selector(QUERY, shown)
    names = [*prompt.slate.first_ids, *prompt.slate.later_ids, *prompt.expansions]
    assert control.isdisjoint(token for ids in names for token in ids)
    assert len(set(prompt.identifiers)) == N


@pytest.mark.parametrize("role", ["selector", "generator"])
@attack
def test_no_passage_writes_a_line_of_the_prompt(
    tokenizer: PreTrainedTokenizerFast, passages: Passages, role: str, name: str
) -> None:
    """Between the frame's lines there are as many lines as passages, each begun by the prompt, in its order."""
    builder = PromptBuilder(tokenizer, "number", K)
    made = getattr(builder, role)(QUERY, attacked(passages, name))
    text = tokenizer.decode(made.ids if role == "selector" else made)
    head = SELECTOR_HEAD if role == "selector" else GENERATOR_HEAD
    body = text.split(head.format(query=QUERY), 1)[1].splitlines()
    title = " ".join(ATTACKS[name][0].splitlines())
    titles = [title if i == 2 else p["title"] for i, p in enumerate(passages)]
    starts = [f"[{i + 1}] {t}:" for i, t in enumerate(titles)] if role == "selector" else [f"{t}:" for t in titles]
    assert [line[: len(start)] for line, start in zip(body, starts, strict=False)] == starts
    assert body[N] == ("" if role == "selector" else "Answer:<|im_end|>")


@given(text=st.text(st.sampled_from("<|>[]/ im_endstar\n＜＞｜thinktoolca")), title=st.text(max_size=20))
def test_any_text_is_data(tools_tokenizer: PreTrainedTokenizerFast, text: str, title: str) -> None:
    """Of any characters, control tokens' own most of all; nothing but line breaks is lost."""
    builder = PromptBuilder(tools_tokenizer, "number", 1)
    frame = [t for t in builder.generator(QUERY, [{"title": "", "text": ""}]) if t in controls(tools_tokenizer)]
    ids = builder.generator(QUERY, [{"title": title, "text": text}])
    assert [t for t in ids if t in controls(tools_tokenizer)] == frame
    assert " ".join(text.splitlines()) in tools_tokenizer.decode(ids)


def test_words_that_were_added_stay_words(tools_tokenizer: PreTrainedTokenizerFast) -> None:
    """A tokenizer's added words and runs of spaces are no control tokens, and are not spelled."""
    vocabulary = tools_tokenizer.get_vocab()
    ids = PromptBuilder(tools_tokenizer).generator(QUERY, [{"title": "x", "text": "The Danube  flows."}])
    assert {vocabulary["Danube"], vocabulary["  "]} <= set(ids)


# ------------------------------------------------------------------------------------------------------- the choice
@pytest.fixture(scope="module")
def pipelines(adapted_model: Callable[..., PeftModel], tokenizer: PreTrainedTokenizerFast) -> dict[str, RAGPipeline]:
    model = adapted_model(randomise=True)
    return {
        name: RAGPipeline(model, tokenizer, PipelineSettings(N, K, identifiers=name, max_passage_tokens=60))
        for name in IDENTIFIERS
    }


@attack
@pytest.mark.parametrize("identifiers", IDENTIFIERS)
def test_no_attack_is_chosen_that_is_no_candidate(
    pipelines: dict[str, RAGPipeline], passages: Passages, identifiers: str, name: str
) -> None:
    """The constrained policy chooses K distinct candidates and its probabilities are of these alone."""
    shown, pipeline = attacked(passages, name), pipelines[identifiers]
    if (identifiers, name) == ("title", "very long"):  # an identifier of which K do not fit into the window
        with pytest.raises(PromptTooLongError):
            pipeline.select(QUERY, shown)
        return
    chosen = [ranked.passage for ranked in pipeline.select(QUERY, shown)]
    assert all(passage in shown for passage in chosen)
    assert len({passage["id"] for passage in chosen}) == K
    with torch.no_grad():
        [[first]] = pipeline.decisions([QUERY], [shown]).logps([[()]])
    assert first.shape == (N,) and first.exp().sum().item() == pytest.approx(1.0, abs=1e-5)  # float32


@attack
@pytest.mark.parametrize("identifiers", ["number", "letter", "title"])
def test_no_text_names_what_is_no_candidate(
    tokenizer: PreTrainedTokenizerFast, passages: Passages, identifiers: str, name: str
) -> None:
    """Free text in which a selector repeats an attack is read as K distinct candidates, or as none."""
    shown = attacked(passages, name)
    identifiers_ = PromptBuilder(tokenizer, identifiers, K).selector(QUERY, shown).identifiers
    for text in ATTACKS[name]:
        read = parse_permutation(text, identifiers_, K).permutation
        assert read is None or (len(read) == len(set(read)) == K and set(read) <= set(range(N)))


def test_free_text_is_drawn_over_attacks(
    make_trainer: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, passages: Passages
) -> None:
    """A training step in free text, an attack in each of thirty rows: what is drawn are candidates, or nothing."""
    rows = [
        {"query": QUERY, "answers": ["Rhine"], "candidates": attacked(passages, name, place % N)}
        for place, name in enumerate(ATTACKS)
    ]
    settings = {"constrained": False, "max_completion_length": 12, "max_passage_tokens": 60, "max_steps": 8}
    trainer = make_trainer(train_rows=rows, generation_kwargs=near_permutations(tokenizer), **settings)
    drawn: list[Any] = []
    original = trainer._generate_and_score_completions

    def noted(*arguments: Any) -> Any:
        found = original(*arguments)
        drawn.extend(z for rollout in found["rollouts"] for z in rollout.permutations)
        return found

    trainer._generate_and_score_completions = noted
    trainer.train()
    valid = [z for z in drawn if z is not None]
    assert valid, "nothing was drawn, so nothing is shown"
    assert all(len(set(z)) == len(z) == 2 and set(z) <= set(range(N)) for z in valid)


# ----------------------------------------------------------------------------------------------- nothing is executed
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load",
    "joblib.load", "marshal.loads", "shelve.open", "os.system", "os.popen", "yaml.load", "pandas.read_pickle",
    "pd.read_pickle",
}  # fmt: skip


def dangers(source: str) -> list[str]:
    """The calls in a source that would run or unpickle what they are given, by name and line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            bad = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"} & {n.split(".")[0] for n in names}
            found += [f"import {name}, line {node.lineno}" for name in bad]
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        unsafe = name in FORBIDDEN
        unsafe |= name == "torch.load" and given.get("weights_only") != "True"
        unsafe |= given.get("allow_pickle", "False") != "False" or given.get("shell", "False") != "False"
        unsafe |= given.get("trust_remote_code", "False") not in ("False", "trust_remote_code")
        if unsafe:
            found.append(f"{name}, line {node.lineno}")
    return found


@pytest.mark.parametrize("folder", [PACKAGE, RECIPES], ids=["drorl", "recipes"])
def test_nothing_is_evaluated_or_unpickled(folder: Path) -> None:
    """No file of the package has a call that runs what a file or a server says."""
    files = sorted(folder.rglob("*.py"))
    assert len(files) > 5
    assert {str(path): found for path in files if (found := dangers(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "eval(x)", "exec(x)", "import pickle", "from pickle import loads", "torch.load(f)", "import joblib",
        "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)", "yaml.load(f)", "__import__(x)",
        "f.from_pretrained(x, trust_remote_code=True)", "subprocess.run(x, shell=True)", "os.system(x)",
    ],
)  # fmt: skip
def test_such_a_call_would_be_found(source: str) -> None:
    """What the test above looks for."""
    assert dangers(source)


def test_pickled_weights_are_refused(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """A checkpoint of `pytorch_model.bin` alone is not loaded."""
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    load_model_and_tokenizer(str(tmp_path), "float32")
    torch.save(tiny_model().state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_model_and_tokenizer(str(tmp_path), "float32")


def test_code_of_a_model_runs_only_when_asked(tiny_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """A model that brings its own code is refused; with `model_init_kwargs` that say so it runs."""
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
    code += "class C(LlamaConfig):\n    model_type = 'own'\n\n\nclass M(LlamaForCausalLM):\n    config_class = C\n"
    (tmp_path / "own.py").write_text(code)
    config = (tmp_path / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "own"')
    auto = '"auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},'
    (tmp_path / "config.json").write_text(config.replace("{", "{" + auto, 1))
    with pytest.raises((ValueError, OSError), match="trust_remote_code"):
        load_model_and_tokenizer(str(tmp_path), "float32")
    assert not ran.exists()
    asked = ["--model_name_or_path", str(tmp_path), "--dtype", "float32", "--output_dir", str(tmp_path / "run")]
    script, config = nq.parse([*asked, "--model_init_kwargs", '{"trust_remote_code": true}'])
    model, *_ = nq.load_model(script, **config.model_init_kwargs)
    assert type(model.get_base_model()).__name__ == "M" and ran.exists()


def test_a_run_with_attacks_is_evaluated(make_trainer: Callable[..., Any], passages: Passages) -> None:
    """Evaluation, generation included, goes through every attack; chosen are places among the candidates."""
    rows = [{"query": QUERY, "answers": ["Rhine"], "candidates": attacked(passages, name)} for name in ATTACKS]
    trainer = make_trainer(max_passage_tokens=60)
    trainer.evaluate(Dataset.from_list(rows))
    assert len(trainer.last_records) == len(ATTACKS)
    assert all(len(set(r.chosen)) == 2 and set(r.chosen) <= set(range(N)) for r in trainer.last_records)
    assert trainer.pipeline.role(SELECTOR) is trainer.pipeline.model
