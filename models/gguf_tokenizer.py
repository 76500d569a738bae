"""A tokenizer rebuilt from the metadata of a GGUF file.

Two kinds are known: byte-level BPE ("gpt2"), with the pre-tokenizers of the GPT-2, SmolLM, Llama 3 and Qwen 2
families, and SentencePiece BPE ("llama"). An unknown one is refused: a near miss would give wrong tokens in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from ..core.errors import ModelFileError
from .gguf import read_gguf
from .tokenizer_settings import TokenizerSettings


class TokenKind(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_PATTERN = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2_PATTERN = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}"

# Name in `tokenizer.ggml.pre` -> family. Names that differ only in what they were called share a family.
_FAMILIES = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), "gpt-2"),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), "smollm"),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe"), "llama3"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), "qwen2"),
}

# Control tokens that end a turn or a document in the known families; GGUF files name only one of them as EOS.
_END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "</s>",
)


def load_gguf_tokenizer(path: Path) -> tuple[tokenizers.Tokenizer, TokenizerSettings]:
    """Rebuild the tokenizer of `path`. Raises ModelFileError that names the metadata key at fault."""
    return build_gguf_tokenizer(read_gguf(path).metadata)


def build_gguf_tokenizer(metadata: Mapping[str, object]) -> tuple[tokenizers.Tokenizer, TokenizerSettings]:
    """The same from metadata that is already read."""
    vocab = _read_vocab(metadata)
    model = _text(metadata, "tokenizer.ggml.model")
    if model == "gpt2":
        backend, adds_bos = _byte_level(vocab, metadata)
    elif model == "llama":
        backend, adds_bos = _sentencepiece(vocab, metadata)
    else:
        raise ModelFileError(f"tokenizer.ggml.model is {model!r}; known are 'gpt2' (byte-level BPE) and 'llama' (SPM)")
    _add_tokens(backend, vocab)
    settings = TokenizerSettings(
        vocab_size=len(vocab.tokens),
        eos_token_ids=_eos_ids(vocab, metadata),
        bos_token_id=_token_id(vocab, metadata, "tokenizer.ggml.bos_token_id"),
        chat_template=_optional_text(metadata, "tokenizer.chat_template"),
    )
    _add_post_processor(backend, vocab, metadata, settings, adds_bos)
    return backend, settings


@dataclass(slots=True, frozen=True)
class _Vocab:
    tokens: list[str]
    kinds: list[int]
    ids: dict[str, int]

    def of_kind(self, *kinds: TokenKind) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.kinds, strict=True) if kind in kinds]


def _read_vocab(metadata: Mapping[str, object]) -> _Vocab:
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    kinds = [int(kind) for kind in _numbers(metadata, "tokenizer.ggml.token_type", len(tokens), TokenKind.NORMAL)]
    ids = {token: token_id for token_id, token in reversed(list(enumerate(tokens)))}
    return _Vocab(tokens, kinds, ids)


def _byte_level(vocab: _Vocab, metadata: Mapping[str, object]) -> tuple[tokenizers.Tokenizer, bool]:
    name = _optional_text(metadata, "tokenizer.ggml.pre")
    family = _FAMILIES.get(name or "")
    if family is None:
        raise ModelFileError(
            f"tokenizer.ggml.pre is {name!r}; known pre-tokenizers are {', '.join(sorted(_FAMILIES))}"
            + ("; convert the model again with a current converter" if name is None else "")
        )
    merges = [_merge(text) for text in _strings(metadata, "tokenizer.ggml.merges")]
    backend = _backend(lambda: models.BPE(vocab=vocab.ids, merges=merges, ignore_merges=family == "llama3"))
    backend.pre_tokenizer = _pre_tokenizer(family)
    if family == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend, family == "llama3"


def _pre_tokenizer(family: str) -> pre_tokenizers.PreTokenizer:
    patterns = {"llama3": _LLAMA3_PATTERN, "qwen2": _QWEN2_PATTERN}
    if family in patterns:
        first = pre_tokenizers.Split(Regex(patterns[family]), behavior="isolated")
        return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if family == "gpt-2":
        return byte_level
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


def _merge(text: str) -> tuple[str, str]:
    left, _, right = text.partition(" ")
    if not left or not right:
        raise ModelFileError(f"tokenizer.ggml.merges holds {text!r}; an entry is two pieces with a space between them")
    return left, right


def _sentencepiece(vocab: _Vocab, metadata: Mapping[str, object]) -> tuple[tokenizers.Tokenizer, bool]:
    scores = _numbers(metadata, "tokenizer.ggml.scores", len(vocab.tokens), 0.0)
    unknown = vocab.of_kind(TokenKind.UNKNOWN)
    merges = _merges_by_score(vocab, scores)
    backend = _backend(
        lambda: models.BPE(
            vocab=vocab.ids,
            merges=merges,
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=bool(vocab.of_kind(TokenKind.BYTE)),
        )
    )
    spaced = metadata.get("tokenizer.ggml.add_space_prefix", True)
    marks = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), marks]) if spaced else marks
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if spaced else steps)
    return backend, True


def _merges_by_score(vocab: _Vocab, scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the two neighbours whose joint piece has the highest score: as a BPE list, best first."""
    normal = {t: i for t, i in vocab.ids.items() if vocab.kinds[i] in (TokenKind.NORMAL, TokenKind.USER_DEFINED)}
    found: list[tuple[float, int, str, str]] = []
    for token, token_id in normal.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                found.append((-scores[token_id], cut, left, right))
    found.sort()
    return [(left, right) for _, _, left, right in found]


def _backend(make_model: Callable[[], models.BPE]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(make_model())
    except Exception as err:  # the library raises bare Exception, for example for a merge of unknown pieces
        raise ModelFileError(f"the GGUF file's vocabulary and merges do not fit together: {err}") from err


def _add_tokens(backend: tokenizers.Tokenizer, vocab: _Vocab) -> None:
    control = vocab.of_kind(TokenKind.CONTROL, TokenKind.UNKNOWN)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    own = vocab.of_kind(TokenKind.USER_DEFINED)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in own])


def _add_post_processor(
    backend: tokenizers.Tokenizer,
    vocab: _Vocab,
    metadata: Mapping[str, object],
    settings: TokenizerSettings,
    adds_bos: bool,
) -> None:
    """Put BOS before and EOS after a text where the file says so; `adds_bos` is the habit of this kind of tokenizer."""
    bos, eos = settings.bos_token_id, _token_id(vocab, metadata, "tokenizer.ggml.eos_token_id")
    before = bos if metadata.get("tokenizer.ggml.add_bos_token", adds_bos) else None
    after = eos if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    used = {vocab.tokens[i]: i for i in (before, after) if i is not None}
    if used:
        template = [*([vocab.tokens[before]] if before is not None else []), "$A"]
        template += [vocab.tokens[after]] if after is not None else []
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(used.items()))


def _eos_ids(vocab: _Vocab, metadata: Mapping[str, object]) -> tuple[int, ...]:
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    named = [_token_id(vocab, metadata, key) for key in keys]
    usual = [vocab.ids[t] for t in _END_TOKENS if t in vocab.ids and vocab.kinds[vocab.ids[t]] == TokenKind.CONTROL]
    return tuple(dict.fromkeys(i for i in (*named, *usual) if i is not None))


def _token_id(vocab: _Vocab, metadata: Mapping[str, object], key: str) -> int | None:
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < len(vocab.tokens):
        raise ModelFileError(f"{key} is {value!r}; the vocabulary has ids 0 to {len(vocab.tokens) - 1}")
    return value


def _text(metadata: Mapping[str, object], key: str) -> str:
    value = metadata.get(key)
    if not isinstance(value, str):
        raise ModelFileError(f"{key} is {value!r}; it must be a string")
    return value


def _optional_text(metadata: Mapping[str, object], key: str) -> str | None:
    return _text(metadata, key) if key in metadata else None


def _strings(metadata: Mapping[str, object], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ModelFileError(f"{key} is missing or not an array of strings")
    return list(value)


def _numbers(metadata: Mapping[str, object], key: str, count: int, default: float) -> list[float]:
    """An array with one number per token; `default` for each when the file has no such key."""
    if key not in metadata:
        return [default] * count
    value = metadata[key]
    if not isinstance(value, list) or len(value) != count:
        raise ModelFileError(f"{key} must be an array of {count} numbers, one per token")
    if not all(isinstance(item, int | float) for item in value):
        raise ModelFileError(f"{key} holds something that is not a number")
    return value
