"""Times the likelihood of m permutations over one shared prompt: packed prefix tree against repeated sequences.

    make bench                                       # or: python benchmarks/likelihood.py --prompt_tokens 500

Forward and backward with LoRA on SmolLM2-135M (embedded), alternating in one process; medians. The last line is JSON.
"""

import argparse
import json
import statistics
import time

import torch
from peft import LoraConfig

from drorl.adapters import adapter_parameters, add_adapters
from drorl.likelihood import sequence_logps
from drorl.models import load_model_and_tokenizer


def repeated_logps(model, prompt, completions):
    """The same log-likelihoods from one padded batch that repeats the prompt, as TRL computes them."""
    width = max(map(len, completions))
    ids = torch.tensor([prompt + c + [0] * (width - len(c)) for c in completions])
    mask = torch.tensor([[1] * (len(prompt) + len(c)) + [0] * (width - len(c)) for c in completions])
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=width + 1).logits[:, :-1].float()
    logps = torch.log_softmax(logits, dim=-1).gather(2, ids[:, len(prompt) :, None])[..., 0]
    return (logps * mask[:, len(prompt) :]).sum(dim=-1)


def timed(function, parameters):
    """Returns seconds of forward and backward, the values and the gradient."""
    for p in parameters:
        p.grad = None
    start = time.perf_counter()
    values = function()
    values.sum().backward()
    seconds = time.perf_counter() - start
    return seconds, values.detach(), torch.cat([p.grad.flatten() for p in parameters])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt_tokens", type=int, default=500)
    parser.add_argument("--completion_tokens", type=int, default=24)
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    base, _ = load_model_and_tokenizer(args.model, "float32")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = add_adapters(base, lora).train()
    parameters = list(adapter_parameters(model, "selector").values())
    for p in parameters:
        torch.nn.init.normal_(p, std=0.02)
    vocabulary = base.config.vocab_size
    prompt = torch.randint(3, vocabulary, (args.prompt_tokens,)).tolist()
    completions = torch.randint(3, vocabulary, (args.num_generations, args.completion_tokens)).tolist()
    ways = {
        "tree": lambda: torch.stack([t.sum() for t in sequence_logps(model, [(prompt, c) for c in completions])]),
        "repeated": lambda: repeated_logps(model, prompt, completions),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for repetition in range(args.repetitions + 1):
        for name, function in ways.items():
            elapsed, values, gradient = timed(function, parameters)
            results[name] = values, gradient
            if repetition:  # the first is a warm-up
                seconds[name].append(elapsed)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    (value, gradient), (expected, reference) = results["tree"], results["repeated"]
    summary = {
        **{f"{name}_seconds": round(median, 3) for name, median in medians.items()},
        "speedup": round(medians["repeated"] / medians["tree"], 2),
        "value_max_error": float((value - expected).abs().max()),
        "gradient_relative_error": float((gradient - reference).norm() / reference.norm()),
        "settings": vars(args),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
