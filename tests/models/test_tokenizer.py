"""Tokenizers from small files made here, from GGUF metadata, and from the real default model."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
from tokenizers import models as tokenizer_models

from penstock.core.errors import BadRequest, ModelFileError
from penstock.models.gguf_tokenizer import build_gguf_tokenizer
from penstock.models.text_stream import TextStream
from penstock.models.token_bytes import byte_level_alphabet
from penstock.models.tokenizer import Tokenizer, load_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HARD_TEXTS = [
    "x  12",
    "  leading and trailing  ",
    "tabs\tand\r\nlines\n\n\n",
    "def f(x):\n    return x ** 2  # é",
    "I'll say we've 3.14159 × 1000000",
    "日本語のテキストと中文和한국어",
    "👩‍👩‍👧‍👦 🇫🇷 🏳️‍🌈 e\u0301",
    "\x00\x01\ufffd\U0010ffff",
    "<|im_start|>user typed this<|im_end|>",
]


def byte_level_metadata(pre: str = "gpt-2") -> dict[str, object]:
    """A byte-level BPE vocabulary of 256 bytes, four merges, two control tokens and a user-defined one."""
    merges = ["l o", "lo w", "Ġ lo", "Ġlo w"]
    tokens = [*byte_level_alphabet(), *(merge.replace(" ", "") for merge in merges)]
    kinds = [1] * len(tokens) + [3, 3, 4]
    tokens += ["<|im_start|>", "<|im_end|>", "<tool>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.chat_template": CHATML,
    }


def sentencepiece_metadata(**changes: object) -> dict[str, object]:
    """A SentencePiece vocabulary: control tokens, all bytes, letters, and pieces with scores."""
    pieces = {"▁": -9.0, "h": -9.0, "i": -9.0, "o": -9.0, "▁h": -3.0, "hi": -2.0, "▁hi": -1.0, "ho": -4.0, "▁▁": -5.0}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "tokenizer.ggml.scores": [0.0] * 259 + list(pieces.values()),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **changes,
    }


def byte_level(pre: str = "gpt-2") -> Tokenizer:
    return Tokenizer(*build_gguf_tokenizer(byte_level_metadata(pre)))


def sentencepiece(**changes: object) -> Tokenizer:
    return Tokenizer(*build_gguf_tokenizer(sentencepiece_metadata(**changes)))


def save_folder(folder: Path, backend: tokenizers.Tokenizer, **files: object) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def user(content: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def smollm2(model_path: Path) -> Tokenizer:
    return load_tokenizer(model_path)


def test_encode_typed_special_token_stays_text_unless_parsed() -> None:
    tokenizer = byte_level()
    end = tokenizer.eos_token_ids[0]
    assert end not in tokenizer.encode("low<|im_end|>")
    assert tokenizer.decode(tokenizer.encode("low<|im_end|>")) == "low<|im_end|>"
    assert tokenizer.encode("low<|im_end|>", parse_special=True)[-1] == end


def test_encode_user_defined_token_is_one_token_and_text() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("low<tool>")
    assert [tokenizer.token_text(i) for i in ids] == ["low", "<tool>"]
    assert tokenizer.decode(ids) == "low<tool>"


def test_encode_half_a_surrogate_pair_is_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="surrogate"):
        byte_level().encode("a\ud83d")


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Let threads take turns as often as they can, so that a race shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_switching")
def test_encode_from_many_threads_keeps_special_and_text_apart() -> None:
    tokenizer = byte_level()
    parsed = tokenizer.encode("<|im_end|>", parse_special=True)
    plain = tokenizer.encode("<|im_end|>")
    wrong: list[list[int]] = []

    def work(parse: bool) -> None:
        for _ in range(300):
            ids = tokenizer.encode("<|im_end|>", parse_special=parse)
            if ids != (parsed if parse else plain):
                wrong.append(ids)

    threads = [threading.Thread(target=work, args=(number % 2 == 0,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_decode_special_tokens_shown_only_when_asked() -> None:
    tokenizer = byte_level()
    ids = [*tokenizer.encode("low"), tokenizer.eos_token_ids[0]]
    assert tokenizer.decode(ids) == "low"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "low<|im_end|>"


def test_decode_id_past_the_vocabulary_adds_nothing() -> None:
    tokenizer = byte_level()
    for token_id in (tokenizer.vocab_size, tokenizer.vocab_size + 1, 1 << 40, -1):
        assert tokenizer.token_bytes(token_id) == b""
    assert tokenizer.decode([*tokenizer.encode("low"), tokenizer.vocab_size]) == "low"


def test_token_text_half_a_character_shows_replacement_and_keeps_bytes() -> None:
    tokenizer = byte_level()
    first = tokenizer.encode("日")[0]
    assert tokenizer.token_bytes(first) == "日".encode()[:1]
    assert tokenizer.token_text(first) == "\ufffd"


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_pre_tokenizer_digits_and_spaces_follow_the_family(pre: str) -> None:
    backend = build_gguf_tokenizer(byte_level_metadata(pre))[0]
    words = [text.replace("Ġ", " ") for text, _ in backend.pre_tokenizer.pre_tokenize_str("x  1234 IT'S")]
    assert (
        words
        == {
            "gpt-2": ["x", " ", " 1234", " IT", "'", "S"],
            "smollm": ["x", "  ", "1", "2", "3", "4", " IT", "'", "S"],
            "llama-bpe": ["x", " ", " ", "123", "4", " IT", "'S"],
            "qwen2": ["x", " ", " ", "1", "2", "3", "4", " IT", "'S"],
        }[pre]
    )


@given(st.text())
def test_byte_level_any_text_round_trips(text: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.special_ids.isdisjoint(ids)


def test_sentencepiece_joins_the_best_scored_pieces_first() -> None:
    tokenizer = sentencepiece()
    texts = [tokenizer.token_text(i) for i in tokenizer.encode("hi ho")]
    assert texts == ["<s>", " hi", " h", "o"]
    assert tokenizer.encode("hi", add_special_tokens=False) == tokenizer.encode("hi")[1:]


@given(st.text(alphabet="hio é日\n👩"))
def test_sentencepiece_any_text_round_trips(text: str) -> None:
    tokenizer = sentencepiece()
    assert tokenizer.strips_leading_space
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_without_space_prefix_round_trips() -> None:
    tokenizer = sentencepiece(**{"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False})
    assert [tokenizer.token_text(i) for i in tokenizer.encode("hi")] == ["hi"]
    assert tokenizer.decode(tokenizer.encode(" hi")) == " hi"


def test_sentencepiece_stream_goes_on_where_the_prompt_ended() -> None:
    tokenizer = sentencepiece()
    prompt, output = tokenizer.encode("hi"), tokenizer.encode("ho é", add_special_tokens=False)
    stream = TextStream(tokenizer)
    text = "".join(stream.feed([i]).text for i in output) + stream.finish().text
    assert text == " ho é"
    assert tokenizer.decode(prompt + output) == tokenizer.decode(prompt) + text


def test_other_decoders_are_read_through_the_library() -> None:
    vocab = {"[UNK]": 0, "a": 1, "low": 2, "##er": 3}
    backend = tokenizers.Tokenizer(tokenizer_models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    folder_free = Tokenizer(backend, build_gguf_tokenizer(byte_level_metadata())[1])
    assert folder_free.decode([1, 2, 3, 2]) == backend.decode([1, 2, 3, 2]) == "a lower low"
    assert folder_free.token_bytes(3) == b"er"


def test_chat_typed_special_token_adds_no_special_id() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode_chat(user("low <|im_end|> low"))
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_ids[0]
    assert [i for i in ids if i in tokenizer.special_ids] == [start, end, start]
    text = "<|im_start|>user\nlow <|im_end|> low<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_chat_harmless_text_equals_plain_rendering_and_encoding() -> None:
    tokenizer = byte_level()
    text = "<|im_start|>user\n  a<b [low] \n<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode_chat(user("  a<b [low] \n")) == tokenizer.encode(text, parse_special=True)


@pytest.mark.parametrize("normalized", [False, True])
def test_chat_mixed_path_equals_library_around_special_tokens(normalized: bool, tmp_path: Path) -> None:
    backend, _ = build_gguf_tokenizer(sentencepiece_metadata())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), backend.normalizer])
    flags = {"lstrip": True, "rstrip": True, "normalized": normalized, "special": True}
    backend.add_special_tokens([AddedToken("<end>", **flags)])
    template = "<s>{% for m in messages %} {{ m.content }} <end> {% endfor %}"
    files = {"tokenizer_config": {"chat_template": template, "eos_token": "<end>"}}
    tokenizer = load_tokenizer(save_folder(tmp_path, backend, **files))
    end = tokenizer.eos_token_ids[0]
    plain = tokenizer.encode_chat(user("hi ho"))
    assert plain == backend_ids(tmp_path, "<s> hi ho <end> ")
    typed = tokenizer.encode_chat([*user("hi ho"), *user("<end>")])
    same = len(plain) - normalized  # in normalized text the last space stays and joins the next one
    assert typed[:same] == plain[:same]
    assert typed.count(end) == 2
    wide = tokenizer.encode_chat(user("＜end＞"))  # becomes "<end>" in normal form
    assert wide.count(end) == 1


def backend_ids(folder: Path, text: str) -> list[int]:
    """What the library alone makes of `text`, special tokens parsed."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    return ids


def test_chat_without_template_says_what_to_use_instead() -> None:
    with pytest.raises(BadRequest, match="/v1/completions"):
        sentencepiece().encode_chat(user("hi"))


def test_folder_settings_come_from_all_its_files(tmp_path: Path) -> None:
    backend = build_gguf_tokenizer(byte_level_metadata())[0]
    start, end = backend.token_to_id("<|im_start|>"), backend.token_to_id("<|im_end|>")
    save_folder(
        tmp_path,
        backend,
        tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>", "chat_template": "old"},
        generation_config={"eos_token_id": [start, end]},
    )
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token_ids == (end, start)
    assert tokenizer.bos_token_id == start
    assert tokenizer.chat_template == CHATML
    assert tokenizer.vocab_size == 263
    assert tokenizer.encode_chat(user("low")) == byte_level().encode_chat(user("low"))


def test_folder_several_templates_default_one_is_used(tmp_path: Path) -> None:
    templates = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    backend = build_gguf_tokenizer(byte_level_metadata())[0]
    save_folder(tmp_path, backend, tokenizer_config={"chat_template": templates})
    assert load_tokenizer(tmp_path).chat_template == "yes"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "tokenizer.json is not a tokenizer file"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("generation_config.json", "[]", "generation_config.json must hold a JSON object"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id .* holds 'x'"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8"),
    ],
)
def test_folder_broken_file_is_named(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    save_folder(tmp_path, build_gguf_tokenizer(byte_level_metadata())[0])
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ModelFileError, match=message):
        load_tokenizer(tmp_path)


def test_folder_without_tokenizer_json_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="save_pretrained"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.model", "bert", "'bert'; known are"),
        ("tokenizer.ggml.model", None, "must be a string"),
        ("tokenizer.ggml.pre", "unheard-of", "'unheard-of'; known pre-tokenizers are .*smollm"),
        ("tokenizer.ggml.tokens", None, "tokens is missing"),
        ("tokenizer.ggml.token_type", [1], "token_type must be an array of 263 numbers"),
        ("tokenizer.ggml.merges", ["ab"], "'ab'; an entry is two pieces"),
        ("tokenizer.ggml.merges", ["a nothing"], "do not fit together"),
        ("tokenizer.ggml.eos_token_id", 263, "eos_token_id is 263; the vocabulary has ids 0 to 262"),
        ("tokenizer.ggml.bos_token_id", "x", "bos_token_id is 'x'"),
    ],
)
def test_gguf_broken_metadata_names_the_key(key: str, value: object, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        build_gguf_tokenizer({**byte_level_metadata(), key: value})


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_smollm2_hard_text_round_trips(smollm2: Tokenizer, text: str) -> None:
    assert smollm2.decode(smollm2.encode(text)) == text


def test_smollm2_spaces_before_a_digit_follow_its_pre_tokenizer(smollm2: Tokenizer) -> None:
    assert [smollm2.token_text(i) for i in smollm2.encode("x  12")] == ["x", "  ", "1", "2"]


def test_smollm2_settings_and_chat_prompt(smollm2: Tokenizer) -> None:
    assert (smollm2.vocab_size, smollm2.eos_token_ids, smollm2.bos_token_id) == (49152, (2, 0), 1)
    ids = smollm2.encode_chat(user("What is the capital of France?"))
    assert len(ids) == 37
    assert smollm2.decode(ids, skip_special_tokens=False).endswith("France?<|im_end|>\n<|im_start|>assistant\n")
    assert smollm2.encode_chat(user("<|im_end|>")).count(2) == 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(ids=st.lists(st.integers(0, 49199), max_size=40), size=st.integers(1, 5))
def test_smollm2_stream_of_random_ids_equals_full_decode(smollm2: Tokenizer, ids: list[int], size: int) -> None:
    stream = TextStream(smollm2)
    chunks = [ids[start : start + size] for start in range(0, len(ids), size)]
    assert "".join(stream.feed(chunk).text for chunk in chunks) + stream.finish().text == smollm2.decode(ids)


def test_smollm2_decode_equals_the_library(smollm2: Tokenizer) -> None:
    for text in HARD_TEXTS:
        ids = smollm2.encode(text)
        assert smollm2.decode(ids[1:]) == smollm2._backend.decode(ids[1:])
