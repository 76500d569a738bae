"""Training text: what the served model itself answers, many prompts at a time.

1. Every prompt has a number; its temperature and seed follow from that, so the same run gives the same text.
2. A prompt takes a lane (a fixed share of the pool's blocks), is prefilled in chunks beside the others' decode, and
   leaves the lane when its answer ends.
3. Each finished sample is appended to a file of JSON lines at once. A run that was cut goes on behind what is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ConfigError
from ..core.ids import AttemptKey, BlockId
from ..engine.interface import Engine, ScheduledSeq
from ..engine.sequence import Sequence as Generation
from ..engine.sequence import blocks_for
from ..protocol.sampling import SamplingParams

Progress = Callable[[int, int], None]  # (samples done, samples in all)


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt of `number` and what the model answered, the end token included where there is one."""

    number: int
    temperature: float
    prompt_ids: list[int]
    output_ids: list[int]

    @property
    def token_ids(self) -> list[int]:
        return self.prompt_ids + self.output_ids


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """`temperatures` take turns over the prompts. `chunk`: new tokens of a prompt in one step."""

    max_new_tokens: int = 320
    temperatures: tuple[float, ...] = (0.0, 0.7)
    seed: int = 0
    num_lanes: int = 64
    chunk: int = 512

    def params(self, number: int) -> SamplingParams:
        """How the answer to prompt `number` is sampled."""
        temperature = self.temperatures[number % len(self.temperatures)]
        return SamplingParams(max_tokens=self.max_new_tokens, temperature=temperature, seed=self.seed + number)


def generate_samples(
    make_engine: Callable[[], Engine],
    prompts: Sequence[list[int]],
    path: Path,
    plan: GenerationPlan,
    progress: Progress | None = None,
) -> list[Sample]:
    """One sample for each of `prompts`, in their order; `path` holds those that are finished, from earlier runs too.

    The engine is made when one is missing. Raises ConfigError when its pool cannot hold the longest prompt and its
    answer, or `path` is of other prompts or another plan.
    """
    done = {sample.number: sample for sample in read_samples(path)}
    for number, sample in done.items():
        is_ours = number < len(prompts) and sample.prompt_ids == prompts[number]
        if not is_ours or sample.temperature != plan.params(number).temperature:
            raise ConfigError(f"{path}: holds samples of other prompts; remove it or name another folder")
    waiting = [number for number in range(len(prompts)) if number not in done]
    if not waiting:
        return [done[number] for number in range(len(prompts))]
    _drop_cut_line(path)
    with path.open("a", encoding="utf-8") as file:
        for sample in _Lanes(make_engine(), plan, max(map(len, prompts))).run(prompts, waiting):
            done[sample.number] = sample
            file.write(_line(sample))
            file.flush()
            if progress is not None:
                progress(len(done), len(prompts))
    return [done[number] for number in range(len(prompts))]


def read_samples(path: Path) -> Iterator[Sample]:
    """The samples in `path`, none where there is no such file; a last line that was cut off is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                number, temperature, prompt_ids, output_ids = json.loads(line)
                yield Sample(number, temperature, prompt_ids, output_ids)


def _drop_cut_line(path: Path) -> None:
    """What is appended must begin a line."""
    if path.exists():
        content = path.read_bytes()
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def _line(sample: Sample) -> str:
    return json.dumps([sample.number, sample.temperature, sample.prompt_ids, sample.output_ids]) + "\n"


class _Lanes:
    """Sequences that run side by side, each in its own blocks."""

    def __init__(self, engine: Engine, plan: GenerationPlan, longest_prompt: int) -> None:
        spec = engine.spec
        self._engine, self._plan = engine, plan
        self._blocks = blocks_for(longest_prompt + plan.max_new_tokens, spec.block_size)
        num_lanes = min(plan.num_lanes, spec.num_blocks // self._blocks)
        if longest_prompt + plan.max_new_tokens > spec.max_sequence_tokens or num_lanes < 1:
            needed = longest_prompt + plan.max_new_tokens
            raise ConfigError(f"{needed} tokens of prompt and answer, the engine holds {spec.max_sequence_tokens}")
        self._free = list(reversed(range(num_lanes)))
        self._running: dict[int, tuple[int, Generation]] = {}  # lane → (number of the prompt, its sequence)

    def run(self, prompts: Sequence[list[int]], waiting: list[int]) -> Iterator[Sample]:
        """Samples as they end."""
        queue = iter(waiting)
        while True:
            while self._free and (number := next(queue, None)) is not None:
                lane = self._free.pop()
                self._running[lane] = number, self._sequence(lane, number, prompts[number])
            if not self._running:
                return
            yield from self._step()

    def _step(self) -> Iterator[Sample]:
        """One step: every decoding sequence, and one chunk of those that prefill."""
        budget, entries, lanes = self._plan.chunk, [], []
        for lane, (_, seq) in self._running.items():
            new = min(seq.num_uncomputed_tokens, budget if seq.is_prefilling else 1)
            if new:
                budget -= new if seq.is_prefilling else 0
                entries.append(ScheduledSeq(seq, new))
                lanes.append(lane)
        sampled = self._engine.execute(entries)
        for lane, entry, tokens in zip(lanes, entries, sampled, strict=True):
            entry.seq.num_computed_tokens += entry.num_new_tokens
            entry.seq.output_ids += [token.token_id for token in tokens]
            if self._has_ended(entry.seq):
                number, seq = self._running.pop(lane)
                self._free.append(lane)
                yield Sample(number, seq.params.temperature, seq.prompt_ids, seq.output_ids)

    def _has_ended(self, seq: Generation) -> bool:
        output = seq.output_ids
        is_full = len(output) == self._plan.max_new_tokens
        return bool(output) and (is_full or output[-1] in self._engine.spec.eos_token_ids)

    def _sequence(self, lane: int, number: int, prompt_ids: list[int]) -> Generation:
        return Generation(
            key=AttemptKey(f"sample-{number}", 0),
            choice=0,
            prompt_ids=prompt_ids,
            params=self._plan.params(number),
            hash_key=b"",
            arrival=0.0,
            deadline=0.0,
            block_table=[BlockId(lane * self._blocks + at) for at in range(self._blocks)],
        )
