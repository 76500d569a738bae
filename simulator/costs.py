"""What a simulated worker and the wire between two cost: given figures, not measured here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerCosts:
    """A step takes  base + streams · stream + tokens held · held  and, for a chunk of n prompt tokens behind c others,
    chunk + n · token + n · (c + n/2) · pair  more. Seconds, tokens, bytes.
    """

    step_base_s: float
    step_stream_s: float
    step_held_s: float
    chunk_s: float
    prompt_token_s: float
    prompt_pair_s: float
    chunk_tokens: int
    kv_tokens: int  # that the worker's memory holds, retained prefixes included
    bytes_per_token: int
    link_bytes_per_s: float
    link_latency_s: float
    max_streams: int = 256

    def step_s(self, num_streams: int, num_held: float) -> float:
        """A decode step, without any prompt in it."""
        return self.step_base_s + num_streams * self.step_stream_s + num_held * self.step_held_s

    def chunk_cost_s(self, num_tokens: int, num_before: int) -> float:
        """What a chunk of a prompt adds to a step."""
        pairs = num_tokens * (num_before + 0.5 * num_tokens)
        return self.chunk_s + num_tokens * self.prompt_token_s + pairs * self.prompt_pair_s

    def prefill_s(self, num_tokens: int, num_before: int) -> float:
        """A prompt alone, in chunks."""
        seconds = 0.0
        while num_tokens > 0:
            chunk = min(num_tokens, self.chunk_tokens)
            seconds += self.chunk_cost_s(chunk, num_before)
            num_tokens, num_before = num_tokens - chunk, num_before + chunk
        return seconds

    def transfer_s(self, num_bytes: int, prefill_s: float) -> float:
        """From the end of prefill until all is there. Layers leave while later ones are computed, so what the wire can
        carry meanwhile is hidden, all but the last twentieth.
        """
        wire_s = num_bytes / self.link_bytes_per_s
        return self.link_latency_s + max(0.05 * wire_s, wire_s - prefill_s)


MODELS = {
    # A dense model of 70 billion parameters with 8 KV heads over eight GPUs of 312 Tflop/s and 2 TB/s each, at half of
    # the arithmetic and 70 % of the memory limit; 400 GB for the cache; 50 GB/s between workers.
    "70b": WorkerCosts(0.0125, 1e-4, 3e-8, 0.004, 1.12e-4, 2.1e-9, 4096, 1_200_000, 327_680, 50e9, 0.002),
    # One of 8 billion on one GPU of 990 Tflop/s and 3.35 TB/s; 50 GB for the cache; 25 GB/s between workers.
    "8b": WorkerCosts(0.0065, 5e-5, 5.2e-8, 0.002, 3.3e-5, 1.1e-9, 4096, 380_000, 131_072, 25e9, 0.002),
    # The same over a network of 10 Gbit/s.
    "8b-slow-link": WorkerCosts(0.0065, 5e-5, 5.2e-8, 0.002, 3.3e-5, 1.1e-9, 4096, 380_000, 131_072, 1.2e9, 0.002),
}
