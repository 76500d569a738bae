"""`penstock bench`: measurements of this machine."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from ..models.store import DEFAULT_MODEL
from . import bench_serve
from .arguments import Commands, Parser, add_command, add_model_options, numbers, whole_number
from .errors import CliError
from .model_files import local_model, use_threads
from .terminal import table

if TYPE_CHECKING:
    from ..engine.engine_bench import EngineFigures
    from ..kvtransfer.transfer_bench import TransferFigures

_DETAILS = """\
Hands one long prompt, many short ones and single blocks over between two processes on this machine, with everything a
real hand-off does, and copies the same bytes plainly in the same run. GB/s, share of the copy's speed, time of the
smallest hand-off, and processor seconds of both processes for each gigabyte. Transports that cannot be used here are
named with the reason. Run it on an otherwise idle machine."""

_ENGINE_DETAILS = """\
Runs the engine alone, without router, gateway and hand-off: decode of several batches (prompts of 128 random tokens, 64
new ones, greedy) and prefill of several lengths; what a step costs outside the network; and what share of this
machine's measured limits that is. Run it on an otherwise idle machine."""


def register(commands: Commands) -> None:
    details = "Each measurement is a command of its own; see `penstock bench engine --help`."
    parser = add_command(commands, "bench", _needs_a_part, "Measure this machine.", details, "penstock bench transfer")
    parts = parser.add_subparsers(title="measurements", metavar="WHAT", dest="what", parser_class=Parser)
    transfer = add_command(
        parts,
        "transfer",
        run_transfer,
        "Measure how fast each transport hands a KV cache over.",
        _DETAILS,
        "penstock bench transfer --transports shm,tcp --json",
    )
    transfer.add_argument(
        "--transports", metavar="NAMES", help="comma-separated names (default: all that can be used here)"
    )
    transfer.add_argument(
        "--tokens", type=whole_number(16, 1 << 20), default=8192, help="length of the long prompt (default: 8192)"
    )
    transfer.add_argument(
        "--rounds", type=whole_number(1, 1000), default=7, help="repetitions of each figure (default: 7)"
    )
    transfer.add_argument("--json", action="store_true", help="print a JSON list, one object for each transport")
    engine = add_command(
        parts,
        "engine",
        run_engine,
        "Measure how fast this machine decodes and prefills.",
        _ENGINE_DETAILS,
        "penstock bench engine --json",
    )
    engine.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=f"model to run (default: {DEFAULT_MODEL})")
    engine.add_argument("--batches", type=numbers(1, 4096), default=[1, 8, 32, 64], help="(default: 1,8,32,64)")
    engine.add_argument("--prompts", type=numbers(1, 1 << 20), help="prompt lengths (default: 512,2048,8192, as fit)")
    engine.add_argument("--rounds", type=whole_number(1, 1000), default=3, help="repetitions (default: 3)")
    engine.add_argument("--threads", type=whole_number(1, 1024), help="threads (default: one for each core)")
    engine.add_argument("--seed", type=whole_number(0, 1 << 62), default=0, help="of the random prompts (default: 0)")
    engine.add_argument("--json", action="store_true", help="print a JSON object")
    add_model_options(engine)
    bench_serve.register(parts)


def _needs_a_part(args: argparse.Namespace) -> int:
    raise CliError("bench: say what to measure", "`penstock bench --help` lists what there is")


def run_engine(args: argparse.Namespace) -> int:
    from ..core.logging import setup_logging
    from ..deploy.launch import available_cores

    setup_logging("bench", args.log_level or "warning")
    model = local_model(args.model)
    threads = args.threads or available_cores()
    use_threads(threads)
    from ..engine.engine_bench import measure_engine
    from ..engine.torch_engine import TorchEngine

    engine = TorchEngine.load(
        model.path,
        model_name=model.name,
        dtype=args.dtype or "auto",
        quantization=args.quantization or "auto",
        num_threads=threads,
    )
    prompts = args.prompts or [n for n in (512, 2048, 8192) if n < engine.spec.max_sequence_tokens]
    try:
        figures = measure_engine(engine, args.batches, prompts, args.rounds, args.seed, _say)
    except ValueError as err:
        raise CliError(f"--batches, --prompts: {err}") from err
    print(_engine_json(figures) if args.json else _engine_table(figures))
    return 0


def _engine_json(figures: EngineFigures) -> str:
    import msgspec

    return json.dumps(msgspec.to_builtins(figures), indent=1)


def _engine_table(figures: EngineFigures) -> str:
    rows = [("WHAT", "tok/s", "OUTSIDE THE NETWORK, ms")]
    rows += [
        (f"decode, batch {batch}", f"{rate:.1f}", f"{figures.step_overhead_ms[batch]:.3f}")
        for batch, rate in figures.decode_tok_s.items()
    ]
    rows += [(f"prefill of {length}", f"{rate:.0f}", "-") for length, rate in figures.prefill_tok_s.items()]
    facts = [
        f"weights {figures.quantization}, {figures.weight_bytes / 1e6:.0f} MB a step; KV {figures.dtype}, "
        f"{figures.kv_bytes_per_token} bytes a token; native kernels {figures.native}, {figures.threads} threads",
        f"this machine reads {figures.read_gb_s:.1f} GB/s (batch 1 uses {figures.share_of_read_limit:.0%}) and "
        f"multiplies {figures.matrix_gflop_s:.0f} GFLOP/s (the longest prefill: {figures.share_of_matrix_limit:.0%})",
    ]
    return "\n".join([table(rows, right=frozenset((1, 2))), *facts])


def run_transfer(args: argparse.Namespace) -> int:
    from ..kvtransfer.transports.catalog import ALL, available

    names = args.transports.split(",") if args.transports else list(ALL)
    unknown = [name for name in names if name not in ALL]
    if unknown:
        raise CliError(f"--transports: {unknown[0]!r} is not one of {', '.join(ALL)}")
    figures: list[TransferFigures] = []
    for name in names:
        obstacle = available(name)
        if obstacle is None:
            figures.append(_measure(name, args))
        else:
            _say(f"{name}: left out: {obstacle}")
            if args.transports:
                raise CliError(f"--transports: {name} cannot be used here: {obstacle}")
    print(_as_json(figures) if args.json else _as_table(figures))
    return 0


def _measure(name: str, args: argparse.Namespace) -> TransferFigures:
    from ..kvtransfer.transfer_bench import measure_transport

    try:
        return measure_transport(name, args.tokens, args.rounds, _say)
    except RuntimeError as err:
        raise CliError(f"{name}: {err}") from err


def _as_json(figures: list[TransferFigures]) -> str:
    import msgspec

    return json.dumps([msgspec.to_builtins(item) for item in figures], indent=1)


def _as_table(figures: list[TransferFigures]) -> str:
    header = (
        "TRANSPORT",
        "GB/s",
        "MEMCPY",
        "SHARE",
        "64 SHORT, GB/s",
        "ONE BLOCK, µs",
        "CPU s/GB",
        "DIGESTS",
        "PLAIN SOCKET",
    )
    rows = [
        (
            item.transport,
            f"{item.gbps:.2f}",
            f"{item.memcpy_gbps:.2f}",
            f"{item.share_of_memcpy:.0%}",
            f"{item.many_gbps:.2f}",
            f"{item.latency_us:.0f}",
            f"{item.cpu_s_per_gb:.2f}",
            f"{item.digest_cost:+.0%}",
            f"{item.plain_socket_gbps:.2f}" if item.plain_socket_gbps else "-",
        )
        for item in figures
    ]
    return table([header, *rows], right=frozenset(range(1, 9)))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
