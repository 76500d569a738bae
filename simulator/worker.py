"""A worker on virtual time: a queue of prompts computed in chunks, a batch of streams that advances step by step.

It speaks the router's protocol and moves no bytes. Where nothing changes for a while, many steps are taken at once; a
newcomer cuts such a leap at the end of the step that runs.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..core.ids import AttemptKey, WorkerKey
from ..protocol.messages import Phases, SampledToken, Tokens, WorkerLoad
from .costs import WorkerCosts
from .prefix_cache import PrefixCache
from .trace import BLOCK_TOKENS, TraceRequest

MAX_LEAP = 32  # steps whose tokens the router sees at once
STOP_TOKEN = 2
_TOKENS = [(SampledToken(1),) * count for count in range(MAX_LEAP + 1)]


@dataclass(slots=True, eq=False)
class Prompt:
    """To be computed here, for this worker's own batch or, with `decode`, for another's."""

    key: AttemptKey
    request: TraceRequest
    arrived_s: float
    decode: WorkerKey | None = None
    begun_s: float = -1.0
    num_cached: int = 0
    num_computed: int = 0  # cached ones included


@dataclass(slots=True, eq=False)
class Stream:
    key: AttemptKey
    request: TraceRequest
    phases: Phases
    num_done: int = 0

    @property
    def num_held(self) -> int:
        return self.request.num_prompt_tokens + self.num_done

    @property
    def num_left(self) -> int:
        return self.request.num_output_tokens - self.num_done


@dataclass(slots=True)
class Leap:
    """Steps that are being computed: the first takes `first_s`, each following one `growth_s` more than the last."""

    start_s: float
    num_steps: int
    first_s: float
    growth_s: float = 0.0
    prompt: Prompt | None = None
    num_tokens: int = 0  # of the prompt

    def lasting(self, num_steps: int) -> float:
        return num_steps * self.first_s + 0.5 * num_steps * (num_steps - 1) * self.growth_s

    @property
    def end_s(self) -> float:
        return self.start_s + self.lasting(self.num_steps)

    def cut(self, now: float) -> None:
        """End with the step that runs at `now`."""
        done = 1
        while done < self.num_steps and self.start_s + self.lasting(done) < now:
            done += 1
        self.num_steps = done


@dataclass(slots=True)
class StepResult:
    """What a leap brought: tokens for the router, and prompts computed for other workers."""

    tokens: list[Tokens]
    computed: list[Prompt]


class SimulatedWorker:
    """Pure: the cluster gives it the time. `leap` is what it computes now."""

    def __init__(self, key: WorkerKey, is_prefill_only: bool, costs: WorkerCosts) -> None:
        self.key = key
        self.costs = costs
        self.cache = PrefixCache()
        self.leap: Leap | None = None
        self.attempts: dict[AttemptKey, None] = {}
        self.received = 0
        self.query_tokens = 0
        self.hit_tokens = 0
        self.busy_s = 0.0
        self.neighbour: SimulatedWorker | None = None  # on the same cores; both slow down while both compute
        self.slowdown = 1.0
        self.is_prefill_only = is_prefill_only
        self._prompts: deque[Prompt] = deque()
        self._arrived: deque[Stream] = deque()  # handed over, without a place in the batch yet
        self._streams: dict[AttemptKey, Stream] = {}
        self._held = 0  # tokens of the running streams
        self._promised = 0  # and of those with all that they will produce

    # ---- what comes

    def add_prompt(self, prompt: Prompt) -> None:
        self._prompts.append(prompt)

    def add_stream(self, stream: Stream) -> None:
        self._arrived.append(stream)

    def drop(self, key: AttemptKey) -> None:
        """Forget an attempt whatever it was doing; a chunk of it that runs is computed for nothing."""
        self.attempts.pop(key, None)
        self._prompts = deque(prompt for prompt in self._prompts if prompt.key != key)
        self._arrived = deque(stream for stream in self._arrived if stream.key != key)
        stream = self._streams.pop(key, None)
        if stream is not None:
            self._leave(stream)

    def held_tokens(self, request: TraceRequest) -> int:
        """Leading prompt tokens that are in the cache here; the last token of a prompt is always computed."""
        return min(self.cache.match(request.prefix_ids) * BLOCK_TOKENS, request.num_prompt_tokens - 1)

    # ---- time

    def begin(self, now: float) -> list[Tokens]:
        """Start the next leap, if there is anything to do. Returns first tokens of streams that joined the batch."""
        assert self.leap is None
        joined = self._admit_arrived()
        prompt = self._prompts[0] if self._prompts and self._has_room(self._prompts[0]) else None
        if prompt is not None:
            self.leap = self._prompt_leap(prompt, now)
        elif self._streams:
            steps = min(MAX_LEAP, min(stream.num_left for stream in self._streams.values()))
            count = len(self._streams)
            self.leap = Leap(now, steps, self.costs.step_s(count, self._held), count * self.costs.step_held_s)
        if self.leap is not None and self.neighbour is not None and self.neighbour.leap is not None:
            self.leap.first_s *= self.slowdown
            self.leap.growth_s *= self.slowdown
        return joined

    def share_cores(self, neighbour: SimulatedWorker, slowdown: float) -> None:
        """From now on a step or chunk that begins while the other computes takes `slowdown` times as long."""
        self.neighbour, self.slowdown = neighbour, slowdown

    def end(self) -> StepResult:
        """The leap is over: its tokens, and the prompts it finished."""
        leap = self.leap
        assert leap is not None
        self.leap = None
        self.busy_s += leap.lasting(leap.num_steps)
        result = StepResult([self._advance(stream, leap.num_steps) for stream in list(self._streams.values())], [])
        if leap.prompt is not None and leap.prompt.key in self.attempts:
            self._advance_prompt(leap.prompt, leap.num_tokens, leap.end_s, result)
        return result

    def load(self) -> WorkerLoad:
        total = self.costs.kv_tokens // BLOCK_TOKENS
        used = min(total, -(-self._held // BLOCK_TOKENS))
        return WorkerLoad(
            total_blocks=total,
            free_blocks=total - used,
            cached_blocks=min(len(self.cache), total - used),
            running=len(self._streams),
            waiting=len(self._prompts) + len(self._arrived),
            queued_tokens=sum(p.request.num_prompt_tokens - p.num_computed for p in self._prompts),
            prefix_hit_tokens=self.hit_tokens,
            prefix_query_tokens=self.query_tokens,
        )

    # ---- prompts

    def _has_room(self, prompt: Prompt) -> bool:
        return prompt.decode is not None or prompt.begun_s >= 0 or self._fits(prompt.request)

    def _fits(self, request: TraceRequest) -> bool:
        needed = request.num_prompt_tokens + request.num_output_tokens
        is_room = self._promised + needed <= self.costs.kv_tokens and len(self._streams) < self.costs.max_streams
        return is_room or not self._streams

    def _prompt_leap(self, prompt: Prompt, now: float) -> Leap:
        request, costs = prompt.request, self.costs
        if prompt.begun_s < 0:
            prompt.begun_s = now
            prompt.num_cached = prompt.num_computed = self.held_tokens(request)
            self.hit_tokens += prompt.num_cached
            self.query_tokens += request.num_prompt_tokens
        left = request.num_prompt_tokens - prompt.num_computed
        if self.is_prefill_only and not self._streams and self.neighbour is None:
            return Leap(now, 1, costs.prefill_s(left, prompt.num_computed), prompt=prompt, num_tokens=left)
        chunk = min(left, costs.chunk_tokens)
        seconds = costs.chunk_cost_s(chunk, prompt.num_computed)
        if self._streams:
            seconds += costs.step_s(len(self._streams), self._held)
        return Leap(now, 1, seconds, prompt=prompt, num_tokens=chunk)

    def _advance_prompt(self, prompt: Prompt, num_tokens: int, now: float, result: StepResult) -> None:
        prompt.num_computed += num_tokens
        if prompt.num_computed < prompt.request.num_prompt_tokens:
            return
        self._prompts.remove(prompt)
        self.retain(prompt.request)
        if prompt.decode is not None:
            result.computed.append(prompt)
            return
        phases = Phases(
            queue_s=prompt.begun_s - prompt.arrived_s,
            prefill_s=now - prompt.begun_s,
            cached_tokens=prompt.num_cached,
        )
        result.tokens.append(self._join(Stream(prompt.key, prompt.request, phases)))

    def retain(self, request: TraceRequest) -> None:
        """The whole blocks of this prompt stay in the cache as long as there is room."""
        whole = request.prefix_ids[: request.num_prompt_tokens // BLOCK_TOKENS]
        self.cache.add(whole, (self.costs.kv_tokens - self._held) // BLOCK_TOKENS)

    # ---- streams

    def _admit_arrived(self) -> list[Tokens]:
        tokens = []
        while self._arrived and self._fits(self._arrived[0].request):
            tokens.append(self._join(self._arrived.popleft()))
        return tokens

    def _join(self, stream: Stream) -> Tokens:
        """Its first token came with the prompt."""
        self._streams[stream.key] = stream
        self._held += stream.num_held
        self._promised += stream.request.num_prompt_tokens + stream.request.num_output_tokens
        return self._advance(stream, 1, stream.phases)

    def _advance(self, stream: Stream, num_tokens: int, phases: Phases | None = None) -> Tokens:
        index = stream.num_done
        stream.num_done += num_tokens
        self._held += num_tokens
        is_over = stream.num_left <= 0
        if is_over:
            del self._streams[stream.key]
            self.attempts.pop(stream.key, None)
            self._leave(stream)
        return Tokens(
            stream.key.request_id,
            stream.key.attempt,
            0,
            index,
            _TOKENS[num_tokens],
            "stop" if is_over else None,
            STOP_TOKEN if is_over else None,
            phases,
        )

    def _leave(self, stream: Stream) -> None:
        self._held -= stream.num_held
        self._promised -= stream.request.num_prompt_tokens + stream.request.num_output_tokens
