"""vLLM as the sampler of the trainer's own policy; see docs/vllm.md.

    base.py      what an engine is asked: next-token log-probabilities after prompts, and texts; under which adapter
    delivery.py  how an adapter gets there: its bytes and their fingerprint, the merged copy, the base's fingerprint
    vllm.py      vLLM in this process (`vllm_mode=colocate`), and what it shares with the server
    served.py    vLLM in the server
    server.py    `drorl serve`: vLLM's own OpenAI server with a few routes more
    remote.py    the trainer's end of that server (`vllm_mode=server`)

Nothing here imports vLLM before an engine is made, so drorl works without it.
"""
