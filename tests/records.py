"""Records of the formats that people keep their data in, with the quirks that these have."""

from typing import Any

HOTPOT = {
    "_id": "5a8b",
    "question": "Were Scott Derrickson and Ed Wood of the same nationality?",
    "answer": "yes",
    "type": "comparison",
    "level": "hard",
    "supporting_facts": [["Scott Derrickson", 0], ["Ed Wood", 0]],
    "context": [
        ["Ed Wood (film)", ["Ed Wood is a 1994 film.", " It is by Tim Burton."]],
        ["Scott Derrickson", ["Scott Derrickson is an American director."]],
        ["Empty", []],
        ["Ed Wood", ["Edward Wood was an American."]],
    ],
}
WIKI2 = {
    **HOTPOT,
    "answer": "USA",
    "answer_id": "Q30",
    "evidences": [["Ed Wood", "country of citizenship", "USA"]],
}
MUSIQUE = {
    "id": "2hop__1_2",
    "question": "Where did the founder of Acme die?",
    "answer": "Rome",
    "answer_aliases": ["Roma"],
    "answerable": True,
    "paragraphs": [
        {"idx": 0, "title": "Acme", "paragraph_text": "Acme was founded by Bo.", "is_supporting": True},
        {"idx": 1, "title": "Acme", "paragraph_text": "Acme makes anvils.", "is_supporting": False},
        {"idx": 2, "title": "Bo", "paragraph_text": "Bo died in Rome.", "is_supporting": True},
    ],
}
CTX = {"id": "wiki:7", "title": "Rome", "text": "Rome is a city.", "score": "82.5", "has_answer": True}
RANKED = (
    "I will provide you with 3 passages, each indicated by a numerical identifier []. Rank them by relevance to the "
    "search query: who built it?.\n\n[1] The tower: [sic] of iron\n[2] By Gustave\nEiffel, in 1889.\n[3] A bridge\n\n"
    "Search Query: who built it?.\nRank the 3 passages above."
)


def _conversation(order: str) -> list[dict[str, str]]:
    return [{"from": "system", "value": "x"}, {"from": "human", "value": RANKED}, {"from": "gpt", "value": order}]


_HUB = {"title": ["Rome", "Bo"], "sentences": [["Rome is a city."], ["Bo was here."]]}

# Of each format two records that are whole; of a table their cells.
WHOLE: dict[str, list[Any]] = {
    "drorl": [
        {"id": i, "query": "who?", "answers": ["Bo"], "candidates": [{"title": "T", "text": "x", "score": 1.5}]}
        for i in range(2)
    ],
    "dpr-retriever": [{"question": "which?", "answers": ["Rome"], "ctxs": [CTX, {**CTX, "id": i}]} for i in range(2)],
    "dpr": [
        {
            "question": "which?",
            "answers": ["Rome"],
            "positive_ctxs": [{"title": "Rome", "text": "Rome is it.", "passage_id": "1"}],
            "hard_negative_ctxs": [{"title": "T", "text": f"Text {i}.", "psg_id": 2}],
            "negative_ctxs": [],
        }
        for i in range(2)
    ],
    "2wiki": [WIKI2, {**WIKI2, "_id": "2", "evidences_id": [["Q1", "P27", "Q30"]]}],
    "hotpotqa": [HOTPOT, {**HOTPOT, "context": _HUB, "supporting_facts": {"title": ["Bo"], "sent_id": [0]}}],
    "musique": [MUSIQUE, {**MUSIQUE, "answerable": False}],
    "dro": [
        {
            "question": "who?",
            "answer": "Bo",
            "query_id": i,
            "positive": ["Title: Bo Li. Content: Bo was here."],
            "retrieval": ['Title: "A: B" Text: Not Bo.', "Title: Bo Li. Content: Bo was here."],
        }
        for i in range(2)
    ],
    "flashrag": [
        {"id": "a", "question": "who?", "golden_answers": ["Bo"], "metadata": {"context": _HUB}},
        {"id": "b", "question": "who?", "golden_answers": ["Bo", "Li"], "metadata": {}},
    ],
    "flashrag-cache": [
        {"key": f"q{i}?", "value": [{"id": "1", "contents": '"T"\nx', "score": 0.5}]} for i in range(2)
    ],
    "kilt": [
        {"id": i, "input": "Hi.\nWho?", "output": [{"answer": "Bo", "provenance": [{"title": "Bo"}]}]}
        for i in range(2)
    ],
    "rankzephyr": [{"id": i, "conversations": _conversation("[2] > [3] > [1]")} for i in range(2)],
    "question": [{"id": i, "question": "who?", "answer": "Bo"} for i in range(2)],
    "questions": [{"question": "who?", "answers": ["Bo", "Li"]} for _ in range(2)],
    "query": [{"query": "who?", "answers": ["Bo"]} for _ in range(2)],
    "bare-question": [{"question": "who?"} for _ in range(2)],
    "bare-query": [{"query": "who?", "more": [1, {"a": None}]} for _ in range(2)],
    "beir": [{"_id": str(i), "text": "who?", "gold_ids": ["d1"]} for i in range(2)],
    "qa-table": [['who sang "it"?', "['Bo', \"O'Neil\"]"], ["where?", "['Rome']"]],
    "topics": [["1", "who?"], ["2", 'where is "it"?']],
    "flashrag-corpus": [{"id": i, "contents": '"Title"\nA text.'} for i in range(2)],
    "passages": [{"_id": i, "title": "T", "text": "A text."} for i in range(2)],
    "psgs": [["id", "text", "title"], ["1", 'He said ""no"".', "Aaron"]],
}
