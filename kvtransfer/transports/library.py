"""What the transports over a library have in common: how it is imported, how its errors become ours, their offers."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TypeVar

import msgspec

from ...core.errors import TransferFailed
from ...engine.kv_memory import KVMemory
from ..bulk import MAX_OFFER_BYTES, LinkFacts, Span, Unusable

T = TypeVar("T", bound=msgspec.Struct)

PIECE_BYTES = 4 << 20  # what is asked of a library at once; a revoked ticket waits for one of them at most

# A process can only hold one UCX: each of these packages brings its own, with the same symbols and settings.
_BRINGS_UCX = {"nixl": ("nixl_cu12", "nixl"), "ucx": ("ucxx",)}


@contextlib.contextmanager
def library_errors(doing: str) -> Iterator[None]:
    """Whatever a library raises becomes TransferFailed: it ends a link, never the worker."""
    try:
        yield
    except (OSError, TransferFailed):
        raise
    except Exception as err:
        raise TransferFailed(f"{doing}: {type(err).__name__}: {err}") from err


def use_ucx_of(transport: str) -> None:
    """Raises Unusable when this process already uses the UCX of another package."""
    for other, modules in _BRINGS_UCX.items():
        if other != transport and any(module in sys.modules for module in modules):
            raise Unusable(f"{transport} and {other} each bring their own UCX, and one process can use one: name one")


def set_defaults(settings: dict[str, str]) -> None:
    """Environment variables that a library reads when it is loaded; what the user has set stays."""
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def encode_offer(offer: msgspec.Struct) -> bytes:
    """Raises Unusable for one that is too large to be exchanged."""
    data = msgspec.msgpack.encode(offer)
    if len(data) > MAX_OFFER_BYTES:
        raise Unusable(f"an offer of {len(data)} bytes; at most {MAX_OFFER_BYTES} can be exchanged")
    return data


def decode_offer(data: bytes, kind: type[T], facts: LinkFacts) -> T:
    """Raises TransferFailed for anything that `encode_offer` did not make."""
    if len(data) > MAX_OFFER_BYTES:
        raise TransferFailed(f"{facts.peer} offers {len(data)} bytes; the bound is {MAX_OFFER_BYTES}")
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError) as err:
        raise TransferFailed(f"the offer of {facts.peer} is not a {kind.__name__}: {err}") from err


def region_bytes(memory: KVMemory) -> int:
    """Size of what is registered: blocks and staging."""
    return memory.nbytes + memory.staging_bytes


def require_inside(spans: list[Span], nbytes: int, whose: str) -> None:
    """Raises TransferFailed for a span that leaves the memory: a library would read or write there."""
    for offset, length in spans:
        if offset < 0 or length <= 0 or offset + length > nbytes:
            raise TransferFailed(f"bytes [{offset}, {offset + length}) are outside {whose} memory of {nbytes} bytes")
