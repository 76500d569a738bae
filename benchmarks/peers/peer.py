"""One peer, in its own environment: `python peer.py vllm|openvino MODEL`. Prints a JSON object a line."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable

NOUNS = "water house table paper light music garden winter market bridge silver window forest letter summer island"
Generate = Callable[[list[str], int], object]  # (prompts, new tokens)
ROUNDS, NEW_TOKENS, CONTEXT = 3, 64, 128


def vllm(model: str) -> Generate:
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=4096,
        max_num_seqs=64,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def generate(prompts: list[str], count: int) -> object:
        return engine.generate(
            prompts, SamplingParams(max_tokens=count, temperature=0, ignore_eos=True), use_tqdm=False
        )

    return generate


def openvino(model: str) -> Generate:
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.max_num_batched_tokens = 4096
    scheduler.max_num_seqs = 64
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.LLMPipeline(model, "CPU", scheduler_config=scheduler)

    def generate(prompts: list[str], count: int) -> object:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = count
        config.ignore_eos = True
        config.do_sample = config.apply_chat_template = False
        return pipeline.generate(prompts, config)

    return generate


def seconds(generate: Generate, prompts: list[str], count: int) -> float:
    started = time.perf_counter()
    generate(prompts, count)
    return time.perf_counter() - started


def main() -> None:
    name, model = sys.argv[1:]
    generate = {"vllm": vllm, "openvino": openvino}[name](model)
    rng, nouns = random.Random(0), NOUNS.split()

    def prompts(count: int, length: int) -> list[str]:
        return [" ".join(rng.choices(nouns, k=length)) for _ in range(count)]

    generate(prompts(2, 16), 4)
    for batch in (1, 8, 32):
        first = min(seconds(generate, prompts(batch, CONTEXT), 1) for _ in range(ROUNDS))
        whole = min(seconds(generate, prompts(batch, CONTEXT), NEW_TOKENS + 1) for _ in range(ROUNDS))
        print(json.dumps({"decode": batch, "tok_s": round(batch * NEW_TOKENS / (whole - first), 1)}), flush=True)
    for length in (512, 2048):
        best = min(seconds(generate, prompts(1, length), 1) for _ in range(ROUNDS))
        print(json.dumps({"prefill": length, "tok_s": round(length / best, 1)}), flush=True)


if __name__ == "__main__":
    main()
