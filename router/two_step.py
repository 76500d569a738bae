"""The fixed policies: first a decode worker, then, unless the prompt is short, a prefill worker, each by one score."""

from __future__ import annotations

from .config import RouterConfig
from .options import Choice, Options
from .policies import Ask, Candidate, Policy, make_policy
from .registry import WorkerRecord

READS_PREFIXES = frozenset({"prefix-affinity", "kv-overlap"})


class TwoStep:
    """A chooser made of two policies, one for each role."""

    def __init__(self, config: RouterConfig, seed: str) -> None:
        self._config = config
        self._decode_policy = make_policy(config, f"{seed} decode")
        self._prefill_policy = make_policy(config, f"{seed} prefill")
        self.reads_prefixes = config.policy in READS_PREFIXES or config.local_prefill_max_tokens > 0

    def choose(self, options: Options) -> Choice:
        decode = _pick(self._decode_policy, options.decodes, options)
        if options.must_stay or (options.may_stay and self._prefers_local(options, decode)):
            return Choice(decode, None)
        free = options.prefills_of(decode)
        return Choice(decode, _pick(self._prefill_policy, free, options) if free else None)

    def _prefers_local(self, options: Options, decode: WorkerRecord) -> bool:
        if decode.hello.role == "both":
            return True
        uncached = options.num_tokens - options.held_tokens.get(decode.key, 0)
        return uncached <= self._config.local_prefill_max_tokens


def _pick(policy: Policy, workers: list[WorkerRecord], options: Options) -> WorkerRecord:
    by_key = {worker.key: worker for worker in workers}
    ask = Ask(options.num_tokens, options.record.request.session)
    return by_key[policy.pick([_candidate(worker, options) for worker in workers], ask).worker]


def _candidate(worker: WorkerRecord, options: Options) -> Candidate:
    load = worker.load
    return Candidate(
        worker.key,
        cost_tokens=worker.queued_tokens + worker.used_blocks * worker.block_size,
        reported=load.running + load.waiting + load.receiving + load.handing_off,
        matched_tokens=options.held_tokens.get(worker.key, 0),
    )
