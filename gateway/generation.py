"""One HTTP call while it runs: a router request for each prompt, n choices for each request, ended in every case.

Leaving `run` by any way (answer, error, cancellation since the client left) cancels what still runs behind it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

from ..core.errors import Cancelled, DeadlineExceeded, InternalError, ServeError
from ..core.random_bits import choice_seed
from ..protocol.sampling import MAX_CHOICES, SamplingParams
from ..router.interface import Decision, EndEvent, GenerateRequest, GenerateStream, TokensEvent
from .call import current_call
from .choice import Choice, ChoiceDelta
from .context import Gateway
from .explain.window import RequestFacts
from .requests import GenerationJob
from .timing import RequestTiming

LATE_S = 5.0  # the router keeps the deadline; this much later the gateway stops waiting for its word

EVENTS_PER_TURN = 32

Sink = Callable[[ChoiceDelta], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    resumed: int = 0  # how often the answer went on with another attempt behind its tokens; known at the end
    drafted: int = 0  # tokens that speculation tried; none of those it rejected is among completion_tokens
    accepted: int = 0

    def body(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.drafted - self.accepted,
                "resumed": self.resumed,
            },
        }


class Generation:
    """Runs a job and feeds each piece of its answer to a sink, in order for each choice."""

    def __init__(self, gateway: Gateway, job: GenerationJob, answer_id: str, received_s: float) -> None:
        n = job.params.n
        self.answer_id = answer_id
        self.job = job
        self.choices = [Choice(i, gateway.tokenizer, job.params, job.options) for i in range(len(job.prompts) * n)]
        self._gateway = gateway
        self._timings = [RequestTiming(gateway.clock, received_s) for _ in job.prompts]
        self._decisions: list[Decision | None] = [None] * len(job.prompts)
        self._streams: list[GenerateStream] = []
        self._abort_error: ServeError | None = None
        self._num_prompt_tokens = sum(len(ids) for ids in job.prompts)

    async def run(self, sink: Sink) -> None:
        """Until every choice is finished; raises what ended it otherwise."""
        gateway = self._gateway
        with gateway.running.hold(self):
            gateway.metrics.started(self._num_prompt_tokens)
            try:
                self._submit()
                async with asyncio.timeout(gateway.config.timeout_s + LATE_S):
                    await self._consume_all(sink)
            except TimeoutError:
                raise DeadlineExceeded(f"no end within {gateway.config.timeout_s:g} s") from None
            except asyncio.CancelledError:
                gateway.metrics.disconnected()
                raise
            except ServeError as err:
                gateway.metrics.failed(err.code)
                raise
            finally:
                for stream in self._streams:
                    stream.cancel()
                gateway.metrics.stopped()

    def abort(self, error: ServeError) -> None:
        """End with `error` as soon as the router has let go."""
        self._abort_error = error
        for stream in self._streams:
            stream.cancel()

    def usage(self) -> Usage:
        """So far. Tokens after a stop string do not count."""
        return Usage(
            self._num_prompt_tokens,
            sum(choice.num_tokens for choice in self.choices),
            sum(timing.phases.cached_tokens for timing in self._timings),
            sum(timing.resumed for timing in self._timings),
            sum(timing.drafted for timing in self._timings),
            sum(timing.accepted for timing in self._timings),
        )

    def mark_written(self, choice: int) -> None:
        """A piece of this choice is with the client's connection."""
        self._timings[choice // self.job.params.n].mark_written()

    def report(self) -> dict[str, object]:
        """The vendor part of the answer: the phases, for each prompt when there are several."""
        reports = [
            timing.report() | ({"decision": decision.report()} if decision is not None else {})
            for timing, decision in zip(self._timings, self._decisions, strict=True)
        ]
        return reports[0] if len(reports) == 1 else {"prompts": reports}

    def _submit(self) -> None:
        job, timeout_s, urgency = self.job, self._gateway.config.timeout_s, self.job.urgency
        for i, prompt_ids in enumerate(job.prompts):
            params = job.params if job.has_own_seed or i == 0 else self._reseeded(i)
            request = GenerateRequest(
                f"{self.answer_id}-{i}",
                prompt_ids,
                params,
                timeout_s,
                job.cache_salt,
                job.session,
                class_name=urgency.class_name,
                priority=urgency.priority,
                tenant=current_call().tenant,
                target_ttft_s=urgency.target_ttft_s,
                target_tpot_s=urgency.target_tpot_s,
            )
            self._timings[i].mark_submitted()
            self._streams.append(self._gateway.router.submit(request))

    async def _consume_all(self, sink: Sink) -> None:
        if len(self._streams) == 1:
            await self._consume(0, sink)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for i in range(len(self._streams)):
                    group.create_task(self._consume(i, sink))
        except BaseExceptionGroup as errors:
            raise _first_leaf(errors) from None

    async def _consume(self, prompt: int, sink: Sink) -> None:
        num_events = 0
        async for event in self._streams[prompt]:
            num_events += 1
            if num_events % EVENTS_PER_TURN == 0:
                await asyncio.sleep(0)  # neither a full queue nor a free socket suspends this task; others need a turn
            if isinstance(event, EndEvent):
                self._end(prompt, event)
                return
            delta = self._take(prompt, event)
            if delta is not None:
                await sink(delta)
        raise InternalError("the router's stream broke off without an end")

    def _take(self, prompt: int, event: TokensEvent) -> ChoiceDelta | None:
        n = self.job.params.n
        if event.choice >= n:
            raise InternalError(f"tokens for choice {event.choice} of {n}")
        self._decisions[prompt] = event.decision or self._decisions[prompt]
        if event.tokens:
            current_call().is_spent = True
            gap = self._timings[prompt].mark_tokens(event)
            self._gateway.metrics.tokens(len(event.tokens), gap.gap_s)
            if gap.parts_us is not None:
                self._gateway.window_of_late.note_gap(self._timings[prompt].last_token_s, gap.parts_us)
        self._timings[prompt].drafted += event.drafted
        self._timings[prompt].accepted += event.accepted
        choice = self.choices[prompt * n + event.choice]
        was_finished = choice.is_finished
        delta = choice.take(event)
        if choice.was_stopped_here and not was_finished:
            self._stop_early(prompt, event.choice)
        return delta

    def _stop_early(self, prompt: int, choice: int) -> None:
        """A stop string came: the engine need not go on with this choice, or with the whole request."""
        stream = self._streams[prompt]
        if self._is_complete(prompt):
            stream.cancel()
        else:
            stream.cancel(choice)

    def _end(self, prompt: int, event: EndEvent) -> None:
        timing = self._timings[prompt]
        timing.mark_end(event.attempts, event.resumed, event.route_s)
        self._gateway.metrics.ended(timing)
        self._remember(prompt, timing, event)
        decision = self._decisions[prompt]
        if decision is not None and event.error is None:
            self._gateway.metrics.predicted(decision, timing)
        if self._is_complete(prompt):
            return
        if self._abort_error is not None:
            raise self._abort_error
        raise event.error or Cancelled("the request was cancelled before it was complete")

    def _remember(self, prompt: int, timing: RequestTiming, event: EndEvent) -> None:
        """For GET /explain: what this request was like."""
        routing, phases = timing.routing, timing.phases
        self._gateway.window_of_late.note_request(
            RequestFacts(
                f"{self.answer_id}-{prompt}",
                current_call().request_id,
                timing.received_s,
                timing.ttft_us(),
                tuple(timing.itl_us),
                timing.e2e_s,
                timing.residence_s,
                phases.work_s or phases.prefill_s,
                len(self.job.prompts[prompt]),
                phases.cached_tokens,
                timing.num_tokens,
                routing.decode if routing else "",
                routing.prefill if routing else None,
                phases.transfer_s,
                phases.transferred_bytes,
                event.attempts,
                event.resumed,
                event.error.code if event.error else "",
                current_call().tenant,
            )
        )

    def _is_complete(self, prompt: int) -> bool:
        n = self.job.params.n
        return all(choice.is_finished for choice in self.choices[prompt * n : (prompt + 1) * n])

    def _reseeded(self, prompt: int) -> SamplingParams:
        """Draws of its own for a further prompt, apart from those of every choice of the first."""
        params = self.job.params
        return msgspec.structs.replace(params, seed=choice_seed(params.seed, MAX_CHOICES + prompt))


def _first_leaf(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that the others followed from."""
    first = errors.exceptions[0]
    return _first_leaf(first) if isinstance(first, BaseExceptionGroup) else first
