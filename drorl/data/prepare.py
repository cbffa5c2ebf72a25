"""From any format to rows in a file, in the memory of one shard, resumed where it was stopped."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from .fields import Row
from .ids import count_equal, id_hashes
from .packages import cache_dir, sha256_of
from .reading import Reading
from .shards import Shards, only_one

SHARD_ROWS = 2_000
FLASHRAG_2WIKI = 15_000
VERSION = 3
"""Raised when a reader makes other rows of the same file."""


@dataclass(frozen=True)
class Prepared:
    """What was written."""

    format: str
    rows: int
    skipped: Counter[str]
    without_candidates: int
    passages: int
    with_gold: int
    """Rows of which a passage is marked as gold."""
    equal_ids: int
    """Rows with the id of an earlier one."""

    def __str__(self) -> str:
        parts = [
            f"{self.rows:,} rows ({self.format}), {self.passages:,} candidates, {self.with_gold:,} rows with golds"
        ]
        if self.without_candidates:
            parts.append(f"{self.without_candidates:,} rows have no candidates")
        if self.equal_ids:
            parts.append(f"warning: {self.equal_ids:,} rows have the id of an earlier row")
        parts += [f"skipped {count:,}: {kind}" for kind, count in self.skipped.most_common()]
        if self.format == "flashrag" and self.rows == FLASHRAG_2WIKI and self.with_gold:  # other sets name none
            parts.append("FlashRAG's 2Wiki has 15,000 training rows where the original has 167,454")
        return "\n".join(parts)


def write_rows(
    reading: Reading,
    output: Path,
    change: Callable[[list[Row]], list[Row]] | None = None,
    depends: Sequence[Any] = (),
    quiet: bool = False,
    shard_rows: int | None = None,
) -> Prepared:
    """Writes rows as they are read, or changed, as JSON lines; packed if the name ends in .gz or .zst.

    A run that was killed goes on after its last finished shard, and ends with the file that it would have written.
    Where the output is already what would be written, by the hash of all it depends on and by its own, it stays.

    Args:
        reading ([`Reading`]): the rows.
        output (`Path`): the file.
        change (`Callable`, *optional*): makes a shard of rows of a shard of rows.
        depends (`Sequence`): what `change` depends on, as JSON.
        quiet (`bool`): no progress on stderr.
        shard_rows (`int`, *optional*): rows that are in memory at a time, and lost at most when killed. Default:
            `SHARD_ROWS`.
    """
    name = json.dumps([reading.depends, *depends, output.suffix, VERSION])
    key = hashlib.sha256(name.encode()).hexdigest()
    with only_one(output):
        kept = cache_dir() / "outputs" / f"{key}.json"
        made = _made_before(output, kept)
        if not made:
            made = _write(reading, output, change, key, quiet, shard_rows or SHARD_ROWS)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(made))
    counted = ("rows", "without_candidates", "passages", "with_gold")
    totals = {name: sum(note[name] for note in made["notes"]) for name in counted}
    skipped = sum((Counter(note["skipped"]) for note in made["notes"]), Counter())
    return Prepared(format=made["format"], skipped=skipped, equal_ids=made["equal_ids"], **totals)


def _made_before(output: Path, kept: Path) -> dict[str, Any]:
    """Returns what was said of an output when it was made, nothing if that is not what lies there."""
    try:
        made = json.loads(kept.read_text())
        return made if output.is_file() and sha256_of(output) == made["sha256"] else {}
    except (OSError, ValueError):  # never made, or killed while that was written
        return {}


def _write(
    reading: Reading,
    output: Path,
    change: Callable[[list[Row]], list[Row]] | None,
    key: str,
    quiet: bool,
    shard_rows: int,
) -> dict[str, Any]:
    """Writes the rows, and returns what is to be known of them and of the file."""
    name = reading.path.name
    with Shards(output, key) as shards:
        if shards.notes:
            reading.start = shards.notes[-1]["record"]
        rows = iter(reading)
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
            task = progress.add_task(name, total=None)
            while block := list(islice(rows, shard_rows)):
                block = change(block) if change else block
                shards.add((json.dumps(row, ensure_ascii=False) for row in block), _note(block, reading))
                progress.update(task, description=f"{name}: {sum(n['rows'] for n in shards.notes):,} rows")
        if reading.skipped:  # behind the last row
            shards.add([], _note([], reading))
        equal_ids = count_equal(id_hashes(shards.lines(), sum(note["rows"] for note in shards.notes)))
        shards.finish()
    made = {"sha256": sha256_of(output), "format": reading.format, "notes": shards.notes}
    return made | {"equal_ids": equal_ids}


def _note(block: list[Row], reading: Reading) -> dict[str, Any]:
    """What is to be known of a shard; the reading forgets what it has counted."""
    skipped, reading.skipped = dict(reading.skipped), Counter()
    return {
        "record": reading.number,
        "rows": len(block),
        "skipped": skipped,
        "without_candidates": sum(not row["candidates"] for row in block),
        "passages": sum(len(row["candidates"]) for row in block),
        "with_gold": sum(any(c.get("is_gold") for c in row["candidates"]) for row in block),
    }
