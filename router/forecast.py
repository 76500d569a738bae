"""What the fitted model says of a choice before it is carried out: recorded with the attempt, for comparison."""

from __future__ import annotations

from dataclasses import dataclass

from .cost_model import CostModel
from .options import Options
from .registry import WorkerRecord


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds from the decision on. `transfer_s` is 0 where decode prefills for itself."""

    wait_s: float
    prefill_s: float
    transfer_s: float
    tpot_s: float

    @property
    def ttft_s(self) -> float:
        return self.wait_s + self.prefill_s + self.transfer_s


def forecast(
    model: CostModel, options: Options, decode: WorkerRecord, prefill: WorkerRecord | None, num_beside: int = 0
) -> Forecast:
    """For any choice, whoever made it. `num_beside`: neighbours at work of the worker that computes the prompt."""
    worker = prefill or decode
    held = options.here(worker)
    output = min(float(options.record.request.params.max_tokens), model.expected_output_tokens)
    context = decode.used_blocks * decode.block_size + options.num_tokens + output / 2
    missing = (options.num_tokens - options.held(decode)) * decode.hello.bytes_per_token
    return Forecast(
        wait_s=worker.prompts.wait_s(options.now),
        prefill_s=model.prefill_s(worker.key, options.num_tokens - held, held, worker.num_running, num_beside),
        transfer_s=model.transfer_s(worker.key, decode.key, missing) if prefill else 0.0,
        tpot_s=model.token_s(decode.num_streams + 1, context),
    )
