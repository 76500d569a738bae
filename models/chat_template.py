"""Chat messages to prompt text, by the Jinja template that comes with the model.

The template is the model's, never a client's; it runs in Jinja's immutable sandbox with a bound on what it may write.
Special tokens of the template become tokens; the same characters typed by a client stay text (chat_guard tells them
apart).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..core.errors import BadRequest, ModelFileError
from .chat_guard import SpecialTokens
from .chat_messages import Message, check_depth, normalize_messages

_MAX_CHARS = 1 << 24
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "chat_template"})
# Whatever a template does with odd input ends here; these are the errors that its expressions can raise.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


@dataclass(slots=True, frozen=True)
class RenderedChat:
    """Prompt text. `segments` is None when every special token in `text` is the template's own.

    Otherwise `segments` cuts `text` into (text, is_special) pieces, and only the special ones may become tokens.
    """

    text: str
    segments: list[tuple[str, bool]] | None = None


class ChatTemplate:
    """One compiled template. `tokens` holds the names a template may use for tokens, such as bos_token.

    `cut_always` gives segments for every prompt: for tokenizers that find special tokens in normalized text, where
    a search in the text as typed could miss one. Raises ModelFileError when the template does not compile.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Iterable[str],
        tokens: Mapping[str, str],
        cut_always: bool = False,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        environment = _environment(now)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as err:
            raise ModelFileError(f"the model's chat template does not compile: {err}") from err
        self._knows_developer = "developer" in source
        self._tokens = dict(tokens)
        self._cut_always = cut_always
        self._special = SpecialTokens(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        /,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        **variables: object,
    ) -> RenderedChat:
        """Raises BadRequest for messages that are malformed or that the template refuses."""
        reserved = sorted(_RESERVED & variables.keys())
        if reserved:
            raise BadRequest(f"chat_template_kwargs may not set {reserved[0]!r}", "chat_template_kwargs")
        check_depth(variables, "chat_template_kwargs")
        check_depth(tools, "tools")
        client: Message = {**variables, "messages": self._messages(messages), "tools": list(tools) if tools else None}
        text = self._write(client, add_generation_prompt)
        return self._trace(text, client, add_generation_prompt, self._special)

    def _messages(self, messages: object) -> list[Message]:
        normal = normalize_messages(messages)
        for message in normal:
            if message["role"] == "developer" and not self._knows_developer:
                message["role"] = "system"
        return normal

    def _trace(self, text: str, client: Message, prompt: bool, special: SpecialTokens) -> RenderedChat:
        """Find out which special tokens in `text` the template wrote."""
        guard = special.guard(client, text)
        if guard is None:
            return self._own(text, special)
        certain = self._write(guard.hide_all(client), prompt)
        close = self._write(guard.hide_tokens(client), prompt) if guard.is_needed else text
        agree = special.found_in(close) == special.found_in(certain)
        if agree and not guard.is_needed:
            return self._own(text, special)
        # A template may look into what a client sent, which hiding disturbs: so the less hidden the better.
        pieces = special.cut(close if agree else certain)
        segments = [(guard.reveal(piece), is_special) for piece, is_special in pieces]
        return RenderedChat("".join(piece for piece, _ in segments), segments)

    def _own(self, text: str, special: SpecialTokens) -> RenderedChat:
        """A prompt in which the template wrote every special token."""
        return RenderedChat(text, list(special.cut(text)) if self._cut_always else None)

    def _write(self, client: Message, add_generation_prompt: bool) -> str:
        pieces: list[str] = []
        room = _MAX_CHARS
        try:
            variables = {"documents": None, **client, **self._tokens, "add_generation_prompt": add_generation_prompt}
            for piece in self._template.generate(variables):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise BadRequest(f"the chat prompt is longer than {_MAX_CHARS} characters", "messages")
        except _TEMPLATE_ERRORS as err:
            raise BadRequest(f"the model's chat template refused these messages: {err}", "messages") from err
        return "".join(pieces)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, with a bound on single steps that could take the whole memory, such as `"a" * 10**12`."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: object, right: object) -> object:
        if _is_too_large(operator, left, right):
            raise jinja2.TemplateRuntimeError(f"the result of {operator!r} is too large for a chat template")
        return super().call_binop(context, operator, left, right)


def _is_too_large(operator: str, left: object, right: object) -> bool:
    if operator == "**":
        return isinstance(left, int) and isinstance(right, int) and (abs(left) > 1 << 16 or abs(right) > 64)
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(times, int) and len(sequence) * times > _MAX_CHARS:
            return True
    return False


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's text for training; for a prompt it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares an instance variable)

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    """The set-up that model authors write for: trimmed blocks, loop controls and three helpers."""
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: now().strftime(layout)
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it stands: Jinja's own filter escapes for HTML, which the model has never seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
