"""Text to token ids and back, for one model. Imports no torch: the router process uses it."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from ..core.errors import BadRequest, ModelFileError
from .chat_template import ChatTemplate
from .gguf_tokenizer import load_gguf_tokenizer
from .hf_tokenizer import load_folder_tokenizer
from .token_bytes import TokenBytes
from .tokenizer_settings import TokenizerSettings


class Tokenizer:
    """Encodes and decodes for one model. Safe to use from several threads.

    `special_ids` are the control tokens: never part of text, and never made from text that a client typed.
    `strips_leading_space`: `decode` drops the one space that the encoder puts before the first word.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: TokenizerSettings) -> None:
        self.vocab_size = settings.vocab_size
        self.eos_token_ids = settings.eos_token_ids
        self.bos_token_id = settings.bos_token_id
        self.chat_template = settings.chat_template
        added: dict[int, tokenizers.AddedToken] = backend.get_added_tokens_decoder()
        self._special = {i: token for i, token in added.items() if token.special}
        self.special_ids = frozenset(self._special)
        self._bytes = TokenBytes(backend, self.vocab_size)
        self.strips_leading_space = self._bytes.strips_leading_space
        self._lock = threading.Lock()  # the switch for special tokens belongs to one call at a time
        self._backend = backend
        self._stand_ins = _stand_ins(self._special)
        self._real_ids = self._add_stand_ins()

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of `text`. With `parse_special` off, a typed "<|im_end|>" stays text.

        `add_special_tokens` puts what the model wants around a text (often a BOS, often nothing).
        Raises BadRequest for text that is not Unicode (half of a surrogate pair).
        """
        with self._lock:
            self._backend.encode_special_tokens = not parse_special
            try:
                ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            except (UnicodeEncodeError, TypeError) as err:
                raise BadRequest("the text holds half of a UTF-16 surrogate pair; send whole characters") from err
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the tokens. Bytes that are no UTF-8 become U+FFFD; ids past the vocabulary add nothing."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        text = b"".join(self._bytes[i] for i in token_ids if i not in skipped).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.strips_leading_space else text

    def vocabulary(self) -> list[bytes]:
        """The bytes of every token, by id."""
        return [self._bytes[token_id] for token_id in range(self.vocab_size)]

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text, possibly part of a character only."""
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """The token's bytes as text, U+FFFD for a part of a character."""
        return self._bytes[token_id].decode("utf-8", errors="replace")

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        **variables: object,
    ) -> list[int]:
        """Ids of the prompt that the model's chat template makes; `variables` go to the template.

        Special tokens count only where the template wrote them. Raises BadRequest, naming the message at fault.
        """
        rendered = self._template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables
        )
        if rendered.segments is None:
            return self.encode(rendered.text, add_special_tokens=False, parse_special=True)
        marked = "".join(self._stand_ins[piece] if is_special else piece for piece, is_special in rendered.segments)
        return [self._real_ids.get(i, i) for i in self.encode(marked, add_special_tokens=False)]

    @cached_property
    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise BadRequest("this model has no chat template; send the prompt to /v1/completions instead", "messages")
        eos = self.eos_token_ids[0] if self.eos_token_ids else None
        return ChatTemplate(
            self.chat_template,
            special_tokens=self._stand_ins,
            tokens={"bos_token": self._name(self.bos_token_id), "eos_token": self._name(eos)},
            cut_always=any(token.normalized for token in self._special.values()),
        )

    def _name(self, token_id: int | None) -> str:
        return "" if token_id is None else self.token_text(token_id)

    def _add_stand_ins(self) -> dict[int, int]:
        """Teach the backend one stand-in per special token; return stand-in id -> id of the special token.

        A stand-in is found even while special tokens are switched off, so a prompt can mix the two.
        """
        tokens = {self._stand_ins[token.content]: (i, token) for i, token in self._special.items()}
        self._backend.add_tokens(
            [
                tokenizers.AddedToken(
                    name,
                    special=False,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    single_word=token.single_word,
                    normalized=token.normalized,
                )
                for name, (_, token) in tokens.items()
            ]
        )
        found = {self._backend.token_to_id(name): i for name, (i, _) in tokens.items()}
        real_ids = {stand_in: i for stand_in, i in found.items() if stand_in is not None}
        if len(real_ids) != len(tokens) or min(real_ids, default=self.vocab_size) < self.vocab_size:
            raise ModelFileError("the tokenizer's ids have gaps, so its special tokens cannot be told from text")
        return real_ids


def load_tokenizer(path: Path) -> Tokenizer:
    """Load from a Hugging Face folder (tokenizer.json and its neighbours) or a GGUF file. Raises ModelFileError."""
    if path.is_file() and path.suffix == ".gguf":
        return Tokenizer(*load_gguf_tokenizer(path))
    folder = path.parent if path.name == "tokenizer.json" else path
    return Tokenizer(*load_folder_tokenizer(folder))


def _stand_ins(special: Mapping[int, tokenizers.AddedToken]) -> dict[str, str]:
    """Special token -> text that stands in for it in a prompt. Nobody can type it: it holds 64 random bits."""
    key = secrets.token_hex(8)
    return {token.content: f"\U0010fffd{key}:{i}\U0010fffd" for i, token in special.items()}
