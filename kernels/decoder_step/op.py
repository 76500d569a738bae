"""A whole step of a decoder of the Llama family in one call: batch in, logits out, keys and values stored on the way.

It is `models.decoder.Decoder.forward` for grouped weights, in one parallel region; that is its slow, obvious twin. The
result of a token does not depend on the tokens beside it, on how a prompt is cut into chunks, nor on threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ...core.errors import InternalError
from ..native.library import ADDRESS, FLOAT, INT32, INT64, Function, function
from ..quant_linear.op import Matrix, QuantLinear

_VECTORS = (1, 2, 4, 5, 6, 8, 16)  # of 16 numbers in a head, as the kernel is compiled for
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

Ints = npt.NDArray[np.int64]
OnLayers = Callable[[int], None]
_ON_LAYERS = ctypes.CFUNCTYPE(None, INT64)


@dataclass(frozen=True, slots=True, eq=False)
class StepLayer:
    """Norm weights float32; qk_norm [heads + kv_heads, head_dim]; gate_up's outputs are gates, then ups."""

    attention_norm: torch.Tensor | None
    mlp_norm: torch.Tensor
    qk_norm: torch.Tensor | None
    qkv: QuantLinear
    output: QuantLinear
    gate_up: QuantLinear
    down: QuantLinear
    window: int | None
    rotates: bool


@dataclass(frozen=True, slots=True, eq=False)
class StepEntrance:
    """Where the step of a draft head begins: with embedded tokens beside hidden states, each normed where it has a norm
    [hidden].

    fc brings both to the width of the residual stream; without it the first qkv takes both, and the residual stream is
    the hidden state, normed if `keeps_norm`.
    """

    embedding_norm: torch.Tensor | None
    hidden_norm: torch.Tensor | None
    fc: QuantLinear | None
    keeps_norm: bool


@dataclass(frozen=True, slots=True, eq=False)
class StepNetwork:
    """cosines and sines [positions, head_dim / 2] float32. norm, and each layer's attention_norm: None where what is
    normed else is taken as it is. embedding: None where every step brings its tokens embedded.
    """

    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    epsilon: float
    scale: float
    cosines: torch.Tensor
    sines: torch.Tensor
    layers: Sequence[StepLayer]
    norm: torch.Tensor | None
    embedding: QuantLinear | None
    head: QuantLinear
    entrance: StepEntrance | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """What a step brings along, float32 [tokens, hidden], contiguous: hidden states for the network's entrance, and its
    tokens embedded.
    """

    states: torch.Tensor | None = None
    embedded: torch.Tensor | None = None


class StepBatch(Protocol):
    """A ragged batch, all int64 and contiguous: what the step reads of `engine.batch.Batch`.

    tree [tokens]: see `kernels.paged_attention.tree`; None where all are chains.
    """

    @property
    def token_ids(self) -> Ints: ...
    @property
    def positions(self) -> Ints: ...
    @property
    def slot_mapping(self) -> Ints: ...
    @property
    def cu_seqlens_q(self) -> Ints: ...
    @property
    def context_lens(self) -> Ints: ...
    @property
    def block_table(self) -> Ints: ...
    @property
    def sampled_rows(self) -> Ints: ...
    @property
    def tree(self) -> Ints | None: ...


@dataclass(frozen=True, slots=True, eq=False)
class StepLogits:
    """logits [rows, vocab_size] float32; the first of the likeliest tokens of each row, int64; and its logit, which is
    NaN when any of the row is. features [rows, taps, hidden] float32, where any are asked for.
    """

    logits: torch.Tensor
    best: Ints
    highest: npt.NDArray[np.float32]
    features: torch.Tensor | None = None


class _Layer(ctypes.Structure):
    _fields_ = [
        ("attention_norm", ADDRESS),
        ("mlp_norm", ADDRESS),
        ("qk_norm", ADDRESS),
        ("qkv", Matrix),
        ("output", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("window", INT64),
        ("rotates", INT64),
    ]


class _Network(ctypes.Structure):
    _fields_ = [
        *((name, INT64) for name in ("hidden", "inner", "heads", "kv_heads", "head_dim", "layers", "vocab")),
        ("epsilon", FLOAT),
        ("scale", FLOAT),
        *((name, ADDRESS) for name in ("cosines", "sines", "layer", "norm")),
        ("embedding", Matrix),
        ("head", Matrix),
        ("entrance", ADDRESS),
    ]


class _Entrance(ctypes.Structure):
    _fields_ = [("embedding_norm", ADDRESS), ("hidden_norm", ADDRESS), ("fc", Matrix), ("keeps_norm", INT64)]


class _Pool(ctypes.Structure):
    _fields_ = [
        ("data", ADDRESS),
        *((name, INT64) for name in ("layers", "block_size", "kv_heads", "head_dim")),
        ("kind", INT32),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, INT64) for name in ("tokens", "sequences", "samples", "table_width")),
        *((name, ADDRESS) for name in ("token_ids", "positions", "slots", "starts", "context_lens", "blocks")),
        *((name, ADDRESS) for name in ("sampled", "tree", "states", "embedded", "logits", "best", "highest")),
        *((name, ADDRESS) for name in ("on_layers", "tapped", "features")),
        *((name, INT64) for name in ("taps", "threads")),
    ]


class DecoderStep:
    """Made once for a network, whose weights it keeps alive."""

    def __init__(self, network: StepNetwork) -> None:
        """Raises InternalError for a network that `can_run` says no to."""
        if not can_run(network):
            raise InternalError("the native step cannot run this network")
        self._network = network
        self._layers = (_Layer * len(network.layers))(*map(_layer, network.layers))
        self._entrance = _entrance(network.entrance) if network.entrance is not None else None
        self._struct = _struct(network, self._layers, self._entrance)

    def run(
        self,
        batch: StepBatch,
        kv_pool: torch.Tensor,
        num_threads: int,
        on_layers: OnLayers | None = None,
        taps: Sequence[int] = (),
        given: Given = Given(),
    ) -> StepLogits:
        """One step on `num_threads` threads.

        kv_pool [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim], contiguous, float32, bfloat16 or
        float16. `on_layers(n)` hears when keys and values of the first n layers are stored; what it raises is raised
        here, at the end. `taps`: see `models.decoder.Taps`. `given`: what the network calls for. Token ids, positions
        and blocks must be in range: the caller has checked them. Raises InternalError when shapes or types do not fit.
        """
        network, native = self._network, _native()
        assert native is not None
        arrays = _checked(network, batch, kv_pool)
        _check_given(network, given, len(batch.token_ids))
        head = network.head
        samples = len(batch.sampled_rows)
        logits = torch.empty(samples, head.packed.padded_outs)
        best, highest = np.empty(samples, np.int64), np.empty(samples, np.float32)
        heard = _Heard(on_layers)
        tapped, features = np.array(taps, np.int64), torch.empty(samples, len(taps), network.hidden)
        pool = _Pool(kv_pool.data_ptr(), *kv_pool.shape[1:2], *kv_pool.shape[3:], _KINDS[kv_pool.dtype])
        step = _Batch(
            len(batch.token_ids),
            len(batch.context_lens),
            samples,
            batch.block_table.shape[1],
            *(None if array is None else array.ctypes.data for array in arrays),
            _address(given.states),
            _address(given.embedded),
            logits.data_ptr(),
            best.ctypes.data,
            highest.ctypes.data,
            ctypes.cast(heard.function, ADDRESS) if on_layers is not None else None,
            tapped.ctypes.data,
            features.data_ptr(),
            len(taps),
            num_threads,
        )
        native(ctypes.addressof(self._struct), ctypes.addressof(pool), ctypes.addressof(step))
        heard.raise_again()
        return StepLogits(logits[:, : head.outs], best, highest, features if taps else None)


def likeliest(logits: torch.Tensor) -> StepLogits:
    """What the native step says of logits [rows, vocab_size] of any float type; its twin."""
    values = logits.to("cpu", torch.float32)
    # numpy finds the first maximum of a row several times faster than torch does on a CPU.
    return StepLogits(values, values.numpy().argmax(axis=-1), values.amax(dim=-1).numpy())


def can_run(network: StepNetwork) -> bool:
    """Whether the native kernel is here and made for such a network."""
    sizes = (network.hidden, network.inner, network.num_heads * network.head_dim)
    is_regular = all(size % 32 == 0 for size in sizes)
    return _native() is not None and is_regular and network.head_dim / 16 in _VECTORS


@cache
def _native() -> Function | None:
    return function("decoder_step", [ADDRESS, ADDRESS, ADDRESS])


class _Heard:
    """Carries an error of the callback across the native call, which would only print it."""

    def __init__(self, on_layers: OnLayers | None) -> None:
        self._on_layers = on_layers
        self._error: BaseException | None = None
        self.function = _ON_LAYERS(self._hear)

    def _hear(self, num_layers: int) -> None:
        if self._on_layers is None or self._error is not None:
            return
        try:
            self._on_layers(num_layers)
        except BaseException as err:  # noqa: BLE001 - raised again by raise_again
            self._error = err

    def raise_again(self) -> None:
        if self._error is not None:
            raise self._error


def _checked(network: StepNetwork, batch: StepBatch, kv_pool: torch.Tensor) -> list[Ints | None]:
    """The batch's arrays in the order of `_Batch`."""
    shape = (len(network.layers), 2, kv_pool.shape[3], network.num_kv_heads, network.head_dim)
    if tuple(kv_pool.shape[1:]) != shape or kv_pool.dtype not in _KINDS or not kv_pool.is_contiguous():
        raise InternalError(f"the pool is {list(kv_pool.shape)} {kv_pool.dtype}, not [blocks, {shape}]")
    tokens, sequences = len(batch.token_ids), len(batch.context_lens)
    arrays: dict[str, tuple[Ints | None, tuple[int, ...]]] = {
        "token_ids": (batch.token_ids, (tokens,)),
        "positions": (batch.positions, (tokens,)),
        "slot_mapping": (batch.slot_mapping, (tokens,)),
        "cu_seqlens_q": (batch.cu_seqlens_q, (sequences + 1,)),
        "context_lens": (batch.context_lens, (sequences,)),
        "block_table": (batch.block_table, (sequences, batch.block_table.shape[1])),
        "sampled_rows": (batch.sampled_rows, (len(batch.sampled_rows),)),
        "tree": (batch.tree, (tokens,)),
    }
    for name, (array, wanted) in arrays.items():
        if array is None:
            continue
        if array.shape != wanted or array.dtype != np.int64 or not array.flags.c_contiguous:
            raise InternalError(f"{name} is {array.shape} {array.dtype}, not {wanted} int64, contiguous")
    return [array for array, _ in arrays.values()]


def _check_given(network: StepNetwork, given: Given, tokens: int) -> None:
    wanted = {"states": network.entrance is not None, "embedded": network.embedding is None}
    for name, is_needed in wanted.items():
        x: torch.Tensor | None = getattr(given, name)
        if x is None and not is_needed:
            continue
        found = "missing" if x is None else f"{list(x.shape)} {x.dtype}"
        if x is None or x.shape != (tokens, network.hidden) or x.dtype != torch.float32 or not x.is_contiguous():
            raise InternalError(f"{name} is {found}, not [{tokens}, {network.hidden}] float32, contiguous")


def _address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _layer(layer: StepLayer) -> _Layer:
    return _Layer(
        _address(layer.attention_norm),
        layer.mlp_norm.data_ptr(),
        _address(layer.qk_norm),
        layer.qkv.matrix(),
        layer.output.matrix(),
        layer.gate_up.matrix(),
        layer.down.matrix(),
        layer.window or 0,
        int(layer.rotates),
    )


def _entrance(entrance: StepEntrance) -> _Entrance:
    norms = _address(entrance.embedding_norm), _address(entrance.hidden_norm)
    return _Entrance(*norms, _matrix(entrance.fc), entrance.keeps_norm)


def _matrix(linear: QuantLinear | None) -> Matrix:
    return Matrix() if linear is None else linear.matrix()


def _struct(network: StepNetwork, layers: ctypes.Array[_Layer], entrance: _Entrance | None) -> _Network:
    return _Network(
        network.hidden,
        network.inner,
        network.num_heads,
        network.num_kv_heads,
        network.head_dim,
        len(network.layers),
        network.head.outs,
        network.epsilon,
        network.scale,
        network.cosines.data_ptr(),
        network.sines.data_ptr(),
        ctypes.addressof(layers),
        _address(network.norm),
        _matrix(network.embedding),
        network.head.matrix(),
        None if entrance is None else ctypes.addressof(entrance),
    )
