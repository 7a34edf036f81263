"""Text to tokens and back, from a model directory's tokenizer.json. Loads no transformers, no torch."""

import codecs
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from nanodeploy.catalog import read_json
from nanodeploy.errors import CheckpointError
from nanodeploy.serve.lark import special_tokens

REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to
MAX_HELD_TOKENS = 16  # a generic decoder that stays undecided for longer is not in the middle of a character


class Detokenizer(Protocol):
    """Turns a stream of tokens into text. The pieces add up to the same text however the stream is cut."""

    def feed(self, token_id: int) -> str:
        """Text that is complete with this token; an unfinished character is held back."""
        ...

    def flush(self) -> str:
        """What is held back, with U+FFFD for what never became a character."""
        ...


class Tokenizer:
    """tokenizer.json, with the parts of tokenizer_config.json that serving needs.

    Text is encoded as Hugging Face does it: a special token spelled out in the text becomes that token, in a chat
    template and in a user's message alike. Who serves untrusted text beside a privileged system prompt must filter it.
    """

    def __init__(self, directory: Path):
        """Raises CheckpointError on files that cannot be read."""
        path = directory / "tokenizer.json"
        source = read_json(path)
        if not isinstance(source.get("model"), dict):
            raise CheckpointError(f"{path} has no `model`; it is not a tokenizer of the tokenizers library.")
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.config: dict[str, Any] = {}
        if (directory / "tokenizer_config.json").is_file():
            self.config = read_json(directory / "tokenizer_config.json")
        template = directory / "chat_template.jinja"
        self.chat_template = (
            template.read_text(encoding="utf-8") if template.is_file() else _default(self.config.get("chat_template"))
        )
        self.special_tokens = _special_tokens(self.config)
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {id: token.content for id, token in added.items() if token.special}
        self.markers = special_tokens(source)  # of grammars
        self._token_bytes: dict[int, bytes] = {}
        self._byte_level = (source.get("decoder") or {}).get("type") == "ByteLevel"

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence: the pieces of a detokenizer, joined."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return "".join([*map(detokenizer.feed, token_ids), detokenizer.flush()])

    def detokenizer(self, *, skip_special_tokens: bool = True, shown: frozenset[str] = frozenset()) -> Detokenizer:
        """`shown` are special tokens that are not skipped."""
        skipped = frozenset(id for id, text in self._special.items() if skip_special_tokens and text not in shown)
        return _ByteLevelDetokenizer(self, skipped) if self._byte_level else _GenericDetokenizer(self, skipped)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; none for an id that the tokenizer does not have."""
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._look_up_bytes(token_id)
        return known

    def _look_up_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            alphabet = _byte_alphabet()
            try:
                return bytes([alphabet[char] for char in token])
            except KeyError:  # an added token outside the alphabet is its own text
                return token.encode("utf-8", "replace")
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # byte fallback of SentencePiece
            return bytes.fromhex(token[3:5])
        return self._tokenizer.decode([token_id], skip_special_tokens=False).encode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        """One token as log-probabilities show it; half a character is written as bytes:\\xe2\\x82."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def decode_some(self, token_ids: list[int]) -> str:
        """tokenizers' own decoding of a run of tokens, special ones included."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


class _ByteLevelDetokenizer:
    """Byte-level BPE (GPT-2, Qwen, Llama 3, DeepSeek): tokens are bytes, so text is their incremental UTF-8."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]):
        self._token_bytes = tokenizer.token_bytes
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _GenericDetokenizer:
    """Any other decoder. It may look at neighbours (leading spaces), so each piece is decoded behind the one before."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]):
        self._decode = tokenizer.decode_some
        self._skipped = skipped
        self._before: list[int] = []  # the tokens of the last piece shown
        self._held: list[int] = []

    def feed(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._held.append(token_id)
        piece = self._piece()
        if piece.endswith(REPLACEMENT) and len(self._held) < MAX_HELD_TOKENS:
            return ""
        self._before, self._held = self._held, []
        return piece

    def flush(self) -> str:
        return self._piece() if self._held else ""

    def _piece(self) -> str:
        return self._decode(self._before + self._held)[len(self._decode(self._before)) :]


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _default(template: Any) -> str | None:
    """tokenizer_config.json's chat_template: a string, or a list of named ones, of which "default" is meant."""
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as text; templates name them."""
    found = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = value.get("content")
        if key.endswith("_token") and isinstance(value, str):
            found[key] = value
    return found
