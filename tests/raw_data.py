"""The five data sets of the paper as their own files, made up: twelve questions each, and their corpus."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import CITIES, RIVERS

Record = dict[str, Any]
COUNT = len(RIVERS)


def sentences(i: int) -> list[str]:
    """An article of a river: what it says of a city, and what it says of none."""
    return [f"The {RIVERS[i]} flows through {CITIES[i]}.", f' It is a river, "the {RIVERS[i]}".']


def question(i: int) -> str:
    return f"Which river flows through {CITIES[i]}?"


def near(i: int, count: int) -> list[int]:
    """The river of a question among others, at a place that changes."""
    return sorted({i, *((i + 5 * j) % COUNT for j in range(1, count))}, key=lambda j: (j * 7 + i) % COUNT)


def nq_train(i: int) -> Record:
    ctxs = [
        {"title": RIVERS[j], "text": sentences(j)[0], "score": 1000 if j == i else 0, "passage_id": str(2 * j + 1)}
        for j in near(i, 6)
    ]
    gold = [ctx for ctx in ctxs if ctx["score"]]
    others = [ctx for ctx in ctxs if not ctx["score"]]
    kinds = {"positive_ctxs": gold, "negative_ctxs": [], "hard_negative_ctxs": others}
    return {"dataset": "nq", "question": question(i)[:-1].lower(), "answers": [RIVERS[i]], **kinds}


def hotpotqa(i: int) -> Record:
    yes_no = {
        "question": f"Is the {RIVERS[i]} a river that flows through {CITIES[i]}?",
        "answer": "yes",
        "type": "comparison",
    }
    asked = yes_no if i % 3 == 0 else {"question": question(i), "answer": RIVERS[i], "type": "bridge"}
    facts = [[RIVERS[i], 0], [CITIES[i], 1]]
    return {"_id": f"5a{i}", **asked, "level": "hard", "supporting_facts": facts, "context": paragraphs(i)}


def paragraphs(i: int) -> list[list]:
    """Ten, two of them of the question, and one empty."""
    others = [[RIVERS[j], sentences(j)] for j in near(i, 8)]
    return [["Empty", []], *others[:3], [CITIES[i], ["A city.", f" On the {RIVERS[i]}."]], *others[3:]]


def two_wiki(i: int) -> Record:
    return {**hotpotqa(i), "answer_id": f"Q{i}", "evidences": [[CITIES[i], "river", RIVERS[i]]]}


def two_wiki_alias(i: int) -> Record:
    return {"Q_id": f"Q{i}", "aliases": [f"River {RIVERS[i]}"], "demonyms": []}


def musique(i: int) -> Record:
    texts = [(RIVERS[j], "".join(sentences(j)), j == i) for j in near(i, 7)]
    return {
        "id": f"2hop__{i}_{i}",
        "question": question(i),
        "answer": RIVERS[i],
        "answer_aliases": [f"River {RIVERS[i]}"],
        "answerable": True,
        "paragraphs": [
            {"idx": idx, "title": title, "paragraph_text": text, "is_supporting": gold}
            for idx, (title, text, gold) in enumerate(texts)
        ],
        "question_decomposition": [],
    }


def wow(i: int) -> Record:
    turn = {"answer": f"It is the {RIVERS[i]}, I think.", "provenance": [{"title": RIVERS[i], "wikipedia_id": str(i)}]}
    return {"id": str(i), "input": f"I have been to {CITIES[i]}.\nNice!\n{question(i)}", "output": [turn]}


def write_corpus(path: Path) -> None:
    """DPR's table: a header, texts in quotes, quotes in them doubled."""
    rows = [(sentence.strip().replace('"', '""'), RIVERS[i]) for i in range(COUNT) for sentence in sentences(i)]
    lines = [f'{number}\t"{text}"\t"{title}"\n' for number, (text, title) in enumerate(rows, start=1)]
    path.write_text("id\ttext\ttitle\n" + "".join(lines))


def write_raw(folder: Path) -> None:
    """Writes every file that the commands in recipes/configs/ name: eight records to train on, four others."""
    (folder / "2wiki").mkdir(parents=True)
    write_corpus(folder / "psgs_w100.tsv")
    cases = [(question(i), [RIVERS[i]]) for i in range(8, COUNT)]
    (folder / "nq-test.qa.csv").write_text("".join(f"{asked}\t{answers!r}\n" for asked, answers in cases))
    for name, record in {
        "biencoder-nq-{}.json": nq_train,
        "hotpot_{}.json": hotpotqa,
        "2wiki/{}.json": two_wiki,
        "musique_ans_v1.0_{}.jsonl": musique,
        "wow-{}-kilt.jsonl": wow,
    }.items():
        _write(folder, name, record)
    (folder / "2wiki" / "id_aliases.json").write_text(_lines(map(two_wiki_alias, range(COUNT))))


def _write(folder: Path, name: str, record: Callable[[int], Record]) -> None:
    own = {"hotpot_{}.json": {"train": "train_v1.1", "dev": "dev_distractor_v1"}}.get(name, {})
    for split, chosen in {"train": range(8), "dev": range(8, COUNT)}.items():
        records = [record(i) for i in chosen]
        text = _lines(records) if name.endswith(".jsonl") else json.dumps(records)
        (folder / name.format(own.get(split, split))).write_text(text)


def _lines(records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
