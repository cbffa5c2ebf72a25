"""Log-likelihoods of token sequences, with every shared prefix encoded once.

One prefix tree holds the sequences of a call ([`tree`]); its distinct tokens pass through the model once. There are
two ways to do that exactly, and a third that is always right:

    packed     all tokens in one row; attention follows the tree, by blocks ([`attention`]), or by a 4-D mask where the
               model's attention cannot be replaced
    cached     one unbranched run of the tree after the other, in rounds; the states of what stands above are gathered
               from a `DynamicCache` that keeps its gradient
    repeated   every sequence by itself, as if nothing were shared

[`backend_of`] takes the first that gives this model the right numbers, in the order of what they cost (docs/
performance.md): a self-check of a few tokens compares each with the third at first use. Exact, not an approximation:
tests/test_likelihood.py compares values and gradients with the repeated computation.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from .attention import Layout, install, uninstall
from .errors import InvalidInputError
from .tree import Segment, TokenTree

logger = logging.get_logger(__name__)
_backends: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


class TreeStates:
    """The states of a growing prefix tree under one model.

    Args:
        model (`nn.Module`): a causal language model of transformers, wrapped by PEFT or not; its active adapter counts
        keep (`bool`): keeps keys and values, so that the tree can grow; not under gradient checkpointing.
        backend (`str`, *optional*): `blocks`, `mask`, `cached` or `repeated`; default: [`backend_of`] the model.
    """

    def __init__(self, model: nn.Module, keep: bool = False, backend: str | None = None):
        self.model = model
        self.tree = TokenTree()
        self.backend = backend or backend_of(model)
        self.base = _base(model)
        if self.backend == "cached" and not can_keep(model):
            self.backend = "repeated"
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.cache = DynamicCache() if keep and self.backend != "repeated" else None
        self.slots: list[int] = []
        """Where the keys of each encoded node stand in the cache."""
        self.windows: list[int | None] = []
        """What the layers said of their sliding windows (`blocks` only)."""

    def fork(self) -> "TreeStates":
        """Returns states that grow on their own, without gradient; nothing is copied."""
        other = TreeStates(self.model, backend=self.backend)
        other.tree, other.slots = self.tree.copy(), self.slots[:]
        if self.cache is not None:
            other.cache = _cache_of([(layer.keys.detach(), layer.values.detach()) for layer in self.cache.layers])
        return other

    def logits(self, nodes: Sequence[int]) -> torch.Tensor:
        """Encodes what is new in the tree and returns the next-token logits after each of `nodes`, `(len(nodes), V)`.

        The head is evaluated there only. `nodes` must be new.
        """
        unique = sorted(set(nodes))
        if unique and unique[0] < len(self.slots):
            raise ValueError(f"node {unique[0]} was encoded before: its logits are gone")
        rows = {node: row for row, node in enumerate(unique)}
        encode = {"cached": self._rounds, "repeated": self._sequences}.get(self.backend, self._packed)
        return encode(unique)[[rows[node] for node in nodes]]

    def _run(self, ids: torch.Tensor, **inputs: object) -> torch.Tensor:
        return self.model(input_ids=ids.to(self.device), **inputs).logits

    # ---------------------------------------------------------------------------------------------------------- packed
    def _packed(self, nodes: list[int]) -> torch.Tensor:
        tree, start = self.tree, len(self.slots)
        if self.backend == "blocks":
            layout = Layout(tree, self.slots, self.device, self.dtype)
            order, slots = layout.order, layout.slots
            # Any mask of four dimensions is handed on as it is, and this one is not looked at.
            attention = {"tree": layout, "attention_mask": torch.empty(1, 1, 1, 1)}
        else:
            order, slots = list(range(start, len(tree))), list(range(len(tree)))
            attention = {"attention_mask": self._mask(start)}
        place = {node: i for i, node in enumerate(order)}
        logits = self._run(
            torch.tensor([[tree.tokens[node] for node in order]]),
            position_ids=torch.tensor([[tree.positions[node] for node in order]], device=self.device),
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            logits_to_keep=torch.tensor([place[node] for node in nodes], dtype=torch.long, device=self.device),
            **attention,
        )
        if self.cache is not None:
            self.slots = slots
        if self.backend == "blocks":
            self.windows = layout.windows
        return logits[0]

    def _mask(self, start: int) -> torch.Tensor | BlockMask:
        """Returns who sees whom as the model's attention wants it, `(1, 1, new, all)`; old nodes keep their order."""
        visible = self.tree.visibility()[start:].to(self.device)
        if self.base.config._attn_implementation == "flex_attention":
            return create_block_mask(
                lambda b, h, q, k: visible[q, k], 1, None, *visible.shape, device=self.device, _compile=False
            )
        # The minimum instead of -inf, because a softmax over a row of -inf would be NaN in the kernels that pad rows.
        smallest = torch.finfo(self.dtype).min
        return torch.zeros_like(visible, dtype=self.dtype).masked_fill(~visible, smallest)[None, None]

    # ---------------------------------------------------------------------------------------------------------- cached
    def _rounds(self, nodes: list[int]) -> torch.Tensor:
        """Encodes the unbranched runs of one depth together, padded, each behind the states above it."""
        tree, cache, slots = self.tree, self.cache or DynamicCache(), self.slots[:]
        count = len(slots)
        segments = tree.segments(count)
        slots += [-1] * (len(tree) - count)
        wanted, found = set(nodes), {}
        depth: dict[int, int] = {}  # by last node
        rounds: list[list[Segment]] = []
        for segment in segments:
            level = depth[segment.nodes[-1]] = depth.get(segment.parent, -1) + 1
            if level == len(rounds):
                rounds.append([])
            rounds[level].append(segment)
        for runs in rounds:
            paths = [torch.tensor([slots[node] for node in tree.path(run.parent)], dtype=torch.long) for run in runs]
            past = pad_sequence(paths, batch_first=True, padding_side="left", padding_value=-1)
            own = [torch.tensor(run.nodes) for run in runs]
            new = pad_sequence(own, batch_first=True, padding_value=-1)
            keep = sorted({run.nodes.index(node) for run in runs for node in wanted.intersection(run.nodes)})
            logits, states = self._round(cache, past, new, keep or [0])
            for row, run in enumerate(runs):
                found |= {node: logits[row, keep.index(t)] for t, node in enumerate(run.nodes) if node in wanted}
                for node in run.nodes:
                    slots[node], count = count, count + 1
            cache = _extended(cache, states, new >= 0)
        if self.cache is not None:
            self.cache, self.slots = cache, slots
        return _stacked(found, nodes)

    def _round(
        self, cache: DynamicCache, past: torch.Tensor, new: torch.Tensor, keep: list[int]
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Returns logits `(runs, keep, V)` and the new keys and values of each layer, `(runs, heads, length, d)`."""
        index = past.clamp(min=0).to(self.device)
        gathered = [
            tuple(states[0][:, index].transpose(0, 1) for states in (layer.keys, layer.values))
            for layer in (cache.layers if past.shape[1] else [])
        ]
        behind = _cache_of(gathered)
        logits = self._run(
            torch.tensor(self.tree.tokens)[new],
            attention_mask=torch.cat([past >= 0, new >= 0], dim=1).long().to(self.device),
            position_ids=torch.tensor(self.tree.positions)[new].to(self.device),
            past_key_values=behind,
            use_cache=True,
            logits_to_keep=torch.tensor(keep, device=self.device),
        )
        width = past.shape[1]
        return logits, [(layer.keys[:, :, width:], layer.values[:, :, width:]) for layer in behind.layers]

    # -------------------------------------------------------------------------------------------------------- repeated
    def _sequences(self, nodes: list[int]) -> torch.Tensor:
        """Encodes the path to each leaf as a row of its own."""
        tree, wanted = self.tree, set(nodes)
        leaves = sorted(set(range(len(tree))) - set(tree.parents))
        paths = [tree.path(leaf) for leaf in leaves]
        ids = pad_sequence([torch.tensor([tree.tokens[node] for node in path]) for path in paths], batch_first=True)
        lengths = torch.tensor([len(path) for path in paths])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        keep = sorted({tree.positions[node] for node in nodes})
        logits = self._run(
            ids,
            attention_mask=mask.long().to(self.device),
            use_cache=False,
            logits_to_keep=torch.tensor(keep, device=self.device),
        )
        found = {
            node: logits[row, keep.index(t)]
            for row, path in enumerate(paths)
            for t, node in enumerate(path)
            if node in wanted
        }
        return _stacked(found, nodes)


def _stacked(rows: dict[int, torch.Tensor], nodes: Sequence[int]) -> torch.Tensor:
    return torch.stack([rows[node] for node in nodes]) if nodes else torch.empty(0)


def _cache_of(states: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """Returns a cache that holds these keys and values themselves, where `DynamicCache(...)` would hold copies."""
    cache = DynamicCache()
    for keys, values in states:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _extended(
    cache: DynamicCache, states: Sequence[tuple[torch.Tensor, torch.Tensor]], valid: torch.Tensor
) -> DynamicCache:
    """Appends the states of padded rows to a cache of one row, without their padding."""
    rows, columns = (index.to(states[0][0].device) for index in valid.nonzero(as_tuple=True))
    flat = [
        (keys[rows, :, columns].transpose(0, 1)[None], values[rows, :, columns].transpose(0, 1)[None])
        for keys, values in states
    ]
    if not cache.layers:
        return _cache_of(flat)
    return _cache_of(
        [
            (torch.cat([layer.keys, keys], dim=2), torch.cat([layer.values, values], dim=2))
            for layer, (keys, values) in zip(cache.layers, flat, strict=True)
        ]
    )


# ----------------------------------------------------------------------------------------------------------- back ends
def backend_of(model: nn.Module) -> str:
    """Returns how prefixes are shared under this model; decided and logged at first use."""
    base = _base(model)
    if base not in _backends:
        _backends[base] = _choose(model, base)
    return _backends[base]


def _choose(model: nn.Module, base: PreTrainedModel) -> str:
    reasons = []
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        for backend in ("blocks", "mask", "cached"):
            reason = _objection(model, base, backend)
            if reason is None:
                break
            reasons.append(f"{backend}: {reason}")
        else:
            backend = "repeated"
    finally:
        for module in training:
            module.training = True
    if reasons:
        logger.warning(f"{type(base).__name__}: shared prefixes are {backend} ({'; '.join(reasons)})")
    return backend


@torch.no_grad()
def _objection(model: nn.Module, base: PreTrainedModel, backend: str) -> str | None:
    """Returns what is wrong with a back end under this model, `None` if it gives the right numbers."""
    config = base.config.get_text_config()
    try:
        if backend == "blocks":
            install(base)
        elif backend == "mask" and any(_windows(config)):
            return "a 4-D mask would replace the model's sliding window"
        shared, windows = _sample(model, backend)
        if backend == "blocks" and sorted(windows, key=str) != sorted(_windows(config), key=str):
            raise NotImplementedError("its layers do not say how far they see")
    except Exception as error:  # whatever a model of any family does with inputs that it does not expect
        if backend == "blocks":
            uninstall(base)
        return f"{type(error).__name__}: {error}"
    expected, _ = _sample(model, "repeated")
    # What sees wrong tokens has logits that are off by their whole spread; bfloat16 rounds them to some hundredths of
    # it, in two computations of SmolLM2-135M to a tenth.
    tolerance = (0.3 if next(model.parameters()).dtype in (torch.bfloat16, torch.float16) else 1e-3) * expected.std()
    error = (shared - expected).square().mean(dim=-1).sqrt().max()
    if bool(error <= tolerance):
        return None
    if backend == "blocks":
        uninstall(base)
    return f"the self-check is off by {float(error):.2g} where logits spread by {float(expected.std()):.2g}"


def _sample(model: nn.Module, backend: str) -> tuple[torch.Tensor, list[int | None]]:
    """Returns logits all over a small tree that grows once, and the windows that its attention reported."""
    states = TreeStates(model, keep=True, backend=backend)
    vocabulary = _base(model).config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    first = states.tree.add(tokens[:6])
    other = states.tree.add(tokens[6:8], first[2])
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


def can_keep(model: nn.Module) -> bool:
    """Whether states can be kept with their gradient: gradient checkpointing throws them away."""
    return not (_base(model).is_gradient_checkpointing and model.training)


def refuse_dropout(model: nn.Module) -> None:
    """Checks that equal prefixes have equal states.

    Raises:
        InvalidInputError: if the model drops out: sequences that share a prefix would share its noise.
    """
    config = _base(model).config.get_text_config()
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0}
    if getattr(config, "attention_dropout", 0.0):
        rates["attention_dropout"] = config.attention_dropout
    if rates:
        name, rate = next(iter(rates.items()))
        raise InvalidInputError(
            f"dropout of {rate} in {name}: sequences that share a prefix would share its noise; set lora_dropout=0 in "
            "the LoraConfig, or disable_dropout=True"
        )


def _base(model: nn.Module) -> PreTrainedModel:
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


# ----------------------------------------------------------------------------------------------------------- functions
class PromptStates:
    """Prompts encoded once, so that the model can be asked again and again what follows them.

    Args:
        model (`nn.Module`): see [`TreeStates`].
        prompts (`list` of B token sequences): none is empty.
        keep (`bool`): `False`: nothing is encoded before the first question, which is answered in one pass; the next
            one would encode the prompts again.
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], keep: bool = True):
        self.states = TreeStates(model, keep)
        # A prompt's last token is encoded with the first question, because only then its logits are wanted.
        self._above = [self.states.tree.add(prompt[:-1])[-1] if len(prompt) > 1 else -1 for prompt in prompts]
        self._last = [prompt[-1] for prompt in prompts]
        if self.states.cache is not None and len(self.states.tree):
            self.states.logits([])

    def fork(self) -> "PromptStates":
        """Returns the same states without gradient; what is asked of them does not reach these."""
        other = object.__new__(PromptStates)
        other.states, other._above, other._last = self.states.fork(), self._above, self._last
        return other

    def logits_after(self, branches: Sequence[tuple[int, Sequence[int]]]) -> torch.Tensor:
        """Returns the next-token logits after each `(prompt, tokens)`, `(len(branches), V)`; `tokens` may be empty."""
        tree, nodes = self.states.tree, []
        for prompt, tokens in branches:
            *_, node = tree.add([self._last[prompt], *tokens], self._above[prompt])
            # A node that was encoded before has no logits any more: its twin has.
            nodes.append(tree.twin(node) if node < len(self.states.slots) else node)
        return self.states.logits(nodes)


def sequence_logps(
    model: nn.Module, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0
) -> list[torch.Tensor]:
    r"""Returns log p(completion_t | prompt, completion_<t) of each (prompt, completion) pair, in nats.

    One tensor of shape `(T,)` per pair, T being the length of its completion; float32 or wider, differentiable. Equal
    prefixes of any two pairs are encoded once, so equal pairs cost nothing. `temperature` divides the logits.

    Raises:
        ValueError: if a prompt or a completion is empty.
    """
    states = TreeStates(model)
    scored: list[int] = []
    targets: list[int] = []
    for prompt, completion in pairs:
        if not prompt or not completion:
            raise ValueError("a prompt and its completion need at least one token each")
        # The last token predicts nothing that is scored, so it is not encoded.
        scored += states.tree.add([*prompt, *completion[:-1]])[len(prompt) - 1 :]
        targets += completion
    logits = states.logits(scored)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logps = torch.log_softmax(logits / temperature, dim=-1).gather(
        1, torch.tensor(targets, device=logits.device)[:, None]
    )[:, 0]
    return list(logps.split([len(completion) for _, completion in pairs]))
