"""What the HTTP front is told at start. Everything else comes with a request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of one request and of the process. What is over a bound is refused before any work is done for it."""

    max_body_bytes: int = 8 << 20
    max_header_bytes: int = 8190  # of one header line; the request line has the same bound
    max_prompt_chars: int = 4 << 20  # text before it is tokenized, all messages together
    max_n: int = 16
    max_choices: int = 64  # prompts x n
    max_logprob_entries: int = 1 << 20  # choices x max_tokens x (1 + alternatives)
    max_concurrent_requests: int = 1024  # generations and tokenizations held at one time
    body_timeout_s: float = 30.0  # to receive the whole body
    write_timeout_s: float = 10.0  # a client that reads nothing for so long is cut


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """`model_name` is the id in /v1/models, `aliases` are accepted as well. No api_keys: the API is open.

    With more than one key each key has a prefix cache of its own. `timeout_s` bounds one generation from end to end.
    """

    model_name: str
    max_model_len: int
    aliases: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    timeout_s: float = 600.0
    ping_interval_s: float = 10.0
    cors_origins: tuple[str, ...] = ()
    has_open_metrics: bool = False  # /metrics answers without a key
    limits: Limits = Limits()

    @property
    def model_names(self) -> tuple[str, ...]:
        return (self.model_name, *self.aliases)
