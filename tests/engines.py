"""An engine that is no vLLM: a second model, which knows of the trainer's only what was delivered to it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from drorl.engines.base import Branch, Completion, Engine, StaleAdapterError
from drorl.engines.delivery import Adapter


class SecondModel(Engine):
    """Answers by one forward pass per question, with the adapter that PEFT loads from what was delivered.

    Args:
        base (`PreTrainedModel`): a copy of the trainer's base, for the engine alone.
        folder (`Path`): where adapters are unpacked.
        error (`float`): standard deviation of noise in its log-probabilities, nats; fixed by the question.
    """

    window = 2048

    def __init__(self, base: PreTrainedModel, folder: Path, error: float = 0.0):
        self.base, self.folder, self.error = base, folder, error
        self.delivered: list[str] = []
        self.model: PeftModel | None = None

    def deliver(self, adapter: Adapter) -> str:
        if not self.delivered or self.delivered[-1] != adapter.version:
            adapter.write(self.folder / adapter.version)
            base = self.base if self.model is None else self.model.unload()
            with torch.random.fork_rng():
                self.model = PeftModel.from_pretrained(base, self.folder / adapter.version).eval()
            self.delivered.append(adapter.version)
        return adapter.version

    @torch.no_grad()
    def _logps(self, tokens: Sequence[int]) -> torch.Tensor:
        logps = torch.log_softmax(self.model(input_ids=torch.tensor([list(tokens)])).logits[0, -1].float(), dim=-1)
        noise = torch.randn(logps.shape, generator=torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31))
        return logps + self.error * noise

    def next_token_logps(
        self, version: str, prompts: Sequence[Sequence[int]], branches: Sequence[Branch]
    ) -> list[list[float]]:
        if version != self.delivered[-1]:
            raise StaleAdapterError(f"not {version}")
        return [self._logps([*prompts[b.prompt], *b.context])[list(b.allowed)].tolist() for b in branches]

    def generate(
        self,
        version: str,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        end_id: int,
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
    ) -> list[Completion]:
        pairs = zip(prompts, seeds or [0] * len(prompts), strict=True)
        return [self._text(prompt, max_tokens, end_id, temperature, seed) for prompt, seed in pairs]

    def _text(self, prompt: Sequence[int], max_tokens: int, end_id: int, temperature: float, seed: int) -> Completion:
        generator = torch.Generator().manual_seed(seed)
        tokens: list[int] = []
        logps: list[float] = []
        while len(tokens) < max_tokens and tokens[-1:] != [end_id]:
            row = torch.log_softmax(self._logps([*prompt, *tokens]) / (temperature or 1.0), dim=-1)
            token = int(torch.multinomial(row.exp(), 1, generator=generator)) if temperature else int(row.argmax())
            tokens.append(token)
            logps.append(float(row[token]))
        return Completion(tokens, logps)

    def close(self) -> None:
        pass
