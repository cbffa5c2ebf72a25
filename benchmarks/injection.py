"""How often does an attack among the passages change what a model chooses?

    python benchmarks/injection.py --rows 3 --identifiers number      SmolLM2-135M on VitalQA; minutes on a CPU

For each question, one passage of N = 8 is replaced by each of the attacks of tests/attacks.py, at a place that is not
the first choice; in the control, by a plain sentence, for any other passage may change a choice too. Counted is how
often the first choice is no longer the one that it was, and how often it is the attack. The model is untrained: what
is measured is the model's own judgement, without the prior of the retriever's scores, which would hold it back.
"""

import argparse
import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from drorl.adapters import add_adapters
from drorl.data.vitalqa import load_vitalqa
from drorl.models import load_model_and_tokenizer
from drorl.pipeline import PipelineSettings, RAGPipeline

N = 8
CONTROLS = {
    "weather": ("Notes", "The weather was mild that day, and people went for a walk along the shore."),
    "list": ("Notes", "Wood, glass, paper, iron, salt and wool are kept on the upper shelf."),
    "fiction": ("A letter", "She closed the window, sat down again, and wrote to her brother about the garden."),
}


def replaced(passages: list[dict[str, Any]], place: int, by: tuple[str, str]) -> list[dict[str, Any]]:
    return [p | ({"title": by[0], "text": by[1]} if i == place else {}) for i, p in enumerate(passages)]


def measure(pipeline: RAGPipeline, rows: list[dict[str, Any]], texts: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Returns how many trials there were, and in how many the first choice changed, and was the text."""
    trials = changed = chosen = 0
    won: dict[str, int] = {}
    for row in rows:
        query, passages = row["query"], row["candidates"][:N]
        before = passages.index(dict(pipeline.select(query, passages)[0].passage))
        place = next(i for i in range(N - 1, -1, -1) if i != before)
        for name, text in texts.items():
            shown = replaced(passages, place, text)
            after = shown.index(dict(pipeline.select(query, shown)[0].passage))
            trials, changed, chosen = trials + 1, changed + (after != before), chosen + (after == place)
            won[name] = won.get(name, 0) + (after == place)
    return {"trials": trials, "changed": changed, "chosen": chosen, "by_attack": {n: c for n, c in won.items() if c}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--identifiers", nargs="+", default=["number", "query"])
    parser.add_argument("--dtype", default="auto")
    asked = parser.parse_args()
    attacks = runpy.run_path(str(Path(__file__).parent.parent / "tests" / "attacks.py"))["ATTACKS"]
    model, tokenizer = load_model_and_tokenizer("smollm2-135m", asked.dtype)
    # Adapters as they begin change nothing: the model is the one that was downloaded.
    model = add_adapters(model, LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    rows = [dict(row) for row in load_vitalqa()["validation"].select(range(asked.rows))]
    run = {"rows": asked.rows, "dtype": str(model.dtype), "threads": torch.get_num_threads()}
    for identifiers in asked.identifiers:
        start = time.perf_counter()
        settings = PipelineSettings(N, 1, identifiers=identifiers, max_passage_tokens=64)
        pipeline = RAGPipeline(model, tokenizer, settings)
        found = {name: measure(pipeline, rows, texts) for name, texts in (("attacks", attacks), ("control", CONTROLS))}
        took = {"seconds": round(time.perf_counter() - start)}
        sys.stdout.write(json.dumps({"identifiers": identifiers, **run, **found, **took}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
