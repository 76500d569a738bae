"""What travels in a simulated cluster, told in words that a person can read: short names, few digits, counts in place
of contents.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from ..core.ids import WorkerKey
from ..kvtransfer.transports.inproc import LinkEnd
from ..protocol.messages import SampledToken
from ..protocol.sampling import SamplingParams

_HIDDEN = {"proof", "digests", "phases", "cache_salt", "pid", "transports", "kv_address", "load", "fingerprint"}
_PACKED = {"prompt_ids", "output_ids"}  # 4 bytes for each id
_PAIRS = {
    "request_id": "attempt",
    "decode_worker": "decode_epoch",
    "prefill_worker": "prefill_epoch",
    "worker_id": "epoch",
}
_MAX_SHOWN = 8


def tell(thing: object) -> str:
    """One message, key or value, in a few words."""
    match thing:
        case WorkerKey(worker_id=name, epoch=epoch):
            return f"{name}.{epoch[:2]}"
        case LinkEnd(reason=reason):
            return f"the link ends: {reason}"
        case SamplingParams():
            return _tell_params(thing)
        case SampledToken(token_id=token_id):
            return str(token_id)
        case msgspec.Struct():
            return " ".join([type(thing).__name__, *_fields(thing)])
        case bytes():
            return thing[:2].hex()
        case list() | tuple():
            return _tell_items([tell(item) for item in thing])
        case float():
            return f"{thing:.4g}"
        case _:
            return str(thing)


def _tell_params(params: SamplingParams) -> str:
    changed = [name for name in params.__struct_fields__ if getattr(params, name) != getattr(SamplingParams(), name)]
    return "{" + ", ".join(f"{name} {tell(getattr(params, name))}" for name in changed if name != "seed") + "}"


def _tell_items(items: list[str]) -> str:
    more = f" … {len(items)} in all" if len(items) > _MAX_SHOWN else ""
    return "[" + ", ".join(items[:_MAX_SHOWN]) + more + "]"


def _fields(message: msgspec.Struct) -> Iterator[str]:
    """The fields that say something, each with its name; an id and what completes it as one."""
    defaults = dict(zip(reversed(message.__struct_fields__), reversed(message.__struct_defaults__), strict=False))
    seconds = {_PAIRS[name] for name in message.__struct_fields__ if name in _PAIRS}
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if name in _HIDDEN or name in seconds or value == defaults.get(name, msgspec.NODEFAULT):
            continue
        if name in _PACKED:
            yield f"{name[:-4]} {len(value) // 4} ids"
        elif name == "request_id":
            yield f"{value}#{getattr(message, 'attempt', '?')}"
        elif name in _PAIRS:
            yield f"{name.removesuffix('_worker')} {tell(WorkerKey(value, getattr(message, _PAIRS[name])))}"
        else:
            yield f"{name} {tell(value)}"
