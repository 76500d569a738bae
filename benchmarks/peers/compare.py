"""Penstock's engine beside other engines, on one machine in one run: see README.md in this folder."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
POINTS = ("decode 1", "decode 8", "decode 32", "prefill 512", "prefill 2048")
Figures = dict[str, float]
US = "penstock"


def run(command: list[str], **environment: str) -> str:
    """What `command` says on stdout; its log goes to nobody unless it fails."""
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def penstock(model: Path) -> Figures:
    command = [sys.executable, "-m", "penstock", "bench", "engine", str(model), "--json"]
    found = json.loads(run([*command, "--batches", "1,8,32", "--prompts", "512,2048"]))
    return {f"decode {n}": rate for n, rate in found["decode_tok_s"].items()} | {
        f"prefill {n}": rate for n, rate in found["prefill_tok_s"].items()
    }


def in_its_python(name: str, python: str, model: Path) -> Figures:
    cores = len(os.sched_getaffinity(0))
    binding = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
    }
    text = run([python, str(HERE / "peer.py"), name, str(model)], **binding)
    rows = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return {f"{kind} {row[kind]}": row["tok_s"] for row in rows for kind in ("decode", "prefill") if kind in row}


def llama(folder: Path, model: Path) -> Figures:
    common = ["-m", str(model), "-t", str(len(os.sched_getaffinity(0)))]
    shape = ["-c", "16384", "-npp", "128", "-ntg", "64", "-npl", "1,8,32", "--output-format", "jsonl"]
    batched = run([str(folder / "llama-batched-bench"), *common, *shape])
    prompts = run([str(folder / "llama-bench"), *common, "-p", "512,2048", "-n", "0", "-r", "3", "-o", "jsonl"])
    rows = [json.loads(line) for line in (batched + prompts).splitlines() if line.startswith("{")]
    return {f"decode {row['pl']}": row["speed_tg"] for row in rows if "pl" in row} | {
        f"prefill {row['n_prompt']}": row["avg_ts"] for row in rows if "n_prompt" in row
    }


def engines(args: argparse.Namespace) -> dict[str, Callable[[], Figures]]:
    found: dict[str, Callable[[], Figures]] = {US: lambda: penstock(args.model)}
    if args.vllm:
        found["vllm"] = lambda: in_its_python("vllm", args.vllm, args.hf)
    if args.openvino:
        found["openvino"] = lambda: in_its_python("openvino", args.openvino, args.model)
    if args.llama:
        found["llama.cpp"] = lambda: llama(args.llama, args.model)
    return found


def table(medians: dict[str, Figures]) -> str:
    peers = [name for name in medians if name != US]
    lines = [f"| tok/s | {' | '.join(medians)} | ratio to the best peer |", "|---" * (len(medians) + 2) + "|"]
    for point in POINTS:
        best = max((medians[name][point] for name in peers), default=float("nan"))
        cells = " | ".join(f"{found[point]:.0f}" for found in medians.values())
        lines.append(f"| {point} | {cells} | {medians[US][point] / best:.2f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--hf", type=Path, help="the same weights as a Hugging Face folder, for vLLM")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter that has vLLM")
    parser.add_argument("--openvino", metavar="PYTHON", help="interpreter that has OpenVINO GenAI")
    parser.add_argument("--llama", type=Path, metavar="FOLDER", help="folder with llama-bench and llama-batched-bench")
    parser.add_argument("--rounds", type=int, default=2, help="times that each engine runs, by turns (default: 2)")
    parser.add_argument("--json", type=Path, help="write everything to this file too")
    args = parser.parse_args()
    chosen = engines(args)
    runs: dict[str, list[Figures]] = {name: [] for name in chosen}
    for number in range(args.rounds):
        for name in list(chosen) if number % 2 == 0 else reversed(chosen):
            print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
            runs[name].append(chosen[name]())
    medians = {name: {p: statistics.median(run[p] for run in found) for p in POINTS} for name, found in runs.items()}
    print(table(medians))
    if args.json is not None:
        facts: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        args.json.write_text(json.dumps(facts | {"medians": medians, "runs": runs}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
