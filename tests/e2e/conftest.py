"""The real model for the tests that need it: float32, so that greedy paths can be compared token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.engine.torch_engine import TorchEngine
from penstock.models.tokenizer import Tokenizer, load_tokenizer
from penstock.protocol.sampling import SamplingParams
from penstock.router.interface import GenerateRequest

MakeEngine = Callable[[int], TorchEngine]


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Tokenizer:
    return load_tokenizer(model_path)


@pytest.fixture(scope="session")
def base_engine(model_path: Path) -> Iterator[TorchEngine]:
    """One engine whose weights all others share."""
    engine = TorchEngine.load(model_path, model_name="smollm2", dtype="float32", num_blocks=2, max_model_len=2048)
    yield engine
    engine.memory.close()


@pytest.fixture
def make_engine(base_engine: TorchEngine) -> Iterator[MakeEngine]:
    """A float32 engine with a pool of its own, of so many blocks of 16 tokens."""
    engines: list[TorchEngine] = []

    def make(num_blocks: int) -> TorchEngine:
        engine = TorchEngine(base_engine.decoder, model_name="smollm2", identity="test", num_blocks=num_blocks)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.memory.close()


@pytest.fixture(scope="session")
def chats(tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of 24 chat prompts of different kinds and lengths."""
    return [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in PROMPTS]


@pytest.fixture
def request_of(chats: list[list[int]]) -> Callable[[SamplingParams], GenerateRequest]:
    return lambda params: GenerateRequest("r", chats[7], params, 300.0)


PROMPTS = (
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "List five uses of a paper clip.",
    "Explain photosynthesis to a ten year old.",
    "Translate to plain English: the party of the first part shall indemnify the party of the second part.",
    "Write a haiku about rain.",
    "def fibonacci(n):\n    # complete this function\n",
    "Summarise: The meeting began at nine. Anna presented the budget, which was over plan by 4 %. Ben asked for the "
    "reasons; the main one was the price of steel. It was agreed to look for a second supplier before June, and to "
    "report back at the next meeting.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron? Explain.",
    "Give me a recipe for pancakes with three ingredients.",
    "Correct the grammar: he go to school yesterday and forget him book",
    "What are the planets of the solar system, in order?",
    "Tell me a joke about computers.",
    "Write an email to my landlord about a leaking tap. Be polite and brief.",
    "Continue: once upon a time, in a village between two mountains,",
    "What does HTTP status 503 mean, and what should a client do?",
    "Name three differences between a list and a tuple in Python.",
    "Write a slogan for a shop that repairs old clocks.",
    "Ein Satz auf Deutsch: was ist ein Fluss?",
    "Sort these words alphabetically: pear, apple, fig, banana, cherry.",
    "Why is the sky blue? Answer in two sentences.",
    "Compare tea and coffee in a small table.",
    "Describe the smell of a library to someone who has never been in one.",
    "If I have 3 boxes with 12 eggs each and break 5 eggs, how many are left? Show the steps.",
)
