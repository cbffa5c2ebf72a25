r"""Turns made-up files into rows with drorl prepare, and says how fast, and in how much memory.

    python benchmarks/reading.py                                     # HotpotQA: ten paragraphs of a hundred words
    python benchmarks/reading.py --format questions --rows 2000000   # many small rows

A quarter of the rows comes first: memory is flat when the whole of them takes no more. drorl prepare is a process of
its own, on one core; minutes are those of its processor, so that neighbours do not count. The last line is JSON.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = [
    a + b for a in ("ba", "de", "ki", "lo", "mu", "ra", "so", "ti") for b in ("", "n", "rest", "lin", "vo", "gar")
]


def hotpotqa(number: int, draw: random.Random) -> dict[str, Any]:
    """A record of HotpotQA's training file: some six kilobytes."""

    def sentence() -> str:
        return " ".join(draw.choices(WORDS, k=25)) + "."

    context = [[f"Title {number} {i}", [sentence() for _ in range(4)]] for i in range(10)]
    facts = [[context[0][0], 0], [context[5][0], 1]]
    more = {"type": "bridge", "level": "hard", "supporting_facts": facts, "context": context}
    return {"_id": f"{number:024x}", "question": sentence(), "answer": draw.choice(WORDS), **more}


def questions(number: int, draw: random.Random) -> dict[str, Any]:
    """A question and its answer."""
    return {"question": f"{number} {' '.join(draw.choices(WORDS, k=8))}?", "answers": [draw.choice(WORDS)]}


FORMATS: dict[str, Callable[[int, random.Random], dict[str, Any]]] = {"hotpotqa": hotpotqa, "questions": questions}


def write(path: Path, make: Callable[[int, random.Random], dict[str, Any]], rows: int) -> None:
    """Writes that many records, as a JSON array."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            file.write(f"{',' if number else '['}{json.dumps(make(number, draw))}\n")
        file.write("]")


def prepare(source: Path, output: Path) -> dict[str, float]:
    """Runs drorl prepare on one core, and returns the processor's minutes and the largest resident set, MiB."""
    command = [sys.executable, "-c", "from drorl.cli import main; main()", "prepare", "--quiet"]
    process = subprocess.Popen(
        [*command, "--input", str(source), "--output", str(output)],
        preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"drorl prepare ended with {status}")
    return {"minutes": (usage.ru_utime + usage.ru_stime) / 60, "peak_mib": usage.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=FORMATS, default="hotpotqa")
    parser.add_argument("--rows", type=int, default=90_000)
    args = parser.parse_args()
    figures: dict[str, Any] = {"format": args.format}
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source.json"
        for name, rows in (("quarter", args.rows // 4), ("all", args.rows)):
            write(source, FORMATS[args.format], rows)
            found = prepare(source, Path(scratch) / "rows.jsonl")
            mib = source.stat().st_size / 2**20
            figures[name] = {"rows": rows, "mib": mib, **found, "rows_per_minute": rows / found["minutes"]}
            print(f"{rows:,} rows, {mib:.0f} MiB: {figures[name]}", file=sys.stderr)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
