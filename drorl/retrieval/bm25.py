r"""BM25 over a corpus of any size: built in shards in bounded memory, searched from disk by memory map.

The index has bm25s's own format (every term's passages with their finished scores), so that bm25s reads it; it is
built here, because bm25s's own building keeps all tokens in memory. Lucene's formula, with terms t of a query and of a
passage of length l,

    score = sum_t log(1 + (N - n_t + 1/2) / (n_t + 1/2)) tf_t / (tf_t + k1 (1 - b + b l / l_mean))

Source: Kamphuis et al., Which BM25 do you mean?, ECIR 2020, Table 1 (Lucene, accurate).
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
from bm25s.stopwords import STOPWORDS_EN
from Stemmer import Stemmer, algorithms

from drorl.errors import InvalidInputError

from .corpus import SHARD_PASSAGES, Corpus

_WORD = re.compile(r"(?u)\b\w\w+\b")  # bm25s's own
_FACTS = "bm25.json"
VERSION = 1


@dataclass(frozen=True)
class BM25Settings:
    """What a BM25 index is made with.

    Args:
        k1 (`float`): how soon further occurrences of a term count less.
        b (`float`): how much a passage's length counts, from 0 to 1.
        stemmer (`str`, *optional*): a language of Snowball; `None`: words as they are.
        stop_words (`bool`): leaves out English stop words.
    """

    k1: float = 0.9
    b: float = 0.4
    stemmer: str | None = "english"
    stop_words: bool = True

    def __post_init__(self) -> None:
        if not (self.k1 >= 0 and 0 <= self.b <= 1):
            raise InvalidInputError(f"k1={self.k1} is not to be negative, and b={self.b} lies between 0 and 1")
        if self.stemmer is not None and self.stemmer not in algorithms():
            raise InvalidInputError(f"no stemmer {self.stemmer!r}; there are {', '.join(algorithms())}")


@cache
def _stemmer(language: str) -> Stemmer:
    return Stemmer(language)


def terms_of(text: str, settings: BM25Settings) -> list[str]:
    """Returns the terms of a text, in their order."""
    words = _WORD.findall(text.lower())
    if settings.stop_words:
        words = [word for word in words if word not in _STOP_WORDS]
    return words if settings.stemmer is None else _stemmer(settings.stemmer).stemWords(words)


_STOP_WORDS = frozenset(STOPWORDS_EN)


class BM25:
    """A BM25 index of a corpus.

    Args:
        corpus ([`Corpus`]): what is searched.
        folder (`Path`): made by [`build`].

    Raises:
        InvalidInputError: if there is no index in it, or one of another corpus.
    """

    def __init__(self, corpus: Corpus, folder: Path):
        self.corpus = corpus
        try:
            facts = json.loads((folder / _FACTS).read_text())
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"{folder} holds no BM25 index: make one with drorl index") from error
        if facts["corpus"] != corpus.key or facts["version"] != VERSION:
            raise InvalidInputError(f"{folder} is an index of another corpus or version: make it again")
        self.settings = BM25Settings(**facts["settings"])
        self.key = f"bm25 {json.dumps(facts, sort_keys=True)}"
        self._index = bm25s.BM25.load(folder, mmap=True, show_progress=False)

    @classmethod
    def build(cls, corpus: Corpus, folder: Path, settings: BM25Settings | None = None) -> "BM25":
        """Indexes a corpus, or goes on where it was killed; what is there already is used if it is of the same corpus.

        Memory: the vocabulary, and what one shard of passages takes.
        """
        settings = settings or BM25Settings()
        facts = {"corpus": corpus.key, "settings": asdict(settings), "version": VERSION}
        kept = folder / _FACTS
        if not (kept.exists() and json.loads(kept.read_text()) == facts):
            folder.mkdir(parents=True, exist_ok=True)
            kept.unlink(missing_ok=True)
            parts = folder / "shards"
            if not _is_json(parts / _FACTS, facts):
                (parts / _FACTS).unlink(missing_ok=True)
                shutil.rmtree(parts, ignore_errors=True)
                parts.mkdir()
                (parts / "partial").write_text(json.dumps(facts))
                (parts / "partial").replace(parts / _FACTS)
            _count(corpus, parts, settings)
            _join(corpus, parts, folder, settings)
            aside = folder / "partial"
            aside.write_text(json.dumps(facts))
            aside.replace(kept)
            (parts / _FACTS).unlink()  # first: what is left of the shards when killed is of no use to anybody
            shutil.rmtree(parts)
        return cls(corpus, folder)

    def search(self, queries: Sequence[str], k: int) -> list[list[dict[str, Any]]]:
        """Returns the best k passages of each query with their scores, best first; equal ones in the corpus' order.

        Passages that share no term with the query are none of its candidates: there may be fewer than k.
        """
        return [self._search(query, k) for query in queries]

    def _search(self, query: str, k: int) -> list[dict[str, Any]]:
        vocabulary = self._index.vocab_dict
        terms = [vocabulary[term] for term in terms_of(query, self.settings) if term in vocabulary]
        if not terms or k < 1:
            return []
        scores = self._index.get_scores_from_ids(sorted(terms))  # always added in this order, to the last bit
        least = np.partition(scores, -k)[-k] if k < len(scores) else 0.0
        found = np.flatnonzero((scores >= least) & (scores > 0))  # all that are equal to the last one, too
        best = found[np.lexsort((found, -scores[found]))][:k]
        return [
            {**self.corpus[int(position)], "score": float(scores[position]), "rank": rank}
            for rank, position in enumerate(best, start=1)
        ]


# ------------------------------------------------------------------------------------------------------------ building
def _is_json(path: Path, content: Any) -> bool:
    return path.exists() and json.loads(path.read_text()) == content


def _count(corpus: Corpus, parts: Path, settings: BM25Settings) -> None:
    """Counts the terms of each shard of passages; a shard is whole or absent."""
    done = len(list(parts.glob("*.npz")))
    for number, block in enumerate(corpus.blocks(done * SHARD_PASSAGES, SHARD_PASSAGES), start=done):
        vocabulary: dict[str, int] = {}
        ids: list[int] = []
        lengths = np.empty(len(block), dtype=np.int32)
        for position, passage in enumerate(block):
            terms = terms_of(f"{passage['title']} {passage['text']}", settings)
            ids += [vocabulary.setdefault(term, len(vocabulary)) for term in terms]
            lengths[position] = len(terms)
        passages = np.repeat(np.arange(len(block), dtype=np.int64), lengths)
        # By term, and within a term by passage: the order of the index.
        pairs, counts = np.unique(np.array(ids, dtype=np.int64) * len(block) + passages, return_counts=True)
        terms, passages = np.divmod(pairs, len(block))
        aside = parts / "partial"
        with aside.open("wb") as file:
            np.savez(
                file,
                terms=terms.astype(np.int32),
                passages=passages.astype(np.int32),
                counts=counts.astype(np.int32),
                lengths=lengths,
                vocabulary=np.frombuffer("\n".join(vocabulary).encode(), dtype=np.uint8),
            )
        aside.replace(parts / f"{number:06d}.npz")


def _join(corpus: Corpus, parts: Path, folder: Path, settings: BM25Settings) -> None:
    """Joins the shards' counts: first the frequencies of all terms, then the scores, each to its place."""
    vocabulary: dict[str, int] = {}
    frequencies = np.zeros(0, dtype=np.int64)
    total, shards = 0, sorted(parts.glob("*.npz"))
    for path in shards:
        with np.load(path) as shard:
            ids = _global_ids(shard["vocabulary"], vocabulary)
            frequencies = np.pad(frequencies, (0, len(vocabulary) - len(frequencies)))
            frequencies[ids] += np.bincount(shard["terms"], minlength=len(ids))
            total += int(shard["lengths"].sum())
    starts = np.concatenate([[0], np.cumsum(frequencies)])
    idf = np.log(1 + (len(corpus) - frequencies + 0.5) / (frequencies + 0.5))
    mean = total / len(corpus)
    kinds = {"data": np.float32, "indices": np.int32}
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.csc.index.npy", "w+", kind, (int(starts[-1]),))
        for name, kind in kinds.items()
    }
    heads = starts[:-1].copy()
    for number, path in enumerate(shards):
        with np.load(path) as shard:
            ids = _global_ids(shard["vocabulary"], vocabulary)
            local, passages, counts, lengths = (shard[name] for name in ("terms", "passages", "counts", "lengths"))
        per_term = np.bincount(local, minlength=len(ids))
        first = np.repeat(np.cumsum(per_term) - per_term, per_term)  # entries are sorted by term
        places = heads[ids][local] + np.arange(len(local)) - first
        weights = counts / (counts + settings.k1 * (1 - settings.b + settings.b * lengths[passages] / mean))
        arrays["data"][places] = idf[ids][local] * weights
        arrays["indices"][places] = passages + number * SHARD_PASSAGES
        heads[ids] += per_term
    for array in arrays.values():
        array.flush()
    np.save(folder / "indptr.csc.index.npy", starts)
    (folder / "vocab.index.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    params = {"k1": settings.k1, "b": settings.b, "delta": 0.5, "method": "lucene", "idf_method": "lucene"}
    params |= {"dtype": "float32", "int_dtype": "int32", "num_docs": len(corpus), "backend": "numpy"}
    (folder / "params.index.json").write_text(json.dumps(params))


def _global_ids(words: np.ndarray, vocabulary: dict[str, int]) -> np.ndarray:
    """Returns the number of each of a shard's words in the vocabulary, to which new ones are added."""
    text = words.tobytes().decode()
    found = [vocabulary.setdefault(word, len(vocabulary)) for word in text.split("\n")] if text else []
    return np.array(found, dtype=np.int64)
