"""A tiny model as a folder of files, and prompts for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from penstock.models.config import config_from_hf
from penstock.testing.tiny_model import random_weights

HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


def write_tokenizer(folder: Path) -> None:
    """One token a word: `w0` to `w126`; everything else is `w1`."""
    words = {f"w{number}": number for number in range(127)}
    document: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w1"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 128 tokens whose text has some order: its head's rows lean on those of its embedding."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    write_tokenizer(folder)
    weights = random_weights(config_from_hf(HF_CONFIG), seed=5)
    save_file({name: weight.to(torch.float32) for name, weight in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": " ".join(f"w{(7 * i + j * j) % 126 + 1}" for j in range(3 + i % 5))} for i in range(62)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
