"""Check the messages of a chat request and give them the one shape that chat templates read.

A template sees plain dictionaries with string content. Every refusal is a BadRequest that names the place, such as
`messages[2].content`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ..core.errors import BadRequest

_KIND_NAMES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
}

# Templates build special tokens from the role ("<|" + role + "|>"), so a role is never free text.
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_MAX_DEPTH = 64

Message = dict[str, object]


def normalize_messages(messages: object) -> list[Message]:
    """Copy `messages` with text parts joined by a newline and tool arguments parsed; unknown keys are left out."""
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise BadRequest(f"messages must be an array, not {_kind(messages)}", "messages")
    if not messages:
        raise BadRequest("messages is empty; send at least one message", "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def check_depth(value: object, where: str, depth: int = 0) -> None:
    """Refuse JSON nested so deep that walking or printing it could exhaust the stack."""
    if depth > _MAX_DEPTH:
        raise BadRequest(f"{where} is nested more than {_MAX_DEPTH} levels deep; flatten it", where)
    if isinstance(value, Mapping):
        for item in value.values():
            check_depth(item, where, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            check_depth(item, where, depth + 1)


def _message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise BadRequest(f"{where} must be an object, not {_kind(message)}", where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRequest(f"{where}.role is {_shown(role)}; it must be one of {', '.join(ROLES)}", f"{where}.role")
    normal: Message = {"role": role, "content": _content(message, role, f"{where}.content")}
    for key in ("name", "tool_call_id", "reasoning_content"):
        if message.get(key) is not None:
            normal[key] = _string(message[key], f"{where}.{key}")
    if message.get("tool_calls"):
        normal["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
    return normal


def _content(message: Mapping[str, object], role: str, where: str) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        if not content:
            raise BadRequest(f"{where} is an empty array; send a string or at least one text part", where)
        return "\n".join(_part(part, f"{where}[{index}]") for index, part in enumerate(content))
    if content is None and role == "assistant" and (message.get("tool_calls") or message.get("refusal")):
        return ""
    if content is None:
        raise BadRequest(f"{where} is missing; send a string or an array of text parts", where)
    raise BadRequest(f"{where} must be a string or an array of text parts, not {_kind(content)}", where)


def _part(part: object, where: str) -> str:
    if not isinstance(part, Mapping):
        raise BadRequest(f"{where} must be an object, not {_kind(part)}", where)
    if part.get("type") != "text":
        kind = _shown(part.get("type"))
        raise BadRequest(f"{where}.type is {kind}; this model reads only parts of type 'text'", f"{where}.type")
    return _string(part.get("text"), f"{where}.text")


def _tool_calls(calls: object, where: str) -> list[Message]:
    if not isinstance(calls, list):
        raise BadRequest(f"{where} must be an array, not {_kind(calls)}", where)
    return [_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: object, where: str) -> Message:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise BadRequest(f"{where} must be an object with a 'function' object", where)
    normal: Message = {
        "type": "function",
        "function": {
            "name": _string(function.get("name"), f"{where}.function.name"),
            "arguments": _arguments(function.get("arguments"), f"{where}.function.arguments"),
        },
    }
    if call.get("id") is not None:
        normal["id"] = _string(call["id"], f"{where}.id")
    return normal


def _arguments(arguments: object, where: str) -> dict[str, object]:
    """Templates print arguments as JSON themselves, so the JSON text of the OpenAI shape is parsed here."""
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as err:
        raise BadRequest(f"{where} is not valid JSON: {err}", where) from err
    if not isinstance(value, dict):
        raise BadRequest(f"{where} must be the JSON text of an object, not of {_kind(value)}", where)
    check_depth(value, where)
    return value


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{where} must be a string, not {_kind(value)}", where)
    return value


def _kind(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "a number"
    return _KIND_NAMES.get(type(value), type(value).__name__)


def _shown(value: object) -> str:
    """The value for a message, cut short: a client's text may be long."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
