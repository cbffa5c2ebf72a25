"""drorl: retrieval-augmented generation trained end to end with Direct Retrieval-augmented Optimization."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DROConfig
    from .pipeline import RAGPipeline
    from .rewards import AnswerLikelihoodReward
    from .trainer import DROTrainer

__version__ = version("drorl")
__all__ = ["AnswerLikelihoodReward", "DROConfig", "DROTrainer", "RAGPipeline"]

_MODULES = {
    "AnswerLikelihoodReward": "rewards",
    "DROConfig": "config",
    "DROTrainer": "trainer",
    "RAGPipeline": "pipeline",
}


def __getattr__(name: str) -> Any:
    """Imports torch, transformers and TRL only when something of theirs is asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module 'drorl' has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
