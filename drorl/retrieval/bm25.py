r"""BM25 over a corpus of any size: built in shards in bounded memory, searched from disk by memory map.

The index has bm25s's own format (every term's passages with their finished scores), so that bm25s reads it; it is
built here, because bm25s's own building keeps all tokens in memory. Lucene's formula, with terms t of a query and of a
passage of length l,

    score = sum_t log(1 + (N - n_t + 1/2) / (n_t + 1/2)) tf_t / (tf_t + k1 (1 - b + b l / l_mean))

Source: Kamphuis et al., Which BM25 do you mean?, ECIR 2020, Table 1 (Lucene, accurate).
"""

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import bm25s
import numpy as np
from bm25s.stopwords import STOPWORDS_EN
from Stemmer import Stemmer, algorithms

from drorl.data.shards import only_one
from drorl.errors import InvalidInputError

from .corpus import SHARD_PASSAGES, Corpus
from .facts import damage_named, read_facts, replace, write_facts
from .retrievers import Place, settings_of

_WORD = re.compile(r"(?u)\b\w\w+\b")  # bm25s's own
_FACTS, _LARGEST = "bm25.json", "largest.npy"
_ROUNDING = 1 - 1e-5
"""Sums in another order differ in their last bits: a passage is left out only if it is further away than that."""
VERSION = 2
Postings: TypeAlias = tuple[np.ndarray, np.ndarray, float]
"""The passages that hold a term, in their order, what a query gets of it in each, and the largest of these."""


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
        if not (0 <= self.k1 < math.inf and 0 <= self.b <= 1):
            raise InvalidInputError(
                f"k1={self.k1} is a number that is not negative, and b={self.b} lies between 0 and 1"
            )
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
        settings ([`BM25Settings`], *optional*): those that it must have been made with.
        threads (`int`, *optional*): queries at a time; whatever it is, the candidates are the same. Default: one for
            each core that this process may use.

    Raises:
        InvalidInputError: if there is no index in it, or one of another corpus or of other settings.
    """

    def __init__(self, corpus: Corpus, folder: Path, settings: BM25Settings | None = None, threads: int | None = None):
        self.corpus, self.threads = corpus, threads or len(os.sched_getaffinity(0))
        facts = read_facts(folder / _FACTS)
        if facts is None:
            raise InvalidInputError(f"{folder} holds no BM25 index: make one with drorl index")
        if facts["corpus"] != corpus.key or facts["version"] != VERSION:
            raise InvalidInputError(f"{folder} is an index of another corpus or version: make it again")
        self.settings = BM25Settings(**facts["settings"])
        if settings not in (None, self.settings):
            raise InvalidInputError(f"{folder} was made with {self.settings}: make it again with drorl index")
        self.key = f"bm25 {json.dumps(facts, sort_keys=True)}"
        with damage_named(folder):
            self._index = bm25s.BM25.load(folder, mmap=True, show_progress=False)
            self._largest = np.load(folder / _LARGEST)

    @classmethod
    def build(cls, corpus: Corpus, folder: Path, settings: BM25Settings | None = None) -> "BM25":
        """Indexes a corpus, or goes on where it was killed; what is there already is used if it is of the same corpus.

        Memory: the vocabulary, and what one shard of passages takes.
        """
        settings = settings or BM25Settings()
        facts = {"corpus": corpus.key, "settings": asdict(settings), "version": VERSION}
        folder.mkdir(parents=True, exist_ok=True)
        with only_one(folder):
            if read_facts(folder / _FACTS) != facts:
                (folder / _FACTS).unlink(missing_ok=True)
                _build(corpus, folder, settings, facts)
        return cls(corpus, folder)

    def search(self, queries: Sequence[str], k: int) -> list[list[dict[str, Any]]]:
        """Returns the best k passages of each query with their scores, best first; equal ones in the corpus' order.

        Passages that share no term with the query are none of its candidates: there may be fewer than k.
        """
        asked = [self._known_terms(query) for query in queries]  # here: a stemmer is no matter of several threads
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(partial(self._search, k=k), asked))

    def _known_terms(self, query: str) -> list[tuple[int, int]]:
        """The numbers of a query's terms, in their order, and how often each occurs."""
        numbers = self._index.vocab_dict
        return sorted(Counter(numbers[term] for term in terms_of(query, self.settings) if term in numbers).items())

    def _search(self, terms: list[tuple[int, int]], k: int) -> list[dict[str, Any]]:
        if not terms or k < 1:
            return []
        found, scores = _best([self._postings(*term) for term in terms], k, len(self.corpus))
        return [
            {**self.corpus[position], "score": score, "rank": rank}
            for rank, (position, score) in enumerate(zip(found.tolist(), scores.tolist(), strict=True), start=1)
        ]

    def _postings(self, term: int, count: int) -> Postings:
        start, end = (int(self._index.scores["indptr"][i]) for i in (term, term + 1))
        passages, scores = (self._index.scores[name][start:end] for name in ("indices", "data"))
        if count > 1:  # else they stay where they are, on disk
            scores = scores * np.float32(count)
        return passages, scores, count * float(self._largest[term])


def _best(lists: Sequence[Postings], k: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best k passages and their scores, best first; equal ones in the corpus' order.

    The terms' lists are added up from the shortest, which has the largest scores, to the longest. Once k passages have
    more than the lists to come could give together, a passage that is in none but them cannot be among the best: only
    those that still can be are looked up in them. That is exact, and the additions are the same in the same order.

    Source: Turtle and Flood, Query evaluation: strategies and optimizations, 1995 (max_score, term at a time).

    Args:
        lists (`Sequence`): the postings of each term.
        k (`int`): how many are wanted.
        count (`int`): passages of the corpus.
    """
    lists = sorted(lists, key=lambda postings: len(postings[0]))
    scores = np.zeros(count, dtype=np.float32)
    found, least = None, 0.0  # the passages that can be among the best (or any), and what k passages have reached
    bounds = list(accumulate((largest for _, _, largest in reversed(lists)), initial=0.0))  # of the last lists
    for left, after, (passages, weights, _) in zip(bounds[:0:-1], bounds[-2::-1], lists, strict=True):
        if found is None and left < least * _ROUNDING:
            found = np.flatnonzero(scores >= least * _ROUNDING - left)
        if found is None:
            scores[passages] += weights
            reached = scores[passages]
        else:
            places = np.minimum(np.searchsorted(passages, found), len(passages) - 1)
            scores[found] += np.where(passages[places] == found, weights[places], np.float32(0))
            reached = scores[found]
        if len(reached) >= k:
            least = max(least, float(np.partition(reached, -k)[-k]))
        if found is not None:
            found = found[reached >= least * _ROUNDING - after]
    if found is None:
        found = np.flatnonzero(scores >= max(least, np.finfo(np.float32).tiny))
    best = found[np.lexsort((found, -scores[found]))[:k]]
    return best, scores[best]


def open_bm25(place: Place, given: Mapping[str, str]) -> BM25:
    """Opens the index of a place, or builds it there; see [`~drorl.retrieval.retrievers.open_retriever`]."""
    folder = place.corpus.folder / "bm25"
    if place.builds:
        return BM25.build(place.corpus, folder, settings_of(BM25Settings, given))
    return BM25(place.corpus, folder, settings_of(BM25Settings, given, (read_facts(folder / _FACTS) or {})))


# ------------------------------------------------------------------------------------------------------------ building
def _build(corpus: Corpus, folder: Path, settings: BM25Settings, facts: dict[str, Any]) -> None:
    parts, joined = folder / "shards", folder / "joined"
    if read_facts(parts / _FACTS) != facts:
        (parts / _FACTS).unlink(missing_ok=True)
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir()
        write_facts(parts / _FACTS, facts)
    _count(corpus, parts, settings)
    shutil.rmtree(joined, ignore_errors=True)
    joined.mkdir()
    _join(corpus, parts, joined, settings)
    for path in joined.iterdir():  # whoever searches an older index keeps its files
        path.replace(folder / path.name)
    joined.rmdir()
    write_facts(folder / _FACTS, facts)
    (parts / _FACTS).unlink()  # first: what is left of the shards when killed is of no use to anybody
    shutil.rmtree(parts)


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
        arrays = {"terms": terms, "passages": passages, "counts": counts, "lengths": lengths}
        arrays = {name: array.astype(np.int32) for name, array in arrays.items()}
        words = np.frombuffer("\n".join(vocabulary).encode(), dtype=np.uint8)
        replace(parts / f"{number:06d}.npz", partial(_save_shard, arrays | {"vocabulary": words}))


def _save_shard(arrays: dict[str, np.ndarray], path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # ty: ignore[invalid-argument-type]


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
    heads, largest = starts[:-1].copy(), np.zeros(len(frequencies), dtype=np.float32)
    for number, path in enumerate(shards):
        with np.load(path) as shard:
            ids = _global_ids(shard["vocabulary"], vocabulary)
            local, passages, counts, lengths = (shard[name] for name in ("terms", "passages", "counts", "lengths"))
        per_term = np.bincount(local, minlength=len(ids))
        first = np.repeat(np.cumsum(per_term) - per_term, per_term)  # entries are sorted by term
        places = heads[ids][local] + np.arange(len(local)) - first
        weights = counts / (counts + settings.k1 * (1 - settings.b + settings.b * lengths[passages] / mean))
        scores = (idf[ids][local] * weights).astype(np.float32)
        arrays["data"][places] = scores
        largest[ids] = np.maximum(largest[ids], np.maximum.reduceat(scores, np.cumsum(per_term) - per_term))
        arrays["indices"][places] = passages + number * SHARD_PASSAGES
        heads[ids] += per_term
    for array in arrays.values():
        array.flush()
    np.save(folder / "indptr.csc.index.npy", starts)
    np.save(folder / _LARGEST, largest)
    (folder / "vocab.index.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    params = {"k1": settings.k1, "b": settings.b, "delta": 0.5, "method": "lucene", "idf_method": "lucene"}
    params |= {"dtype": "float32", "int_dtype": "int32", "num_docs": len(corpus), "backend": "numpy"}
    (folder / "params.index.json").write_text(json.dumps(params))


def _global_ids(words: np.ndarray, vocabulary: dict[str, int]) -> np.ndarray:
    """Returns the number of each of a shard's words in the vocabulary, to which new ones are added."""
    text = words.tobytes().decode()
    found = [vocabulary.setdefault(word, len(vocabulary)) for word in text.split("\n")] if text else []
    return np.array(found, dtype=np.int64)
