"""Dense retrieval: the passages whose vectors have the largest inner product with the query's.

A faiss index finds `refine * k` passages, whose products are then computed from the vectors on disk: scores do not
depend on the kind of index, and passages with equal vectors have equal scores. Bytes that N passages of d dimensions
take, beside the encoder:

    on disk     2 d N, the vectors, of every kind; and a file of the size of the index, but of flat
    flat        4 d N                                                                              exact
    hnsw        (2 d + 8 * 32 + 16) N                                                              a graph
    ivfpq       (d / 4 + 8) N + 4 d lists + 1024 d;  while it trains, 400 d lists more             lists, codes

with lists = 2 sqrt(N). For d = 768 and 21 million passages: flat 65 GB, hnsw 38 GB, ivfpq 4.2 GB, and
32 GB of vectors on disk.

Sources: Jégou et al., Product quantization for nearest neighbor search, PAMI 2011; Malkov and Yashunin, HNSW, 2016;
https://github.com/facebookresearch/faiss.
"""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from drorl.data.shards import only_one
from drorl.errors import InvalidInputError

from .corpus import SHARD_PASSAGES, Corpus
from .encoder import WORDLLAMA_ALIAS, Encoder
from .facts import read_facts, replace, write_facts
from .retrievers import Place, settings_of
from .vectors import Vectors, check, encode

logger = logging.getLogger(__name__)

VERSION = 1
LINKS = 32
CODE_DIMENSIONS = 4
MIN_IVFPQ = 256  # codes of a byte have that many values, each of which is a mean
SAMPLES_PER_LIST = 50
_SETTINGS = "dense.json"


@dataclass(frozen=True)
class DenseSettings:
    """What a dense index is made and searched with.

    Args:
        model (`str`): an encoder, see [`Encoder`].
        index (`str`): `flat` is exact, `ivfpq` small, `hnsw` fast. An encoded corpus can have all of them.
        query_prefix (`str`, *optional*): see [`Encoder`].
        passage_prefix (`str`, *optional*): see [`Encoder`]; another one means encoding again.
        probes (`int`): lists of ivfpq that are searched; more find more, and take longer. Of a million passages in
            2,000 lists, 128 find 93 % of the 20 best with wordllama-256, and 87 % with 128 random dimensions more;
            there 192 find 90 %, and 256 find 92 %.
        refine (`int`): passages that are looked at for each that is wanted; 20 find no more than 10.
    """

    model: str = WORDLLAMA_ALIAS
    index: str = "flat"
    query_prefix: str | None = None
    passage_prefix: str | None = None
    probes: int = 256
    refine: int = 10

    def __post_init__(self) -> None:
        if self.index not in ("flat", "ivfpq", "hnsw"):
            raise InvalidInputError(f"no index {self.index!r}; there are flat, ivfpq, hnsw")
        if min(self.probes, self.refine) < 1:
            raise InvalidInputError(f"probes={self.probes} and refine={self.refine} are 1 at least")


class Dense:
    """A dense index of a corpus.

    Args:
        corpus ([`Corpus`]): what is searched.
        folder (`Path`): made by [`build`].
        settings ([`DenseSettings`], *optional*): those that the vectors and the index must have been made with.
        encoder ([`Encoder`], *optional*): if it has been loaded already.

    Raises:
        InvalidInputError: if there is no index in it, or one of another corpus, encoder or prefix.
    """

    def __init__(
        self, corpus: Corpus, folder: Path, settings: DenseSettings | None = None, encoder: Encoder | None = None
    ):
        self.corpus, self.settings = corpus, settings or DenseSettings()
        self._encoder = encoder or _encoder(self.settings)
        facts = {"vectors": check(corpus, self._encoder, folder), "index": self.settings.index, "version": VERSION}
        self._vectors = Vectors(folder)
        path = folder / f"{self.settings.index}.faiss"
        if self.settings.index == "flat":  # a file of its own would be twice as long as that of the vectors
            self._index = _made("flat", self._vectors)
        elif read_facts(path.with_suffix(".json")) == facts:
            self._index = faiss.read_index(str(path))
        else:
            raise InvalidInputError(f"{folder} holds no {self.settings.index} of its vectors: make it by drorl index")
        search = [self.settings.probes, self.settings.refine, self._encoder.query_prefix]
        self.key = f"dense {json.dumps([facts, search])}"

    @classmethod
    def build(cls, corpus: Corpus, folder: Path, settings: DenseSettings | None = None) -> "Dense":
        """Encodes and indexes a corpus, or goes on where it was killed; what is there already is used if it is of the
        same corpus, encoder and prefix. What it takes is logged before it begins.

        Raises:
            InvalidInputError: if there are too few passages for ivfpq.
        """
        settings = settings or DenseSettings()
        if settings.index == "ivfpq" and len(corpus) < MIN_IVFPQ:
            raise InvalidInputError(f"ivfpq needs {MIN_IVFPQ} passages, and there are {len(corpus)}: use flat")
        encoder = _encoder(settings)
        memory = {"encoder": encoder.bytes, **memory_of(settings.index, len(corpus), encoder.dimension)}
        stated = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in memory.items())
        logger.info("dense: %s passages of %d dimensions take %s", f"{len(corpus):,}", encoder.dimension, stated)
        folder.mkdir(parents=True, exist_ok=True)
        with only_one(folder):
            facts = {"vectors": encode(corpus, encoder, folder), "index": settings.index, "version": VERSION}
            path = folder / f"{settings.index}.faiss"
            kept = path.with_suffix(".json")
            if settings.index != "flat" and read_facts(kept) != facts:
                kept.unlink(missing_ok=True)
                replace(path, lambda aside: _write(_made(settings.index, Vectors(folder)), aside))
                write_facts(kept, facts)
            write_facts(folder / _SETTINGS, {"settings": asdict(settings)})
        return cls(corpus, folder, settings, encoder)

    def search(self, queries: Sequence[str], k: int) -> list[list[dict[str, Any]]]:
        """Returns the best k passages of each query with their scores, best first; equal ones in the corpus' order.

        The score is the cosine of the vectors. A query without any known token has no vector, and no candidates.
        """
        if k < 1 or not queries:
            return [[] for _ in queries]
        vectors = self._encoder.queries(queries).astype(np.float32)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return list(
                pool.map(lambda pair: self._ranked(*pair, k), zip(vectors, self._near(vectors, k), strict=True))
            )

    def _near(self, vectors: np.ndarray, k: int) -> Sequence[np.ndarray]:
        """Returns the positions of passages that may be among the best k of each query; -1 is none.

        A flat index multiplies all queries at once. The others are asked one by one: what is found is then the same
        whatever other queries there are, and however many threads.
        """
        wanted = min(len(self.corpus), k * self.settings.refine)
        if self.settings.index == "flat":
            return self._index.search(vectors, wanted)[1]
        asked = (
            faiss.SearchParametersIVF(nprobe=self.settings.probes)
            if self.settings.index == "ivfpq"
            else faiss.SearchParametersHNSW(efSearch=wanted)
        )
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(lambda vector: self._index.search(vector[None], wanted, params=asked)[1][0], vectors))

    def _ranked(self, vector: np.ndarray, near: np.ndarray, k: int) -> list[dict[str, Any]]:
        if not vector.any():
            return []
        near = np.sort(near[near >= 0])
        scores = np.einsum("pd,d->p", self._vectors.rows(near), vector)  # no BLAS: the same to the last bit, always
        best = np.lexsort((near, -scores))[:k]
        return [
            {**self.corpus[position], "score": score, "rank": rank}
            for rank, (position, score) in enumerate(zip(near[best].tolist(), scores[best].tolist(), strict=True), 1)
        ]


def open_dense(place: Place, given: Mapping[str, str]) -> Dense:
    """Opens the index of a place, or builds it there; see [`~drorl.retrieval.retrievers.open_retriever`]."""
    folder = place.corpus.folder / "dense"
    if place.builds:
        return Dense.build(place.corpus, folder, settings_of(DenseSettings, given))
    return Dense(place.corpus, folder, settings_of(DenseSettings, given, read_facts(folder / _SETTINGS)))


# ------------------------------------------------------------------------------------------------------------ building
def memory_of(index: str, count: int, dimension: int) -> dict[str, int]:
    """Returns what an index will take, bytes, by the formulas at the head of this module."""
    lists = num_lists(count)
    searched = {
        "flat": 4 * dimension * count,
        "hnsw": (2 * dimension + 8 * LINKS + 16) * count,
        "ivfpq": (code_bytes(dimension) + 8) * count + 4 * dimension * lists + 1024 * dimension,
    }[index]
    training = {"training": 8 * dimension * SAMPLES_PER_LIST * lists} if index == "ivfpq" else {}
    return {"vectors on disk": 2 * dimension * count, index: searched, **training}


def num_lists(count: int) -> int:
    """Lists of ivfpq: about as many as keep both choosing and reading lists short."""
    return max(1, min(round(2 * math.sqrt(count)), count // SAMPLES_PER_LIST))


def code_bytes(dimension: int) -> int:
    """Bytes of a passage's code: one for every 4 dimensions, or for the next number that divides them."""
    return next(m for m in range(max(1, dimension // CODE_DIMENSIONS), 0, -1) if dimension % m == 0)


def _encoder(settings: DenseSettings) -> Encoder:
    return Encoder(settings.model, settings.query_prefix, settings.passage_prefix)


def _made(kind: str, vectors: Vectors) -> Any:
    """Builds an index: of the same vectors the same, to the byte, with any number of threads."""
    names = {
        "flat": "Flat",
        "hnsw": f"HNSW{LINKS}_SQfp16",
        "ivfpq": f"IVF{num_lists(len(vectors))},PQ{code_bytes(vectors.dimension)}",
    }
    index = faiss.index_factory(vectors.dimension, names[kind], faiss.METRIC_INNER_PRODUCT)
    threads = faiss.omp_get_max_threads()
    if kind == "hnsw":
        faiss.omp_set_num_threads(1)  # in older versions of faiss the graph hangs on which thread comes first
    if kind == "ivfpq":
        index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # say nothing of small corpora
    try:
        if not index.is_trained:
            wanted = max(MIN_IVFPQ, SAMPLES_PER_LIST * num_lists(len(vectors)))
            index.train(vectors.rows(np.unique(np.linspace(0, len(vectors) - 1, wanted, dtype=np.int64))))
        for first in range(0, len(vectors), SHARD_PASSAGES):
            index.add(vectors.rows(np.arange(first, min(first + SHARD_PASSAGES, len(vectors)))))
    finally:
        faiss.omp_set_num_threads(threads)
    return index


def _write(index: Any, path: Path) -> None:
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:  # such as a full disk
        raise OSError(f"{path} cannot be written: {error}") from error
