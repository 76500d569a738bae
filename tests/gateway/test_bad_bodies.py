"""Thousands of wrong bodies, made from a seed, while a stream runs beside them: no 500, the stream says the same."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

from penstock.gateway.bodies import REFUSED

NUMBERS = ["-1", "0", "1", "2147483647", "2147483648", "9223372036854775807", "9223372036854775808", "1e309", "-1e309"]
NUMBERS += ["NaN", "Infinity", "-Infinity", "1e-400", "0.5", "-0.0", "1" * 5000, "1e5", "1.0"]
WORDS = ['"1"', "true", "false", "null", '""', '"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"' + "x" * 5000 + '"']
NESTED = ["[]", "{}", "[null]", '[""]', '{"a": 1}', "[[[]]]", '[1, "a"]', "[true]", "[1.5]"]
NESTED += ["[" * 200 + "]" * 200, '{"a":' * 200 + "1" + "}" * 200]
VALUES = NUMBERS + WORDS + NESTED

SAMPLING = ["max_tokens", "min_tokens", "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"]
SAMPLING += ["presence_penalty", "frequency_penalty", "logit_bias", "stop", "stop_token_ids", "ignore_eos", "stream"]
SAMPLING += ["skip_special_tokens", "include_stop_str_in_output", "stream_options", "logprobs", "cache_salt", "model"]
SAMPLING += ["user", "metadata", "store", "service_tier"]
CHAT = ["messages", "top_logprobs", "max_completion_tokens", "add_generation_prompt"]
FIELDS = {
    "/v1/completions": [*SAMPLING, "prompt", "add_special_tokens", *REFUSED],
    "/v1/chat/completions": [
        *SAMPLING,
        "messages",
        "top_logprobs",
        "max_completion_tokens",
        "add_generation_prompt",
        *REFUSED,
    ],
    "/tokenize": ["model", "prompt", "messages", "add_special_tokens", "add_generation_prompt", "return_token_strs"],
    "/detokenize": ["model", "tokens"],
}
VALID = {
    "/v1/completions": {"model": '"toy"', "prompt": '"hi"', "max_tokens": "4"},
    "/v1/chat/completions": {"model": '"toy"', "messages": '[{"role": "user", "content": "hi"}]', "max_tokens": "4"},
    "/tokenize": {"prompt": '"hi"'},
    "/detokenize": {"tokens": "[104]"},
}
INSIDE = {
    "stream_options": ['{"include_usage": %s}', '{"continuous_usage_stats": %s}'],
    "logit_bias": ['{"1": %s}', '{"-1": %s}', '{"1e3": %s}'],
    "stop": ["[%s]"],
    "stop_token_ids": ["[%s]"],
    "prompt": ["[%s]", "[[%s]]", "[97, %s]", '["a", %s]'],
    "tokens": ["[%s]"],
    "messages": [
        "[%s]",
        '[{"role": %s, "content": "x"}]',
        '[{"role": "user", "content": %s}]',
        '[{"role": "user", "content": [%s]}]',
        '[{"role": "user", "content": [{"type": %s}]}]',
        '[{"role": "user", "content": [{"type": "text", "text": %s}]}]',
        '[{"role": "assistant", "content": "x", "tool_calls": %s}]',
        '[{"role": "user", "content": "x", "name": %s}]',
    ],
}


STRAY_BYTES = [b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\x00", b"\xef\xbb\xbf", b","]
START = b'{"model":"toy","prompt":"x",'
DEEP = [b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt":' + b"[" * 50_000 + b"]" * 50_000 + b"}"]
DEEP += [START + b'"tools":' + b"[" * depth + b"]" * depth + b"}" for depth in (10, 900, 1100, 50_000)]
DEEP += [START + b'"zebra":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}" for depth in (900, 50_000)]


def _join(fields: dict[str, str]) -> bytes:
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}").encode()


def boundary_bodies() -> Iterator[tuple[str, bytes]]:
    """Every value in every field, and inside of every field that holds more."""
    for path, names in FIELDS.items():
        for name in names:
            for value in VALUES:
                yield path, _join(VALID[path] | {name: value})
                for template in INSIDE.get(name, ()):
                    yield path, _join(VALID[path] | {name: template % value})


def broken_bodies(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Valid bodies with bytes cut, changed, doubled or mixed with several wrong fields."""
    rng = random.Random(seed)
    for _ in range(count):
        path = rng.choice(list(FIELDS))
        fields = dict(VALID[path])
        for name in rng.sample(FIELDS[path], k=min(len(FIELDS[path]), rng.randrange(5))):
            template = rng.choice(["%s", *INSIDE.get(name, ())])
            fields[name] = template % rng.choice(VALUES)
        body = bytearray(_join(fields))
        match rng.randrange(5):
            case 0:
                del body[rng.randrange(len(body)) :]
            case 1:
                body[rng.randrange(len(body))] = rng.randrange(256)
            case 2:
                position = rng.randrange(len(body))
                body[position:position] = rng.choice(STRAY_BYTES)
            case 3:
                body *= 2
            case _:
                pass
        yield path, bytes(body)


def test_bad_bodies_never_fail_the_server_nor_a_stream_beside(serve: Any) -> None:
    bodies = [*boundary_bodies(), *broken_bodies(seed=7, count=1000)]
    bodies += [(path, body) for path in FIELDS for body in DEEP]
    assert len(bodies) > 2000

    async def run() -> None:
        async with serve(hold_before=3) as served:
            beside = asyncio.create_task(served.events("/v1/completions", max_tokens=20))
            await served.router.entered.wait()
            live = served.router.only
            served.router.hold_before = None  # the requests below run through
            statuses: Counter[int] = Counter()
            for path, body in bodies:
                statuses[await _send(served, path, body)] += 1
            assert set(statuses) <= {200, 400, 404}, statuses
            assert statuses[400] > 2000, statuses
            live.wake.set()
            *chunks, done = await beside
            assert done == "[DONE]"
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "The quick brown fox "
            assert served.gateway.running.count == 0
            assert served.gateway.admission.active == 0

    asyncio.run(run())


async def _send(served: Any, path: str, body: bytes) -> int:
    """The status; an error must have the error body and name a parameter where it is about one."""
    headers = {"Content-Type": "application/json"}
    async with served.http.post(served.url + path, data=body, headers=headers) as response:
        data = await response.read()
        status: int = response.status
    if status != 200:
        error = json.loads(data)["error"]
        assert set(error) == {"message", "type", "param", "code"}, body[:200]
        assert len(error["message"]) < 1000
        assert "Traceback" not in error["message"]
    elif data.startswith(b"{"):
        json.loads(data)
    assert b"internal_error" not in data, body[:200]
    return status
