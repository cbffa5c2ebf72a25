"""docs/data.md, as a reader would follow it: its commands are run, its tables complete."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from raw_data import COUNT, RIVERS, question, sentences

from drorl.data.formats import PASSAGES, ROWS
from drorl.metrics import PRESETS

REPOSITORY = Path(__file__).parent.parent
PAGE = (REPOSITORY / "docs" / "data.md").read_text()
README = (REPOSITORY / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def write_own_files(folder: Path) -> None:
    """The files that the page's reader has; those that it shows begin as it shows them."""
    passages = [
        {"id": str(1 + i + COUNT * j), "title": RIVERS[i], "text": sentences(i)[j].strip()}
        for j in (0, 1)
        for i in range(COUNT)
    ]
    questions = [{"question": question(i), "answers": [RIVERS[i], f"the {RIVERS[i]}"]} for i in range(COUNT)]
    files = {"passages": passages, "train-questions": questions[:8], "test-questions": questions[8:]}
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shown = [json.loads(block) for block in blocks(PAGE, "json")]
    assert shown == [passages[0], questions[0]]
    (folder / "topics.tsv").write_text(f"q1\t{question(0)}\n")
    (folder / "run.trec").write_text("q1 Q0 3 1 2.5 bm25\nq1 Q0 1 2 7.5 bm25\n")
    (folder / "recipes").symlink_to(REPOSITORY / "recipes")


def follow(folder: Path, flags: str) -> list[dict]:
    """Runs every command of the page, training with some more flags, and returns what drorl score said."""
    write_own_files(folder)
    script = "".join(blocks(PAGE, "sh")).replace("--output_dir", f"{flags} --output_dir")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        ["bash", "-ec", script], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"exact_match"')]


def check(folder: Path, scores: list[dict]) -> None:
    summary = json.loads((folder / "outputs/mine/summary.json").read_text())
    assert scores[0] == {**{name: summary["dro"][name] for name in ("exact_match", "f1")}, "n": 4}
    assert len(scores) == 2 and (folder / "outputs/mine/report.html").exists()
    [ranked] = [json.loads(line) for line in (folder / "ranked.jsonl").read_text().splitlines()]
    assert [(c["title"], c["rank"]) for c in ranked["candidates"]] == [("Danube", 1), ("Thames", 2)]


def test_the_commands_run(tmp_path: Path, tiny_model, tokenizer) -> None:
    """From files as the page shows them to a trained run and its scores; a tiny model stands for the embedded one."""
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = "--model_name_or_path model --dtype float32 --lora_first_layer 1 --max_answer_length 4"
    check(tmp_path, follow(tmp_path, f"{flags} --warmup_queries 4 --max_steps 2"))


@pytest.mark.slow
@pytest.mark.network  # the embedded model, if it is not in the cache
def test_the_commands_run_with_the_embedded_model(tmp_path: Path) -> None:
    """The same with the model that the page names."""
    check(tmp_path, follow(tmp_path, "--warmup_queries 8 --max_steps 2"))


def test_the_readme_says_the_same() -> None:
    """Its short form begins with the page's first block, to the letter."""
    section = README.split("## Your own data")[1].split("\n## ")[0]
    assert blocks(section, "sh")[0] == blocks(PAGE, "sh")[0]


def test_every_format_and_preset_is_described() -> None:
    """A format or preset that is added has a line in the page, and none is described that is gone."""
    formats, metrics = PAGE.split("## Formats")[1].split("\n## ")[0], PAGE.split("## Metrics")[1].split("\n## ")[0]
    named = {
        name for cell in re.findall(r"^\| (`[^|]+) \|", formats, re.MULTILINE) for name in re.findall(r"[\w-]+", cell)
    }
    assert named == ROWS.keys() | PASSAGES.keys()
    assert set(re.findall(r"\| `([\w-]+)` \|", metrics)) == PRESETS.keys()
