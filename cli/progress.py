"""What `penstock serve` says to people: a line for each process as it becomes ready, then a request to paste."""

from __future__ import annotations

import json
import sys
from typing import TextIO

from .. import __version__
from ..core.clock import Clock
from ..core.config import Topology
from ..deploy.cluster import ChildExited, News, Stopping
from ..deploy.reports import ClusterReady, Listening, WorkerChanged
from .terminal import has_colour, printable, style


class Progress:
    """Hears the news of a cluster and prints what a person wants to know, each fact once."""

    def __init__(self, topology: Topology, clock: Clock, out: TextIO = sys.stdout) -> None:
        self._topology, self._clock, self._out = topology, clock, out
        self._born = clock.now()
        self._url = ""
        self._announced: set[tuple[str, str]] = set()  # (worker, epoch), and (worker, "peer transport")
        self._is_ready = self._is_stopping = False
        self._is_coloured = has_colour(out)
        self._is_heard = True

    def starting(self) -> None:
        workers = self._topology.workers()
        count = {role: sum(w.role == role for w in workers) for role in ("prefill", "decode", "both")}
        shape = ", ".join(f"{n} {_ROLE_WORDS[role]}" for role, n in count.items() if n)
        self._say(f"penstock {__version__}: {self._topology.model.served_name}, {shape}")

    def tell(self, news: News) -> None:
        match news:
            case Listening():
                self._listening(news)
            case WorkerChanged():
                self._worker(news)
            case ClusterReady():
                self._ready(news)
            case ChildExited():
                self._is_ready = False
                word = style("ended", "red", self._is_coloured)
                self._say(
                    f"  {news.name:<12}{word}: pid {news.pid}, {news.cause}; starts again in {news.restart_in_s:g} s"
                )
            case Stopping():
                self._stopping()

    def ended(self) -> None:
        self._say("stopped; nothing left running")

    def _listening(self, news: Listening) -> None:
        if news.url != self._url:
            self._url = news.url
            self._say(f"  {'router':<12}listening on {news.url}")

    def _worker(self, news: WorkerChanged) -> None:
        if ":" in news.state and self._is_new(news.worker_id, news.state):  # refused: why
            self._say(f"  {news.worker_id:<12}{style(printable(news.state), 'red', self._is_coloured)}")
        if news.state != "ready":
            return
        if self._is_new(news.worker_id, news.epoch):
            tokens = news.total_blocks * self._topology.block_size
            word = style("ready", "green", self._is_coloured)
            took = "" if ("", "first ready") in self._announced else f", after {self._clock.now() - self._born:.1f} s"
            facts = f"{_ROLE_WORDS[news.role]}, pid {news.pid}, {news.total_blocks} blocks ({tokens:,} tokens)"
            self._say(f"  {news.worker_id:<12}{word}: {facts}, {news.dtype}{took}")
        for peer, transport in sorted(news.links.items()):
            source, destination = sorted((news.worker_id, peer), reverse=True)  # prefill-… → decode-…
            if self._is_new(source, f"{destination} {transport}"):
                self._say(f"  {source} → {destination}: KV blocks go by {_TRANSPORT_WORDS.get(transport, transport)}")

    def _ready(self, news: ClusterReady) -> None:
        if self._is_ready:
            return
        self._is_ready = True
        if not self._is_new("", "first ready"):
            self._say("ready again")
            return
        window = f"longest prompt + output {news.max_sequence_tokens:,} tokens"
        self._say(f"  KV cache: {news.bytes_per_token:,} bytes per token, {news.block_size} tokens a block; {window}")
        self._say(f"\nready at {style(self._url + '/v1', 'bold', self._is_coloured)}; try")
        self._say(f"\n  {curl_command(self._url, news.model, self._has_keys)}\n")
        self._say("Ctrl-C stops it: running requests finish first, a second Ctrl-C ends them.")

    def _stopping(self) -> None:
        self._say(
            "\nending now" if self._is_stopping else "\nstopping: running requests finish; Ctrl-C again ends them"
        )
        self._is_stopping = True

    @property
    def _has_keys(self) -> bool:
        return bool(self._topology.gateway.api_keys or self._topology.gateway.api_key_file)

    def _is_new(self, subject: str, fact: str) -> bool:
        if (subject, fact) in self._announced:
            return False
        self._announced.add((subject, fact))
        return True

    def _say(self, line: str) -> None:
        if self._is_heard:
            try:
                print(line, file=self._out, flush=True)
            except BrokenPipeError:  # whoever read our stdout has gone; the cluster goes on
                self._is_heard = False


_ROLE_WORDS = {"prefill": "prefill", "decode": "decode", "both": "colocated"}
_TRANSPORT_WORDS = {"shm": "shared memory (shm)", "tcp": "TCP (tcp)"}


def curl_command(url: str, model: str, has_keys: bool) -> str:
    """A chat request to paste into a shell."""
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    body = json.dumps({"model": model, "messages": messages, "max_tokens": 128, "stream": True}).replace("'", "'\\''")
    key = ' -H "Authorization: Bearer $PENSTOCK_API_KEY"' if has_keys else ""
    return f"curl -N {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"
