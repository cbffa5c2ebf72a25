"""The server's engine."""

import asyncio
from argparse import Namespace
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.sampling_params import RequestOutputKind

from .base import EngineError
from .delivery import base_folder
from .vllm import VLLMEngine


class ServedEngine(VLLMEngine):
    """The server's engine, asked from the threads in which the routes run.

    Args:
        client: vLLM's engine client; its event loop is the running one.
        args (`Namespace`): the server's arguments.
    """

    def __init__(self, client: Any, args: Namespace):
        config = client.model_config
        super().__init__(
            base_folder(args.model), config.dtype, config.max_model_len, bool(args.enable_lora), args.max_lora_rank
        )
        self._client, self._loop = client, asyncio.get_running_loop()
        self._count = 0

    def adopt(self, loras: dict[str, Any]) -> None:
        """Takes over the adapters that vLLM has loaded itself; their names are their versions."""
        self.loaded |= loras

    def _wait(self, work: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _run(self, prompts: list[Any], params: list[Any], lora: Any) -> list[Any]:
        async def one(prompt: Any, param: Any, name: str) -> Any:
            outputs = [o async for o in self._client.generate(prompt, param, name, lora_request=lora)]
            return outputs[-1]  # with FINAL_ONLY there is one

        for param in params:
            param.output_kind = RequestOutputKind.FINAL_ONLY

        async def every() -> list[Any]:
            names = [f"drorl-{self._count + i}" for i in range(len(prompts))]
            self._count += len(prompts)
            try:
                async with asyncio.TaskGroup() as group:  # with the first that fails the others end
                    tasks = [group.create_task(one(*asked)) for asked in zip(prompts, params, names, strict=True)]
            except BaseExceptionGroup as failed:
                raise failed.exceptions[0] from None
            return [task.result() for task in tasks]

        return self._wait(every())

    def _add(self, lora: Any) -> None:
        self._wait(self._client.add_lora(lora))

    def _remove(self, lora: Any) -> None:
        self._wait(self._client.remove_lora(lora.lora_int_id))

    def _reload(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        folder = Path(self._folder.name) / "merged"  # the engine is another process
        folder.mkdir(exist_ok=True)
        save_file(dict(weights), folder / "model.safetensors")
        self._wait(self._client.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)}))
        if not self._wait(self._client.reset_prefix_cache(reset_running_requests=True)):
            raise EngineError("vLLM could not empty its prefix cache")
