"""What one token id adds to the text, as bytes, whatever tokens stand beside it.

Byte-level BPE and SentencePiece BPE are tables of bytes. Any other decoder is asked what a token adds after an
ordinary token, so that one streaming path (bytes, then incremental UTF-8) serves every tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import tokenizers

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_WORD_MARK = "\u2581"  # SentencePiece writes a space as this character


def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of the GPT-2 alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


class TokenBytes:
    """Bytes of every token of one `tokenizers.Tokenizer`, worked out on first use and kept.

    `strips_leading_space` says that a text decoded from its start loses one leading space (SentencePiece adds one
    when it encodes).
    """

    def __init__(self, backend: tokenizers.Tokenizer, vocab_size: int) -> None:
        self._backend = backend
        self._known: list[bytes | None] = [None] * vocab_size
        self._literal: dict[int, str] = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
        self._convert, self.strips_leading_space = _converter(backend)

    def __getitem__(self, token_id: int) -> bytes:
        """Empty for an id past the vocabulary: models pad their embedding, and such an id stands for no text."""
        if not 0 <= token_id < len(self._known):
            return b""
        known = self._known[token_id]
        if known is None:
            known = self._known[token_id] = self._compute(token_id)
        return known

    def _compute(self, token_id: int) -> bytes:
        literal = self._literal.get(token_id)
        if literal is not None:
            return literal.encode("utf-8")
        piece = self._backend.id_to_token(token_id)
        return b"" if piece is None else self._convert(token_id, piece)


Converter = Callable[[int, str], bytes]


def _converter(backend: tokenizers.Tokenizer) -> tuple[Converter, bool]:
    kinds = _decoder_kinds(backend)
    if "ByteLevel" in kinds:
        return _byte_level_converter(), False
    if "ByteFallback" in kinds or "Metaspace" in kinds:
        return _sentencepiece_piece, "Strip" in kinds or kinds.get("Metaspace", {}).get("prepend_scheme") == "always"
    return _anchored_converter(backend)


def _decoder_kinds(backend: tokenizers.Tokenizer) -> dict[str, dict[str, object]]:
    """Type name -> settings of each step of the tokenizer's decoder."""
    if backend.decoder is None:
        return {}
    settings = json.loads(backend.decoder.__getstate__())
    steps = settings["decoders"] if settings["type"] == "Sequence" else [settings]
    return {step["type"]: step for step in steps}


def _byte_level_converter() -> Converter:
    alphabet = byte_level_alphabet()

    def convert(_: int, piece: str) -> bytes:
        values = [alphabet.get(character) for character in piece]
        known = [value for value in values if value is not None]
        return bytes(known) if len(known) == len(values) else piece.encode("utf-8")

    return convert


def _sentencepiece_piece(_: int, piece: str) -> bytes:
    byte = _BYTE_PIECE.match(piece)
    if byte:
        return bytes([int(byte.group(1), 16)])
    return piece.replace(_WORD_MARK, " ").encode("utf-8")


def _anchored_converter(backend: tokenizers.Tokenizer) -> tuple[Converter, bool]:
    anchor = _anchor_id(backend)
    if anchor is None:
        return (lambda token_id, _: backend.decode([token_id], skip_special_tokens=False).encode("utf-8")), False
    before = backend.decode([anchor], skip_special_tokens=False)

    def convert(token_id: int, _: str) -> bytes:
        both = backend.decode([anchor, token_id], skip_special_tokens=False)
        added = both[len(before) :] if both.startswith(before) else backend.decode([token_id])
        return added.encode("utf-8")

    spaced = backend.decode([anchor, anchor], skip_special_tokens=False) == f"{before} {before}"
    return convert, spaced


def _anchor_id(backend: tokenizers.Tokenizer) -> int | None:
    """The lowest id whose text is one ASCII letter: no decoder changes such a token because of what follows it."""
    letters = (backend.token_to_id(letter) for letter in "abcdefghijklmnopqrstuvwxyz")
    return min((i for i in letters if i is not None), default=None)
