"""Evaluation of a system on held-out questions, question by question, so that systems can be compared in pairs."""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, chain, islice
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import track

from .adapters import GENERATOR
from .answers import answer_logps, scored_answers
from .metrics import KILT, MetricSettings, contains_answer, exact_match, f1, normalize_answer
from .permutations import Permutation
from .pipeline import Passage, RAGPipeline
from .ranking import gold_of, recalls
from .records import Record
from .weights import iw_elbo, log_importance_weights

_STDERR = Console(stderr=True)
T = TypeVar("T")
# How many questions are answered together, and of these how many are asked of the selector: products that are large
# enough for a small model, and little memory. A GPU waits for the next kernel, whatever is in it.
_ANSWERS_A_PASS = {"cpu": 16, "cuda": 64}
_PROMPTS_A_PASS = {"cpu": 4, "cuda": 16}
Ranked = tuple[Mapping[str, Any], list[int], float, float]  # row, order of candidates, answer_logp, iw_elbo


def _holds_answer(row: Mapping[str, Any], passage: Passage) -> bool:
    return contains_answer(passage["text"], row["answers"])


def _title_overlap(row: Mapping[str, Any], passage: Passage) -> float:
    """Share of the title's words that the query has."""
    title = normalize_answer(passage["title"]).split()
    return len(set(title) & set(normalize_answer(row["query"]).split())) / max(len(title), 1)


# How good a passage is without any selector; passages that are level keep the retriever's order.
RANKINGS: dict[str, Callable[[Mapping[str, Any], Passage], float]] = {
    "retriever": lambda row, passage: 0.0,
    "oracle": lambda row, passage: float(_holds_answer(row, passage)),
    "gold": lambda row, passage: float(bool(passage.get("is_gold"))),
    "closed_book": lambda row, passage: 0.0,
    "title": _title_overlap,
    "longest": lambda row, passage: float(len(passage["text"].split())),
}


def ranked(row: Mapping[str, Any], ranking: str, num_candidates: int) -> list[int]:
    """Returns the order in which a system without a selector reads passages, as indices into the row's candidates.

    `ranking`: `retriever`, its order; `oracle`, those that hold an answer first; `gold`, those that are marked first;
    `closed_book`, none; `title` and `longest`, controls that do not read: the title's words in the query, the
    passage's length.
    """
    if ranking == "closed_book":
        return []
    scores = [RANKINGS[ranking](row, passage) for passage in row["candidates"][:num_candidates]]
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def evaluate_rows(
    pipeline: RAGPipeline,
    rows: Iterable[Mapping[str, Any]],
    answer_target: str = "surface",
    num_samples: int = 8,
    ranking: str | None = None,
    description: str | None = None,
    metrics: MetricSettings = KILT,
) -> list[Record]:
    """Returns one record per row, decoded greedily.

    Args:
        pipeline ([`RAGPipeline`]): the system.
        rows (iterable of rows): `query`, `answers`, `candidates`.
        answer_target (`str`): the y of `answer_logp` and `iw_elbo`; exact match and F1 always use all gold answers.
        num_samples (`int`): permutations of `iw_elbo`. With K = 1 all N of them are enumerated instead, and the bound
            is the log marginal likelihood.
        ranking (`str`, *optional*): see [`ranked`]: no selector, and no bound. Default: the selector.
        description (`str`, *optional*): shows a progress bar with this text.
        metrics ([`MetricSettings`]): of exact match and F1; recall is always KILT's.

    With several processes each takes its share, and all return all records.
    """
    state = PartialState()
    rows = list(rows)
    shard = rows[state.process_index :: state.num_processes]
    progress = iter(shard if description is None else track(shard, description, transient=True, console=_STDERR))
    records: list[Record] = []
    with pipeline.evaluating():
        while block := list(islice(progress, _fitting(_ANSWERS_A_PASS, pipeline))):
            parts = _parts(block, pipeline)
            chosen = [_select(pipeline, part, answer_target, num_samples, ranking) for part in parts]
            records += _answer(pipeline, [*chain.from_iterable(chosen)], metrics)
    gathered = gather_object([records])
    return [gathered[i % state.num_processes][i // state.num_processes] for i in range(len(rows))]


def _fitting(sizes: Mapping[str, int], pipeline: RAGPipeline) -> int:
    return sizes.get(pipeline.model.device.type, sizes["cpu"])


def _parts(items: Sequence[T], pipeline: RAGPipeline) -> list[Sequence[T]]:
    """Cuts what the selector is to be asked into what one pass takes."""
    size = _fitting(_PROMPTS_A_PASS, pipeline)
    return [items[start : start + size] for start in range(0, len(items), size)]


def score_permutations(
    pipeline: RAGPipeline,
    rows: Sequence[Mapping[str, Any]],
    shown: Sequence[Sequence[Passage]],
    permutations: Sequence[Sequence[Permutation]],
    answer_target: str,
) -> list[torch.Tensor]:
    """Returns log p_g(y|x,d_z) of permutations of each row's candidates as shown, `(m,)` each, nats, on the CPU."""
    prompts = pipeline.generator_prompts
    contexts, answers = [], []
    for row, passages, of_row in zip(rows, shown, permutations, strict=True):
        targets = scored_answers(row, answer_target, pipeline.settings.num_candidates)
        contexts += [prompts.generator(row["query"], [passages[i] for i in z]) for z in of_row]
        answers += [[prompts.answer(a) for a in targets]] * len(of_row)
    logps = answer_logps(pipeline.role(GENERATOR), contexts, answers).cpu()
    return list(logps.split([len(of_row) for of_row in permutations]))


def _select(
    pipeline: RAGPipeline,
    rows: Sequence[Mapping[str, Any]],
    answer_target: str,
    num_samples: int,
    ranking: str | None,
) -> list[Ranked]:
    """Chooses passages for some questions, and scores their answers under them."""
    settings, candidates = pipeline.settings, [list(row["candidates"]) for row in rows]
    if ranking is not None:
        orders = [ranked(row, ranking, settings.num_candidates) for row in rows]
        read = [[tuple(order[: settings.num_selected])] for order in orders]
        scores = score_permutations(pipeline, rows, candidates, read, answer_target)
        return [(row, order, float(s[0]), math.nan) for row, order, s in zip(rows, orders, scores, strict=True)]
    shown = [pipeline.present(row["query"], row["candidates"]) for row in rows]
    decisions = pipeline.decisions([row["query"] for row in rows], shown)
    greedy = decisions.greedy()
    # The same randomness for every system and every time, and none of the training's.
    generators = [torch.Generator().manual_seed(zlib.crc32(row["query"].encode())) for row in rows]
    draws = decisions.sample(num_samples, every_first_choice=settings.num_selected == 1, generators=generators)
    # All that is asked of the decisions comes before the generator's adapter is active.
    firsts = decisions.logps([[()]] * len(rows))
    asked = [[z, *draw.permutations] for z, draw in zip(greedy, draws, strict=True)]
    scores = score_permutations(pipeline, rows, shown, asked, answer_target)
    chosen = []
    for i, (first,) in enumerate(firsts):
        bound = iw_elbo(log_importance_weights(scores[i][1:], draws[i].log_ratio))
        order = dict.fromkeys([*greedy[i], *first.argsort(descending=True).tolist()])
        order = [candidates[i].index(shown[i][place]) for place in order]
        chosen.append((rows[i], order, float(scores[i][0]), float(bound)))
    return chosen


def _answer(pipeline: RAGPipeline, block: Sequence[Ranked], metrics: MetricSettings) -> list[Record]:
    passages, k = [[row["candidates"][i] for i in order] for row, order, _, _ in block], pipeline.settings.num_selected
    pairs = zip(block, passages, strict=True)
    contexts = [pipeline.generator_prompts.generator(row["query"], p[:k]) for (row, *_), p in pairs]
    predictions = pipeline.generate(contexts)
    return [
        Record(
            query=row["query"],
            prediction=prediction,
            exact_match=exact_match(prediction, row["answers"], metrics),
            f1=f1(prediction, row["answers"], metrics),
            recall=recalls([passage["text"] for passage in ordered], row["answers"]),
            answer_logp=answer_logp,
            iw_elbo=bound,
            chosen=order[:k],
            all_gold=gold_recalls(row, ordered),
            order=order,
        )
        for (row, order, answer_logp, bound), ordered, prediction in zip(block, passages, predictions, strict=True)
    ]


def gold_recalls(row: Mapping[str, Any], passages: Sequence[Passage]) -> list[float]:
    """Returns all_gold@k for each k: whether the first k passages hold every gold one; `[]` if the row names none.

    A question of several hops needs them all, those too that are no candidates, see [`~ranking.gold_of`].

    >>> golds = [{"is_gold": True}, {"is_gold": False}, {"is_gold": True}]
    >>> gold_recalls({"candidates": golds}, golds), gold_recalls({"candidates": golds}, golds[:2])
    ([0.0, 0.0, 1.0], [0.0, 0.0])
    """
    relevant, golds = gold_of(row, passages) or ([], 0)
    return [float(count == golds) for count in accumulate(relevant)] if golds else []


def position_shares(pipeline: RAGPipeline, rows: Iterable[Mapping[str, Any]]) -> list[list[float]]:
    """Returns how likely each question's first choice is at each place of the prompt, all else equal, `(n, N)`.

    The candidates are shown in all N rotations of one order, so that every passage stands at every place once: a
    selector that only reads gives each place 1/N.
    """
    shares = []
    for row in rows:
        shown = pipeline.present(row["query"], row["candidates"], "position")
        orders = [shown[step:] + shown[:step] for step in range(len(shown))]
        with pipeline.evaluating():
            first = [
                of_order[0].exp()
                for part in _parts(orders, pipeline)
                for of_order in pipeline.decisions([row["query"]] * len(part), part).logps([[()]] * len(part))
            ]
        shares.append(torch.stack(first).mean(dim=0).tolist())
    return shares


def position_bias(shares: Sequence[Sequence[float]]) -> float:
    r"""Returns $\tfrac12 \sum_j |\bar p_j - 1/N|$ of [`position_shares`], in [0, 1): how much of the choice is place.

    >>> position_bias([[0.7, 0.3], [0.3, 0.7]]), round(position_bias([[0.9, 0.1]]), 3)
    (0.0, 0.4)
    """
    mean = torch.tensor(shares, dtype=torch.float64).mean(dim=0)
    return float(0.5 * (mean - 1 / len(mean)).abs().sum())
