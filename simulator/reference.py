"""How other systems' routers place requests, told in our terms, for comparison only.

Each is made from the public description of the system's rule. All of them hand every prompt over, and none refuses
requests here, so that rows of a table serve the same work.
"""

from __future__ import annotations

from ..core.ids import WorkerKey
from ..router.options import Choice, Options
from ..router.registry import WorkerRecord
from .costs import WorkerCosts
from .trace import BLOCK_TOKENS


class SglangThresholds:
    """SGLang's gateway, cache-aware policy, with its default thresholds.

    While loads are balanced, the worker with the longest match where it covers more than 30 % of the prompt, else the
    one that has been sent the fewest tokens of prompts. When loads differ by more than 64 requests and by more
    than half, the least loaded. Decode workers by the fewest requests.
    """

    reads_prefixes = True
    match_threshold = 0.3
    absolute_threshold = 64
    relative_threshold = 1.5

    def __init__(self) -> None:
        self._sent_tokens: dict[WorkerKey, int] = {}

    def choose(self, options: Options) -> Choice:
        decode = min(options.decodes, key=lambda worker: (len(worker.attempts), worker.key))
        workers = options.prefills_of(decode)
        if not workers:
            return Choice(decode, None)
        prefill = self._pick(workers, options)
        new_tokens = options.num_tokens - options.held(prefill)
        self._sent_tokens[prefill.key] = self._sent_tokens.get(prefill.key, 0) + new_tokens
        return Choice(decode, prefill)

    def _pick(self, workers: list[WorkerRecord], options: Options) -> WorkerRecord:
        loads = [len(worker.attempts) for worker in workers]
        low, high = min(loads), max(loads)
        if high - low > self.absolute_threshold and high > self.relative_threshold * low:
            return min(workers, key=lambda worker: (len(worker.attempts), worker.key))
        best = min(workers, key=lambda worker: (-options.held(worker), worker.key))
        if options.held(best) > self.match_threshold * options.num_tokens:
            return best
        return min(workers, key=lambda worker: (self._sent_tokens.get(worker.key, 0), worker.key))


class DynamoLinear:
    """Dynamo's linear cost in blocks: prompt blocks that wait or come and are not cached, plus blocks that decode.

    In its prefill pool nothing decodes; in its decode pool overlap earns no credit and prompts do not count.
    """

    reads_prefixes = True

    def choose(self, options: Options) -> Choice:
        decode = min(options.decodes, key=lambda worker: (worker.used_blocks, worker.key))
        workers = options.prefills_of(decode)
        if not workers:
            return Choice(decode, None)
        return Choice(decode, min(workers, key=lambda worker: (_prompt_blocks(worker, options), worker.key)))


def _prompt_blocks(worker: WorkerRecord, options: Options) -> float:
    return max(0, worker.queued_tokens + options.num_tokens - options.held(worker)) / BLOCK_TOKENS


class MooncakeShortestTtft:
    """Mooncake's algorithm 1: the prefill worker with the shortest estimated TTFT = queue + prefill, by times known
    before; decode by the shortest step.

    Its copying of prefixes from one prefill worker to another is left out, since no message of ours asks for it, and so
    is its refusal of requests.
    """

    reads_prefixes = True

    def __init__(self, costs: WorkerCosts) -> None:
        self._costs = costs

    def choose(self, options: Options) -> Choice:
        decode = min(options.decodes, key=lambda worker: (self._step_s(worker), worker.key))
        workers = options.prefills_of(decode)
        if not workers:
            return Choice(decode, None)
        return Choice(decode, min(workers, key=lambda worker: (self._ttft_s(worker, options), worker.key)))

    def _ttft_s(self, worker: WorkerRecord, options: Options) -> float:
        held = options.held(worker)
        return worker.prompts.wait_s(options.now) + self._costs.prefill_s(options.num_tokens - held, held)

    def _step_s(self, worker: WorkerRecord) -> float:
        return self._costs.step_s(worker.num_streams + 1, worker.used_blocks * worker.block_size)
