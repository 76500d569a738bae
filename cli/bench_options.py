"""The options of `penstock bench serve`. Names of vLLM's `bench serve` are understood beside ours."""

from __future__ import annotations

from ..loadtest.names import KINDS, SHAPES
from .arguments import Parser, add_server_options, number, whole_number

ARRIVALS = (*SHAPES, "trace", "closed")


def add_bench_serve_options(parser: Parser) -> None:
    add_server_options(parser)
    parser.add_argument(
        "--against",
        metavar="URL",
        nargs="+",
        default=[],
        help="other servers, run by turns with --url's, which runs twice a round (default: none)",
    )
    parser.add_argument("--model", metavar="NAME", help="model to ask for (default: the server's first)")
    _add_workload(parser)
    _add_arrivals(parser)
    _add_requests(parser)
    _add_verdicts(parser)
    outputs = parser.add_argument_group("output (a table always goes to stdout)")
    outputs.add_argument(
        "--json", metavar="FILE", help="keys of vLLM's bench result, ours under `penstock` (default: none)"
    )
    outputs.add_argument("--csv", metavar="FILE", help="a row for each request (default: none)")
    outputs.add_argument("--html", metavar="FILE", help="a report with plots in one file (default: none)")
    outputs.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _add_workload(parser: Parser) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--workload",
        "--dataset-name",
        choices=KINDS,
        default="random",
        metavar="KIND",
        help=f"one of {', '.join(KINDS)} (default: random)",
    )
    group.add_argument("--file", "--dataset-path", metavar="FILE", help="the data file, gzipped or not (default: none)")
    group.add_argument(
        "--num-requests",
        "--num-prompts",
        type=whole_number(1, 10_000_000),
        metavar="N",
        help="requests, or conversations where they have several turns (default: 100, or the whole file)",
    )
    group.add_argument(
        "--input-tokens",
        "--random-input-len",
        metavar="N",
        default="512",
        help="of a random prompt or message: 512 or 128-1024 (default: 512)",
    )
    group.add_argument(
        "--output-tokens",
        "--random-output-len",
        metavar="N",
        default="128",
        help="of an answer where the file says nothing: 128 or 64-256 (default: 128)",
    )
    group.add_argument("--prefixes", type=whole_number(1, 1 << 20), default=8, help="shared prefixes (default: 8)")
    group.add_argument("--prefix-tokens", type=whole_number(1, 1 << 22), default=512, help="of each (default: 512)")
    group.add_argument("--turns", metavar="N", default="2-6", help="of a synthetic conversation (default: 2-6)")
    group.add_argument("--think-s", type=number(0, 3600), default=0.0, help="between turns (default: 0)")
    group.add_argument(
        "--start-fresh", action="store_true", help="synthetic conversations all begin at their first turn"
    )
    group.add_argument("--first-turn-only", action="store_true", help="leave out later turns of a file's conversations")
    group.add_argument("--length-scale", type=number(1e-4, 1e4), default=1.0, help="of a trace's lengths (default: 1)")
    group.add_argument(
        "--keep-batched-times", action="store_true", help="do not spread equal times of a Mooncake trace"
    )
    group.add_argument(
        "--leave-out", action="store_true", help="leave out what is too long for the window; else it is clipped"
    )
    group.add_argument("--shuffle", action="store_true", help="rows in an order drawn from --seed")
    group.add_argument("--max-model-len", type=whole_number(2, 1 << 30), help="tokens (default: what /v1/models says)")
    group.add_argument(
        "--seed", type=whole_number(0, 1 << 62), default=0, help="of lengths, prompts, times (default: 0)"
    )
    group.add_argument(
        "--salt",
        type=whole_number(0, 1 << 30),
        default=0,
        help="another number gives other words of the same lengths: no cache knows them (default: 0)",
    )
    group.add_argument("--keep-texts", action="store_true", help="never write the salt before a file's prompts")


def _add_arrivals(parser: Parser) -> None:
    group = parser.add_argument_group("arrivals")
    group.add_argument(
        "--arrivals",
        choices=ARRIVALS,
        metavar="SHAPE",
        help=f"{', '.join(ARRIVALS)} (default: poisson; closed with --concurrency; a trace's own)",
    )
    group.add_argument("--request-rate", metavar="R", help="requests per second; inf: all at once (default: 1)")
    group.add_argument(
        "--burstiness", type=number(0.01, 1000), help="gamma shape: 1 is Poisson, less is burstier (default: 1)"
    )
    group.add_argument("--end-rate", type=number(1e-4, 1e6), help="at a ramp's end (default: none)")
    group.add_argument(
        "--concurrency", "--max-concurrency", type=whole_number(1, 100_000), help="closed loop (default: none)"
    )
    group.add_argument("--trace-speed", type=number(1e-4, 1e4), default=1.0, help="2: twice as fast (default: 1)")
    group.add_argument(
        "--duration", type=number(0.1, 1e6), metavar="S", help="no arrivals after S seconds (default: none)"
    )


def _add_requests(parser: Parser) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--endpoint", choices=("chat", "completions"), help="(default: completions, chat for text and turns)"
    )
    group.add_argument(
        "--prompts", choices=("ids", "text"), help="how random prompts are sent (default: ids, text to chat)"
    )
    group.add_argument("--token-ids", metavar="LOW-HIGH", default="1000-30000", help="random ids (default: 1000-30000)")
    group.add_argument("--temperature", type=number(0, 2), default=0.0, help="(default: 0)")
    group.add_argument(
        "--ignore-eos",
        choices=("auto", "on", "off"),
        default="auto",
        help="answers of exactly the planned length; auto: for all but text files (default: auto)",
    )
    group.add_argument("--extra-body", metavar="JSON", help="object of further fields of every request (default: none)")
    group.add_argument(
        "--timeout", type=number(0.1, 1e5), default=600.0, metavar="S", help="of a request (default: 600)"
    )
    group.add_argument("--warmup", type=whole_number(0, 10_000), default=4, metavar="N", help="left out (default: 4)")
    group.add_argument("--reset-cache", action="store_true", help="POST /reset_prefix_cache before each run")


def _add_verdicts(parser: Parser) -> None:
    group = parser.add_argument_group("targets, search, comparison")
    group.add_argument(
        "--goodput",
        metavar="TARGET",
        nargs="+",
        default=[],
        help="what a good request keeps, in ms: ttft:500 tpot:50 e2el:10000 (default: none)",
    )
    group.add_argument(
        "--search", action="store_true", help="find the highest rate that keeps the targets; needs --goodput"
    )
    group.add_argument("--attainment", metavar="SHARES", default="0.9,0.99", help="of requests (default: 0.9,0.99)")
    group.add_argument("--probe-s", type=number(1, 1e5), default=60.0, help="seconds of a search's run (default: 60)")
    group.add_argument("--probe-requests", type=whole_number(10, 1 << 20), default=100, help="at least (default: 100)")
    group.add_argument("--max-rate", type=number(1e-3, 1e6), default=1000.0, help="of a search (default: 1000)")
    group.add_argument(
        "--precision", type=number(1.005, 2), default=1.05, help="of a search, as a ratio (default: 1.05)"
    )
    group.add_argument("--max-probes", type=whole_number(3, 1000), default=16, help="for each share (default: 16)")
    group.add_argument("--rounds", type=whole_number(1, 1000), default=3, help="of a comparison (default: 3)")
    group.add_argument(
        "--max-lag-ms",
        type=number(0.1, 1e5),
        help="client lateness (p99) that makes a run invalid (default: 10, or 5 %% of the TTFT target)",
    )
