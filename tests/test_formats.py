"""The formats that people keep their data in: every quirk that a file is known to have, and files that are broken."""

import gzip
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import CTX, HOTPOT, MUSIQUE, RANKED, WIKI2

from drorl.data import files
from drorl.data.files import records
from drorl.data.formats import PASSAGES, ROWS
from drorl.data.reading import Reading, read_aliases
from drorl.data.rows import RowError, validate_rows
from drorl.errors import InvalidInputError


def written(path: Path, *entries: Any) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def read(path: Path, *arguments: Any, **options: Any) -> list[dict]:
    """All rows of a file."""
    return list(Reading(path, *arguments, **options))


def only(tmp_path: Path, entry: Any, **options: Any) -> dict:
    """The row that is made of one record; the trainer takes it, too."""
    [row] = read(written(tmp_path / "data.jsonl", entry), **options)
    assert set(row) == {"id", "query", "answers", "candidates", "metadata"}
    assert [c["rank"] for c in row["candidates"]] == list(range(1, len(row["candidates"]) + 1))
    if row["answers"]:
        validate_rows([row], 0)
    return row


# --------------------------------------------------------------------------------------------------- what rows become
def test_hotpotqa_in_its_three_shapes(tmp_path: Path) -> None:
    """Pairs in its own files, records of lists on the hub and in FlashRAG: the same passages, golds by title."""
    row = only(tmp_path, HOTPOT)
    assert [c["title"] for c in row["candidates"]] == ["Ed Wood (film)", "Scott Derrickson", "Ed Wood"]
    assert [c["is_gold"] for c in row["candidates"]] == [False, True, True]
    assert row["candidates"][0]["text"] == "Ed Wood is a 1994 film. It is by Tim Burton."
    assert (row["id"], row["answers"], row["metadata"]["type"]) == ("5a8b", ["yes"], "comparison")

    context = {"title": [t for t, _ in HOTPOT["context"]], "sentences": [s for _, s in HOTPOT["context"]]}
    facts = {"title": ["Scott Derrickson", "Ed Wood"], "sent_id": [0, 0]}
    hub = {**HOTPOT, "id": "5a8b", "context": context, "supporting_facts": facts}
    del hub["_id"]
    assert only(tmp_path, hub)["candidates"] == row["candidates"]
    for sentences in ("sentences", "content"):  # FlashRAG's 2Wiki
        metadata = {
            "supporting_facts": facts,
            "context": {"title": context["title"], sentences: context["sentences"]},
            "level": "hard",
        }
        flashrag = {"id": "5a8b", "question": HOTPOT["question"], "golden_answers": ["yes"], "metadata": metadata}
        assert only(tmp_path, flashrag)["candidates"] == row["candidates"]
        assert only(tmp_path, flashrag)["metadata"]["gold_titles"] == row["metadata"]["gold_titles"]
    assert row["metadata"]["gold_titles"] == ["Scott Derrickson", "Ed Wood"]
    unknown = only(tmp_path, {**HOTPOT, "supporting_facts": []})  # that is no statement about any passage
    assert "gold_titles" not in unknown["metadata"]
    assert not any("is_gold" in c for c in unknown["candidates"])


def test_2wiki_knows_the_aliases_of_its_answers(tmp_path: Path) -> None:
    """They are in a file of their own, by the id of the answer; an answer without an id has none."""
    aliases = read_aliases(
        written(tmp_path / "aliases", {"Q_id": "Q30", "aliases": ["U.S.", "USA"], "demonyms": ["American"]})
    )
    path = written(tmp_path / "2wiki.jsonl", WIKI2, {**WIKI2, "_id": "2", "answer_id": None})
    reading = Reading(path, options={"aliases": aliases})
    assert [row["answers"] for row in reading] == [["USA", "U.S.", "American"], ["USA"]]
    assert reading.format == "2wiki"


def test_musique_counts_only_what_can_be_answered(tmp_path: Path) -> None:
    """Its second half is left out, and counted, unless asked for; titles repeat within a row."""
    path = written(tmp_path / "musique.jsonl", MUSIQUE, {**MUSIQUE, "answerable": False})
    reading = Reading(path)
    [row] = reading
    assert (row["answers"], reading.skipped) == (["Rome", "Roma"], {"not answerable": 1})
    assert [c["is_gold"] for c in row["candidates"]] == [True, False, True]
    assert row["metadata"]["gold_titles"] == ["Acme", "Bo"]
    assert len(read(path, options={"keep_unanswerable": True})) == 2


def test_dpr_in_its_three_shapes(tmp_path: Path) -> None:
    """Scores are texts; in training data the gold passages come first, and must not be known by that."""
    retrieved = {"question": "which city?", "answers": ["Rome"], "ctxs": [CTX, {**CTX, "id": 8, "text": "No."}]}
    row = only(tmp_path, retrieved)
    assert row["candidates"][0] == {
        "title": "Rome",
        "text": "Rome is a city.",
        "id": "wiki:7",
        "score": 82.5,
        "rank": 1,
    }
    assert row["candidates"][1]["id"] == "8"

    gold = {"title": "Rome", "text": "Rome is it.", "score": 1000, "passage_id": "1"}
    others = [{"title": f"T{i}", "text": f"Text {i}.", "score": i, "psg_id": i} for i in range(2, 9)]
    places = []
    for i in range(40):
        biencoder = {
            "dataset": "nq_train_psgs_w100",
            "question": f"which city {i}?",
            "answers": ["Rome"],
            "positive_ctxs": [gold],
            "negative_ctxs": [],
            "hard_negative_ctxs": [*others, gold],  # some are listed twice
        }
        row = only(tmp_path, biencoder)
        places.append([c["id"] for c in row["candidates"]].index("1"))
        assert len(row["candidates"]) == 8 and not any("score" in c for c in row["candidates"])
        assert row["metadata"] == {"gold_ids": ["1"]}
        assert row == only(tmp_path, biencoder)
    assert min(places) == 0 and max(places) == 7 and len(set(places)) > 5


def test_questions_in_a_table(tmp_path: Path) -> None:
    """DPR's qa.csv is parted by tabs; the answers are a Python list, which is parsed and never evaluated."""
    path = tmp_path / "nq-test.qa.csv"
    path.write_text("who sang \"it\"?\t[\"O'Neil\", 'Bo']\nwhere?\t['1,000 km']\n")
    rows = read(path)
    assert [row["query"] for row in rows] == ['who sang "it"?', "where?"]
    assert [row["answers"] for row in rows] == [["O'Neil", "Bo"], ["1,000 km"]]
    path.write_text("who?\t__import__('os').system('touch /tmp/x')\n")
    with pytest.raises(RowError, match="row 1, field 'answers': no list of texts"):
        read(path)


def test_kilt_flashrag_and_plain_questions(tmp_path: Path) -> None:
    """Wizard of Wikipedia's outputs may lack an answer; names of fields differ; what is not read is kept."""
    wow = {
        "id": "3",
        "input": "I like trains.\nMe too!\nWhich one?",
        "output": [{"answer": "The TGV.", "provenance": [{"title": "TGV"}]}, {"provenance": [{"title": "Train"}]}],
    }
    row = only(tmp_path, wow)
    assert (row["query"], row["answers"]) == (wow["input"], ["The TGV."])
    assert row["metadata"]["gold_titles"] == ["TGV", "Train"]
    flashrag = {"id": "test_0", "question": "who?", "golden_answers": ["Bo", "Bo", " "], "metadata": {}}
    assert only(tmp_path, flashrag)["answers"] == ["Bo"]
    plain = {"question": "who?", "answer": ["Bo", 1889], "source": "me"}
    row = only(tmp_path, plain)
    assert (row["id"], row["answers"], row["metadata"]) == ("1", ["Bo", "1889"], {"source": "me"})
    own = {"query": "who?", "answers": ["Bo"], "candidates": [{"title": "", "text": "Bo.", "score": 1.5}], "more": 2}
    row = only(tmp_path, own)
    assert row["candidates"] == [{"title": "", "text": "Bo.", "score": 1.5, "rank": 1, "id": "1/1"}]
    assert row["metadata"] == {"more": 2}


def test_the_authors_data(tmp_path: Path) -> None:
    """Both ways in which DRO's authors write a passage."""
    record = {
        "question": "who?",
        "answer": "Bo",
        "query_id": 4,
        "positive": ["Title: Bo Li. Content: Bo was here."],
        "retrieval": ['Title: "A: B" Text: Not\nBo.', "Title: Bo Li. Content: Bo was here."],
    }
    row = only(tmp_path, record)
    assert [(c["title"], c["text"], c["is_gold"]) for c in row["candidates"]] == [
        ("A: B", "Not\nBo.", False),
        ("Bo Li", "Bo was here.", True),
    ]
    assert row["id"] == "4" and row["metadata"] == {"gold_titles": ["Bo Li"]}


def test_rankzephyrs_conversations(tmp_path: Path) -> None:
    """The teacher's ranking becomes the order of the candidates; what was shown can be restored."""
    record = {
        "id": "9",
        "conversations": [
            {"from": "system", "value": "You are RankGPT."},
            {"from": "human", "value": RANKED},
            {"from": "gpt", "value": "[2] > [3]"},
        ],
    }
    row = only(tmp_path, record)
    assert row["query"] == "who built it?"
    assert [c["text"] for c in row["candidates"]] == [
        "By Gustave\nEiffel, in 1889.",
        "A bridge",
        "The tower: [sic] of iron",
    ]
    assert row["metadata"]["shown"] == [1, 2, 0]
    noted = RANKED.replace("of iron", "of iron\n[2010] And a note.").replace("A bridge", "A bridge\n\n[1] A note.")
    record["conversations"][1]["value"] = noted
    assert [c["text"] for c in only(tmp_path, record)["candidates"]] == [
        "By Gustave\nEiffel, in 1889.",
        "A bridge\n\n[1] A note.",
        "The tower: [sic] of iron\n[2010] And a note.",
    ]
    record["conversations"][1]["value"] = RANKED.replace("Search Query:", "The query is:")
    assert [c["text"] for c in only(tmp_path, record)["candidates"]] == [c["text"] for c in row["candidates"]]
    record["conversations"][2]["value"] = "[2] > [4]"
    with pytest.raises(RowError, match="not shown"):
        only(tmp_path, record)


@pytest.mark.parametrize(
    "record",
    [
        {
            "question": "q",
            "golden_answers": ["x"],
            "metadata": {"context": {"title": ["a", "b"], "sentences": [["x"]]}},
        },
        {"question": "q", "golden_answers": ["x"], "metadata": {"context": {"title": ["a"], "sentences": 5}}},
        {**HOTPOT, "supporting_facts": 5},
        {**HOTPOT, "context": [["T", [float("nan")]]]},
        {"input": "q", "output": [{"answer": "x", "provenance": 5}]},
        {"question": "q", "answers": ["x"], "positive_ctxs": [{"title": "", "text": "x", "passage_id": [1]}]},
        {"question": "q", "answers": ["x"], "ctxs": [{**CTX, "score": 10**400}]},
        {"question": "q", "answers": ["x"], "ctxs": [{**CTX, "score": "nan"}]},
        {"question": "q", "answer": "[{[1]}]", "retrieval": ["Title: " + " " * 5000 + "x"]},
        {"query": "q", "answers": ["x"], "candidates": [], "metadata": "x"},
    ],
)
def test_a_record_that_is_wrong_inside_is_refused(tmp_path: Path, record: dict) -> None:
    """Whatever is in the place of what was meant: one message, at once."""
    with pytest.raises(RowError, match="row 1"):
        only(tmp_path, record)


def test_an_id_of_zero_is_one(tmp_path: Path) -> None:
    """Ids are counted from 0 in many files."""
    row = only(
        tmp_path, {"query": "q", "answers": ["x"], "candidates": [{"id": 0, "title": "", "text": "x"}], "id": 0}
    )
    assert (row["id"], row["candidates"][0]["id"]) == ("0", "0")


def test_corpora(tmp_path: Path) -> None:
    """DPR's table with its header and doubled quotes, FlashRAG's contents, BEIR's ids."""
    table = tmp_path / "psgs_w100.tsv"
    table.write_text('id\ttext\ttitle\n1\t"He said ""no""\tand went."\t"Aaron"\n2\tPlain text.\tBo\n')
    reading = Reading(table, PASSAGES)
    entries = [
        {"id": "1", "title": "Aaron", "text": 'He said "no"\tand went.'},
        {"id": "2", "title": "Bo", "text": "Plain text."},
    ]
    assert list(reading) == entries
    assert (reading.format, reading.number, reading.skipped) == ("psgs", 3, {})
    table.write_text('title\tid\ttext\n"Aaron"\t1\t"He said ""no""\tand went."\nBo\t2\tPlain text.\n')
    again = Reading(table, PASSAGES)
    assert list(again) == entries
    assert [p["text"] for p in Reading(table, PASSAGES, start=2)] == ["Plain text."]
    table.write_text("title\tid\ttext\nBo\t2\n")
    with pytest.raises(RowError, match="row 2: not three columns"):
        read(table, PASSAGES)
    entries = [{"id": 0, "contents": '"The "Title"\nA text.\nMore.'}, {"id": 1, "contents": "no title"}]
    assert read(written(tmp_path / "corpus.jsonl", *entries), PASSAGES) == [
        {"id": "0", "title": 'The "Title', "text": "A text.\nMore."},
        {"id": "1", "title": "", "text": "no title"},
    ]
    beir = read(written(tmp_path / "beir.jsonl", {"_id": "a", "title": "T", "text": "x", "metadata": {}}), PASSAGES)
    assert beir == [{"id": "a", "title": "T", "text": "x"}]


# ----------------------------------------------------------------------------------------------------- what is a file
def test_a_file_is_the_same_however_it_is_kept(tmp_path: Path) -> None:
    """Lines, an array, an indented array; gzip, zstd, with a byte order mark, with CRLF, under any name."""
    entries = [{**HOTPOT, "_id": str(i), "question": f"Größe {i}\u2028?"} for i in range(3)]
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    kept = {
        "lines.jsonl": lines.encode(),
        "bom.jsonl": b"\xef\xbb\xbf" + lines.encode(),
        "crlf.jsonl": lines.replace("\n", "\r\n").encode(),
        "blank.jsonl": ("\n" + lines + "\n\n").encode(),
        "array.json": json.dumps(entries).encode(),
        "indented.json": json.dumps(entries, indent=2).encode(),
        "gz.jsonl.gz": gzip.compress(lines.encode()),
        "two.gz": gzip.compress(lines.encode()[:50]) + gzip.compress(lines.encode()[50:]),
        "zst.jsonl.zst": zstandard.compress(lines.encode()),
        "misnamed.jsonl": zstandard.compress(json.dumps(entries).encode()),
    }
    for name, data in kept.items():
        (tmp_path / name).write_bytes(data)
        assert [row["query"] for row in read(tmp_path / name)] == [e["question"] for e in entries], name


def test_an_object_of_lists_is_read_entry_by_entry(tmp_path: Path) -> None:
    """FlashRAG's cache of retrieved passages maps questions to them, on one line or on many."""
    cache = {f"q{i}?": [{"id": str(i), "contents": '"T"\nx', "score": 0.5}] for i in range(3)}
    for indent in (None, 1):
        (tmp_path / "cache.json").write_text(json.dumps(cache, indent=indent))
        assert [r for _, r in records(tmp_path / "cache.json")] == [{"key": k, "value": v} for k, v in cache.items()]
        rows = read(tmp_path / "cache.json")
        assert [row["query"] for row in rows] == list(cache)
        assert rows[2]["candidates"] == [{"title": "T", "text": "x", "id": "2", "score": 0.5, "rank": 1}]


BROKEN = {
    "cut off": (b'{"question": "who?", "answ', "no JSON"),
    "latin-1": (b'{"question": "Gr\xf6\xdfe?", "answer": "x"}', "no UTF-8"),
    "nul": (b'{"question": "who\0?", "answer": "x"}', "NUL"),
    "deep": (b"[" * 100 + b'{"question"', "no JSON"),
    "no answer": (b'{"question": "who?", "answer": []}', "no answer that is not blank"),
    "answers that are no texts": (b'{"question": "who?", "answer": [["Bo"]]}', "no text"),
    "a list as a text": (b'{"question": "who?", "answer": "[\'Bo\', \'Al\']"}', "text of a list"),
    "a list of a text and a number": (b'{"question": "w?", "answers": "[\'Bo\', 1889]"}', "text of a list"),
    "a list of numbers": (b'{"question": "w?", "answers": "[1889, 1890]"}', "text of a list"),
    "a list in a list": (b'{"question": "w?", "answers": "[[\'Bo\']]"}', "text of a list"),
    "a dict": (b'{"question": "w?", "answers": "{\'a\': 1}"}', "text of a list"),
    "a set": (b'{"question": "w?", "answers": [" {1, 2}"]}', "text of a list"),
    "a tuple": (b'{"question": "w?", "answers": "(\'Bo\', \'Al\')"}', "text of a list"),
    "no number as an answer": (b'{"question": "w?", "answers": NaN}', "field 'answers': no number: nan"),
    "no number as a question": (b'{"question": NaN, "answers": "x"}', "field 'question': no number: nan"),
    "no number as an id": (b'{"id": NaN, "question": "w?", "answers": "x"}', "field 'id': no number: nan"),
    "no number in metadata": (
        b'{"question": "w?", "answers": "x", "m": [{"n": 1e999}]}',
        "'metadata': no number: inf",
    ),
    "an escaped NUL": (b'{"question": "w\\u0000?", "answers": "x"}', "field 'question': a NUL character"),
    "no question": (b'{"question": null, "answer": "Bo"}', "no text"),
    "a long text": (b'{"question": "' + b"x" * 1_000_001 + b'", "answer": "Bo"}', "1,000,000 characters"),
    "half a character": (b'{"question": "who \\ud83d?", "answer": "Bo"}', "half of a character"),
    "another record": (b'{"id": 3}', "no record|no text"),
    "no record": (b"17", "no record"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_is_named_or_skipped(tmp_path: Path, name: str) -> None:
    """Its number, its field and what was seen; the records around it are read."""
    line, message = BROKEN[name]
    good = json.dumps({"question": "why?", "answer": "Bo"}).encode()
    path = tmp_path / "data.jsonl"
    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(RowError, match=message) as caught:
        read(path)
    assert caught.value.index == 2
    assert len(str(caught.value)) < 250
    reading = Reading(path, on_error="skip")
    assert [row["id"] for row in reading] == ["1", "3"]
    assert reading.skipped.total() == 1


@pytest.mark.parametrize("answer", ["1,000", "(1889)", "[sic]", "(a) and (b)", "[1] to [2]", "{x: 1}"])
def test_an_answer_may_hold_brackets(tmp_path: Path, answer: str) -> None:
    """What only looks a little like a list is an answer."""
    assert only(tmp_path, {"question": "how many?", "answer": answer})["answers"] == [answer]


def test_a_file_that_cannot_be_read_is_one_message(tmp_path: Path) -> None:
    """Folders, missing files, damaged archives, arrays that are cut off, open quotes, unknown formats."""
    damaged = gzip.compress(b'{"question": "who?", "answer": "Bo"}\n' * 1000)[:-20]
    cases = {
        "cut.jsonl.gz": (damaged, "damaged or cut off"),
        "cut.jsonl.zst": (zstandard.compress(random.Random(0).randbytes(10_000).hex().encode())[:-500], "cut off"),
        "lines.zst": (zstandard.compress(b'{"question": "who?", "answer": "Bo"}\n' * 5000)[:-4], "cut off"),
        "array.json": (b'[{"question": "who?", "answer": "Bo"}, {"question', "no JSON after record 1"),
        "unknown.jsonl": (b'{"prompt": "who?", "gold": "Bo"}', r"\['gold', 'prompt'\] is of no format"),
        "long.jsonl": (b'{"' + b"[" * 3000 + b'": 1}', r"record with \['\[{798} is of no format"),
        "three.tsv": (b"a\tb\tc\n", "not two columns"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InvalidInputError, match=message):
            read(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInputError, match="no regular file"):
        read(tmp_path / "pipe")
    with pytest.raises(InvalidInputError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(InvalidInputError, match="cannot be read: No such file"):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(InvalidInputError, match="no format 'x'; there are auto, drorl"):
        Reading(tmp_path / "array.json", format="x")
    assert read(written(tmp_path / "empty.jsonl")) == []


def test_a_quote_left_open_spoils_its_own_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a later row has a quote, or the file ends, or is long: the rows behind are read, under their numbers."""
    good, quoted = "why {}?\t['x']\n", '"a ""b"", on\n\ntwo lines {}?"\t[\'x\']\n'
    path = tmp_path / "q.tsv"
    tails = {
        "a row with quotes": (good + quoted + good, ["4", "5", "8"]),
        "a quote in a row": (good + "who \"{}\"?\t['x']\n" + good, ["4", "5", "6"]),
        "the end": (good * 30, [str(number) for number in range(4, 34)]),
        "one that would close it, far away": (good * 20 + "end\"\t['x']\n", [str(n) for n in range(4, 25)]),
    }
    monkeypatch.setattr(files, "_CELL_LINES", 10)
    for tail, numbers in tails.values():
        path.write_text(good + "\"open {}?\t['x']\n\n" + tail)
        reading = Reading(path, on_error="skip")
        assert [row["id"] for row in reading] == ["1", *numbers]
        assert reading.skipped == {"no row of a table, or a quote is left open": 1}
        with pytest.raises(RowError, match=r"q\.tsv, row 2: no row of a table, or a quote is left open .*open"):
            read(path)
    path.write_text('7\t"open?\n8\twho "it"?\n')
    assert [row["query"] for row in read(path, format="topics")] == ['"open?', 'who "it"?']


def test_a_damaged_line_spoils_the_row_that_it_is_in(tmp_path: Path) -> None:
    """A cell over several lines, one of them Latin-1: that row is refused as a whole, the next keeps its number."""
    path = tmp_path / "q.tsv"
    path.write_bytes(b"who?\t['x']\n\"one\nGr\xf6\xdfe\nthree\"\t['x']\nGr\xf6\xdfe?\t['x']\nwhy?\t['x']\n")
    with pytest.raises(RowError, match=r"q\.tsv, row 3: byte 3 is no UTF-8"):
        read(path)
    reading = Reading(path, on_error="skip")
    assert [(row["id"], row["query"]) for row in reading] == [("1", "who?"), ("6", "why?")]
    assert reading.skipped == {"no UTF-8": 2}


def test_an_item_of_an_array_has_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a line has: what is longer is not read into memory; any number of shorter ones is."""
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 1 << 18)
    good = {"question": "why?" + "x" * 2000, "answer": "Bo"}
    path = tmp_path / "array.json"
    path.write_text(json.dumps([good] * 500))
    assert len(read(path)) == 500
    long = [good] * 3 + [{"question": ["y" * 100] * 20_000, "answer": "Bo"}]
    for content in (long, {f"q{i}": [entry] for i, entry in enumerate(long)}):
        path.write_text(json.dumps(content, indent=1))
        with pytest.raises(
            InvalidInputError, match=r"array\.json: no JSON after record 3: a record of more than 0 MiB"
        ):
            list(records(path))


def test_an_option_of_another_format_is_refused(tmp_path: Path) -> None:
    """It is said which format takes it, and which one the file has."""
    path = written(tmp_path / "q.jsonl", {"question": "why?", "answer": "Bo"})
    message = r"aliases is for the format 2wiki or hotpotqa, and .*q\.jsonl is of the format question"
    for format in ("auto", "question"):
        with pytest.raises(InvalidInputError, match=message):
            read(path, format=format, options={"aliases": {}})
    aliases = written(tmp_path / "aliases", {"Q_id": "Q1", "aliases": 5})
    with pytest.raises(RowError, match="aliases, row 1, field 'aliases': no list: 5"):
        read_aliases(aliases)


def test_what_grows_out_of_all_proportion_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bomb, of one endless line or of many: refused after 16 MiB, not when the memory is full."""
    monkeypatch.setattr(files, "_FREE_BYTES", 1 << 20)
    for unit in (b" ", b'{"question": "who?", "answer": "Bo"}\n'):
        bomb = io.BytesIO()
        with gzip.GzipFile(fileobj=bomb, mode="wb", compresslevel=9) as file:
            for _ in range(64):
                file.write(unit * ((1 << 19) // len(unit)))
        for data in (bomb.getvalue(), zstandard.compress(unit * ((1 << 25) // len(unit)))):
            (tmp_path / "bomb").write_bytes(data)
            with pytest.raises(InvalidInputError, match="grows more than 200 times"):
                read(tmp_path / "bomb")
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 1000)
    path = written(
        tmp_path / "long.jsonl", {"question": "x" * 5000, "answer": "Bo"}, {"question": "y", "answer": "Bo"}
    )
    reading = Reading(path, on_error="skip")
    assert ([row["query"] for row in reading], reading.skipped.total()) == (["y"], 1)


RECORDS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(sorted({name for f in ROWS.values() for name in f.fields} | {"title", "text", "value"})),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entry=RECORDS, name=st.sampled_from(sorted(ROWS)))
def test_any_json_is_a_row_or_a_clear_error(tmp_path: Path, entry: Any, name: str) -> None:
    """Whatever a record holds, a reader gives a row that can be trained on, or names what is wrong with it."""
    path = written(tmp_path / "any.jsonl", entry)
    try:
        rows = read(path, format=name)
    except InvalidInputError as error:
        assert len(str(error)) < 400
    else:
        assert all(row["query"].strip() for row in rows)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), suffix=st.sampled_from([".jsonl", ".json", ".tsv", ".csv", ".gz", ".zst"]))
def test_any_bytes_are_rows_or_a_clear_error(tmp_path: Path, data: bytes, suffix: str) -> None:
    """The same of any file."""
    path = tmp_path / f"any{suffix}"
    path.write_bytes(data)
    for formats in (ROWS, PASSAGES):
        for on_error in ("fail", "skip"):
            try:
                read(path, formats, on_error=on_error)
            except InvalidInputError as error:
                assert len(str(error)) < 1500
