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


def follow(folder: Path, script: str) -> list[str]:
    """Runs commands of the page as its reader would; returns what they said on stdout, by lines."""
    write_own_files(folder)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)}
    command = ["bash", "-ec", script]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_commands_make_rows(tmp_path: Path) -> None:
    """From files as the page shows them to rows: all but the training, and what needs a trained run."""
    commands = "".join(blocks(PAGE, "sh")).splitlines()
    follow(tmp_path, "\n".join(c for c in commands if not c.startswith(("accelerate", "drorl score"))))
    for name, count in (("train", 8), ("test", 4)):
        rows = read(tmp_path / f"{name}.jsonl")
        assert len(rows) == count and all(len(row["candidates"]) == 20 for row in rows)
    [ranked] = read(tmp_path / "ranked.jsonl")
    assert [(c["title"], c["rank"]) for c in ranked["candidates"]] == [("Danube", 1), ("Thames", 2)]


@pytest.mark.slow
@pytest.mark.network  # the embedded model, if it is not in the cache
def test_the_commands_train(tmp_path: Path) -> None:
    """The whole page, with the model that it names, for two steps: what a run says of itself, drorl score says too."""
    script = "".join(blocks(PAGE, "sh")).replace("--output_dir", "--warmup_queries 8 --max_steps 2 --output_dir")
    scores = [json.loads(line) for line in follow(tmp_path, script) if line.startswith('{"exact_match"')]
    run = tmp_path / "outputs/mine"
    found = json.loads((run / "summary.json").read_text())["dro"]
    assert len(scores) == 2 and (run / "report.html").exists()
    assert scores[0] == {"exact_match": found["exact_match"], "f1": found["f1"], "n": 4}


def test_every_marker_has_a_target() -> None:
    """What the default suite leaves out, but for what needs a GPU, a target of make runs; CONTRIBUTING names it."""
    makefile, guide = ((REPOSITORY / name).read_text() for name in ("Makefile", "CONTRIBUTING.md"))
    for marker in ("slow", "network", "vllm"):
        recipe = makefile.split(f"\ntest-{marker}:")[1].split("\n\n")[0]
        assert (
            re.search(f'-m "?{marker}\\b', recipe)
            and f"test-{marker}" in makefile.split(".PHONY:")[1].split("\n\n")[0]
        )
        assert f"make test-{marker}" in guide


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
