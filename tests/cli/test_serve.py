"""`penstock serve`: from the command line to a topology, what it prints, and how it fails at once."""

from __future__ import annotations

import io
import json
import shlex
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.cli.main import build_parser, main
from penstock.cli.progress import Progress, curl_command
from penstock.cli.serve import topology_from
from penstock.core.config import GatewayConfig, Topology
from penstock.core.errors import ConfigError
from penstock.deploy.cluster import ChildExited, Stopping
from penstock.deploy.reports import ClusterReady, Listening, WorkerChanged


def topology_of(*argv: str) -> Topology:
    return topology_from(build_parser().parse_args(["serve", *argv]))


def test_no_option_gives_the_defaults() -> None:
    assert topology_of() == Topology()


def test_options_reach_their_fields() -> None:
    http = "m.gguf --host ::1 --port 0 --api-key-file keys --log-level debug"
    workers = "--prefill 2 --decode 3 --dtype float32 --transport tcp --policy round-robin"
    room = "--threads 10 --kv-cache-mib 64 --max-model-len 512"
    topology = topology_of(*f"{http} {workers} {room}".split())
    assert (topology.model.source, topology.model.dtype, topology.model.max_model_len) == ("m.gguf", "float32", 512)
    assert (topology.gateway.host, topology.gateway.port) == ("::1", 0)
    assert topology.gateway.api_key_file == str(Path("keys").absolute())
    assert (topology.prefill.replicas, topology.decode.replicas) == (2, 3)
    assert (topology.prefill.threads, topology.decode.threads) == (2, 2)
    assert topology.prefill.kv_cache_bytes == topology.decode.kv_cache_bytes == 64 << 20
    assert (topology.router.policy, topology.transfer.transport, topology.log_level) == ("round-robin", "tcp", "debug")


def test_one_pool_reaches_its_field_and_the_file_may_set_it(tmp_path: Path) -> None:
    assert topology_of("--one-pool").transfer.one_pool
    file = tmp_path / "t.yaml"
    file.write_text("transfer: {one_pool: true}\n")
    assert topology_of("--topology", str(file)).transfer.one_pool
    with pytest.raises(ConfigError, match=r"transfer\.one_pool: transport is tcp"):
        topology_of("--topology", str(file), "--transport", "tcp")


def test_options_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(
        "model: {source: a, name: b}\ngateway: {port: 1}\ndecode: {replicas: 4, num_blocks: 9}\ncolocated: true\n"
    )
    topology = topology_of("--topology", str(file), "--port", "2")
    assert (topology.gateway.port, topology.decode.replicas, topology.colocated) == (2, 4, True)
    assert topology.model.served_name == "b"
    other = topology_of("c", "--topology", str(file), "--kv-cache-mib", "1")
    assert (other.model.served_name, other.decode.num_blocks, other.decode.kv_cache_bytes) == ("c", None, 1 << 20)


def test_open_host_without_a_key_is_refused_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="no API key"):
        topology_of("--host", "0.0.0.0")
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert capsys.readouterr().err.startswith("penstock: error: gateway.host: 0.0.0.0 is reachable")


def test_empty_key_file_is_refused_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.touch()
    assert main(["serve", "--api-key-file", str(file)]) == 2


def test_taken_port_is_one_error_and_nothing_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"penstock: error: port {port} on 127.0.0.1 is taken by another program\n"
        "hint: stop what listens there, or choose another port with --port\n"
    )


class Hours:
    """A clock that moves when told."""

    time = 0.0

    def now(self) -> float:
        return self.time


def worker(name: str, role: str, epoch: str = "e1", state: str = "ready", **links: str) -> WorkerChanged:
    links = {peer.replace("_", "-"): transport for peer, transport in links.items()}
    return WorkerChanged(name, role, 7, epoch, state, 2048, "float32", links)


def test_progress_tells_each_fact_once() -> None:
    out, clock = io.StringIO(), Hours()
    progress = Progress(Topology(), clock, out)
    progress.starting()
    progress.tell(Listening("127.0.0.1", 8123))
    progress.tell(worker("prefill-0", "prefill", state="starting"))
    clock.time = 2.5
    for _ in range(2):
        progress.tell(worker("prefill-0", "prefill", decode_0="shm"))
        progress.tell(worker("decode-0", "decode", prefill_0="shm"))
    ready = ClusterReady("smollm2-135m-instruct", 16, 23040, 8192)
    progress.tell(ready)
    assert out.getvalue().splitlines()[:6] == [
        "penstock 0.1.0: smollm2-135m-instruct, 1 prefill, 1 decode",
        "  router      listening on http://127.0.0.1:8123",
        "  prefill-0   ready: prefill, pid 7, 2048 blocks (32,768 tokens), float32, after 2.5 s",
        "  prefill-0 → decode-0: KV blocks go by shared memory (shm)",
        "  decode-0    ready: decode, pid 7, 2048 blocks (32,768 tokens), float32, after 2.5 s",
        "  KV cache: 23,040 bytes per token, 16 tokens a block; longest prompt + output 8,192 tokens",
    ]
    assert "ready at http://127.0.0.1:8123/v1; try" in out.getvalue()


def test_progress_tells_of_a_restart_and_of_the_end() -> None:
    out = io.StringIO()
    progress = Progress(Topology(), Hours(), out)
    ready = ClusterReady("m", 16, 1, 1)
    progress.tell(ready)
    said = len(out.getvalue())
    progress.tell(ChildExited("decode-0", 7, "killed by SIGSEGV", 0.4))
    progress.tell(worker("decode-0", "decode", epoch="e2"))
    progress.tell(ready)
    progress.tell(Stopping())
    progress.tell(Stopping())
    progress.ended()
    assert out.getvalue()[said:].splitlines() == [
        "  decode-0    ended: pid 7, killed by SIGSEGV; starts again in 0.4 s",
        "  decode-0    ready: decode, pid 7, 2048 blocks (32,768 tokens), float32",
        "ready again",
        "",
        "stopping: running requests finish; Ctrl-C again ends them",
        "",
        "ending now",
        "stopped; nothing left running",
    ]


def test_progress_tells_why_a_worker_is_refused() -> None:
    out = io.StringIO()
    progress = Progress(Topology(), Hours(), out)
    for _ in range(2):
        progress.tell(worker("decode-0", "decode", state="refused: dtype differs"))
    assert out.getvalue() == "  decode-0    refused: dtype differs\n"


def test_curl_command_is_what_a_shell_can_run() -> None:
    words = shlex.split(curl_command("http://127.0.0.1:8000", "it's", has_keys=False))
    assert words[:3] == ["curl", "-N", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == "it's"
    assert "Bearer $PENSTOCK_API_KEY" in curl_command("http://x", "m", has_keys=True)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:1"),
        ("::1", "http://[::1]:1"),
        ("0.0.0.0", "http://127.0.0.1:1"),
        ("::", "http://[::1]:1"),
    ],
)
def test_url_is_one_that_a_client_can_open(host: str, url: str) -> None:
    assert Listening(host, 1).url == url


def test_progress_mentions_the_key_when_the_gateway_asks_for_one() -> None:
    out = io.StringIO()
    topology = replace(Topology(), gateway=GatewayConfig(api_keys=("k",)))
    Progress(topology, Hours(), out).tell(ClusterReady("m", 16, 1, 1))
    assert "Authorization: Bearer" in out.getvalue()
