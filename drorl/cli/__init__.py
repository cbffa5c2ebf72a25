"""The `drorl` command. What a command needs is imported when it runs: `--help` is to take no time."""

import sys

from ..errors import UserError
from . import asking, data, planning, retrieval, runs  # noqa: F401 (each adds its commands)
from .app import app

__all__ = ["app", "main"]

_EXTRAS = {
    "bm25s": "retrieval",
    "Stemmer": "retrieval",
    "faiss": "retrieval",
    "sentence_transformers": "retrieval",
    "pymilvus": "milvus",
    "anyio": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
}


def main() -> None:
    """Entry point of the `drorl` command: a user's mistake is answered by one line."""
    try:
        app()
    except (UserError, OSError) as error:  # such as a full disk
        sys.exit(f"drorl: {error}")
    except ModuleNotFoundError as error:
        if error.name in ("pylate", "fast_plaid"):
            sys.exit(
                "drorl: colbert has an environment of its own, make install-colbert: serve it, and ask it by http"
            )
        if error.name not in _EXTRAS:
            raise
        sys.exit(f"drorl: {error.name} is not installed: pip install 'drorl[{_EXTRAS[error.name]}]'")
