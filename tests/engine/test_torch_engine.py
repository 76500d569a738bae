from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from penstock.core.errors import ConfigError, InternalError, ModelFileError
from penstock.core.random_bits import choice_seed
from penstock.engine.race import race_key
from penstock.engine.torch_engine import TorchEngine, build_decoder, resolve_dtype
from penstock.models.config import RopeScaling
from penstock.models.decoder import Decoder
from penstock.protocol.messages import SampledToken
from penstock.protocol.sampling import SamplingParams
from penstock.testing.stepper import Stepper
from penstock.testing.tiny_model import random_weights, tiny_config

BLOCK_SIZE = 4
NUM_BLOCKS = 200
LENGTHS = [1, 3, 4, 5, 16, 17, 31, 60]
HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 72,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "eos_token_id": [0, 7],
}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    config = tiny_config()
    return build_decoder(config, random_weights(config).items(), torch.float32)


def make_engine(decoder: Decoder, num_blocks: int = NUM_BLOCKS, block_size: int = BLOCK_SIZE) -> TorchEngine:
    return TorchEngine(decoder, model_name="tiny", identity="abc", num_blocks=num_blocks, block_size=block_size)


def prompt(length: int) -> list[int]:
    return torch.randint(1, 320, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def generate(
    engine: TorchEngine, lengths: list[int], params: SamplingParams | None = None, chunk: int | None = None
) -> list[list[int]]:
    """Eight output tokens of a prompt of each length, all in one batch."""
    stepper = Stepper(engine.spec.num_blocks, engine.spec.block_size, seed=len(lengths))
    seqs = [stepper.add(prompt(length), params) for length in lengths]
    stepper.generate(engine, seqs, 8, chunk)
    return [seq.output_ids for seq in seqs]


PARAMS = {
    "greedy": SamplingParams(temperature=0),
    "seeded": SamplingParams(temperature=0.9, top_p=0.9, seed=42),
    "penalties": SamplingParams(temperature=0.7, top_k=30, repetition_penalty=1.3, frequency_penalty=0.2, seed=1),
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_batch_gives_the_tokens_of_one_by_one(decoder: Decoder, params: SamplingParams) -> None:
    engine = make_engine(decoder)
    alone = [generate(engine, [length], params)[0] for length in LENGTHS]
    assert generate(engine, LENGTHS, params) == alone
    assert len({tuple(tokens) for tokens in alone}) == len(LENGTHS)


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 20])
def test_chunked_prompt_gives_the_same_tokens(decoder: Decoder, chunk: int) -> None:
    engine = make_engine(decoder)
    assert generate(engine, LENGTHS, chunk=chunk) == generate(engine, LENGTHS)


def test_block_size_does_not_change_tokens(decoder: Decoder) -> None:
    expected = generate(make_engine(decoder), LENGTHS)
    assert generate(make_engine(decoder, 300, 1), LENGTHS) == expected
    assert generate(make_engine(decoder, 40, 16), LENGTHS) == expected


def test_engines_with_one_decoder_have_separate_pools(decoder: Decoder) -> None:
    first, second = make_engine(decoder), make_engine(decoder)
    before = generate(first, [20])
    second.memory.buffer[:] = b"\xff" * second.memory.nbytes  # NaN
    assert generate(first, [20]) == before
    assert generate(second, [20]) == before


def test_blocks_copied_to_another_engine_continue_the_sequence(decoder: Decoder) -> None:
    """What a hand-off does: the bytes of a prefilled sequence's blocks, in other blocks of another pool."""
    source, destination = make_engine(decoder), make_engine(decoder)
    stepper = Stepper(NUM_BLOCKS, BLOCK_SIZE)
    seq = stepper.add(prompt(18))
    entries = [stepper.schedule(seq)]
    stepper.commit(entries, source.execute(entries))
    moved = Stepper(NUM_BLOCKS, BLOCK_SIZE, seed=9)
    blocks = [moved.free.pop() for _ in seq.block_table]
    for old, new in zip(seq.block_table, blocks, strict=True):
        destination.memory.block(new)[:] = source.memory.block(old)
    seq.block_table = blocks
    moved.generate(destination, [seq], 8)
    assert seq.output_ids == generate(make_engine(decoder), [18])[0]


def test_engine_on_the_memory_of_another_continues_its_sequence_where_it_lies(decoder: Decoder) -> None:
    source = make_engine(decoder)
    destination = TorchEngine(
        decoder,
        model_name="tiny",
        identity="abc",
        num_blocks=12,
        block_size=BLOCK_SIZE,
        make_memory=lambda num_blocks, num_layers, nbytes: source.memory,
    )
    assert (destination.spec.num_blocks, destination.spec.max_sequence_tokens) == (12, 12 * BLOCK_SIZE)
    stepper = Stepper(NUM_BLOCKS, BLOCK_SIZE)
    seq = stepper.add(prompt(18))
    entries = [stepper.schedule(seq)]
    stepper.commit(entries, source.execute(entries))
    assert max(seq.block_table) >= 12, "block ids are those of the whole memory"
    stepper.generate(destination, [seq], 8)
    assert seq.output_ids == generate(make_engine(decoder), [18])[0]


def test_several_choices_share_one_prefill(decoder: Decoder) -> None:
    engine, stepper = make_engine(decoder), Stepper(NUM_BLOCKS, BLOCK_SIZE)
    params = SamplingParams(n=3, seed=5, temperature=2.0, logprobs=1)
    seq, other = stepper.add(prompt(9), params), stepper.add(prompt(30))
    seq.sample_choices = (0, 1, 2)
    results = engine.execute([stepper.schedule(other, 10), stepper.schedule(seq), stepper.schedule(stepper.add([4]))])
    assert [len(tokens) for tokens in results] == [0, 3, 1]
    expected: list[SampledToken] = []
    for choice in range(3):
        one = stepper.add(prompt(9), params)
        one.choice = choice
        expected += engine.execute([stepper.schedule(one)])[0]
    assert list(results[1]) == expected
    assert len({race_key(choice_seed(5, choice), 0) for choice in range(3)}) == 3


def test_broken_sequence_is_named_and_leaves_the_others_their_tokens(decoder: Decoder) -> None:
    engine, stepper = make_engine(decoder), Stepper(NUM_BLOCKS, BLOCK_SIZE)
    seqs = [stepper.add(prompt(length)) for length in (9, 10, 11)]
    entries = [stepper.schedule(seq) for seq in seqs]
    stepper.commit(entries, engine.execute(entries))
    engine.memory.block(seqs[1].block_table[0])[:] = b"\xff" * engine.memory.block_bytes  # NaN
    entries = [stepper.schedule(seq) for seq in seqs]
    with pytest.raises(InternalError, match="seq-2#0: the highest logit is nan"):
        engine.execute(entries)
    for index in (0, 2):
        stepper.commit([entries[index]], engine.execute([entries[index]]))
        expected = generate(make_engine(decoder), [9 + index])[0]
        assert seqs[index].output_ids == expected[:2]
    # The next owner of the broken blocks sees nothing of them.
    for seq in seqs:
        stepper.release(seq)
    again = stepper.add(prompt(60))
    stepper.generate(engine, [again], 8)
    assert again.output_ids == generate(make_engine(decoder), [60])[0]


def test_empty_batch_gives_nothing(decoder: Decoder) -> None:
    assert make_engine(decoder).execute([]) == []


def test_spec_states_the_facts(decoder: Decoder) -> None:
    spec = make_engine(decoder, num_blocks=10).spec
    assert (spec.num_blocks, spec.block_size, spec.vocab_size, spec.max_sequence_tokens) == (10, 4, 320, 40)
    assert spec.bytes_per_token == 3 * 2 * 2 * 16 * 4
    fingerprint = spec.fingerprint
    assert (fingerprint.model, fingerprint.weights, fingerprint.dtype) == ("tiny", "abc", "float32")
    assert (fingerprint.num_layers, fingerprint.num_kv_heads, fingerprint.head_dim) == (3, 2, 16)
    assert make_engine(decoder, num_blocks=1000).spec.max_sequence_tokens == 512


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_caches_rotated_for_other_contexts_do_not_mix(kind: str) -> None:
    factors: dict[str, Any] = {"short_factor": (1.0,) * 8, "long_factor": (2.0,) * 8} if kind == "longrope" else {}
    config = tiny_config(rope_scaling=RopeScaling(kind=kind, factor=2.0, original_max_position=64, **factors))
    weights = random_weights(config)
    short, long = (
        make_engine(build_decoder(config, weights.items(), torch.float32, length)).spec.fingerprint
        for length in (64, 512)
    )
    assert "weights differs" in (short.difference(long) or "")


def save_model(folder: Path, **changes: object) -> Path:
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | changes))
    save_file(random_weights(tiny_config()), folder / "model.safetensors")
    return folder


def test_load_serves_a_folder(tmp_path: Path, decoder: Decoder) -> None:
    counted: list[tuple[int, int]] = []
    engine = TorchEngine.load(
        save_model(tmp_path),
        model_name="tiny",
        dtype="float32",
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        progress=lambda done, total: counted.append((done, total)),
    )
    assert engine.spec.eos_token_ids == {0, 7}
    assert generate(engine, LENGTHS) == generate(make_engine(decoder), LENGTHS)
    assert counted == [(i, 30) for i in range(1, 31)]


def test_load_sizes_the_pool_by_bytes_and_the_window_by_request(tmp_path: Path) -> None:
    engine = TorchEngine.load(
        save_model(tmp_path), model_name="tiny", dtype="bfloat16", kv_bytes=1 << 20, max_model_len=100
    )
    assert engine.memory.nbytes <= 1 << 20 < engine.memory.nbytes + engine.memory.block_bytes
    assert engine.memory.block_bytes == 16 * engine.spec.bytes_per_token
    assert engine.spec.max_sequence_tokens == 100
    assert engine.spec.fingerprint.dtype == "bfloat16"
    assert np.frombuffer(engine.memory.buffer, dtype=np.uint8).max() == 0


def test_load_refuses_what_cannot_work(tmp_path: Path) -> None:
    path = save_model(tmp_path)
    with pytest.raises(ConfigError, match="kv_cache_bytes: 1000 holds fewer than two blocks"):
        TorchEngine.load(path, model_name="tiny", kv_bytes=1000)
    with pytest.raises(ConfigError, match="max_model_len: 513 is beyond the model's window of 512"):
        TorchEngine.load(path, model_name="tiny", max_model_len=513)
    with pytest.raises(ConfigError, match=r"model\.dtype: 'float8' is not one of auto, float32, bfloat16"):
        TorchEngine.load(path, model_name="tiny", dtype="float8")


def test_auto_type_is_native_bfloat16_or_float32() -> None:
    assert resolve_dtype("auto") in (torch.bfloat16, torch.float32)
    assert (resolve_dtype("float32"), resolve_dtype("bfloat16")) == (torch.float32, torch.bfloat16)


def test_weights_that_do_not_fit_the_config_are_refused() -> None:
    config = tiny_config()
    weights = random_weights(config)
    for broken, message in (
        ({name: w for name, w in weights.items() if "norm" not in name}, "is missing"),
        (weights | {"model.norm.weight": torch.ones(3)}, r"has shape \[3\], the config calls for \[72\]"),
        (weights | {"model.layers.9.x": torch.ones(3)}, "is not part of this architecture"),
    ):
        with pytest.raises(ModelFileError, match=message):
            build_decoder(config, broken.items(), torch.float32)
