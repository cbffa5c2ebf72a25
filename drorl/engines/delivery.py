"""Adapters on their way to an engine: what is sent is what is fingerprinted, and the fingerprint is the version.

A version is made of the adapter's bytes. So an engine that answers for a version has those weights and no others, an
adapter that did not change is not sent again, and a stale one cannot have the new one's name.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from drorl.errors import InvalidInputError

_CONFIG = "adapter_config"
# What makes an adapter more than B A x, or other than r and alpha say.
_SPECIAL = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
)
_PLAIN_STARTS = (True, False, "gaussian")  # the others, as pissa, take a part out of the base in memory
_INCIDENTAL = ("inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping")
_PEFT_PREFIX = "base_model.model."
_PARTS = (".lora_A.weight", ".lora_B.weight")
_EXACT = (torch.float32, torch.float64, torch.bfloat16)  # types from which a bfloat16 comes out as from the file


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
        # Only what the weights mean: where they lie, or whether PEFT has just saved them, makes no other version.
        meant = {name: value for name, value in config.items() if name not in _INCIDENTAL}
        if not isinstance(meant["target_modules"], str):
            meant["target_modules"] = sorted(meant["target_modules"])
        text = json.dumps(meant, sort_keys=True, default=sorted)  # of what JSON does not know there are sets only
        return cls(role, safetensors.torch.save(tensors, {_CONFIG: text}))

    def __post_init__(self) -> None:
        config, names = self.config, self._names
        special = [name for name in _SPECIAL if config.get(name)]
        if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
            special.append(f"init_lora_weights={config['init_lora_weights']!r}")
        if config.get("peft_type") != "LORA" or special:
            raise InvalidInputError(
                f"vLLM takes plain LoRA adapters: {self.role} is {config.get('peft_type')} {' '.join(special)}".strip()
            )
        if strange := [name for name in names if not name.endswith(_PARTS)]:
            raise InvalidInputError(
                f"vLLM takes LoRA of linear layers: {self.role} has {len(strange)} other weights, as {min(strange)}"
            )
        if not (isinstance(config.get("r"), int) and isinstance(config.get("lora_alpha"), int | float)):
            raise InvalidInputError(f"the configuration of {self.role} has no numbers r and lora_alpha")

    @cached_property
    def version(self) -> str:
        """What the engine calls this adapter: its role and the SHA-256 of its bytes."""
        return f"{self.role}-{hashlib.sha256(self.content).hexdigest()[:16]}"

    @cached_property
    def _header(self) -> tuple[dict[str, Any], list[str]]:
        try:
            header = json.loads(self.content[8 : 8 + int.from_bytes(self.content[:8], "little")])
            return dict(json.loads(header["__metadata__"][_CONFIG])), sorted(header.keys() - {"__metadata__"})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _not_an_adapter(error) from error

    @property
    def config(self) -> dict[str, Any]:
        """PEFT's configuration.

        Raises:
            InvalidInputError: if the bytes are not an adapter.
        """
        return self._header[0]

    @property
    def _names(self) -> list[str]:
        return self._header[1]

    @property
    def rank(self) -> int:
        """Rank of its matrices."""
        return self.config["r"]

    def matrices(self) -> dict[str, torch.Tensor]:
        """Returns A and B of each layer by name.

        Raises:
            InvalidInputError: if the bytes are not an adapter.
        """
        try:
            return safetensors.torch.load(self.content)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise _not_an_adapter(error) from error

    def _matrices_for(self, base: Path) -> dict[str, torch.Tensor]:
        """Returns the matrices, once it is sure that each has its place in the base."""
        weights, shapes = self.matrices(), base_shapes(base)
        modules = {name.removesuffix(part) for name in weights for part in _PARTS if name.endswith(part)}
        places = {module: f"{module.removeprefix(_PEFT_PREFIX)}.weight" for module in sorted(modules)}
        if lost := [place for place in places.values() if place not in shapes]:
            raise InvalidInputError(f"{base} has no weights for {len(lost)} parts of the adapter, as {lost[0]}")
        for module, place in places.items():
            outer, *inner = shapes[place]
            found = [list(weights[module + part].shape) for part in _PARTS if module + part in weights]
            if found != [[self.rank, *inner], [outer, self.rank]]:
                raise InvalidInputError(f"{place} is {shapes[place]} in {base}, and the adapter's part {found}")
        return weights

    def write(self, folder: Path) -> None:
        """Writes what `PeftModel.from_pretrained`, and vLLM, read."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_model.safetensors").write_bytes(self.content)
        (folder / "adapter_config.json").write_text(json.dumps(self.config))

    def merged(self, base: Path, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Returns the weights of the base's checkpoint with this adapter added, by name, one after the other.

        The sum is made in float32 from the checkpoint's own weights, and nothing is merged in place: adding and
        taking away again would wear the base down, in bfloat16 within hours.

        Raises:
            InvalidInputError: if the adapter is not of this base; before anything is merged.
        """
        weights = self._matrices_for(base)
        scale = self.config["lora_alpha"] / (self.rank**0.5 if self.config.get("use_rslora") else self.rank)
        return _added(weights, scale, base, dtype)


def _added(
    weights: Mapping[str, torch.Tensor], scale: float, base: Path, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in base_weights(base):
        down, up = (weights.get(f"{_PEFT_PREFIX}{name.removesuffix('.weight')}{part}") for part in _PARTS)
        if down is not None and up is not None:
            tensor = (tensor.float() + scale * up.float() @ down.float()).to(dtype)
        yield name, tensor


def _not_an_adapter(error: Exception) -> InvalidInputError:
    return InvalidInputError(f"this is not an adapter in safetensors' format: {error!r}")


def base_folder(name_or_path: str) -> Path:
    """Returns where the files of a base model lie: a folder, or the hub's cache."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    return Path(snapshot_download(name_or_path, allow_patterns=["*.json", "*.safetensors"]))


def base_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weights of a checkpoint by name, one after the other."""
    for file in _files(folder):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                yield name, weights.get_tensor(name)


def base_shapes(folder: Path) -> dict[str, list[int]]:
    """Returns the shapes of a checkpoint's weights by name."""
    shapes: dict[str, list[int]] = {}
    for file in _files(folder):
        with safe_open(file, "pt") as weights:
            shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}
    return shapes


def base_fingerprint(folder: Path, model: PeftModel | None = None) -> str:
    """Returns what tells one base from another, whatever data type and however many files it was saved in.

    The SHA-256 of each weight's name, shape and first row, rounded to bfloat16: a fine-tuned model differs in most.

    Args:
        folder (`Path`): of the checkpoint; its names are the ones that count, since tied weights have several.
        model (`PeftModel`, *optional*): takes the rows from the base in memory, which may have changed since it was
            loaded, or be another revision. The file's stay where memory has other names or a coarser data type.
    """
    memory = {} if model is None else model.get_base_model().state_dict()
    memory = {name.replace(".base_layer.", "."): w for name, w in memory.items() if w.dtype in _EXACT}
    digest = hashlib.sha256()
    rows: dict[str, bytes] = {}
    for file in _files(folder):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                part = memory[name] if name in memory else weights.get_slice(name)
                shape = list(part.shape) if name in memory else part.get_shape()
                rows[name] = f"{name}{shape}".encode() + _first_row(part[:1])
    for name in sorted(rows):
        digest.update(rows[name])
    return digest.hexdigest()[:16]


def _first_row(part: torch.Tensor) -> bytes:
    return part.detach().flatten()[:4096].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()


def _files(folder: Path) -> list[Path]:
    """Returns the files that transformers reads; others beside them may hold the same weights once more."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise InvalidInputError(f"{folder} holds no *.safetensors: save the base with `save_pretrained`")
    return files
