r"""Every format in which people keep questions, passages and candidates, read into drorl's rows.

    row      id, query, answers, candidates, metadata
    passage  id, title, text; as a candidate also rank (from 1), score where a retriever gave one, and is_gold where
             the data set says which passages support the answer

A format is one function from a record to a row, and the fields by which it is known: a line of `ROWS` or `PASSAGES`.
Candidates keep the order of the file, unless it gives the gold passages away (DPR's training data list them first):
then they are shuffled, by their row's id. Sources of the formats: see each function.
"""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .fields import LeftOut, Problem, Row, answers_of, candidate, list_of, literal_list, objects_of, score_of, text_of


def shuffled(candidates: list[Row], row_id: str) -> list[Row]:
    """Returns candidates in an order that says nothing of which are gold, and without the scores that would."""
    bare = [{name: value for name, value in c.items() if name != "score"} for c in candidates]
    random.Random(row_id).shuffle(bare)
    return bare


def title_and_text(contents: str) -> tuple[str, str]:
    r"""Splits FlashRAG's and Search-R1's `"Title"\ntext`."""
    title, _, text = contents.partition("\n")
    return (title.strip().strip('"'), text.strip()) if text.strip() else ("", contents.strip())


def _supporting(facts: object) -> list[str]:
    """The titles of HotpotQA's supporting facts: pairs with a number (its own files), or a record of lists."""
    if isinstance(facts, dict):
        return list(map(str, list_of(facts, "title")))
    return [str(fact[0]) for fact in facts or [] if isinstance(fact, list) and fact]  # ty: ignore[not-iterable]


def _golds(field: str, names: Iterable[object]) -> Row:
    """What `drorl retrieve` marks passages by, `gold_titles` or `gold_ids`; nothing where a data set names none."""
    known = list(dict.fromkeys(str(name) for name in names if isinstance(name, (str, int))))
    return {field: known} if known else {}


def _paragraphs(context: object, gold: Sequence[str]) -> list[Row]:
    """HotpotQA's context: pairs (its own files), or a record of lists (hub, FlashRAG; 2Wiki says `content`)."""
    if isinstance(context, dict):
        sentences = context.get("sentences", context.get("content"))
        titles = list_of(context, "title")
        if not isinstance(sentences, list) or len(titles) != len(sentences):
            raise Problem("context", "not as many paragraphs as titles", len(titles))
        pairs = list(zip(titles, sentences, strict=True))
    elif isinstance(context, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in context):
        pairs = context
    else:
        raise Problem("context", "no paragraphs", context)
    found = []
    for title, sentences in pairs:
        if not isinstance(title, str) or not isinstance(sentences, list):
            raise Problem("context", "no title with its sentences", [title, sentences])
        text = " ".join(text_of({"context": sentence}, "context").strip() for sentence in sentences).strip()
        if text:  # HotpotQA has empty paragraphs
            found.append(candidate(title, text, is_gold=title in gold if gold else None))
    return found


# ----------------------------------------------------------------------------------------------------- formats of rows
def drorl_row(record: Row) -> Row:
    """drorl's own; whatever else a row has is kept in `metadata`."""
    own = ("id", "query", "answers", "candidates", "metadata")
    more = {name: value for name, value in record.items() if name not in own}
    candidates = []
    for item in objects_of(record, "candidates"):
        score = score_of(item)
        texts = {"title": text_of(item, "title", ""), "text": text_of(item, "text")}
        candidates.append(item | texts | ({} if score is None else {"score": score}))
    answers = answers_of(record.get("answers"), "answers")
    if record["answers"] and not answers:
        raise Problem("answers", "no answer that is not blank")
    return {
        "id": record.get("id"),
        "query": text_of(record, "query"),
        "answers": answers,
        "candidates": candidates,
        "metadata": {**(record.get("metadata") or {}), **more},
    }


def plain_row(record: Row) -> Row:
    """A question with its answers, under any of the usual names (NQ-open, WebQuestions): no candidates yet."""
    question = next((name for name in ("query", "question") if name in record), "question")
    answers = next((name for name in ("answers", "answer", "golden_answers") if name in record), "answers")
    own = {"id", question, answers}
    return {
        "id": record.get("id"),
        "query": text_of(record, question),
        "answers": answers_of(record.get(answers, []), answers),
        "candidates": [],
        "metadata": {name: value for name, value in record.items() if name not in own},
    }


def dpr_retriever_row(record: Row) -> Row:
    """What DPR's dense_retriever.py writes; https://github.com/facebookresearch/DPR."""
    ctxs = objects_of(record, "ctxs")
    return {
        "id": record.get("id"),
        "query": text_of(record, "question"),
        "answers": answers_of(record.get("answers"), "answers"),
        "candidates": [
            candidate(text_of(c, "title", ""), text_of(c, "text"), id=c.get("id"), score=score_of(c)) for c in ctxs
        ],
    }


def dpr_row(record: Row) -> Row:
    """DPR's training data: gold passages first, so that their order must go."""
    kinds = {"positive_ctxs": True, "hard_negative_ctxs": False, "negative_ctxs": False}
    query = text_of(record, "question")
    candidates: dict[Any, Row] = {}
    for name, is_gold in kinds.items():
        for c in objects_of(record, name) if name in record else []:
            title, text = text_of(c, "title", ""), text_of(c, "text")
            where = c.get("passage_id", c.get("psg_id"))
            candidates.setdefault(where or (title, text), candidate(title, text, id=where, is_gold=is_gold))
    return {
        "id": record.get("id"),
        "query": query,
        "answers": answers_of(record.get("answers"), "answers"),
        "candidates": shuffled(list(candidates.values()), query),
        "metadata": _golds("gold_ids", (c.get("id") for c in candidates.values() if c["is_gold"])),
    }


def hotpotqa_row(record: Row, aliases: Mapping[str, Sequence[str]] | None = None) -> Row:
    """HotpotQA's own files; 2WikiMultihopQA's too, with ids of answers, whose aliases are in a file of their own."""
    row_id = record.get("_id", record.get("id"))
    answer_id = record.get("answer_id")
    more = (aliases or {}).get(answer_id, ()) if isinstance(answer_id, str) else ()
    names, gold = ("type", "level", "evidences", "supporting_facts"), _supporting(record.get("supporting_facts"))
    metadata = {name: record[name] for name in names if name in record}
    if aliases and record.get("evidences_id"):
        metadata["evidences"] = _with_aliases(record["evidences"], record["evidences_id"], aliases)
    return {
        "id": row_id,
        "query": text_of(record, "question"),
        "answers": answers_of([record.get("answer"), *more], "answer"),
        "candidates": _paragraphs(record.get("context"), gold),
        "metadata": metadata | _golds("gold_titles", gold),
    }


def _with_aliases(evidences: list, ids: list, aliases: Mapping[str, Sequence[str]]) -> list:
    """2Wiki's triples, subject and object with all of their names."""

    def named(name: str, of: object) -> list[str]:
        return list(dict.fromkeys([name, *(aliases.get(of, ()) if isinstance(of, str) else ())]))

    pairs = zip(evidences, ids, strict=True)
    return [[named(subject, s), relation, named(obj, o)] for (subject, relation, obj), (s, _, o) in pairs]


def musique_row(record: Row, keep_unanswerable: bool = False) -> Row:
    """MuSiQue; its second half repeats the questions with a passage missing, and is left out."""
    if record.get("answerable") is False and not keep_unanswerable:
        raise LeftOut("not answerable")
    passages = [
        candidate(text_of(p, "title", ""), text_of(p, "paragraph_text"), is_gold=bool(p.get("is_supporting")))
        for p in objects_of(record, "paragraphs")
    ]
    return {
        "id": record.get("id"),
        "query": text_of(record, "question"),
        "answers": answers_of([record.get("answer"), *list_of(record, "answer_aliases", [])], "answer"),
        "candidates": passages,
        "metadata": {"answerable": record.get("answerable", True)}
        | _golds("gold_titles", (p["title"] for p in passages if p["is_gold"])),
    }


def kilt_row(record: Row) -> Row:
    """KILT's tasks, Wizard of Wikipedia among them: the input is the dialogue, turns parted by newlines."""
    outputs = objects_of(record, "output")
    pages = [p.get("title") for o in outputs for p in o.get("provenance") or [] if isinstance(p, dict)]
    return {
        "id": record.get("id"),
        "query": text_of(record, "input"),
        "answers": answers_of([o["answer"] for o in outputs if o.get("answer")], "output"),
        "candidates": [],
        "metadata": _golds("gold_titles", pages),
    }


def flashrag_row(record: Row) -> Row:
    """FlashRAG's jsonl; where its metadata carry HotpotQA's or 2Wiki's context, that is what may be chosen from."""
    metadata = record.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise Problem("metadata", "no record", metadata)
    context, gold = metadata.get("context"), _supporting(metadata.get("supporting_facts"))
    return {
        "id": record.get("id"),
        "query": text_of(record, "question"),
        "answers": answers_of(record.get("golden_answers"), "golden_answers"),
        "candidates": _paragraphs(context, gold) if context else [],
        "metadata": {name: value for name, value in metadata.items() if name != "context"}
        | _golds("gold_titles", gold),
    }


def flashrag_cache_row(record: Row) -> Row:
    """FlashRAG's cache of retrieved passages, a question and what was found for it; no answers."""
    found = objects_of(record, "value")
    pairs = [(c, *title_and_text(text_of(c, "contents"))) for c in found]
    candidates = [candidate(title, text, id=c.get("id"), score=score_of(c)) for c, title, text in pairs]
    return {"id": None, "query": text_of(record, "key"), "answers": [], "candidates": candidates}


_DRO_TEXT = re.compile(r"\s(?:Content|Text):")


def dro_row(record: Row) -> Row:
    """The data of DRO's authors: passages are texts, `Title: X. Content: ...` or `Title: "X" Text: ...`."""

    def passage(text: object) -> tuple[str, str]:
        title, *rest = _DRO_TEXT.split(text.strip(), maxsplit=1) if isinstance(text, str) else [""]
        if not title.startswith("Title:") or not rest:
            raise Problem("retrieval", "no text 'Title: ... Content: ...'", text)
        title = title.removeprefix("Title:").strip()
        quoted = title.startswith('"') and title.endswith('"') and len(title) > 1
        return (title[1:-1] if quoted else title.removesuffix(".")), rest[0].strip()

    gold = dict.fromkeys(map(passage, list_of(record, "positive", [])))
    found = dict.fromkeys(map(passage, list_of(record, "retrieval")))
    return {
        "id": record.get("query_id"),
        "query": text_of(record, "question"),
        "answers": answers_of(record.get("answer"), "answer"),
        "candidates": [candidate(*pair, is_gold=pair in gold) for pair in found],
        "metadata": _golds("gold_titles", (title for title, _ in gold)),
    }


_SHOWN = re.compile(r"^\[(\d+)\]:?[ \t]*", re.MULTILINE)
_ASKED = re.compile(r"(?:search query|query)(?: is)?: *(.+?)\.?$", re.IGNORECASE | re.MULTILINE)


def _shown(prompt: str) -> dict[int, str]:
    """The passages of a prompt by their numbers. Only the number that comes next begins one: a passage may have lines
    that begin with others, such as its notes. What is behind the last passage repeats the query."""
    starts: list[re.Match] = []
    for match in _SHOWN.finditer(prompt):
        if match[1] == str(len(starts) + 1):
            starts.append(match)
    end = prompt.rfind("\nSearch Query:", starts[-1].end() if starts else 0)
    ends = [match.start() for match in starts[1:]] + [len(prompt) if end < 0 else end]
    texts = [prompt[match.end() : stop] for match, stop in zip(starts, ends, strict=True)]
    if starts and end < 0:
        texts[-1] = re.split(r"\n\s*\n", texts[-1])[0]
    return {number: text.strip() for number, text in enumerate(texts, start=1)}


def rankzephyr_row(record: Row) -> Row:
    """RankZephyr's conversations: a teacher's ranking, for the selector's warm-up; no answers. Ranked as the teacher
    says; `metadata.shown` is the order in which they were shown (0 is the first)."""
    said = {str(turn.get("from")): text_of(turn, "value") for turn in objects_of(record, "conversations")}
    if not {"human", "gpt"} <= said.keys():
        raise Problem("conversations", "no human's and no model's turn", sorted(said))
    asked = _ASKED.findall(said["human"])
    shown = _shown(said["human"])
    order = [int(number) for number in re.findall(r"\[(\d+)\]", said["gpt"])]
    if not asked or not shown:
        raise Problem("conversations", "no query or no passages in the human's turn", said["human"])
    if len(set(order)) < len(order) or not set(order) <= shown.keys():
        raise Problem("conversations", "a ranking of passages that were not shown, or shown once", said["gpt"])
    order += [number for number in shown if number not in order]
    return {
        "id": record.get("id"),
        "query": asked[-1].strip(),
        "answers": [],
        "candidates": [candidate("", shown[number]) for number in order],
        "metadata": {"shown": [number - 1 for number in order]},
    }


def beir_row(record: Row) -> Row:
    """A query of a BEIR folder, with the ids of the passages that are judged relevant; no answers."""
    gold = [str(passage) for passage in list_of(record, "gold_ids")]
    query = text_of(record, "text")
    return {"id": record["_id"], "query": query, "answers": [], "candidates": [], "metadata": {"gold_ids": gold}}


def topic_row(cells: list[str]) -> Row:
    """A topic of TREC in two columns, its number and its text; no answers."""
    if len(cells) != 2:
        raise Problem("", "not two columns, a number and a question", cells)
    return {"id": cells[0], "query": cells[1], "answers": [], "candidates": []}


def table_row(cells: list[str]) -> Row:
    """A question and its answers as a Python list, in two columns: DPR's qas/*.csv, Anserini's topics."""
    if len(cells) != 2:
        raise Problem("", "not two columns, a question and its answers", cells)
    answers = literal_list(cells[1])
    if answers is None:
        raise Problem("answers", "no list of texts", cells[1])
    return {"id": None, "query": cells[0], "answers": answers_of(answers, "answers"), "candidates": []}


# ----------------------------------------------------------------------------------------------- formats of passages
def passage(record: Row) -> Row:
    """A passage under the usual names: `id` or BEIR's `_id`, `title`, `text`."""
    return {
        "id": record.get("id", record.get("_id")),
        "title": text_of(record, "title", ""),
        "text": text_of(record, "text"),
    }


def flashrag_passage(record: Row) -> Row:
    r"""FlashRAG's and Search-R1's corpus: `{"id", "contents": "\"Title\"\ntext"}`."""
    title, text = title_and_text(text_of(record, "contents"))
    return {"id": record.get("id"), "title": title, "text": text}


PSGS_COLUMNS = ("id", "text", "title")


def psgs_passage(cells: list[str]) -> Row:
    """DPR's psgs_w100.tsv: id, text, title; a header first."""
    if len(cells) != 3:
        raise Problem("", "not three columns, id, text and title", cells)
    if cells == list(PSGS_COLUMNS):
        raise LeftOut("header")
    return {"id": cells[0], "title": cells[2], "text": cells[1]}


# ---------------------------------------------------------------------------------------------------------- the tables
@dataclass(frozen=True)
class Format:
    """A format: the fields by which it is known, and what makes a row of a record."""

    fields: frozenset[str]
    read: Callable[..., Row]
    has_answers: bool = True
    """Whether a row without any is not whole."""
    quoted: bool = True
    """Of a table: whether a cell may stand in quotes."""
    columns: tuple[str, ...] = ()
    """Of a table: what a first row may name in another order, which is then that of the file."""

    def fits(self, record: object) -> bool:
        """Whether a record may be of this format. A table's is a list of cells."""
        return isinstance(record, dict) and bool(self.fields) and self.fields <= record.keys()


def _format(fields: str, read: Callable[..., Row], has_answers: bool = True) -> Format:
    return Format(frozenset(fields.split()), read, has_answers)


ROWS: dict[str, Format] = {  # the first that fits is taken: what has more fields stands before what has fewer
    "drorl": _format("query answers candidates", drorl_row, has_answers=False),  # those of a question alone are none
    "dpr-retriever": _format("question answers ctxs", dpr_retriever_row),
    "dpr": _format("question answers positive_ctxs", dpr_row),
    "2wiki": _format("question answer context supporting_facts evidences", hotpotqa_row),
    "hotpotqa": _format("question answer context", hotpotqa_row),
    "musique": _format("question answer paragraphs", musique_row),
    "dro": _format("question answer retrieval", dro_row),
    "flashrag": _format("question golden_answers", flashrag_row),
    "flashrag-cache": _format("key value", flashrag_cache_row, has_answers=False),
    "kilt": _format("input output", kilt_row),
    "rankzephyr": _format("conversations", rankzephyr_row, has_answers=False),
    "question": _format("question answer", plain_row),
    "questions": _format("question answers", plain_row),
    "query": _format("query answers", plain_row),
    "bare-question": _format("question", plain_row, has_answers=False),  # to be retrieved for, or answered
    "bare-query": _format("query", plain_row, has_answers=False),
    "beir": _format("_id text gold_ids", beir_row, has_answers=False),
    "qa-table": Format(frozenset(), table_row),
    "topics": Format(frozenset(), topic_row, has_answers=False, quoted=False),  # to be named: it looks like any table
}
PASSAGES: dict[str, Format] = {
    "flashrag-corpus": _format("contents", flashrag_passage),
    "passages": _format("text", passage),
    "psgs": Format(frozenset(), psgs_passage, columns=PSGS_COLUMNS),
}
