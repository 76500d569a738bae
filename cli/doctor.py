"""`penstock doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from .arguments import Commands, add_command, whole_number
from .terminal import byte_size, has_colour, printable, style, table

Level = Literal["OK", "WARN", "FAIL"]
_COLOURS = {"OK": "green", "WARN": "yellow", "FAIL": "red"}
_REQUIRED = (
    "torch",
    "numpy",
    "msgspec",
    "pyzmq",
    "aiohttp",
    "tokenizers",
    "jinja2",
    "safetensors",
    "xxhash",
    "pyyaml",
    "rich",
)
MIN_FREE_BYTES = 2 << 30
MIN_OPEN_FILES = 1024
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `hint` is the next step and is empty only for OK."""

    name: str
    level: Level
    detail: str
    hint: str = ""


def register(commands: Commands) -> None:
    parser = add_command(
        commands,
        "doctor",
        run,
        "Check this machine.",
        "Each line says OK, WARN or FAIL, and what to do. The exit code is 1 when a line says FAIL.",
        "penstock doctor --json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON with the key `checks`")
    parser.add_argument(
        "--port", type=whole_number(1, 65535), default=8000, help="port that `serve` is to use (default: 8000)"
    )


def run(args: argparse.Namespace) -> int:
    checks = list(examine(args.port))
    if args.json:
        print(json.dumps({"checks": [asdict(check) for check in checks]}, indent=2))
    else:
        print(format_checks(checks, has_colour(sys.stdout)))
    return 1 if any(check.level == "FAIL" for check in checks) else 0


def format_checks(checks: list[Check], is_coloured: bool = False) -> str:
    """One line a check; the hint follows on its own line where there is one."""
    lines = table([(check.level, check.name, printable(check.detail)) for check in checks]).split("\n")
    shown = []
    for check, line in zip(checks, lines, strict=True):
        shown.append(line.replace(check.level, style(check.level, _COLOURS[check.level], is_coloured), 1))
        if check.hint:
            shown.append(f"      hint: {check.hint}")
    return "\n".join(shown)


def examine(port: int) -> Iterator[Check]:
    """Every check, in the order in which a person would ask."""
    probes: tuple[Callable[[], Check], ...] = (
        check_python,
        check_system,
        check_packages,
        check_torch,
        check_cpu,
        check_memory,
        check_shared_memory,
        check_sockets,
        lambda: check_port("127.0.0.1", port),
        check_cache,
        check_open_files,
        lambda: check_thread_settings(os.environ),
    )
    for probe in probes:
        yield probe()


def check_python() -> Check:
    detail = f"{platform.python_version()} at {sys.executable}"
    return Check("python", "OK", detail)


def check_system() -> Check:
    detail = f"{platform.system()} {platform.release()} {platform.machine()}"
    if sys.platform == "linux":
        return Check("system", "OK", detail)
    return Check("system", "WARN", detail, "shared-memory hand-off needs Linux; elsewhere KV moves over TCP")


def check_packages() -> Check:
    versions, missing = [], []
    for name in _REQUIRED:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check("packages", "FAIL", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Check("packages", "OK", ", ".join(versions))


def check_torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as err:
        return Check("torch", "FAIL", str(err), "pip install torch --index-url https://download.pytorch.org/whl/cpu")
    capability = torch.backends.cpu.get_cpu_capability()
    devices = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no CUDA device"
    return Check("torch", "OK", f"{torch.__version__}, CPU kernels {capability}, {devices}")


def check_cpu(flags: frozenset[str] | None = None) -> Check:
    """Cores, and whether bfloat16 is computed natively. `flags` are those of /proc/cpuinfo by default."""
    from ..deploy.launch import available_cores

    flags = cpu_flags() if flags is None else flags
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
    detail = f"{available_cores()} cores, {' '.join(f for f in wanted if f in flags) or 'no vector extension found'}"
    if flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        return Check("cpu", "OK", f"{detail}; native bfloat16")
    if flags & {"avx2", "asimd"} or not flags:
        return Check("cpu", "OK", f"{detail}; no native bfloat16")
    return Check("cpu", "WARN", detail, "without AVX2 expect a tenth of the speed")


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return frozenset(found.partition(":")[2].split())


def check_memory(meminfo: Path = Path("/proc/meminfo")) -> Check:
    try:
        lines = meminfo.read_text(encoding="utf-8").splitlines()
        sizes = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
        available, total = sizes["MemAvailable"], sizes["MemTotal"]
    except (OSError, ValueError, KeyError, IndexError):
        return Check("memory", "WARN", "size unknown", "make sure that about 2 GiB are free")
    detail = f"{byte_size(available)} of {byte_size(total)} available"
    if available < MIN_FREE_BYTES:
        return Check("memory", "WARN", detail, "close something, or lower --kv-cache-mib and use --dtype bfloat16")
    return Check("memory", "OK", detail)


def check_shared_memory() -> Check:
    """Blocks move between processes of one machine through a sealed memfd."""
    from ..engine.kv_memory import KVMemory

    try:
        memory = KVMemory(1, 1, 4096)
    except OSError as err:
        return Check("shared memory", "WARN", f"memfd: {err}", "use --transport tcp")
    has_memfd = memory.fileno() is not None
    memory.close()
    if not has_memfd:
        return Check("shared memory", "WARN", "this system has no memfd", "use --transport tcp")
    return Check("shared memory", "OK", "memfd with seals works")


def check_sockets() -> Check:
    """The runtime folder can be made, and a Unix socket in it."""
    import socket

    from ..core.errors import ConfigError
    from ..deploy.runtime_dir import RuntimeDir

    try:
        with RuntimeDir() as folder, socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(folder.path / "probe.sock"))
            return Check("runtime folder", "OK", f"{folder.path.parent} takes sockets")
    except (OSError, ConfigError) as err:
        return Check("runtime folder", "FAIL", str(err), "set XDG_RUNTIME_DIR to a private folder with a short path")


def check_port(host: str, port: int) -> Check:
    from ..deploy.ports import port_problem

    problem = port_problem(host, port)
    if problem is None:
        return Check("port", "OK", f"{host}:{port} is free")
    return Check("port", "WARN", problem, "stop what listens there, or use `penstock serve --port N`")


def check_open_files() -> Check:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < MIN_OPEN_FILES:
        return Check(
            "open files", "WARN", f"limit {soft} (hard {hard})", f"ulimit -n {MIN_OPEN_FILES} before `penstock serve`"
        )
    return Check("open files", "OK", f"limit {soft}")


def check_thread_settings(environment: Mapping[str, str]) -> Check:
    """Settings of the caller's shell that would make the workers' threads spin or trample on each other."""
    found = {k: v for k, v in sorted(environment.items()) if k.startswith(("OMP_", "KMP_", "MKL_NUM", "GOMP_"))}
    detail = ", ".join(f"{name}={value}" for name, value in found.items()) or "none set; workers choose their own"
    if found.get("OMP_WAIT_POLICY", "").lower() == "active" or "GOMP_SPINCOUNT" in found:
        return Check("threads", "WARN", detail, "unset it: threads that spin take the cores from the other workers")
    return Check("threads", "OK", detail)


def check_cache() -> Check:
    """The model store's folder: writable, and with room."""
    import shutil

    from ..models.store import cache_folder

    folder = cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        return Check("model cache", "FAIL", f"{folder} is not writable", "set PENSTOCK_CACHE to a folder of yours")
    free = shutil.disk_usage(existing).free
    detail = f"{folder}, {byte_size(free)} free"
    if free < GIB:
        return Check("model cache", "WARN", detail, "free some disk space or set PENSTOCK_CACHE to another disk")
    return Check("model cache", "OK", detail)
