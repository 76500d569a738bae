"""What a KV cache of 8 bits costs in accuracy, on real text: `python benchmarks/kv_accuracy.py --data FOLDER`.

The same figures as `quant_accuracy.py`, on the same windows of the same books: the network in float32 with a float32
cache is what the others are compared with. With 8 bits the network stays in float32, so only the cache differs.
Computed by the fused operations: on a CUDA device by their kernels, elsewhere by their references, which take some
seconds a window.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from penstock.benchmarks.quant_accuracy import BLOCK_SIZE, compare, make_parser, show, windows
from penstock.kernels.paged_attention.device_plan import build_device_plan
from penstock.models import store
from penstock.models.checkpoint import open_checkpoint
from penstock.models.device_decoder import DeviceDecoder, DeviceStep, make_pool
from penstock.models.weights import load_weights

# name: what the network computes in, what the cache holds
WAYS = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "int8 cache": (torch.float32, torch.int8),
    "fp8_e4m3 cache": (torch.float32, torch.float8_e4m3fn),
}


class CacheWay:
    """A `quant_accuracy.Predictor` with one kind of cache, filled `chunk` tokens a step."""

    def __init__(self, decoder: DeviceDecoder, cache_dtype: torch.dtype, chunk: int) -> None:
        self._decoder, self._cache_dtype, self._chunk = decoder, cache_dtype, chunk

    def predictions(self, token_ids: list[int]) -> torch.Tensor:
        decoder, num_tokens = self._decoder, len(token_ids)
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        pool = make_pool(decoder.config, num_blocks, BLOCK_SIZE, self._cache_dtype, decoder.device)
        table, ids = np.arange(num_blocks)[None], torch.tensor(token_ids, device=decoder.device)
        found = []
        for start in range(0, num_tokens, self._chunk):
            stop = min(start + self._chunk, num_tokens)
            places = torch.arange(start, stop, device=decoder.device)  # blocks lie in order: slots are positions
            plan = build_device_plan(np.array([0, stop - start]), np.array([stop]), table, decoder.device)
            found.append(decoder.forward(DeviceStep(ids[start:stop], places, places, plan), pool))
        return torch.cat(found).float().log_softmax(dim=-1).cpu()


def load(model: Path, dtype: torch.dtype, max_context: int) -> DeviceDecoder:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = open_checkpoint(model)
    tensors = ((name, tensor.to(device)) for name, tensor in checkpoint.tensors())
    return DeviceDecoder(checkpoint.config, load_weights(checkpoint.config, tensors, dtype), max_context)


def measure(model: Path, texts: list[list[int]], chunk: int) -> dict[str, dict[str, float]]:
    longest = max(map(len, texts))
    decoders = {dtype: load(model, dtype, longest) for dtype in (torch.float32, torch.bfloat16)}
    base = CacheWay(decoders[torch.float32], torch.float32, chunk)
    ways = {name: CacheWay(decoders[dtype], cache, chunk) for name, (dtype, cache) in WAYS.items()}
    return compare(base, ways, texts)


def main() -> int:
    parser = make_parser((__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--chunk", type=int, default=512, help="tokens of a step (default: 512); 1 fills blocks as decode does"
    )
    args = parser.parse_args()
    model = store.resolve(store.DEFAULT_MODEL).path
    show(model, args, measure(model, list(windows(args.data, model, args.length, args.windows)), args.chunk))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
