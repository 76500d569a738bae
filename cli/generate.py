"""`penstock generate`: one answer, made in this process. No cluster, no port."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .arguments import Commands, add_command, add_model_options, number, whole_number
from .errors import USAGE, CliError
from .terminal import printable

if TYPE_CHECKING:
    from ..models.tokenizer import Tokenizer

_DETAILS = """\
The prompt is one user message for the model's chat template; with --raw it is continued as it stands. PROMPT - reads
it from stdin. The text goes to stdout as it is made. The same seed gives the same text again."""


def register(commands: Commands) -> None:
    parser = add_command(
        commands,
        "generate",
        run,
        "Answer one prompt in this process.",
        _DETAILS,
        'penstock generate "Why is the sky blue?"',
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what to say to the model, or - for stdin")
    parser.add_argument(
        "--model",
        default="smollm2-135m-instruct",
        help="name, folder, .gguf file or hf:org/name (default: smollm2-135m-instruct)",
    )
    parser.add_argument("--raw", action="store_true", help="continue the prompt, without the chat template")
    parser.add_argument(
        "--max-tokens",
        type=whole_number(1, 1 << 20),
        default=256,
        metavar="N",
        help="longest answer, in tokens (default: 256)",
    )
    parser.add_argument(
        "--temperature",
        type=number(0, 100),
        default=0.0,
        metavar="T",
        help="0 is greedy, higher is more varied (default: 0)",
    )
    parser.add_argument(
        "--seed", type=whole_number(0, (1 << 63) - 1), help="seed of the random draws (default: a new one)"
    )
    parser.add_argument(
        "--threads", type=whole_number(1, 4096), metavar="N", help="compute threads (default: every core)"
    )
    parser.add_argument(
        "--speculative",
        metavar="METHOD",
        default="auto",
        help="what drafts tokens, as in `penstock serve`: off, auto, ngram, suffix, eagle, eagle:PATH, draft:MODEL; "
        "the answer stays the same (default: auto)",
    )
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    from ..core.config import SpeculationConfig, check_method
    from ..core.logging import setup_logging
    from ..deploy.launch import available_cores
    from ..models.tokenizer import load_tokenizer
    from ..protocol.sampling import SamplingParams
    from .model_files import local_method, local_model, use_threads

    setup_logging("generate", args.log_level or "warning")
    text = _prompt(args.prompt)
    check_method(args.speculative)
    model = local_model(args.model)
    tokenizer = load_tokenizer(model.path)
    prompt_ids = _encode(tokenizer, text, args.raw)
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        seed=secrets.randbits(63) if args.seed is None else args.seed,
    )
    method = local_method(SpeculationConfig(args.speculative), model.path)
    threads = args.threads or available_cores()
    use_threads(threads)
    from ..decode_node.local import LocalRunner

    dtype, quantization = args.dtype or "auto", args.quantization or "auto"
    runner = LocalRunner.open(model.path, model.name, dtype, threads, quantization, method)
    token_ids = (sampled.token_id for item in runner.stream(prompt_ids, params) for sampled in item.tokens)
    for piece in text_pieces(tokenizer, token_ids):
        print(printable(piece), end="", flush=True)
    print()
    return 0


def text_pieces(tokenizer: Tokenizer, token_ids: Iterator[int]) -> Iterator[str]:
    """The text of the tokens as it becomes whole, never half a character."""
    from ..models.text_stream import TextStream

    stream = TextStream(tokenizer)
    for token_id in token_ids:
        yield stream.feed([token_id]).text
    yield stream.finish().text


def _prompt(given: str) -> str:
    text = sys.stdin.read() if given == "-" else given
    if not text:
        raise CliError("the prompt is empty", 'for example: penstock generate "Why is the sky blue?"', USAGE)
    return text


def _encode(tokenizer: Tokenizer, text: str, is_raw: bool) -> list[int]:
    if is_raw or tokenizer.chat_template is None:
        return tokenizer.encode(text)
    return tokenizer.encode_chat([{"role": "user", "content": text}])
