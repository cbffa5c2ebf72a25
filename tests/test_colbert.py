"""Late interaction, in an environment of its own: `make test-colbert`. It has no TRL, hence no conftest."""

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("pylate", reason="PyLate has an environment of its own: make test-colbert")

import torch
from pylate.models import ColBERT as Encoder
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from drorl.errors import InvalidInputError
from drorl.retrieval import colbert
from drorl.retrieval.colbert import ColBERT
from drorl.retrieval.corpus import Corpus

torch.set_num_threads(1)
WORDS = "river mountain lake city king war music train bridge castle forest island poet novel treaty harbour".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[Q]", "[D]", ".", "|"]
QUERIES = ["river king", "", "a treaty of the harbour", "music music"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random ColBERT: two layers of BERT, 16 dimensions."""
    folder = tmp_path_factory.mktemp("model")
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", SPECIAL.index("[CLS]")), ("[SEP]", SPECIAL.index("[SEP]"))]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    tokens = {f"{name}_token": token for name, token in names.items()}
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder / "bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    vocabulary = len(SPECIAL) + len(WORDS)
    BertModel(BertConfig(vocab_size=vocabulary, initializer_range=0.3, **sizes)).save_pretrained(folder / "bert")
    prefixes = {"query_prefix": "[Q]", "document_prefix": "[D]"}
    Encoder(str(folder / "bert"), embedding_size=16, device="cpu", **prefixes).save(str(folder / "colbert"))
    return str(folder / "colbert")


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """200 passages, some with no title; encoded in shards of 70."""
    monkeypatch.setattr(colbert, "SHARD_PASSAGES", 70)
    draw, path = random.Random(0), tmp_path / "p.jsonl"
    lines = []
    for i in range(200):
        text = " ".join(draw.choices(WORDS, k=draw.randint(2, 30)))
        lines.append({"id": f"p{i}", "title": draw.choice(["", *WORDS]), "text": text})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Corpus.build(path, tmp_path / "c")


def brute_force(corpus: Corpus, model: str, query: str) -> np.ndarray:
    """MaxSim of a query with every passage, in float64, by two loops; each text is encoded alone."""
    encoder = Encoder(model, device="cpu")

    def vectors(text: str, is_query: bool) -> np.ndarray:
        return encoder.encode([text], is_query=is_query, show_progress_bar=False)[0].astype(np.float64)

    asked, scores = vectors(query, True), []
    for i in range(len(corpus)):
        title, text = corpus[i]["title"], corpus[i]["text"]
        document = vectors(f"{title} | {text}" if title else text, False)
        scores.append(sum(max(float(q @ d) for d in document) for q in asked))
    return np.array(scores)


def test_scores_are_max_sim(corpus: Corpus, model: str, tmp_path: Path) -> None:
    """To 1e-4, in falling order; of the true best, nine in ten are found through the compressed vectors."""
    index = ColBERT.build(corpus, tmp_path / "i", model, "cpu")
    hits = 0
    for query, found in zip(QUERIES, index.search(QUERIES, 10), strict=True):
        wanted = brute_force(corpus, model, query)
        positions = [int(c["id"][1:]) for c in found]
        assert np.abs(np.array([c["score"] for c in found]) - wanted[positions]).max() < 1e-4
        assert [c["score"] for c in found] == sorted((c["score"] for c in found), reverse=True)
        assert [c["rank"] for c in found] == list(range(1, 11))
        assert all(c["text"] == corpus[p]["text"] for c, p in zip(found, positions, strict=True))
        hits += len(set(positions) & set(np.argsort(-wanted)[:10].tolist()))
    assert hits >= 0.9 * 10 * len(QUERIES)
    [found] = index.search(QUERIES[:1], 500)
    assert 100 < len({c["id"] for c in found}) == len(found) <= len(corpus)
    assert index.search([], 5) == []
    assert index.search(QUERIES[:1], 0) == [[]]


def test_encoding_goes_on_where_it_stopped(
    corpus: Corpus, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished shards are kept, a finished index is used, and nothing but it is left; that of another model is not."""
    encode, asked = Encoder.encode, []

    def watched(self: Any, texts: Sequence[str], **settings: Any) -> Any:
        if len(asked) == 2:
            asked.append(0)
            raise KeyboardInterrupt
        asked.append(len(texts))
        return encode(self, texts, **settings)

    monkeypatch.setattr(Encoder, "encode", watched)
    with pytest.raises(KeyboardInterrupt):
        ColBERT.build(corpus, tmp_path / "i", model, "cpu")
    with pytest.raises(InvalidInputError, match="holds no ColBERT index of this corpus"):
        ColBERT(corpus, tmp_path / "i", model, "cpu")
    index = ColBERT.build(corpus, tmp_path / "i", model, "cpu")
    assert asked == [70, 70, 0, 60]
    whole = ColBERT.build(corpus, tmp_path / "whole", model, "cpu")
    assert index.search(QUERIES, 20) == whole.search(QUERIES, 20)
    assert index.key == whole.key
    before = len(asked)
    ColBERT.build(corpus, tmp_path / "i", model, "cpu")
    assert len(asked) == before
    assert {path.name for path in (tmp_path / "i").iterdir()} == {"colbert.json", "plaid"}
    (Path(model) / "note").write_text("another model")
    with pytest.raises(InvalidInputError, match="holds no ColBERT index of this corpus by"):
        ColBERT(corpus, tmp_path / "i", model, "cpu")
