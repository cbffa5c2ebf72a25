"""Vectors in Milvus, where one machine's memory is not enough for them.

A trial and a cluster differ by the address: a file, `vectors.db`, is Milvus Lite in this process, `http://host:19530`
a server, or the proxy of a cluster that has the vectors on many nodes. The passages stay in the corpus' folder, on
disk; Milvus keeps a vector for each position in it. Source: https://milvus.io/docs.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from pymilvus import DataType, MilvusClient, MilvusException

from drorl.data.shards import only_one
from drorl.errors import InvalidInputError, UserError

from .corpus import Corpus
from .encoder import WORDLLAMA_ALIAS, Encoder
from .retrievers import Place, settings_of

Encode: TypeAlias = Callable[[Sequence[str]], np.ndarray]
"""Vectors of queries, `(queries, dimensions)`; by their inner product with those of passages is searched."""
EncodePassages: TypeAlias = Callable[[Sequence[dict[str, Any]]], np.ndarray]
"""Vectors of passages, `(passages, dimensions)`."""

BLOCK = 1_000
"""Passages of one insertion, and queries of one search; Milvus takes messages up to 64 MB."""
MAX_TOP_K = 16_384
"""Milvus' own limit."""
VERSION = 1
_SECONDS = 600.0


class MilvusError(UserError):
    """Milvus cannot be reached, or fails."""


class Milvus:
    """Searches the vectors of a corpus in Milvus.

    Args:
        corpus ([`Corpus`]): what is searched.
        url (`str`): a file whose name ends in .db, or the address of a server.
        encode (`Callable`): the vectors of queries.
        encoder (`str`): what the vectors depend on, of queries and passages: the model and its prefixes.
        token (`str`): `user:password`, or an API key.

    Raises:
        InvalidInputError: if the corpus' vectors by this encoder are not there, or not all.
        MilvusError: if Milvus cannot be reached.
    """

    def __init__(self, corpus: Corpus, url: str, encode: Encode, encoder: str, token: str = ""):
        self.corpus, self._encode = corpus, encode
        facts = {"corpus": corpus.key, "encoder": encoder, "version": VERSION}
        self.collection = _collection(facts)
        self.key = f"milvus {url} {json.dumps(facts, sort_keys=True)}"
        self._client = _connected(url, token)
        try:
            there = _count(self._client, self.collection)
        except MilvusException as error:
            raise MilvusError(f"{url}: {_reason(error)}") from error
        if there != len(corpus):
            self._client.close()
            raise InvalidInputError(
                f"{url} has {there:,} of {len(corpus):,} vectors of this corpus: load them by drorl index"
            )

    @classmethod
    def build(
        cls,
        corpus: Corpus,
        url: str,
        encode_passages: EncodePassages,
        encode: Encode,
        encoder: str,
        token: str = "",
    ) -> "Milvus":
        """Encodes and loads a corpus, or goes on after the last whole block; what is there already is used.

        Passages are loaded in their order, each block when the one before has arrived: how many there are says which.
        The last block may be there in part, and is written over. Memory: one block of vectors.
        """
        name = _collection({"corpus": corpus.key, "encoder": encoder, "version": VERSION})
        client = _connected(url, token)
        with only_one(corpus.folder / name):
            try:
                done = _count(client, name)
                if done < len(corpus):
                    _load(client, name, corpus, done // BLOCK * BLOCK, encode_passages)
            except MilvusException as error:
                raise MilvusError(f"{url}: {_reason(error)}") from error
            finally:
                client.close()
        return cls(corpus, url, encode, encoder, token)

    def search(self, queries: Sequence[str], k: int) -> list[list[dict[str, Any]]]:
        """Returns the best k passages of each query by the vectors' inner product, best first."""
        if k < 1:
            return [[] for _ in queries]
        if k > MAX_TOP_K:
            raise InvalidInputError(f"Milvus finds {MAX_TOP_K:,} passages of a query at most, not {k:,}")
        found: list[list[dict[str, Any]]] = []
        for start in range(0, len(queries), BLOCK):
            found += map(self._candidates, self._search(self._encode(queries[start : start + BLOCK]), k))
        return found

    def _search(self, vectors: np.ndarray, k: int) -> list[list[dict[str, Any]]]:
        # As Milvus asks of its graph: at least k; with k alone a few of the last ones are missed.
        breadth = max(2 * k, 128)
        try:
            return self._client.search(
                self.collection,
                data=vectors.tolist(),
                limit=min(k, len(self.corpus)),
                search_params={"metric_type": "IP", "params": {"ef": breadth}},
                timeout=_SECONDS,
            )
        except MilvusException as error:
            raise MilvusError(f"the search in Milvus has failed: {_reason(error)}") from error

    def _candidates(self, hits: list[dict[str, Any]]) -> list[dict[str, Any]]:
        ordered = sorted(hits, key=lambda hit: (-hit["distance"], hit["id"]))  # equal ones in the corpus' order
        return [
            {**self.corpus[hit["id"]], "score": float(hit["distance"]), "rank": rank}
            for rank, hit in enumerate(ordered, start=1)
        ]

    def close(self) -> None:
        """Gives the file of Milvus Lite back, or the connection."""
        self._client.close()


def _collection(facts: dict[str, Any]) -> str:
    """Of other passages or vectors there is another collection: a stale one is never searched."""
    return f"drorl_{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]}"


def _connected(url: str, token: str) -> MilvusClient:
    try:
        return MilvusClient(uri=url, token=token)
    except (MilvusException, ValueError, OSError) as error:
        raise MilvusError(f"Milvus cannot be reached at {url}: {_reason(error)}") from error


def _create(client: MilvusClient, name: str, dimensions: int) -> None:
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dimensions)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="AUTOINDEX", metric_type="IP")
    client.create_collection(name, schema=schema, consistency_level="Strong")
    client.create_index(name, index, sync=False)  # there is nothing to wait for, and Milvus Lite cannot be waited for
    client.load_collection(name, timeout=_SECONDS)


def _load(client: MilvusClient, name: str, corpus: Corpus, start: int, encode: EncodePassages) -> None:
    """Loads the passages from a position on."""
    for block in corpus.blocks(start, BLOCK):
        vectors = encode(block)
        if not client.has_collection(name):
            _create(client, name, vectors.shape[1])
        rows = [{"id": position, "vector": vector.tolist()} for position, vector in enumerate(vectors, start)]
        client.upsert(name, rows, timeout=_SECONDS)
        start += len(block)


def _count(client: MilvusClient, name: str) -> int:
    """Returns how many vectors there are, of those that have arrived by now."""
    if not client.has_collection(name):
        return 0
    client.load_collection(name, timeout=_SECONDS)
    [row] = client.query(name, filter="", output_fields=["count(*)"])
    return int(row["count(*)"])


def _reason(error: Exception) -> str:
    """An error of Milvus in one line."""
    return " ".join(str(getattr(error, "message", None) or error).split())[:300]


@dataclass(frozen=True)
class MilvusSettings:
    """Where the vectors are, and whose.

    Args:
        url (`str`): a file whose name ends in .db, or the address of a server.
        model (`str`), query_prefix (`str`, *optional*), passage_prefix (`str`, *optional*): see [`Encoder`].
    """

    url: str
    model: str = WORDLLAMA_ALIAS
    query_prefix: str | None = None
    passage_prefix: str | None = None


def open_milvus(place: Place, given: Mapping[str, str]) -> Milvus:
    """Opens the vectors of a corpus, or loads them; see [`~drorl.retrieval.retrievers.open_retriever`].

    The token is that of the environment variable `MILVUS_TOKEN`: what is on a command line can be read by others.
    """
    settings, token = settings_of(MilvusSettings, given), os.environ.get("MILVUS_TOKEN", "")
    encoder = Encoder(settings.model, settings.query_prefix, settings.passage_prefix)
    name = json.dumps([encoder.weights, encoder.query_prefix, encoder.passage_prefix])
    if place.builds:
        return Milvus.build(place.corpus, settings.url, encoder.passages, encoder.queries, name, token)
    return Milvus(place.corpus, settings.url, encoder.queries, name, token)
