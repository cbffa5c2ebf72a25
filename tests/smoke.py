"""What `make dist` asks of an installed drorl: two steps of training on a model made on the spot, and an answer.

    python tests/smoke.py FOLDER      in an environment that has drorl and its dependencies, and nothing else

It is run outside of the repository, and imports nothing of it.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import drorl

RIVERS = {"Danube": "Vienna", "Rhine": "Basel", "Thames": "London", "Po": "Turin", "Seine": "Paris", "Tiber": "Rome"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(folder: Path) -> None:
    """A random Llama of two layers, and a byte-level tokenizer of 300 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>"], initial_alphabet=alphabet
    )
    backend.train_from_iterator(RIVERS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path) -> None:
    passages = [
        {"id": river, "title": river, "text": f"The {river} flows through {city}.", "score": 1.0}
        for river, city in RIVERS.items()
    ]
    rows = [
        {"query": f"What flows through {city}?", "answers": [river], "candidates": passages}
        for river, city in RIVERS.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(folder: Path) -> None:
    """Trains, answers and repeats by the installed command.

    Raises:
        SystemExit: if drorl is not the installed one.
        CalledProcessError: if a command fails.
    """
    package = Path(drorl.__file__).parent
    if "site-packages" not in package.parts:
        sys.exit(f"drorl is imported from {package}, and the installed one is to be tried")
    command = str(Path(sys.executable).with_name("drorl"))
    said = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if said != drorl.__version__:
        sys.exit(f"drorl --version says {said}, the package is {drorl.__version__}")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    settings = {
        "config": package / "recipes/configs/nq_demo.yaml",
        "model_name_or_path": folder / "model",
        "train_file": folder / "rows.jsonl",
        "test_file": folder / "rows.jsonl",
        "output_dir": folder / "run",
        "num_candidates": 6,
        "num_generations": 6,
        "per_device_train_batch_size": 12,
        "gradient_accumulation_steps": 1,
        "lora_first_layer": 1,
        "warmup_queries": 6,
        "max_steps": 2,
        "dtype": "float32",
    }
    flags = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    subprocess.run([command, "train", *flags], check=True)
    subprocess.run([command, "answer", folder / "run", "--input", folder / "rows.jsonl", "--json"], check=True)
    subprocess.run([command, "reproduce", folder / "run"], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
