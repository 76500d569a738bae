"""`penstock chat`: a conversation in the terminal with a cluster that is already running."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from .arguments import Commands, add_command, add_server_options, number, whole_number
from .errors import CliError, print_error
from .terminal import has_colour, printable, style

if TYPE_CHECKING:
    from .http_client import Server

Message = dict[str, str]
_COMMANDS = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def register(commands: Commands) -> None:
    parser = add_command(
        commands,
        "chat",
        run,
        "Talk to a running cluster in the terminal.",
        f"Answers stream as they are made. {_COMMANDS}.",
        'penstock chat --system "You answer in one sentence."',
    )
    add_server_options(parser)
    parser.add_argument("--model", help="model to ask for (default: the first one the cluster serves)")
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: the chat template's own)")
    parser.add_argument(
        "--max-tokens", type=whole_number(1, 1 << 20), default=512, help="longest answer, in tokens (default: 512)"
    )
    parser.add_argument(
        "--temperature", type=number(0, 2), default=0.7, help="0 is greedy, higher is more varied (default: 0.7)"
    )


def run(args: argparse.Namespace) -> int:
    from .http_client import Server

    server = Server(args.url, args.api_key)
    model = args.model or first_model(server)
    settings = {"model": model, "max_tokens": args.max_tokens, "temperature": args.temperature, "stream": True}
    if sys.stdin.isatty():
        print(f"{model} at {server.url}. {_COMMANDS}.", file=sys.stderr)
    conversation = Conversation(server, settings, args.system)
    for line in _questions(sys.stdin):
        if line in ("/exit", "/quit"):
            break
        if line == "/reset":
            conversation.reset()
            print("conversation forgotten", file=sys.stderr)
        else:
            _answer(conversation, line)
    return 0


class Conversation:
    """The messages so far. A turn that fails leaves them as they were."""

    def __init__(self, server: Server, settings: dict[str, Any], system: str | None) -> None:
        self._server, self._settings = server, settings
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._opening)

    def reset(self) -> None:
        self.messages = list(self._opening)

    def ask(self, text: str) -> Generator[str, None, None]:
        """Pieces of the answer. What has arrived when the caller leaves early counts as the answer."""
        asked = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        try:
            with self._server.stream("/v1/chat/completions", {**self._settings, "messages": asked}) as events:
                for event in events:
                    piece = piece_of(event)
                    if piece:
                        pieces.append(piece)
                        yield piece
        finally:
            if pieces:
                self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]


def piece_of(event: Any) -> str:
    """The text in one chunk of a chat stream; raises CliError for an error event."""
    if isinstance(event, dict) and "error" in event:
        raise CliError(f"the answer broke off: {event['error'].get('message', event['error'])}")
    try:
        choices = event["choices"]
        return str(choices[0]["delta"].get("content") or "") if choices else ""
    except (KeyError, IndexError, TypeError, AttributeError) as err:
        raise CliError("the answer is not a chat completion chunk", "is this a Penstock gateway? check --url") from err


def first_model(server: Server) -> str:
    """The first model in /v1/models."""
    try:
        return str(server.get("/v1/models")["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as err:
        raise CliError(f"{server.url} serves no model", "name one with --model") from err


def _answer(conversation: Conversation, text: str) -> None:
    answer = conversation.ask(text)
    try:
        for piece in answer:
            print(printable(piece), end="", flush=True)
        print()
    except KeyboardInterrupt:
        print("\n(stopped)", file=sys.stderr)
    except CliError as err:
        print()
        if not sys.stdin.isatty():
            raise
        print_error(str(err), err.hint)
    finally:
        answer.close()  # closing the connection ends the request


def _questions(stdin: TextIO) -> Iterator[str]:
    """Non-empty lines, with a prompt and line editing on a terminal. Ctrl-C at the prompt clears the line."""
    if not stdin.isatty():
        yield from (line.strip() for line in stdin if line.strip())
        return
    import readline  # noqa: F401  # gives input() history and editing

    prompt = style("> ", "bold", has_colour(sys.stdout))
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line:
            yield line
