"""Which ways of sharing prefixes give a model the right numbers; see [`likelihood`]."""

from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .attention import install, uninstall
from .errors import InvalidInputError
from .states import TreeStates, base_of

logger = logging.get_logger(__name__)
_backends: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


def backend_of(model: nn.Module) -> str:
    """Returns how prefixes are shared under this model; decided and logged at first use, from now on the same.

    `blocks`, `mask`, `cached` or `repeated`: the first that passes a self-check, in the order of their measured cost.
    """
    base = base_of(model)
    if base not in _backends:
        _backends[base] = _choose(base)
    return _backends[base]


def _choose(base: PreTrainedModel) -> str:
    reasons = []
    training = [module for module in base.modules() if module.training]  # some may be in evaluation mode, and stay so
    base.eval()
    try:
        for backend in ("blocks", "mask", "cached", "repeated"):
            reason = _objection(base, backend)
            if reason is None:
                break
            uninstall(base)
            reasons.append(f"{backend}: {reason}")
    finally:
        for module in training:
            module.training = True
    if reasons:
        logger.warning(f"{type(base).__name__}: shared prefixes are {backend} ({'; '.join(reasons)})")
    return backend


@torch.no_grad()
def _objection(base: PreTrainedModel, backend: str) -> str | None:
    """Returns what is wrong with a back end under this model, `None` if it gives the right numbers."""
    config = base.config.get_text_config()
    try:
        if backend == "blocks":
            install(base)
        elif backend == "mask" and any(_windows(config)):
            return "a 4-D mask would replace the model's sliding window"
        shared, windows = _sample(base, backend)
        if backend == "blocks" and sorted(windows, key=str) != sorted(_windows(config), key=str):
            raise NotImplementedError("its layers do not say how far they see")
    except Exception as error:  # whatever a model of any family does with inputs that it does not expect
        return f"{type(error).__name__}: {error}"
    expected, _ = _sample(base, "repeated")
    # What sees wrong tokens has logits that are off by their whole spread; bfloat16 rounds them to some hundredths of
    # it, in two computations of SmolLM2-135M to a tenth.
    tolerance = (0.3 if base.dtype in (torch.bfloat16, torch.float16) else 1e-2) * expected.std()
    error = (shared - expected).square().mean(dim=-1).sqrt().max()
    if bool(error <= tolerance):
        return None
    return f"the self-check is off by {float(error):.2g} where logits spread by {float(expected.std()):.2g}"


def _sample(base: PreTrainedModel, backend: str) -> tuple[torch.Tensor, list[int | None]]:
    """Returns logits all over a small tree that grows once, and the windows that its attention reported."""
    states = TreeStates(base, backend, keep=True)
    vocabulary = base.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    first = states.tree.add(tokens[:6])
    other = states.tree.add(tokens[6:8], first[2])
    with torch.autocast(base.device.type, enabled=False):  # which rounds, as a wrapper of the model may do
        logits = [states.logits([*first, *other])]
        grown = [*states.tree.add(tokens[8:10], first[-1]), *states.tree.add(tokens[10:12], other[-1])]
        logits.append(states.logits(grown))
    return torch.cat(logits).float(), states.windows


def _windows(config: PreTrainedConfig) -> list[int | None]:
    """Returns the sliding window of each layer.

    Raises:
        NotImplementedError: if there are layers of which it is not known how they attend.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    if other := set(kinds) - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"it has layers of {', '.join(sorted(other))}")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def refuse_dropout(model: nn.Module) -> None:
    """Checks that equal prefixes have equal states.

    Raises:
        InvalidInputError: if the model drops out: sequences that share a prefix would share its noise.
    """
    noise = "sequences with a shared prefix would share its noise"
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise InvalidInputError(
                f"dropout of {module.p} in {name}: {noise}; set lora_dropout=0 in LoraConfig, or disable_dropout=True"
            )
    rate = getattr(base_of(model).config.get_text_config(), "attention_dropout", 0.0)
    if rate:
        raise InvalidInputError(f"attention_dropout={rate}: {noise}; set it to 0 in the model's configuration")
