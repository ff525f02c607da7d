"""The vocabulary of a model: text to tokens, tokens to bytes, conversations to tokens."""

# pyright: reportArgumentType=false
# (llama_cpp declares every handle optional and every number a ctypes object)

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from llama_cpp import llama_cpp as lc

from pyagent_node.base.errors import InvalidRequest, Unsupported
from pyagent_node.inference.backend import Tokens
from pyagent_node.inference.generation import ChatMessage
from pyagent_node.inference.llama import library
from pyagent_node.inference.llama.chat_template import ChatTemplate, Rendered
from pyagent_node.inference.models.gguf_header import read_header
from pyagent_node.inference.runner_protocol import TokenizerInfo

TEMPLATE_KEY: Final = "tokenizer.chat_template"
MAX_PIECE: Final = 1 << 16
"""Bytes of one token."""

_HIDDEN: Final = lc.LLAMA_TOKEN_ATTR_CONTROL | lc.LLAMA_TOKEN_ATTR_UNKNOWN
_SPACE: Final = " \t\n\v\f\r"
"""What C's ``isspace`` says, which llama.cpp strips around some control tokens."""


class LlamaTokenizer:
    """A GGUF file loaded for its vocabulary alone.

    Raises what ``load_model`` raises, and :class:`Unsupported` (``no_vocabulary``) for a file
    without one, as slices without the output head are.
    """

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        if header.text("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
            raise Unsupported(
                f"{path.name} holds no vocabulary.",
                code="no_vocabulary",
                remedy="Use the whole model's file, or a slice with the output head.",
            )
        self._model = library.load_model(path, vocab_only=True)
        vocab = self._vocab = self._model.vocab
        n = self._model.n_vocab
        attributes = [int(lc.llama_vocab_get_attr(vocab, token)) for token in range(n)]
        self._attributes = attributes
        self._control = {
            self._text(token): token for token in range(n) if attributes[token] & _HIDDEN
        }
        self._control.pop("", None)
        ordered = sorted(self._control, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, ordered)) + ")")
        bos, eos = int(lc.llama_vocab_bos(vocab)), int(lc.llama_vocab_eos(vocab))
        self._template = None
        if TEMPLATE_KEY in header.fields:
            self._template = ChatTemplate(
                header.text(TEMPLATE_KEY),
                bos=self._text(bos),
                eos=self._text(eos),
                control=ordered,
            )
        self._info = TokenizerInfo(
            n_vocab=n,
            bos=bos,
            eos=eos,
            add_bos=bool(lc.llama_vocab_get_add_bos(vocab)),
            add_eos=bool(lc.llama_vocab_get_add_eos(vocab)),
            end_tokens=tuple(t for t in range(n) if lc.llama_vocab_is_eog(vocab, t)),
            control_tokens=tuple(t for t in range(n) if attributes[t] & _HIDDEN),
            has_chat_template=self._template is not None,
        )

    @property
    def info(self) -> TokenizerInfo:
        """What the vocabulary says of itself."""
        return self._info

    def close(self) -> None:
        """Release the vocabulary; idempotent."""
        self._model.close()

    def tokenize(self, text: bytes, *, add_special: bool, parse_special: bool) -> Tokens:
        """Return the tokens of UTF-8 ``text``; see ``TokenizerRunner.tokenize``."""
        room = len(text) + 8
        while True:
            tokens = np.empty(room, np.int32)
            pointer = ctypes.cast(tokens.ctypes.data, ctypes.POINTER(ctypes.c_int32))
            n = int(
                lc.llama_tokenize(
                    self._vocab,
                    text,
                    len(text),
                    pointer,
                    room,
                    add_special,
                    parse_special,
                )
            )
            if n >= 0:
                return tokens[:n].copy()
            if -n <= room:
                raise InvalidRequest("The text is too long to tokenise.", code="text_too_long")
            room = -n

    def pieces(self) -> list[bytes]:
        """Return the bytes of every token; control tokens have none."""
        buffer = ctypes.create_string_buffer(MAX_PIECE)
        pieces = []
        for token in range(self._info.n_vocab):
            n = int(lc.llama_token_to_piece(self._vocab, token, buffer, MAX_PIECE, 0, False))
            pieces.append(buffer.raw[:n] if 0 < n <= 64 else ctypes.string_at(buffer, max(n, 0)))
        return pieces

    def render(self, messages: Sequence[ChatMessage], *, now: float) -> str:
        """Return the text of a conversation; see ``TokenizerRunner.render``."""
        return self._rendered(messages, now).plain

    def chat(self, messages: Sequence[ChatMessage], *, now: float) -> Tokens:
        """Return the tokens of a conversation; see ``TokenizerRunner.chat``."""
        rendered = self._rendered(messages, now)
        if not rendered.stand_ins:
            text = rendered.text.encode()
            return self.tokenize(text, add_special=False, parse_special=True)
        return self._tokenize_apart(rendered)

    def _rendered(self, messages: Sequence[ChatMessage], now: float) -> Rendered:
        if self._template is None:
            raise Unsupported(
                "The model has no chat template.",
                code="no_chat_template",
                remedy="Send a plain prompt instead of messages.",
            )
        return self._template.render(messages, now=now)

    def _tokenize_apart(self, rendered: Rendered) -> Tokens:
        """Tokenise a conversation in which messages spell out control tokens.

        Does what llama.cpp does: cuts at control tokens, longest spelling first, and tokenises what
        is between them.  Only the template's own are left to cut at; what stands for the messages'
        is put back and read as text.
        """
        tokens: list[Tokens] = []
        parts = self._splitter.split(rendered.text)
        for index, part in enumerate(parts):
            if index % 2:
                tokens.append(np.array([self._control[part]], np.int32))
                continue
            piece = part
            if index and self._attributes[self._control[parts[index - 1]]] & (
                lc.LLAMA_TOKEN_ATTR_RSTRIP
            ):
                piece = piece.lstrip(_SPACE)
            if index + 1 < len(parts) and self._attributes[self._control[parts[index + 1]]] & (
                lc.LLAMA_TOKEN_ATTR_LSTRIP
            ):
                piece = piece.rstrip(_SPACE)
            if piece:
                text = rendered.restore(piece).encode()
                tokens.append(self.tokenize(text, add_special=False, parse_special=False))
        return np.concatenate(tokens) if tokens else np.zeros(0, np.int32)

    def _text(self, token: int) -> str:
        if token < 0:
            return ""
        text = lc.llama_vocab_get_text(self._vocab, token)
        return bytes(text).decode("utf-8", "replace") if text else ""
