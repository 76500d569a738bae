"""From text, messages or ids to prompt token ids. Sizes are checked before tokenizing; long text leaves the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from ..core.errors import BadRequest
from .bodies import ChatMessage, ContentPart, shorten
from .config import Limits
from .errors import Unsupported
from .tokens import GatewayTokenizer

OFF_LOOP_CHARS = 4096  # tokenizing this much takes about a millisecond
MOST_CHARS_PER_TOKEN = 128  # longer text cannot fit the window: no vocabulary has words like that all along

T = TypeVar("T")


class PromptReader:
    """Owns the one executor of the gateway. `close` ends it."""

    def __init__(self, tokenizer: GatewayTokenizer, limits: Limits, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._max_choices = limits.max_choices
        self._max_chars = min(limits.max_prompt_chars, max_model_len * MOST_CHARS_PER_TOKEN)
        self._max_tokens = max_model_len
        self._working: list[Future[Any]] = []
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="penstock-tokenize")

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def from_prompt(self, prompt: str | list[Any], n: int, add_special_tokens: bool) -> list[list[int]]:
        """One list of ids for each prompt in the `prompt` field of a completion."""
        prompts = self._split(prompt)
        if len(prompts) * n > self._max_choices:
            raise BadRequest(
                f"prompt: {len(prompts)} prompts x n={n} is more choices than the bound of {self._max_choices}",
                "prompt",
            )
        self._check_chars(sum(len(p) for p in prompts if isinstance(p, str)), "prompt")
        return [await self._ids_of(one, add_special_tokens) for one in prompts]

    async def from_text(self, text: str, add_special_tokens: bool) -> list[int]:
        self._check_chars(len(text), "prompt")
        return await self._off_loop(
            len(text), lambda: self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )

    async def from_messages(self, messages: list[ChatMessage], add_generation_prompt: bool) -> list[int]:
        """The ids of the conversation in the model's own template."""
        plain = [_plain_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
        num_chars = sum(len(m["content"]) for m in plain)
        self._check_chars(num_chars, "messages")
        ids = await self._off_loop(
            num_chars, lambda: self._tokenizer.encode_chat(plain, add_generation_prompt=add_generation_prompt)
        )
        return _not_empty(ids, "messages")

    async def to_text(self, token_ids: list[int]) -> str:
        return await self._off_loop(
            len(token_ids), lambda: self._tokenizer.decode(token_ids, skip_special_tokens=False)
        )

    def check_ids(self, ids: Iterable[Any], param: str) -> list[int]:
        """Ids from a client, each in the vocabulary."""
        bound = self._tokenizer.vocab_size
        checked = list(ids)
        if checked and set(map(type, checked)) == {int} and min(checked) >= 0 and max(checked) < bound:
            return checked
        for position, token_id in enumerate(checked):
            if type(token_id) is not int or not 0 <= token_id < bound:
                name = f"{param}[{position}]"
                raise BadRequest(
                    f"{name}: {shorten(token_id)} is not a token id of this model (0 to {bound - 1})", param
                )
        return checked

    def _split(self, prompt: str | list[Any]) -> list[str | list[int]]:
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise BadRequest(
                "prompt: the list is empty; give a string, strings, token ids or lists of token ids", "prompt"
            )
        kind = type(prompt[0])
        self._check_length(len(prompt), self._max_tokens if kind is int else self._max_choices)
        if kind not in (str, int, list) or any(type(item) is not kind for item in prompt):
            raise BadRequest(
                f"prompt: {shorten(prompt)} is not a string, a list of strings, of token ids, or of lists of token ids",
                "prompt",
            )
        if kind is int:
            return [self.check_ids(prompt, "prompt")]
        if kind is str:
            return list(prompt)
        for ids in prompt:
            self._check_length(len(ids), self._max_tokens)
        return [self.check_ids(ids, f"prompt[{i}]") for i, ids in enumerate(prompt)]

    def _check_length(self, length: int, bound: int) -> None:
        """Before any look at the items: a list may hold millions."""
        if length > bound:
            raise BadRequest(f"prompt: a list of {length} items, the bound is {bound}; shorten it", "prompt")

    async def _ids_of(self, prompt: str | list[int], add_special_tokens: bool) -> list[int]:
        ids = await self.from_text(prompt, add_special_tokens) if isinstance(prompt, str) else prompt
        return _not_empty(ids, "prompt")

    def _check_chars(self, num_chars: int, param: str) -> None:
        bound = self._max_chars
        if num_chars > bound:
            raise BadRequest(f"{param}: {num_chars} characters, the bound is {bound}; shorten it", param)

    async def _off_loop(self, num_chars: int, work: Callable[[], T]) -> T:
        """Short work at once, long work in the executor, behind long work everything: the tokenizer has one lock."""
        self._working = [future for future in self._working if not future.done()]
        if num_chars < OFF_LOOP_CHARS and not self._working:
            return work()
        future = self._executor.submit(work)
        self._working.append(future)
        return await asyncio.wrap_future(future)


def _not_empty(ids: list[int], param: str) -> list[int]:
    if not ids:
        raise BadRequest(f"{param}: has no tokens; give at least one", param)
    return ids


def _plain_message(message: ChatMessage, at: str) -> dict[str, str]:
    """Role and text as chat templates want them."""
    for field in ("tool_calls", "function_call", "audio"):
        if getattr(message, field):
            raise Unsupported(f"{at}.{field} is not supported by this server; send text content only", f"{at}.{field}")
    if message.content is None:
        raise BadRequest(f"{at}.content is missing; give a string or a list of text parts", f"{at}.content")
    content = message.content
    if not isinstance(content, str):
        content = "\n".join(_part_text(part, f"{at}.content[{i}]") for i, part in enumerate(content))
    plain = {"role": "system" if message.role == "developer" else message.role, "content": content}
    return plain | {"name": message.name} if message.name else plain


def _part_text(part: ContentPart, at: str) -> str:
    if part.type == "refusal" and part.refusal is not None:
        return part.refusal
    if part.type != "text":
        raise Unsupported(f"{at}.type: {part.type!r} is not supported by this server; only 'text' is", f"{at}.type")
    if part.text is None:
        raise BadRequest(f"{at}.text is missing", f"{at}.text")
    return part.text
