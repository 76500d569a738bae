"""The topology file: what is accepted, and how a mistake is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from penstock.core.config import (
    GatewayConfig,
    ModelConfig,
    Topology,
    dump_topology,
    is_loopback,
    load_topology,
    parse_topology,
    read_api_keys,
)
from penstock.core.errors import ConfigError


def write(path: Path, text: str) -> Path:
    file = path / "topology.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_topology_from_nothing_is_the_defaults(tmp_path: Path) -> None:
    assert load_topology(write(tmp_path, "")) == Topology()
    assert parse_topology({"prefill": None}) == Topology()


def test_topology_values_reach_their_fields() -> None:
    topology = parse_topology(
        {
            "model": {"source": "hf:org/tiny", "dtype": "float32"},
            "prefill": {"replicas": 2, "threads": 3},
            "gateway": {"api_keys": ["a", "b"], "timeout_s": 5},
            "transfer": {"transport": "tcp"},
        }
    )
    assert topology.model.served_name == "tiny"
    assert topology.prefill.threads == 3
    assert topology.gateway.api_keys == ("a", "b")
    assert topology.gateway.timeout_s == 5.0
    assert isinstance(topology.gateway.timeout_s, float)
    assert [w.name for w in topology.workers()] == ["prefill-0", "prefill-1", "decode-0"]


def test_topology_in_a_ray_launcher_file_is_found_under_metadata(tmp_path: Path) -> None:
    text = "cluster_name: x\nprovider: {type: local}\nmetadata:\n  penstock:\n    decode: {replicas: 4}\n"
    assert load_topology(write(tmp_path, text)).decode.replicas == 4


def test_ray_launcher_file_without_a_topology_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metadata\.penstock: missing"):
        load_topology(write(tmp_path, "provider: {type: local}\n"))


def test_error_in_a_ray_launcher_file_names_the_whole_path() -> None:
    data = {"provider": {}, "metadata": {"penstock": {"decode": {"replicas": 0}}}}
    with pytest.raises(ConfigError, match=r"metadata\.penstock\.decode\.replicas: must be between 1 and 64, got 0"):
        parse_topology(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"prefil": {}}, r'prefil: unknown key, did you mean "prefill"\?'),
        ({"prefill": {"replcas": 2}}, r'prefill\.replcas: unknown key, did you mean "replicas"\?'),
        ({"gateway": {"zzz": 2}}, r"gateway\.zzz: unknown key; known: host, port"),
        ({1: 2}, r"1: unknown key"),
        ({"gateway": {"port": 70000}}, r"gateway\.port: must be between 0 and 65535, got 70000"),
        ({"gateway": {"port": "80"}}, r"gateway\.port: must be a whole number, got '80'"),
        ({"gateway": {"port": True}}, r"gateway\.port: must be a whole number, got True"),
        ({"gateway": {"port": 80.5}}, r"gateway\.port: must be a whole number, got 80\.5"),
        ({"gateway": {"timeout_s": float("nan")}}, r"gateway\.timeout_s: must be a finite number"),
        ({"gateway": {"timeout_s": 0}}, r"gateway\.timeout_s: must be between 0\.1 and 86400, got 0\.0"),
        ({"gateway": {"api_keys": "secret"}}, r"gateway\.api_keys: must be a list of non-empty strings$"),
        ({"colocated": "yes please"}, r"colocated: must be true or false, got 'yes please'"),
        ({"model": {"dtype": "int4"}}, r"model\.dtype: 'int4' is not one of auto, float32, bfloat16"),
        ({"router": {"disaggregate": True}}, r"router\.disaggregate: True is not one of"),
        ({"model": ["x"]}, r"model: must be a mapping, got \['x'\]"),
        ({"model": {"source": None}}, r"model\.source: must be a string, got None"),
        ("text", r"topology: must be a mapping, got 'text'"),
        ({"version": 2}, r"version: 2 is not supported"),
        ({"liveness": {"heartbeat_s": 0.3}}, r"router\.worker_timeout_s: 0\.6 is less than three heartbeats"),
        ({"prefill": {"num_blocks": 9, "kv_cache_bytes": 1 << 20}}, r"prefill: kv_cache_bytes and num_blocks"),
        ({"colocated": True, "router": {"disaggregate": "always"}}, r"router\.disaggregate: always needs a prefill"),
    ],
)
def test_topology_mistake_is_named_with_its_path(data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_topology(data)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_gateway_reachable_from_outside_needs_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.host: .* no API key"):
        parse_topology({"gateway": {"host": host}})
    assert parse_topology({"gateway": {"host": host, "api_keys": ["k"]}}).gateway.host == host


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "::1"])
def test_loopback_hosts_are_recognized(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("model: {source: x}\nmodel: {source: y}\n", "key 'model' is there twice"),
        ("model: !!python/object:os.system {}\n", "not YAML"),
        ("prefill: {replicas: -1}\n", r"topology\.yaml: prefill\.replicas: must be between"),
    ],
)
def test_bad_file_gives_one_error_that_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_topology(write(tmp_path, text))
    assert "topology.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_topology(tmp_path / "absent.yaml")


def test_dump_then_load_gives_the_same_topology_in_a_private_file(tmp_path: Path) -> None:
    topology = replace(
        Topology(),
        model=ModelConfig("ä/b.gguf", max_model_len=99),
        gateway=GatewayConfig(api_keys=("k: 1",)),
        colocated=True,
    )
    file = tmp_path / "t.yaml"
    dump_topology(topology, file)
    assert load_topology(file) == topology
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_colocated_topology_has_workers_of_role_both() -> None:
    topology = parse_topology({"colocated": True, "decode": {"replicas": 2}})
    assert [(w.name, w.role) for w in topology.workers()] == [("both-0", "both"), ("both-1", "both")]
    assert topology.worker("both-1").config is topology.decode


def test_unknown_worker_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"worker 'x' is not in this topology; it has prefill-0, decode-0"):
        Topology().worker("x")


def test_router_address_lies_in_the_runtime_folder() -> None:
    topology = replace(Topology(), runtime_dir="/run/p")
    assert topology.router_address == "ipc:///run/p/router.sock"
    with pytest.raises(ConfigError, match="runtime_dir: not set"):
        _ = Topology().router_address


def test_api_keys_come_from_the_list_and_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# mine\nfirst\n\n  second \n", encoding="utf-8")
    assert read_api_keys(GatewayConfig(api_keys=("zero",), api_key_file=str(file))) == ("zero", "first", "second")
    assert read_api_keys(GatewayConfig()) == ()


@pytest.mark.parametrize("content", ["", "# only a comment\n"])
def test_key_file_without_a_key_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no key"):
        read_api_keys(GatewayConfig(api_key_file=str(file)))


def test_key_file_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="api_key_file"):
        read_api_keys(GatewayConfig(api_key_file=str(tmp_path / "absent")))


@pytest.mark.parametrize(
    ("source", "name"),
    [("a/b/c.gguf", "c.gguf"), ("hf:org/name", "name"), ("plain", "plain"), ("folder/", "folder"), ("/", "/")],
)
def test_served_name_is_the_last_part_of_the_source(source: str, name: str) -> None:
    assert ModelConfig(source).served_name == name


def test_one_pool_is_off_by_default_and_needs_something_to_hand_over_within_it() -> None:
    assert not Topology().transfer.one_pool
    for transport in ("auto", "shm"):
        assert parse_topology({"transfer": {"one_pool": True, "transport": transport}}).transfer.one_pool


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"transfer": {"one_pool": True, "transport": "tcp"}}, r"transfer\.one_pool: transport is tcp, .* auto or shm"),
        (
            {"transfer": {"one_pool": True, "wire_dtype": "int8"}},
            r"transfer\.one_pool: wire_dtype is int8, .* lossless",
        ),
        ({"transfer": {"one_pool": True}, "colocated": True}, r"transfer\.one_pool: nothing is handed over"),
        ({"transfer": {"one_pool": True}, "prefill": {"replicas": 0}}, r"transfer\.one_pool: nothing is handed over"),
        ({"transfer": {"one_pool": 1}}, r"transfer\.one_pool: must be true or false"),
    ],
)
def test_one_pool_that_cannot_be_is_refused(data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_topology(data)
