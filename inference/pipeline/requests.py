"""Checks a generation request and tokenises its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from pyagent_node.base.errors import InvalidRequest, PyAgentError
from pyagent_node.inference.backend import Tokens
from pyagent_node.inference.generation import (
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    GenerationRequest,
)
from pyagent_node.inference.pipeline.ports import Tokenizer


async def prompt_tokens(tokenizer: Tokenizer, request: GenerationRequest) -> Tokens:
    """Return the tokens of a checked request's prompt.

    A plain prompt may spell out control tokens: who sends one decides about all of it.  Messages
    may not (see ``Tokenizer.chat``).  Raises :class:`InvalidRequest` (``bad_parameter``) for an
    empty prompt, and what the tokenizer raises.
    """
    if request.tokens is not None:
        ids: Sequence[int] = request.tokens
    elif request.prompt is not None:
        ids = await tokenizer.tokenize(request.prompt, add_special=True, parse_special=True)
    else:
        assert request.messages is not None, "check_request has seen that one of three is given"
        ids = await tokenizer.chat(request.messages)
    if not ids:
        raise InvalidRequest("The prompt is empty.", code="bad_parameter", parameter="prompt")
    return cast("Tokens", np.array(ids, dtype=np.int32))


def check_request(request: GenerationRequest, n_vocab: int) -> None:
    """Check everything about a request that needs no model run.

    Raises :class:`InvalidRequest` (``bad_parameter``) naming the parameter.
    """

    def wrong(parameter: str, message: str) -> PyAgentError:
        return InvalidRequest(message, code="bad_parameter", parameter=parameter)

    given = [x for x in (request.messages, request.prompt, request.tokens) if x is not None]
    if len(given) != 1:
        raise wrong("prompt", "Give exactly one of messages, prompt and tokens.")
    if request.messages is not None and not request.messages:
        raise wrong("messages", "There must be at least one message.")
    if request.max_tokens is not None and request.max_tokens < 1:
        raise wrong("max_tokens", f"max_tokens is {request.max_tokens}; it must be at least 1.")
    if len(request.stop) > MAX_STOP_STRINGS:
        raise wrong("stop", f"There may be at most {MAX_STOP_STRINGS} stop strings.")
    for stop in request.stop:
        if not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise wrong("stop", f"A stop string must have 1 to {MAX_STOP_LENGTH} characters.")
    for token in request.tokens or ():
        if not 0 <= token < n_vocab:
            raise wrong("tokens", f"Token {token} is outside the vocabulary of {n_vocab}.")
    request.sampling.check(n_vocab)
