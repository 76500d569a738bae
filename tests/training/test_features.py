"""Features are the states the served network goes through."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from penstock.core.errors import ConfigError
from penstock.engine.torch_engine import TorchEngine, build_decoder
from penstock.models.decoder import Decoder
from penstock.models.draft_config import FINAL_NORM
from penstock.testing.stepper import Stepper
from penstock.testing.tiny_model import random_weights, tiny_config
from penstock.training import features as features_module
from penstock.training.features import compute_features, hidden_states, read_examples
from penstock.training.generation import Sample

LENGTHS = (1, 9, 40)
SAMPLES = [Sample(i, 0.0, [1 + i] * (3 + i), list(range(2, 9 + i))) for i in range(7)]


def sequences() -> list[list[int]]:
    return [torch.randint(1, 320, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]


def tiny(architecture: str, **changes: object) -> Decoder:
    config = tiny_config(architecture, **changes)
    return build_decoder(config, random_weights(config).items(), torch.float32)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_final_state_gives_the_engines_next_token(architecture: str) -> None:
    decoder = tiny(architecture)
    states = hidden_states(decoder, sequences(), [FINAL_NORM])[:, 0]
    engine = TorchEngine(decoder, model_name="t", identity="i", num_blocks=60, block_size=4)
    for ids, rows in zip(sequences(), states.split(LENGTHS), strict=True):
        stepper = Stepper(60, 4)
        seq = stepper.add(ids)
        stepper.generate(engine, [seq], 1)
        assert seq.output_ids == [int(decoder.weights.head(rows[-1:]).argmax())]


def test_sequences_side_by_side_give_what_each_gives_alone() -> None:
    decoder = tiny("llama")
    together = hidden_states(decoder, sequences(), [0, 1, 3])
    apart = torch.cat([hidden_states(decoder, [ids], [0, 1, 3]) for ids in sequences()])
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_state_after_n_layers_is_that_of_a_network_of_n_layers() -> None:
    config = tiny_config()
    weights = random_weights(config)
    ids = sequences()
    states = hidden_states(build_decoder(config, weights.items(), torch.float32), ids, [0, 1, 2, 3, FINAL_NORM])
    torch.testing.assert_close(
        states[:, 0], weights["model.embed_tokens.weight"][torch.tensor([i for sequence in ids for i in sequence])]
    )
    for depth in (1, 2):
        short = tiny_config(num_layers=depth, window_layers=(False,) * depth, rope_layers=(True,) * depth)
        kept = {n: w for n, w in weights.items() if not any(f"layers.{i}." in n for i in range(depth, 3))}
        alone = hidden_states(build_decoder(short, kept.items(), torch.float32), ids, [depth])
        torch.testing.assert_close(states[:, depth], alone[:, 0])
    normed = torch.nn.functional.rms_norm(states[:, 3], (config.hidden_size,), weights["model.norm.weight"], 1e-6)
    torch.testing.assert_close(states[:, 4], normed)


def nothing(done: int, total: int) -> None:
    return


def test_examples_come_back_from_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "SHARD_TOKENS", 40)
    decoder = tiny("llama")
    paths = compute_features(decoder, SAMPLES, [1, FINAL_NORM], tmp_path, nothing)
    assert len(paths) > 1
    examples = [example for path in paths for example in read_examples(path, SAMPLES, [1, FINAL_NORM])]
    assert [example.sample for example in examples] == SAMPLES
    for example in examples:
        states = hidden_states(decoder, [example.sample.token_ids], [1, FINAL_NORM]).to(torch.bfloat16)
        torch.testing.assert_close(example.features, states.flatten(1), atol=0.05, rtol=0.02)
        torch.testing.assert_close(example.final, states[:, 1], atol=0.05, rtol=0.02)


def test_files_that_are_there_are_kept_and_those_of_others_refused(tmp_path: Path) -> None:
    decoder = tiny("llama")
    (path,) = compute_features(decoder, SAMPLES, [1], tmp_path, nothing)
    written = path.stat().st_mtime_ns
    for layers in ([1], [FINAL_NORM]):
        compute_features(decoder, SAMPLES, layers, tmp_path, nothing)
    assert path.stat().st_mtime_ns == written
    for samples, layers in ((SAMPLES[1:], [1]), (SAMPLES, [2])):
        with pytest.raises(ConfigError, match="features of other samples or layers"):
            compute_features(decoder, samples, layers, tmp_path, nothing)
    path.write_bytes(b"\xff" * 32)
    with pytest.raises(ConfigError, match="remove it"):
        compute_features(decoder, SAMPLES, [1], tmp_path, nothing)
