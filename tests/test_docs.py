"""Every code block of the documentation runs; what takes long, or another machine, is parsed to its last option.

Blocks are run in the order of the pages, in one folder, with small files, a random model, and two steps in place of
what they name: see `small`. `NOT_RUN` lists what is parsed instead, and why; a block that is neither fails.
"""

import argparse
import doctest
import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from accelerate.commands.launch import launch_command_parser
from compare import HERE, Grid, cells_of
from nq import parse
from raw_data import COUNT, RIVERS, question, sentences

import drorl.losses
from drorl import DROConfig, DROTrainer, RAGPipeline
from drorl.cli import app
from drorl.data.formats import PASSAGES, ROWS
from drorl.metrics import PRESETS

REPOSITORY = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs", "results/README.md")
PAGE = (REPOSITORY / "docs" / "data.md").read_text()
README = (REPOSITORY / "README.md").read_text()

# Blocks that have a command which begins so are parsed, and not run.
NOT_RUN = {
    "make ": "installs, or trains for minutes to hours; `make test` and `make docs` are run by .ci/run",
    ".venv/bin/pre-commit ": "changes this repository's hooks",
    ".venv/bin/pytest ": "these tests themselves: they are collected",
    ".venv/bin/python recipes/": "minutes to hours of training on embedded data; tests/test_comparison.py runs cells",
    "python recipes/compare.py ": "the same",
    "python recipes/variance.py ": "needs the embedded data",
    ".venv/bin/python benchmarks/": "minutes of measurement on the embedded model",
    "python benchmarks/": "the same",
    ".venv-vllm/bin/python ": "needs vLLM, and the embedded model",
    ".venv-vllm/bin/pytest ": "tests: they are collected",
    "accelerate launch recipes/nq.py --config recipes/configs/nq_demo.yaml --push_to_hub ": "needs the hub",
    "hf upload ": "needs the hub; tests/test_hub.py has a stand-in",
    ".venv/bin/pip install --target ": "installs llama.cpp's converter",
    "accelerate launch --config_file ": "eight GPUs; tests/test_processes.py and test_recipes.py launch two processes",
}
NO_CODE = ("text", "bibtex")


# ------------------------------------------------------------------------------------------------------- which blocks
@dataclass(frozen=True)
class Block:
    """A fenced block, without its indentation."""

    page: str
    line: int
    language: str
    text: str

    @property
    def is_parsed(self) -> bool:
        return any(line.startswith(start) for line in self.text.splitlines() for start in NOT_RUN)


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, flags=re.MULTILINE | re.DOTALL)
    name = str(page.relative_to(REPOSITORY))
    made = [Block(name, text.count("\n", 0, f.start()) + 1, f[2], textwrap.dedent(f[3])) for f in found]
    assert text.count("```") == 2 * len(made), f"{name}: a block that is not closed, or not indented as it began"
    return made


FILES = [file for page in PAGES for file in (sorted((REPOSITORY / page).glob("*.md")) or [REPOSITORY / page])]
BLOCKS = [block for file in FILES for block in blocks_of(file)]
SHELL = [block for block in BLOCKS if block.language == "sh"]
RUN, PARSED = ([block for block in SHELL if block.is_parsed == parsed] for parsed in (False, True))


def of_page(page: str, language: str) -> list[str]:
    return [block.text for block in BLOCKS if (block.page, block.language) == (page, language)]


def test_every_block_is_run_or_parsed() -> None:
    """Each has a language that is dealt with below, and nothing is excused that no page has any more."""
    [row_page] = {block.page for block in BLOCKS if block.language == "json"}
    assert row_page == "docs/data.md"  # `write_own_files` compares them with what the commands read
    assert {block.language for block in BLOCKS} == {"sh", "python", "json", *NO_CODE}
    pages = [block.page for block in BLOCKS if block.language == "python"]  # each has a test below
    assert pages == ["README.md", "CONTRIBUTING.md", "docs/health.md", "docs/sharing.md"]
    assert len(RUN) + len(PARSED) == len(SHELL)
    for start in NOT_RUN:
        assert any(line.startswith(start) for block in SHELL for line in block.text.splitlines()), start


def test_every_example_in_a_docstring_is_run() -> None:
    """The modules that have any are those that pytest collects, see pyproject.toml."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    modules = [path for path in (REPOSITORY / "drorl").rglob("*.py") if ">>> " in path.read_text()]
    assert sorted(str(path.relative_to(REPOSITORY)) for path in modules) == sorted(settings["testpaths"][1:])
    for name in (path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", ".") for path in modules):
        assert any(test.examples for test in doctest.DocTestFinder().find(importlib.import_module(name))), name


# ----------------------------------------------------------------------------------------------------- blocks that run
def write_own_files(folder: Path) -> None:
    """The files that the reader of docs/data.md has; those that it shows begin as it shows them."""
    passages = [
        {"id": str(1 + i + COUNT * j), "title": RIVERS[i], "text": sentences(i)[j].strip()}
        for j in (0, 1)
        for i in range(COUNT)
    ]
    questions = [{"question": question(i), "answers": [RIVERS[i], f"the {RIVERS[i]}"]} for i in range(COUNT)]
    files = {"passages": passages, "train-questions": questions[:8], "test-questions": questions[8:]}
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [json.loads(block) for block in of_page("docs/data.md", "json")] == [passages[0], questions[0]]
    (folder / "topics.tsv").write_text(f"q1\t{question(0)}\n")
    (folder / "run.trec").write_text("q1 Q0 3 1 2.5 bm25\nq1 Q0 1 2 7.5 bm25\n")
    for name in ("recipes", "docs"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "bin").mkdir()


def follow(folder: Path, script: str) -> list[str]:
    """Runs commands as a page's reader would; returns what they said on stdout, by lines."""
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = ["bash", "-ec", script]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_commands_make_rows(tmp_path: Path) -> None:
    """docs/data.md, from files as it shows them to rows: all but the training, and what needs a trained run."""
    write_own_files(tmp_path)
    commands = "".join(of_page("docs/data.md", "sh")).splitlines()
    follow(tmp_path, "\n".join(c for c in commands if not c.startswith(("accelerate", "drorl score"))))
    for name, count in (("train", 8), ("test", 4)):
        rows = read(tmp_path / f"{name}.jsonl")
        assert len(rows) == count and all(len(row["candidates"]) == 20 for row in rows)
    [ranked] = read(tmp_path / "ranked.jsonl")
    assert [(c["title"], c["rank"]) for c in ranked["candidates"]] == [("Danube", 1), ("Thames", 2)]


@pytest.mark.slow
@pytest.mark.network  # the embedded model, if it is not in the cache
def test_the_commands_train(tmp_path: Path) -> None:
    """docs/data.md with the model that it names, for two steps: what a run says of itself, drorl score says too."""
    write_own_files(tmp_path)
    script = "".join(of_page("docs/data.md", "sh"))
    script = script.replace("--output_dir", "--warmup_queries 8 --max_steps 2 --output_dir")
    scores = [json.loads(line) for line in follow(tmp_path, script) if line.startswith('{"exact_match"')]
    run = tmp_path / "outputs/mine"
    found = json.loads((run / "summary.json").read_text())["dro"]
    assert len(scores) == 2 and (run / "report.html").exists()
    assert scores[0] == {"exact_match": found["exact_match"], "f1": found["f1"], "n": 4}


SMALL = {  # instead of the demo's: the same configuration on a random model, in seconds
    "model_name_or_path": "model",
    "train_file": "demo-train.jsonl",
    "test_file": "demo-test.jsonl",
    "lora_first_layer": 1,
    "warmup_queries": 8,
    "max_steps": 2,
    "save_steps": 1,
    "dtype": "float32",
}


def small(block: str) -> str:
    """A block with the small configuration and model in place of the demo's."""
    return block.replace("recipes/configs/nq_demo.yaml", "demo.yaml").replace("smollm2-135m", "model")


def write_small_demo(folder: Path, model: Any, tokenizer: Any, rows: Callable[..., Any]) -> None:
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for split, count in (("train", 8), ("test", 4)):
        (folder / f"demo-{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows(count)))
    demo = yaml.safe_load((REPOSITORY / "recipes/configs/nq_demo.yaml").read_text()) | SMALL
    for name, output in (("demo", demo["output_dir"]), ("my", "outputs/my")):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(demo | {"output_dir": output}))


SLURM = {"srun": '#!/bin/bash\nexec "$@"\n', "scontrol": '#!/bin/bash\necho "$@" > requeued\n'}


@pytest.mark.slow
def test_the_blocks_run(tmp_path: Path, tiny_model: Any, tokenizer: Any, rows: Any) -> None:
    """Each but those of `NOT_RUN`, page after page; one that two pages have once. Slurm's commands are stand-ins."""
    write_own_files(tmp_path)
    write_small_demo(tmp_path, tiny_model(), tokenizer, rows)
    for name, text in SLURM.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    said = [line for text in dict.fromkeys(block.text for block in RUN) for line in follow(tmp_path, small(text))]
    for run in ("nq_demo", "mine", "my"):
        assert json.loads((tmp_path / "outputs" / run / "summary.json").read_text())["n_eval"] == 4
    assert "equal, bit for bit: outputs/mine and outputs/mine.repeated" in said  # drorl reproduce
    assert len(read(tmp_path / "predictions.jsonl")) == 4  # drorl evaluate
    assert not (tmp_path / "requeued").exists()  # the job is over


def test_the_ten_lines_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Any, tokenizer: Any, rows: Any, capsys: Any
) -> None:
    """README's Python, with a random model, made-up rows and two steps; each adapter loads by itself, as it says."""
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    [code] = of_page("README.md", "python")
    code, found = re.subn("^rows = .*$", "rows = given", code, flags=re.MULTILINE)
    code = code.replace('"Qwen/Qwen3-0.6B"', '"model"').replace("batch_size=8", "batch_size=8, max_steps=2")
    assert found == 1 and '"model"' in code and "max_steps" in code
    exec(code, {"given": rows(4)})
    assert capsys.readouterr().out.strip()  # an answer
    for role in ("selector", "generator"):
        assert (tmp_path / "outputs/mine" / role / "adapter_model.safetensors").exists()


def test_a_pair_is_loaded_and_a_view_added_as_the_pages_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Any, tokenizer: Any, rows: Any
) -> None:
    """docs/sharing.md and docs/health.md; a folder stands for the hub, which tests/test_hub.py has."""
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    args = DROConfig("run", num_candidates=8, num_selected=2, num_generations=4, use_cpu=True, report_to="none")
    trainer = DROTrainer("model", args, rows(4))
    trainer.save_model("me/nq_demo")
    [code] = of_page("docs/sharing.md", "python")
    names: dict[str, Any] = {"trainer": trainer}
    exec(code, names)
    assert isinstance(names["pipeline"], RAGPipeline)
    [code] = of_page("docs/health.md", "python")
    exec(code, names)
    assert trainer.callback_handler.callbacks[-1].trainer is trainer


def test_the_estimator_of_the_guide_is_reinforce() -> None:
    """CONTRIBUTING's function, in a copy of the module it is to be added to, does what the module's own does."""
    [code] = of_page("CONTRIBUTING.md", "python")
    module = vars(drorl.losses) | {"ADVANTAGES": {}}
    exec(code, module)
    scores = drorl.losses.Scores(*(torch.randn(2, 3) for _ in range(3)), torch.tensor([[1.0, -2.0, 3.0]] * 2))
    given, own = (table["reinforce"] for table in (module["ADVANTAGES"], drorl.losses.ADVANTAGES))
    assert given is not own
    assert torch.equal(given(scores, torch.ones(2, 3)), own(scores, torch.ones(2, 3)))


# ---------------------------------------------------------------------------------------------- blocks that are parsed
STUB = '#!/bin/bash\nprintf "%q " "${0#$PWD/}" "$@" >> calls\necho >> calls\n'
PROGRAMS = ["make", "python", "accelerate", "drorl", ".venv/bin/python", ".venv/bin/pytest", ".venv/bin/pre-commit"]
PROGRAMS += [".venv-vllm/bin/python", ".venv-vllm/bin/pytest", ".venv-vllm/bin/drorl", ".venv/bin/pip", "hf", "sed"]


def calls_of(block: str, folder: Path) -> list[list[str]]:
    """Returns the command lines that bash makes of a block, where nothing but these programs' names can be started."""
    for name in PROGRAMS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    subprocess.run(["/bin/bash", "-euc", block], cwd=folder, env={"PATH": str(folder)}, check=True)
    return [shlex.split(line) for line in (folder / "calls").read_text().splitlines()]


def check(program: str, *arguments: str) -> None:
    """Reads a command line as its program would, and fails where the program would."""
    name, *rest = arguments
    match Path(program).name:
        case "make":
            for started in made_by(arguments):
                check(*started)
        case "accelerate":
            assert name == "launch"
            launch = launch_command_parser().parse_args(rest)
            assert launch.config_file is None or Path(launch.config_file).exists()
            check("python", launch.training_script, *launch.training_script_args)
        case "drorl":
            typer.main.get_command(app).commands[name].make_context(name, rest)
        case "pytest":
            command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", *arguments]
            subprocess.run(command, check=True)
        case "pre-commit":
            hooks = yaml.safe_load(Path(".pre-commit-config.yaml").read_text())
            assert name == "install" and hooks["repos"]
        case "hf":  # help comes when all options have been found
            subprocess.run(
                [Path(sys.executable).with_name("hf"), *arguments, "--help"], stdout=subprocess.PIPE, check=True
            )
        case "pip" | "sed":
            assert rest
        case "python" if name == "-m":  # of what pip would have installed
            assert rest
        case "python":
            check_script(name, rest)


def made_by(arguments: Sequence[str]) -> list[list[str]]:
    """Returns the recipes and benchmarks that `make` would start, if the environments were there."""
    there = [f"-o{environment}/.installed" for environment in (".venv", ".venv-vllm", ".venv-docs", ".venv-colbert")]
    dry = subprocess.run(["make", "-n", *there, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    lines = dry.stdout.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if re.match(r"\S+/python (recipes|benchmarks)/", line)]


class Parsed(Exception):
    """A script has read its command line, and goes no further."""


def check_script(script: str, arguments: list[str]) -> None:
    """Lets a script's own parser read its command line, and a grid say whether it has what is asked for."""
    if script == "recipes/nq.py":
        parse([*arguments, "--bf16", "false"])  # which a CPU refuses
        return
    real = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser) -> None:
        raise Parsed(real(parser))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed) as read:
        patch.syspath_prepend(str(Path(script).parent))
        patch.setattr(sys, "argv", [script, *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        runpy.run_path(script, run_name="__main__")
    [asked] = read.value.args
    if script in ("recipes/compare.py", "recipes/multihop.py"):
        grid = Grid(getattr(asked, "grid", HERE / "grids" / "multihop.yaml"))
        assert list(cells_of(grid, asked))


def marked(block: Block) -> Any:
    marks = [pytest.mark.slow] if "bin/pytest" in block.text else []  # each collects in a process of its own
    marks += [pytest.mark.vllm] if ".venv-vllm/bin/p" in block.text else []
    return pytest.param(block, id=f"{block.page}, {block.text.splitlines()[0]}"[:70], marks=marks)


@pytest.mark.parametrize("block", map(marked, PARSED))
def test_what_is_not_run_is_parsed(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program, target, script, option and value of it exists."""
    calls = calls_of(block.text, tmp_path)
    assert calls
    monkeypatch.chdir(REPOSITORY)
    for call in calls:
        check(*call)


@pytest.mark.parametrize(
    "command",
    [
        "no-such-program demo",
        "make no-such-target",
        "make demo ARGS='--no_such 1'",
        "make bench ARGS=--no_such",
        ".venv/bin/python recipes/lab.py --no_such",
        "python recipes/compare.py run --methods nobody",
        "python recipes/compare.py walk",
        ".venv-vllm/bin/drorl serve outputs/nq_demo_vllm --no_such",
        "accelerate launch --no_such recipes/nq.py",
        "hf upload me/nq_demo outputs/nq_demo --no_such",
        "accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/nq.py --identifiers no_such",
    ],
)
def test_a_mistake_in_a_command_is_found(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the command line: bash, make, argparse, a grid, typer, accelerate, or the recipe."""
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises((Exception, SystemExit)):
        for call in calls_of(command, tmp_path):
            check(*call)


# -------------------------------------------------------------------------------------------------- what pages promise
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
    assert of_page("docs/data.md", "sh")[0] in section


def test_every_format_and_preset_is_described() -> None:
    """A format or preset that is added has a line in the page, and none is described that is gone."""
    formats, metrics = PAGE.split("## Formats")[1].split("\n## ")[0], PAGE.split("## Metrics")[1].split("\n## ")[0]
    named = {
        name for cell in re.findall(r"^\| (`[^|]+) \|", formats, re.MULTILINE) for name in re.findall(r"[\w-]+", cell)
    }
    assert named == ROWS.keys() | PASSAGES.keys()
    assert set(re.findall(r"\| `([\w-]+)` \|", metrics)) == PRESETS.keys()
