"""The test's side of `testing/bulk_peer.py`: starts such processes and talks to them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

ANSWER_S = 20.0

Spans = Sequence[tuple[int, int]]


class BulkError(RuntimeError):
    """What the other process could not do, with the error it raised there."""


class BulkProcess:
    """One process with ends of bulk links. `ask` waits for the answer; `tell` and `answer` do not, and do."""

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None) -> None:
        """`settings`: environment variables of the process, beside our own."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        command = [sys.executable, "-m", "penstock.testing.bulk_peer", str(folder)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(settings or {})
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, bufsize=0, stdin=pipe, stdout=pipe, stderr=self._errors, env=environment
        )
        self._buffer = b""
        self._jobs = count()

    def ask(self, do: str, **arguments: object) -> Any:
        self.tell(do, **arguments)
        return self.answer()

    def tell(self, do: str, **arguments: object) -> None:
        if self.process.stdin is None or self.process.stdin.closed:
            raise BulkError(f"{do}: the process has been ended")
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        except BrokenPipeError as err:
            raise BulkError(f"{do}: the process is gone: {self.errors[-2000:]}") from err

    def answer(self) -> Any:
        """Raises BulkError for an error there, and when no answer comes."""
        answer = json.loads(self._line())
        if "error" in answer:
            raise BulkError(answer["error"])
        return answer["ok"]

    def start(self, link: str, what: str, source: Spans, target: Spans | None = None, wanted: int = 1 << 30) -> str:
        """Begin to send, receive or discard; the job's name, for `ask("wait", job=…)`."""
        job = self.new_job()
        self.ask("start", link=link, job=job, what=what, source=source, target=target, wanted=wanted)
        return job

    def new_job(self) -> str:
        return f"job-{next(self._jobs)}"

    def wait(self, job: str) -> float:
        """Seconds that the job took; raises BulkError with what it raised."""
        return float(self.ask("wait", job=job))

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen process go on; nothing for one that is gone."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self._reap()

    def close(self) -> None:
        """End it in order, as a worker would; by force when it does not."""
        if self.process.poll() is None:
            try:
                self.ask("quit")
                self.process.wait(10)
            except (BulkError, OSError, subprocess.TimeoutExpired):
                self.process.kill()
        self._reap()

    @property
    def errors(self) -> str:
        """What it has written to standard error."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        while b"\n" not in self._buffer:
            if not select.select([self.process.stdout], [], [], ANSWER_S)[0]:
                self.process.kill()  # a late answer would be taken for that to the next command
                raise BulkError(f"no answer within {ANSWER_S:g} s: {self.errors[-2000:]}")
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                raise BulkError(f"the process is gone with status {self.process.wait(10)}: {self.errors[-2000:]}")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def _reap(self) -> None:
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self._errors.close()
