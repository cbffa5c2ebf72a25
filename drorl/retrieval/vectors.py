"""The vectors of a corpus on disk: encoded in shards that survive being killed, read where they are asked for.

They are kept as float16: half the disk of float32, and half of what an index is built from is read. Of vectors of
length 1, rounding moves an inner product by some 1e-4 at most, far less than encoders differ from each other.
"""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from drorl.errors import InvalidInputError

from .corpus import SHARD_PASSAGES, Corpus
from .encoder import Encoder
from .facts import read_facts, write_facts

logger = logging.getLogger(__name__)

_FILE, _FACTS = "vectors.npy", "vectors.json"


class Vectors:
    """Vectors by number.

    Args:
        folder (`Path`): in which [`encode`] has put them.
    """

    def __init__(self, folder: Path):
        path = folder / _FILE
        self._array = np.load(path, mmap_mode="r")
        self._file = path.open("rb")
        self.dimension: int = self._array.shape[1]

    def __len__(self) -> int:
        return len(self._array)

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Returns the vectors at positions, in float32.

        They are read, not mapped: rows from all over the file would soon make all of it count as this process' memory.
        """
        rows = np.empty((len(positions), self.dimension), dtype=np.float16)
        for row, position in zip(rows, positions.tolist(), strict=True):
            os.preadv(self._file.fileno(), [row.data], self._array.offset + position * row.nbytes)
        return rows.astype(np.float32)


def facts_of(corpus: Corpus, encoder: Encoder) -> dict[str, Any]:
    """What the vectors of a corpus depend on."""
    return {"corpus": corpus.key, "weights": encoder.weights, "prefix": encoder.passage_prefix, "version": 1}


def encode(corpus: Corpus, encoder: Encoder, folder: Path) -> dict[str, Any]:
    """Encodes a corpus into a folder, or goes on where it was killed; returns what the vectors are of.

    Memory: the encoder, and what one shard of passages takes.
    """
    path, facts, of = folder / _FILE, folder / _FACTS, facts_of(corpus, encoder)
    state: dict[str, Any] = read_facts(facts) or {}
    if state.get("of") != of:
        facts.unlink(missing_ok=True)
        path.unlink(missing_ok=True)  # who searches the old ones keeps them
        np.lib.format.open_memmap(path, "w+", np.float16, (len(corpus), encoder.dimension))
        state["done"] = 0
        write_facts(facts, {"of": of, "done": 0})
    done, start = state["done"], np.load(path, mmap_mode="r").offset
    with path.open("r+b") as file:
        for block in corpus.blocks(done, SHARD_PASSAGES):
            vectors = encoder.passages(block)
            file.seek(start + done * vectors.itemsize * encoder.dimension)
            file.write(vectors.data)
            file.flush()
            os.fsync(file.fileno())
            done += len(block)
            write_facts(facts, {"of": of, "done": done})  # the last step: a shard counts once this is written
            logger.info("%s of %s passages encoded", f"{done:,}", f"{len(corpus):,}")
    return of


def check(corpus: Corpus, encoder: Encoder, folder: Path) -> dict[str, Any]:
    """Returns what the vectors of a folder are of, once they are those of this corpus and encoder, and complete.

    Raises:
        InvalidInputError: if they are not.
    """
    of = facts_of(corpus, encoder)
    if read_facts(folder / _FACTS) != {"of": of, "done": len(corpus)}:
        raise InvalidInputError(
            f"{folder} holds no whole vectors of this corpus and encoder: make them by drorl index"
        )
    return of
