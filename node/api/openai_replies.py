"""OpenAI's reply bodies from generation events.

Pure: events in, JSON-ready dictionaries out.  One :class:`Writer` serves one request; it keeps what
a whole (not streamed) answer needs and gives the chunks that a stream sends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from pyagent_node.inference.generation import Finished, Generated, LoadedModel, TopLogprob
from pyagent_node.node.api.citations import Citation
from pyagent_node.node.api.openai_requests import Shape

Json = dict[str, object]


def fingerprint(model: LoadedModel) -> str:
    """Return ``system_fingerprint``: what, besides the request, a seeded answer depends on."""
    return f"{model.digest}-e{model.placement.epoch}"


def piece_text(piece: bytes) -> str:
    r"""Return a token's text; one that is no whole UTF-8 text is shown as ``bytes:\xe2\x82``."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class Choice:
    """What is known of one choice so far."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.events: list[Generated] = []
        self.offset = 0
        self.finished: Finished | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.texts)


class Style(Protocol):
    """The differences between the chat and the legacy shape."""

    prefix: str
    whole_object: str
    chunk_object: str

    def opening(self) -> Json | None:
        """Return the fields of a choice's first chunk, if it has one of its own."""
        ...

    def part(self, text: str) -> Json:
        """Return the fields that carry ``text`` in a chunk."""
        ...

    def whole(self, text: str) -> Json:
        """Return the fields that carry ``text`` in a whole answer."""
        ...

    def logprobs(self, events: Sequence[Generated], offset: int, top: int) -> Json:
        """Return the log-probabilities of ``events``; the first one's text is at ``offset``."""
        ...


class ChatStyle:
    """``/v1/chat/completions``."""

    prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> Json | None:
        """Return the chunk that names the role."""
        return {"delta": {"role": "assistant", "content": ""}}

    def part(self, text: str) -> Json:
        """Return a delta; the last one, without text, is empty."""
        return {"delta": {"content": text} if text else {}}

    def whole(self, text: str) -> Json:
        """Return the assistant's message."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, events: Sequence[Generated], offset: int, top: int) -> Json:
        """Return one entry a token."""
        entries = [
            {**_entry(event), "top_logprobs": [_entry(t) for t in event.top[:top]]}
            for event in events
        ]
        return {"content": entries, "refusal": None}


def _entry(event: Generated | TopLogprob) -> Json:
    return {
        "token": piece_text(event.piece),
        "logprob": event.logprob,
        "bytes": list(event.piece),
    }


class CompletionStyle:
    """``/v1/completions``."""

    prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def opening(self) -> Json | None:
        """Return nothing: a text has no role."""
        return None

    def part(self, text: str) -> Json:
        """Return the text."""
        return {"text": text}

    def whole(self, text: str) -> Json:
        """Return the text."""
        return {"text": text}

    def logprobs(self, events: Sequence[Generated], offset: int, top: int) -> Json:
        """Return OpenAI's legacy shape: parallel lists over the tokens."""
        tokens = [piece_text(event.piece) for event in events]
        offsets = []
        for event in events:
            offsets.append(offset)
            offset += _characters(event)
        tops: list[dict[str, float]] | None = None
        if top:
            tops = [
                {piece_text(t.piece): t.logprob for t in reversed(event.top[:top])}
                for event in events
            ]
        return {
            "tokens": tokens,
            "token_logprobs": [event.logprob for event in events],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def _characters(event: Generated) -> int:
    return len(event.piece.decode("utf-8", "ignore"))


def _tokens(events: Sequence[Generated]) -> Json:
    """Return token ids with their times, in seconds: the whole step, and what ranks computed."""
    return {
        "token_ids": [event.token for event in events],
        "step_seconds": [event.step_seconds for event in events],
        "compute_seconds": [event.compute_seconds for event in events],
    }


class Writer:
    """Builds the replies to one request.

    ``identity`` is a random 128-bit number for the reply's id, ``created`` the Unix time,
    ``fingerprint`` what :func:`fingerprint` gives, ``citations`` the chunks of a context that the
    answer is drawn from: they stand in the whole answer, and in a stream's first chunk.  Chunks
    say in ``token_count`` how many tokens of their choice there were so far, themselves included:
    from there a client asks for the rest if it loses the stream.
    """

    def __init__(
        self,
        shape: Shape,
        fingerprint: str,
        identity: int,
        created: int,
        citations: Sequence[Citation] | None = None,
    ) -> None:
        self._citations = citations
        self._shape = shape
        self._style: Style = ChatStyle() if shape.kind == "chat" else CompletionStyle()
        self._choices = [Choice() for _ in range(shape.choices)]
        self._fingerprint = fingerprint
        self._id = f"{self._style.prefix}{identity:032x}"
        self._created = created
        self._model = shape.model

    def opening(self, only: int | None = None) -> list[bytes]:
        """Return the chunks before the first token: of every choice, or of ``only`` one."""
        fields = self._style.opening()
        if fields is None:
            return []
        return [
            self._chunk(
                [{"index": i, **fields, "logprobs": None, "finish_reason": None}],
                citations=self._citations if not number else None,
            )
            for number, i in enumerate(range(len(self._choices)) if only is None else (only,))
        ]

    def skip(self, index: int, event: Generated | Finished) -> None:
        """Take in an event that the reader of a choice has seen already."""
        if isinstance(event, Generated):
            choice = self._choices[index]
            choice.events.append(event)
            choice.offset += _characters(event) if self._shape.logprobs else 0

    def add(self, index: int, event: Generated | Finished) -> bytes | None:
        """Take in an event; return the chunk to stream for it, if there is anything to show."""
        choice = self._choices[index]
        choice.texts.append(event.text)
        if isinstance(event, Finished):
            choice.finished = event
            return self._chunk(
                [
                    {
                        "index": index,
                        **self._style.part(event.text),
                        "logprobs": None,
                        "finish_reason": event.reason,
                        "token_count": len(choice.events),
                    }
                ],
                finished=event,
            )
        choice.events.append(event)
        logprobs: Json | None = None
        if self._shape.logprobs:
            logprobs = self._style.logprobs([event], choice.offset, self._shape.top_logprobs)
            choice.offset += _characters(event)
        elif not event.text and not self._shape.token_ids:
            return None
        body: Json = {
            "index": index,
            **self._style.part(event.text),
            "logprobs": logprobs,
            "finish_reason": None,
            "token_count": len(choice.events),
        }
        if self._shape.token_ids:
            body |= _tokens([event])
        return self._chunk([body])

    def usage_chunk(self) -> bytes:
        """Return the chunk that ends a stream with ``include_usage``."""
        return self._chunk([], usage=self._usage())

    def whole(self) -> bytes:
        """Return the whole answer; every choice must have finished."""
        choices: list[Json] = []
        for index, choice in enumerate(self._choices):
            assert choice.finished is not None
            body: Json = {
                "index": index,
                **self._style.whole(choice.text),
                "logprobs": self._style.logprobs(choice.events, 0, self._shape.top_logprobs)
                if self._shape.logprobs
                else None,
                "finish_reason": choice.finished.reason,
            }
            if self._shape.token_ids:
                body |= _tokens(choice.events)
            choices.append(body)
        reply = self._envelope(self._style.whole_object, choices)
        reply["usage"] = self._usage()
        reply |= _served_by([c.finished for c in self._choices if c.finished is not None])
        if self._citations is not None:
            reply["citations"] = self._citations
        if self._shape.token_ids:
            assert self._choices[0].finished is not None
            reply["pyagent"] = self._details(self._choices[0].finished)
        return msgspec.json.encode(reply)

    def _usage(self) -> Json:
        ended = [c.finished.usage for c in self._choices if c.finished is not None]
        each = len(self._choices) // self._shape.prompts
        prompt = sum(usage.prompt_tokens for usage in ended[::each])
        completion = sum(usage.completion_tokens for usage in ended)
        body: Json = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": sum(usage.cached_tokens for usage in ended[::each])
            },
        }
        if self._citations is not None:
            details = {
                "cached_tokens": sum(usage.cached_tokens for usage in ended[::each]),
                "joined_tokens": sum(usage.joined_tokens for usage in ended[::each]),
            }
            if few := sum(usage.joined_landmarks for usage in ended[::each]):
                details["joined_landmarks"] = few
            body["prompt_tokens_details"] = details
        evicted = [usage.evicted for usage in ended if usage.evicted is not None]
        if evicted:
            body["kv"] = {
                "held_cells": sum(each.held for each in evicted),
                "evicted_cells": sum(each.cells for each in evicted),
                "evicted_bytes": sum(each.bytes for each in evicted),
            }
        guesses = [usage.speculation for usage in ended if usage.speculation is not None]
        if guesses:
            accepted = sum(each.accepted for each in guesses)
            body["completion_tokens_details"] = {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": sum(each.drafted for each in guesses) - accepted,
            }
        return body

    def _chunk(
        self,
        choices: list[Json],
        usage: Json | None = None,
        finished: Finished | None = None,
        citations: Sequence[Citation] | None = None,
    ) -> bytes:
        reply = self._envelope(self._style.chunk_object, choices)
        if self._shape.include_usage:
            reply["usage"] = usage
        if citations is not None:
            reply["citations"] = citations
        if finished is not None:
            reply |= _served_by([finished])
            if self._shape.token_ids:
                reply["pyagent"] = self._details(finished)
        return b"data: " + msgspec.json.encode(reply) + b"\n\n"

    def _envelope(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
        }

    def _details(self, finished: Finished) -> Json:
        usage = finished.usage
        return {
            "placement": finished.placement,
            "seed": self._shape.seed,
            "ttft_seconds": usage.ttft_seconds,
            "seconds": usage.seconds,
            "tokens_per_second": usage.tokens_per_second,
            "failovers": usage.failovers,
            "recomputed_tokens": usage.recomputed_tokens,
            "stall_seconds": usage.stall_seconds,
            "speculation": usage.speculation,
        }


def _served_by(finished: Sequence[Finished]) -> Json:
    """Return ``served_by``: the exactness classes of the backends that computed an answer.

    Nothing where its ranks do not say.
    """
    classes = dict.fromkeys(name for each in finished for name in each.usage.classes)
    return {"served_by": list(classes)} if classes else {}
