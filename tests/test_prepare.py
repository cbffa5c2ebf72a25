"""Long outputs: made in shards, killed at any moment, and in the end what they would have been."""

import gzip
import json
import os
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from processes import kill_once
from records import WHOLE
from typer.testing import CliRunner

from drorl.cli import app
from drorl.data import prepare
from drorl.data.formats import ROWS
from drorl.data.load import load_rows
from drorl.data.prepare import Prepared, write_rows
from drorl.data.reading import Reading
from drorl.data.rows import RowError
from drorl.data.shards import Shards
from drorl.errors import InvalidInputError

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRORL_CACHE", str(tmp_path_factory.mktemp("cache")))


def prepare_rows(source: Path, output: Path) -> Prepared:
    """Writes the rows of a file, without those that are broken."""
    return write_rows(Reading(source, on_error="skip"), output, quiet=True)


def questions(path: Path, count: int) -> Path:
    """A file of questions, every tenth of which has no answer."""
    entries = ({"question": f"who is {i}?", "golden_answers": [f"Bo {i}"] if i % 10 else []} for i in range(count))
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_rows_are_counted_and_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows in shards of any size, plain or packed; what was skipped in all shards is counted."""
    source = questions(tmp_path / "q.jsonl", 45)
    wanted = [f"who is {i}?" for i in range(45) if i % 10]
    for rows in (7, 1000):
        monkeypatch.setattr(prepare, "SHARD_ROWS", rows)
        for name, unpacked in (("a.jsonl", bytes), ("a.gz", gzip.decompress), ("a.zst", _unpacked)):
            (tmp_path / name).unlink(missing_ok=True)  # else it stays as it is
            prepared = prepare_rows(source, tmp_path / name)
            lines = unpacked((tmp_path / name).read_bytes()).decode().splitlines()
            assert [json.loads(line)["query"] for line in lines] == wanted
            assert (prepared.rows, prepared.without_candidates, prepared.skipped.total()) == (40, 40, 5)
    assert "skipped 5: no answer that is not blank" in str(prepared)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gz", "a.jsonl", "a.zst", "q.jsonl"]


def _unpacked(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().stream_reader(data).read()


@pytest.mark.parametrize("name", sorted(name for name, known in ROWS.items() if not known.has_answers))
def test_rows_without_answers_are_read_again(name: str, tmp_path: Path) -> None:
    """What has no answers is prepared, and read as it was written: to be retrieved for, looked at, answered. Training
    and an evaluation refuse it, and so does everybody answers of which none is left."""
    bare = [{**row, "answers": []} for row in WHOLE["drorl"]]
    records, source = bare if name == "drorl" else WHOLE[name], tmp_path / "in.jsonl"
    if name == "topics":
        source = tmp_path / "in.tsv"
        source.write_text("".join("\t".join(cells) + "\n" for cells in records))
    else:
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
    output = tmp_path / "rows.jsonl"
    assert write_rows(Reading(source, format=name), output, quiet=True).rows == 2
    again = Reading(output)
    assert list(again) == list(Reading(source, format=name)) == list(map(json.loads, output.open()))
    assert again.format == "drorl" and not any(row["answers"] for row in again)
    with pytest.raises(RowError, match="row 1, field 'answers': no answer that is not blank"):
        load_rows(str(output))
    output.write_text(json.dumps({**WHOLE["drorl"][0], "answers": [" "]}))
    with pytest.raises(RowError, match="row 1, field 'answers': no answer that is not blank"):
        list(Reading(output))


def test_a_key_that_has_changed_begins_anew(tmp_path: Path) -> None:
    """Shards of other settings, or of another file of that name, are never taken over."""
    for key, kept in (("a", 0), ("a", 1), ("b", 0)):
        shards = Shards(tmp_path / "out", key)
        assert len(shards.notes) == kept
        shards.add([key], {"n": 1})
    shards.add(["end"], {"n": 2})
    shards.finish()
    assert (tmp_path / "out").read_text() == "b\nend\n"
    assert not Shards(tmp_path / "out", "b").notes
    for place in (tmp_path, tmp_path / "none" / "out"):
        with pytest.raises(InvalidInputError, match="cannot be written"):
            Shards(place, "a")


KILLED = """
import sys, time
from pathlib import Path
from drorl.data import formats, prepare, reading
prepare.SHARD_ROWS = 50
real = formats.ROWS["flashrag"].read
def slow(record):
    time.sleep(0.002)
    return real(record)
formats.ROWS["flashrag"] = formats.Format(frozenset(["question", "golden_answers"]), slow)
prepare.write_rows(reading.Reading(Path(sys.argv[1]), on_error="skip"), Path(sys.argv[2]), quiet=True)
"""


def test_killed_and_begun_again_it_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 in the middle: the second run keeps the finished shards, and nobody can tell from the file."""
    monkeypatch.setattr(prepare, "SHARD_ROWS", 50)
    source = questions(tmp_path / "q.jsonl", 1000)
    whole = prepare_rows(source, tmp_path / "whole.gz")
    folder = tmp_path / ".out.gz.shards"
    kill_once((folder / "000003.json").exists, [sys.executable, "-c", KILLED, source, tmp_path / "out.gz"], 60)
    assert not (tmp_path / "out.gz").exists()
    finished = [(p.name, p.stat().st_mtime_ns) for p in sorted(folder.glob("*.json"))]
    assert 4 <= len(finished) < 18

    made: list[int] = []
    real = Shards.add
    monkeypatch.setattr(Shards, "add", lambda self, *a: (made.append(len(self.notes)), real(self, *a))[1])
    again = prepare_rows(source, tmp_path / "out.gz")
    assert made[0] == len(finished)
    assert (tmp_path / "out.gz").read_bytes() == (tmp_path / "whole.gz").read_bytes()
    assert again == whole


def test_the_command_prepares_and_scores(tmp_path: Path) -> None:
    """Data to files and stdout, counts to stderr, exit codes."""
    source = questions(tmp_path / "q.jsonl", 20)
    arguments = ["prepare", "--input", str(source), "--output", str(tmp_path / "rows.jsonl")]
    refused = run(app, arguments)
    assert (refused.exit_code, "row 1, field 'answers'" in str(refused.exception)) == (1, True)
    done = run(app, [*arguments, "--on-error", "skip"])
    assert (done.exit_code, done.stdout) == (0, "")
    assert "18 rows (flashrag)" in done.stderr
    assert run(app, [*arguments, "--on-error", "skip", "--quiet"]).stderr == ""
    assert run(app, [*arguments, "--on-error", "maybe"]).exit_code == 2

    predictions = [("the U.S.", ["U.S.", "us"]), ("yes", ["yes it is"]), ("", ["Bo"]), ("u s", ["x", "U.S."])]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps({"prediction": p, "answers": a}) + "\n" for p, a in predictions))
    for preset, expected in {"kilt": (0.25, 0.375), "hotpot": (0.25, 0.25), "dro-official": (0.25, 0.375)}.items():
        done = run(app, ["score", "--input", str(path), "--json", "--preset", preset])
        assert json.loads(done.stdout.splitlines()[-1]) == {"exact_match": expected[0], "f1": expected[1], "n": 4}
    spaced = run(app, ["score", "--input", str(path), "--json", "--punct", "space"])
    assert json.loads(spaced.stdout)["exact_match"] == 0.5
    [strict] = run(app, ["score", "--input", str(path), "--json", "--hotpot-yesno"]).stdout.splitlines()
    assert json.loads(strict) == {"exact_match": 0.25, "f1": 0.25, "n": 4}
    path.write_text(json.dumps({"prediction": "b", "answers": ["c d", "b"]}))
    for switches, expected in (([], 1), (["--first-answer-only"], 0)):
        done = run(app, ["score", "--input", str(path), "--json", *switches])
        assert json.loads(done.stdout) == {"exact_match": expected, "f1": expected, "n": 1}
    path.write_text('{"prediction": "x", "answers": "y"}\n')
    assert "row 1, field 'answers'" in str(run(app, ["score", "--input", str(path)]).exception)
    skipped = run(app, ["score", "--input", str(path), "--on-error", "skip", "--json"])
    assert json.loads(skipped.stdout) == {"exact_match": None, "f1": None, "n": 0}


def test_equal_ids_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of questions in any shard, packed or not; the rows stay, and it is said again when they are there already."""
    monkeypatch.setattr(prepare, "SHARD_ROWS", 3)
    names = ["a", "b", 7, "a", "c", "7", "a", "d"]
    source = tmp_path / "q.jsonl"
    source.write_text("".join(json.dumps({"id": name, "question": "who?", "answer": "Bo"}) + "\n" for name in names))
    for output in ("rows.jsonl", "rows.jsonl.gz", "rows.jsonl"):
        done = run(app, ["prepare", "--input", str(source), "--output", str(tmp_path / output)])
        assert "8 rows (question)" in done.stderr and "warning: 3 rows have the id of an earlier row" in done.stderr
    source.write_text(json.dumps({"id": "a", "question": "who?", "answer": "Bo"}))
    assert "warning" not in run(app, ["prepare", "--input", str(source), "--output", str(tmp_path / "one")]).stderr


def test_half_of_2wiki_is_said(tmp_path: Path) -> None:
    """FlashRAG's 2Wiki is known by its length and by its golds; another set of that length is whole."""
    for golds, said in ((3, True), (0, False)):
        prepared = Prepared("flashrag", 15_000, Counter(), 0, 20, golds, 0)
        assert ("has 15,000 training rows where the original has 167,454" in str(prepared)) is said
    assert "167,454" not in str(Prepared("flashrag", 14_999, Counter(), 0, 20, 3, 0))


COMMAND = [sys.executable, "-c", "from drorl.cli import main; main()", "prepare", "--input"]


def test_progress_goes_to_stderr(tmp_path: Path) -> None:
    """On a terminal, which FORCE_COLOR makes of a pipe: stdout is for data."""
    command = [*COMMAND, questions(tmp_path / "q.jsonl", 200), "--output", tmp_path / "rows", "--on-error", "skip"]
    done = subprocess.run(command, env={**os.environ, "FORCE_COLOR": "1"}, capture_output=True, check=True)
    assert done.stdout == b"" and b"q.jsonl: 180 rows" in done.stderr


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """An error of the system is no traceback: exit code 1, and what the system says."""
    command = [*COMMAND, questions(tmp_path / "q.jsonl", 2000), "--output", tmp_path / "rows", "--on-error", "skip"]
    full = subprocess.run(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)),
    )
    assert full.returncode == 1 and re.fullmatch(r"drorl: .*File too large.*\n", full.stderr), full.stderr


def test_beir_and_trec(tmp_path: Path) -> None:
    """A BEIR folder's judged queries; a TREC run with topics, qrels and a corpus: scores decide, not the ranks."""
    folder = tmp_path / "scifact"
    (folder / "qrels").mkdir(parents=True)
    texts = {"q1": "which river?", "q2": "no judgement", "3": "why?"}
    queries = [{"_id": name, "text": text} for name, text in texts.items()]
    (folder / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td2\t1\nq1\td3\t0\n3\td1\t2\n")
    passages = [{"_id": f"d{i}", "title": f"T{i}", "text": f"Text {i}."} for i in range(1, 6)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(p) + "\n" for p in passages))
    output = tmp_path / "rows.jsonl"

    def prepared(*arguments: str) -> list[dict]:
        done = run(app, ["prepare", "--output", str(output), *arguments])
        assert done.exit_code == 0, done.exception
        return [json.loads(line) for line in output.read_text().splitlines()]

    rows = prepared("--input", str(folder))
    assert [(row["id"], row["metadata"]["gold_ids"]) for row in rows] == [("q1", ["d2"]), ("3", ["d1"])]

    (tmp_path / "topics.tsv").write_text("q1\twhich river?\n3\twhy?\n9\tnothing found\n")
    (tmp_path / "run.trec").write_text("q1 Q0 d3 1 2.5 x\nq1 Q0 d2 2 7.5 x\nq1 Q0 d4 3 0.5 x\n3 Q0 d5 1 1 x\n")
    (tmp_path / "qrels").write_text("q1 0 d2 1\nq1 0 d3 0\n")
    files = ["--input", str(tmp_path / "topics.tsv"), "--format", "topics", "--run", str(tmp_path / "run.trec")]
    files += ["--corpus", str(folder / "corpus.jsonl"), "--qrels", str(tmp_path / "qrels"), "--top-k", "2"]
    rows = prepared(*files)
    assert [[c["id"] for c in row["candidates"]] for row in rows] == [["d2", "d3"], ["d5"], []]
    wanted = {"id": "d2", "title": "T2", "text": "Text 2.", "score": 7.5, "rank": 1, "is_gold": True}
    assert rows[0]["candidates"][0] == wanted
    assert rows[0]["candidates"][1]["is_gold"] is False

    assert [row["metadata"] for row in rows] == [{"gold_ids": ["d2"]}, {}, {}]

    alone = ["prepare", "--input", str(tmp_path / "topics.tsv"), "--qrels", str(tmp_path / "qrels")]
    assert run(app, [*alone, "--output", str(tmp_path / "x")]).exit_code == 2  # they mark a run's candidates

    (tmp_path / "run.trec").write_text("q1 Q0 d2 1 2.5 x\n3 Q0 d2 1 2 x\nq1 Q0 d2 2 1.5 x\n")
    refused = run(app, ["prepare", "--output", str(tmp_path / "x"), *files])
    assert "run.trec, row 3, field 'passage-id': 'd2' has been found for 'q1' before" in str(refused.exception)
    (tmp_path / "run.trec").write_text("q1 Q0 d9 1 2.5 x\n")
    refused = run(app, ["prepare", "--output", str(tmp_path / "x"), *files])
    assert "lacks 1 of 1 passages of the run, such as 'd9'" in str(refused.exception)
    (tmp_path / "run.trec").write_text("q1 Q0 d9 1 high x\n")
    assert "row 1, field 'score': no number: 'high'" in str(
        run(app, ["prepare", "--output", str(tmp_path / "x"), *files]).exception
    )
    (folder / "queries.jsonl").unlink()
    assert "not BEIR's" in str(
        run(app, ["prepare", "--output", str(tmp_path / "x"), "--input", str(folder)]).exception
    )
    assert run(app, ["prepare", "--output", str(tmp_path / "x"), "--input", "y", "--run", "z"]).exit_code == 2
    assert not list(tmp_path.glob("*x*"))  # what failed at once leaves nothing behind


@pytest.mark.slow
@pytest.mark.parametrize("name, rows, least", [("hotpotqa", 48_000, 20_000), ("questions", 200_000, 200_000)])
def test_reading_is_fast_and_flat(name: str, rows: int, least: int) -> None:
    """Rows a minute on one core, as the benchmark measures them; four times as many take no more memory."""
    root = Path(__file__).parent.parent
    command = [sys.executable, root / "benchmarks" / "reading.py", "--format", name, "--rows", str(rows)]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["all"]["rows_per_minute"] >= least
    assert figures["all"]["peak_mib"] <= 1.1 * figures["quarter"]["peak_mib"]
