"""Late interaction: ColBERT models by PyLate, the index by fast-plaid.

The score of a passage is MaxSim: for each vector of the query the largest inner product with one of the passage's,
added up. PLAID finds candidates by compressed vectors; these passages are encoded again, so that scores and order are
the model's own, whatever the compression. For 40 passages of each of the 58,622 questions of NQ, that is a ninth of
what encoding 21 million passages takes. Sources: Khattab and Zaharia, ColBERT, SIGIR 2020; Santhanam et al., PLAID,
CIKM 2022.

PyLate pins an older transformers and torch than drorl trains with, so this module has an environment of its own (`make
install-colbert`), from which it answers over the `/retrieve` protocol. PyLate's own index is not used: it keeps the
passages' numbers in a pickle, and reads it for every search.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fast_plaid.search import FastPlaid
from pylate.models import ColBERT as Encoder

from drorl.data.shards import only_one
from drorl.errors import InvalidInputError

from .corpus import Corpus
from .facts import read_facts, write_facts
from .retrievers import Place, settings_of

SHARD_PASSAGES = 5_000
"""Passages that are encoded at a time. With 128 dimensions a passage of 140 tokens takes 35 KB of disk until the index
is made."""
VERSION = 1
_DEPTH = 2
"""So many times k candidates are found by compressed vectors."""
_FACTS = "colbert.json"
_BITS, _PROBES, _FULL_SCORES = 4, 8, 8_192


class ColBERT:
    """A ColBERT index of a corpus.

    Args:
        corpus ([`Corpus`]): what is searched.
        folder (`Path`): made by [`build`].
        model (`str`): the folder of a ColBERT model in PyLate's, sentence-transformers' or Stanford's form, or its id.
        device (`str`, *optional*): of the model and the index; default: a GPU if there is one.

    Raises:
        InvalidInputError: if there is no index in it, or one of another corpus or model.
    """

    def __init__(self, corpus: Corpus, folder: Path, model: str, device: str | None = None):
        self.corpus = corpus
        facts = _facts(corpus, model)
        if read_facts(folder / _FACTS) != facts:
            raise InvalidInputError(
                f"{folder} holds no ColBERT index of this corpus by {model}: make one by drorl index"
            )
        self.key = f"colbert {json.dumps(facts, sort_keys=True)}"
        self._encoder = _encoder(model, device)
        self._index = FastPlaid(str(folder / "plaid"), device=device)

    @classmethod
    def build(cls, corpus: Corpus, folder: Path, model: str, device: str | None = None) -> "ColBERT":
        """Encodes and indexes a corpus, or goes on after the last finished shard; a finished index is used.

        Memory: one shard of vectors; then, for k-means, those of 16 sqrt(120 n) of the n passages (6 GB of a million,
        28 GB of 21 million), and the index, 70 bytes a token.
        """
        facts = _facts(corpus, model)
        folder.mkdir(parents=True, exist_ok=True)
        with only_one(folder):
            if read_facts(folder / _FACTS) != facts:
                (folder / _FACTS).unlink(missing_ok=True)
                parts = folder / "shards"
                if read_facts(parts / _FACTS) != facts:
                    shutil.rmtree(parts, ignore_errors=True)
                    parts.mkdir(parents=True)
                    write_facts(parts / _FACTS, facts)
                _encode(corpus, parts, _encoder(model, device))
                shutil.rmtree(folder / "plaid", ignore_errors=True)
                # Below `start_from_scratch` passages it would keep the vectors in a pickle, for an update.
                index = FastPlaid(str(folder / "plaid"), device=device)
                with torch.random.fork_rng():
                    torch.manual_seed(0)  # passages for k-means are drawn without the seed that `create` takes
                    index.create(_vectors(parts), nbits=_BITS, use_triton_kmeans=False, start_from_scratch=0)
                write_facts(folder / _FACTS, facts)
                shutil.rmtree(parts)
        return cls(corpus, folder, model, device)

    def search(self, queries: Sequence[str], k: int) -> list[list[dict[str, Any]]]:
        """Returns the k best passages of each query by MaxSim, best first; equal ones in the corpus' order.

        PLAID looks at the passages that share a cluster with the query: of a small corpus there may be fewer than k.
        """
        if not queries or k < 1:
            return [[] for _ in queries]
        asked = self._encoder.encode(list(queries), is_query=True, show_progress_bar=False)
        found = self._index.search(
            [torch.from_numpy(vectors) for vectors in asked],
            top_k=min(_DEPTH * k, len(self.corpus)),
            n_ivf_probe=_PROBES,
            n_full_scores=_FULL_SCORES,
            show_progress=False,
        )
        vectors = self._encoded({position for hits in found for position, _ in hits})
        answers = []
        for query, hits in zip(asked, found, strict=True):
            scored = sorted((-_max_sim(query, vectors[position]), position) for position, _ in hits)[:k]
            answers.append(
                [
                    {**self.corpus[position], "score": -score, "rank": rank}
                    for rank, (score, position) in enumerate(scored, start=1)
                ]
            )
        return answers

    def _encoded(self, positions: set[int]) -> dict[int, np.ndarray]:
        """Returns the vectors of passages, `(tokens, dimensions)` each."""
        texts = [_text(self.corpus[position]) for position in sorted(positions)]
        vectors = self._encoder.encode(texts, is_query=False, show_progress_bar=False)
        return dict(zip(sorted(positions), vectors, strict=True))


def _max_sim(query: np.ndarray, passage: np.ndarray) -> float:
    return float((query @ passage.T).max(axis=1).sum())


def _text(passage: dict[str, Any]) -> str:
    """A passage as ColBERT's own collections have it."""
    return f"{passage['title']} | {passage['text']}" if passage["title"] else passage["text"]


def _encoder(model: str, device: str | None) -> Encoder:
    return Encoder(model, device=device, trust_remote_code=False)


def _facts(corpus: Corpus, model: str) -> dict[str, Any]:
    """What an index depends on; a model in a folder is what its files hold."""
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(model).rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(model)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    known = digest.hexdigest() if Path(model).is_dir() else model
    return {"corpus": corpus.key, "model": known, "bits": _BITS, "version": VERSION}


def _encode(corpus: Corpus, parts: Path, encoder: Encoder) -> None:
    """Writes the vectors of each shard of passages, and how many each passage has; the latter once all is there."""
    done = len(list(parts.glob("*.lengths.npy")))
    for number, block in enumerate(corpus.blocks(done * SHARD_PASSAGES, SHARD_PASSAGES), start=done):
        vectors = encoder.encode(list(map(_text, block)), is_query=False, show_progress_bar=False)
        np.save(parts / f"{number:06d}.vectors.npy", np.concatenate(vectors).astype(np.float16))
        np.save(parts / "partial.npy", np.array(list(map(len, vectors))))
        (parts / "partial.npy").replace(parts / f"{number:06d}.lengths.npy")


def _vectors(parts: Path) -> list[torch.Tensor]:
    """Returns the vectors of each passage, left on disk."""
    vectors = []
    for path in sorted(parts.glob("*.lengths.npy")):
        shard = np.load(path.with_name(path.name.replace("lengths", "vectors")), mmap_mode="c")
        vectors += torch.from_numpy(shard).split(np.load(path).tolist())
    return vectors


@dataclass(frozen=True)
class ColBERTSettings:
    """Whose vectors.

    Args:
        model (`str`): see [`ColBERT`].
        device (`str`, *optional*): of the model and the index; default: a GPU if there is one.
    """

    model: str
    device: str | None = None


def open_colbert(place: Place, given: Mapping[str, str]) -> ColBERT:
    """Opens the index of a place, or builds it there; see [`~drorl.retrieval.retrievers.open_retriever`]."""
    settings, folder = settings_of(ColBERTSettings, given), place.corpus.folder / "colbert"
    make = ColBERT.build if place.builds else ColBERT
    return make(place.corpus, folder, settings.model, settings.device)
