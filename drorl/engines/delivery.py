"""Adapters on their way to an engine: what is sent is what is fingerprinted, and the fingerprint is the version.

A version is made of the adapter's bytes. So an engine that answers for a version has those weights and no others, an
adapter that did not change is not sent again, and a stale one cannot have the new one's name.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open

from drorl.errors import InvalidInputError

_CONFIG = "adapter_config"
_SPECIAL = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern")
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """One role's LoRA adapter as bytes.

    Args:
        role (`str`): `selector` or `generator`.
        content (`bytes`): a safetensors file of PEFT's weights, with PEFT's configuration in its header.
    """

    role: str
    content: bytes

    @classmethod
    def of(cls, model: PeftModel, role: str) -> "Adapter":
        """Returns the adapter of `role` as it is now."""
        weights = get_peft_model_state_dict(model, adapter_name=role, save_embedding_layers=False)
        tensors = {name: weights[name].detach().cpu().contiguous() for name in sorted(weights)}
        return cls._packed(role, tensors, model.peft_config[role].to_dict())

    @classmethod
    def saved(cls, folder: str | Path, role: str) -> "Adapter":
        """Returns the adapter of `role` that PEFT has written to `folder`."""
        tensors = safetensors.torch.load_file(Path(folder) / "adapter_model.safetensors")
        return cls._packed(role, tensors, json.loads((Path(folder) / "adapter_config.json").read_text()))

    @classmethod
    def _packed(cls, role: str, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> "Adapter":
        text = json.dumps(config, sort_keys=True, default=sorted)  # of what JSON does not know there are sets only
        return cls(role, safetensors.torch.save(tensors, {_CONFIG: text}))

    def __post_init__(self) -> None:
        config = self.config
        special = [name for name in _SPECIAL if config.get(name)]
        if config.get("peft_type") != "LORA" or special:
            raise InvalidInputError(
                f"vLLM takes plain LoRA adapters: {self.role} is {config.get('peft_type')} {' '.join(special)}".strip()
            )

    @cached_property
    def version(self) -> str:
        """What the engine calls this adapter: its role and the SHA-256 of its bytes."""
        return f"{self.role}-{hashlib.sha256(self.content).hexdigest()[:16]}"

    @cached_property
    def config(self) -> dict[str, Any]:
        """PEFT's configuration.

        Raises:
            InvalidInputError: if the bytes are not an adapter.
        """
        try:
            size = int.from_bytes(self.content[:8], "little")
            return json.loads(json.loads(self.content[8 : 8 + size])["__metadata__"][_CONFIG])
        except (ValueError, KeyError) as error:
            raise InvalidInputError(f"this is not an adapter in safetensors' format: {error!r}") from error

    @property
    def rank(self) -> int:
        """Rank of its matrices."""
        return self.config["r"]

    def write(self, folder: Path) -> None:
        """Writes what `PeftModel.from_pretrained`, and vLLM, read."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_model.safetensors").write_bytes(self.content)
        (folder / "adapter_config.json").write_text(json.dumps(self.config))

    def merged(self, base: Path, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the weights of the base's checkpoint with this adapter added, by name.

        The sum is made in float32 from the checkpoint's own weights, and nothing is merged in place: adding and
        taking away again would wear the base down, in bfloat16 within hours.

        Raises:
            InvalidInputError: if the base has no weights for a part of the adapter.
        """
        weights = safetensors.torch.load(self.content)
        scale = self.config["lora_alpha"] / (self.rank**0.5 if self.config.get("use_rslora") else self.rank)
        left = {name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")}
        for name, tensor in base_weights(base):
            module = _PEFT_PREFIX + name.removesuffix(".weight")
            if module in left:
                left.remove(module)
                down, up = (weights[f"{module}.lora_{part}.weight"].float() for part in "AB")
                tensor = (tensor.float() + scale * up @ down).to(dtype)
            yield name, tensor
        if left:
            raise InvalidInputError(f"{base} has no weights for {len(left)} parts of the adapter, as {min(left)}")


def base_folder(name_or_path: str) -> Path:
    """Returns where the files of a base model lie: a folder, or the hub's cache."""
    return Path(name_or_path) if Path(name_or_path).is_dir() else Path(snapshot_download(name_or_path))


def base_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weights of a checkpoint by name, one after the other."""
    for file in _files(folder):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                yield name, weights.get_tensor(name)


def base_fingerprint(folder: Path) -> str:
    """Returns what tells one base from another, whatever data type and however many files it was saved in.

    The SHA-256 of each weight's name, shape and first row, rounded to bfloat16: a fine-tuned model differs in most.
    """
    digest = hashlib.sha256()
    rows: dict[str, bytes] = {}
    for file in _files(folder):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                part = weights.get_slice(name)
                first = part[:1].flatten()[:4096].to(torch.bfloat16).view(torch.int16)
                rows[name] = f"{name}{part.get_shape()}".encode() + first.numpy().tobytes()
    for name in sorted(rows):
        digest.update(rows[name])
    return digest.hexdigest()[:16]


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InvalidInputError(f"{folder} holds no *.safetensors: save the base with `save_pretrained`")
    return files
