from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from penstock.core.errors import InternalError
from penstock.core.ids import BlockId
from penstock.engine.batch import build_batch
from penstock.engine.kv_memory import KVMemory
from penstock.engine.model_runner import ModelRunner, layer_bytes, pool_view
from penstock.engine.torch_engine import build_decoder
from penstock.testing.stepper import Stepper
from penstock.testing.tiny_model import random_weights, tiny_config

BLOCK_SIZE = 4
CONFIG = tiny_config(max_position=32)


def make_runner() -> tuple[ModelRunner, KVMemory]:
    memory = KVMemory(8, CONFIG.num_layers, layer_bytes(CONFIG, BLOCK_SIZE, torch.float32))
    decoder = build_decoder(CONFIG, random_weights(CONFIG).items(), torch.float32)
    return ModelRunner(decoder, pool_view(memory, CONFIG, BLOCK_SIZE, torch.float32)), memory


def test_view_and_memory_agree_on_where_a_block_lies() -> None:
    memory = KVMemory(5, CONFIG.num_layers, layer_bytes(CONFIG, BLOCK_SIZE, torch.bfloat16))
    pool = pool_view(memory, CONFIG, BLOCK_SIZE, torch.bfloat16)
    pool[3, 1, 1, 2, 0, 5] = 1.0
    values = np.frombuffer(memory.block(3, 1, 1), dtype=np.uint16).reshape(2, BLOCK_SIZE, 2, 16)
    assert np.argwhere(values).tolist() == [[1, 2, 0, 5]]
    assert pool.shape == (5, 3, 2, BLOCK_SIZE, 2, 16)


def test_view_outlives_the_memory() -> None:
    memory = KVMemory(2, CONFIG.num_layers, layer_bytes(CONFIG, BLOCK_SIZE, torch.float32))
    pool = pool_view(memory, CONFIG, BLOCK_SIZE, torch.float32)
    memory.close()
    del memory
    gc.collect()
    pool.fill_(1.0)
    assert float(pool.sum()) == pool.numel()


@pytest.mark.parametrize(
    ("token_id", "length", "block", "message"),
    [
        (320, 3, None, r"token id 320 or 320 is not in \[0, 320\)"),
        (-1, 3, None, "token id -1"),
        (5, 33, None, r"position 0 or 32 is not in \[0, 32\)"),
        (5, 3, 8, r"block id 8 or 8 is not in \[0, 8\)"),
    ],
)
def test_number_out_of_range_is_refused(token_id: int, length: int, block: int | None, message: str) -> None:
    runner, _ = make_runner()
    stepper = Stepper(16, BLOCK_SIZE)
    stepper.free = [BlockId(i % 8) for i in range(16)]
    entry = stepper.schedule(stepper.add([token_id] * length))
    if block is not None:
        entry.seq.block_table = [BlockId(block)]
    with pytest.raises(InternalError, match=message):
        runner.run(build_batch([entry], BLOCK_SIZE))
