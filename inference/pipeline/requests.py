"""Checks generation requests and journals, and makes the head's plans of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, cast

import numpy as np

from pyagent_node.base.errors import CorruptData, InvalidRequest, PyAgentError, Unavailable
from pyagent_node.base.types import PeerId, SessionId
from pyagent_node.inference.backend import Tokens
from pyagent_node.inference.generation import (
    MAX_LABEL_LENGTH,
    MAX_STOP_LENGTH,
    MAX_STOP_STRINGS,
    NO_SPECULATION,
    GenerationRequest,
)
from pyagent_node.inference.kv.budgets import check, positions
from pyagent_node.inference.kv.chunks import check_pieces, chunk_root
from pyagent_node.inference.pipeline.head_plan import HeadPlan, Vocabulary
from pyagent_node.inference.pipeline.journal import SessionJournal
from pyagent_node.inference.pipeline.ports import HeadModel, Tokenizer
from pyagent_node.sharding.kv_keys import LINK_BYTES, MAX_SALT, cache_root

MAX_BUDGET: Final = 2**31 - 1
"""Tokens of an answer that a journal may speak of."""
_SESSION_ID: Final = re.compile("[0-9a-f]{32}")


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

    Raises :class:`InvalidRequest` (``bad_parameter``, ``bad_join``) naming the parameter.
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
    if request.session is not None and not _SESSION_ID.fullmatch(request.session):
        raise wrong("session", "A session id has 32 lowercase hexadecimal digits.")
    if len(request.label) > MAX_LABEL_LENGTH:
        raise wrong("label", f"A label may have at most {MAX_LABEL_LENGTH} characters.")
    try:
        salt = len(request.cache_salt.encode())
    except UnicodeEncodeError:
        raise wrong("cache_salt", "A cache salt is valid Unicode text.") from None
    if salt > MAX_SALT:
        raise wrong("cache_salt", f"A cache salt may have at most {MAX_SALT} bytes.")
    for token in request.tokens or ():
        if not 0 <= token < n_vocab:
            raise wrong("tokens", f"Token {token} is outside the vocabulary of {n_vocab}.")
    request.sampling.check(n_vocab)
    if request.pruning is not None:
        check(request.pruning)
    if request.join is not None:
        if request.tokens is None:
            raise wrong("join", "Pieces are named in a prompt of tokens.")
        check_pieces(request.join.pieces, request.join.skip, len(request.tokens))


def plan_request(
    request: GenerationRequest,
    prompt: Tokens,
    model: HeadModel,
    *,
    session: SessionId,
    head: PeerId,
) -> HeadPlan:
    """Return the plan of a request; raises :class:`InvalidRequest` (``prompt_too_long``)."""
    n, n_ctx = len(prompt), model.placement.n_ctx
    most = positions(request.pruning, n, n_ctx=n_ctx, trained=model.n_ctx_train)
    if n >= most:
        raise InvalidRequest(
            f"The prompt has {n} tokens; the context of {most} leaves room for {most - 1}.",
            code="prompt_too_long",
            remedy="Shorten it, or load the model with a longer context (model load --context).",
            prompt_tokens=n,
            n_ctx=n_ctx,
        )
    # an answer goes on behind the slot where that is asked for: ranks that cannot refuse it
    rolls = request.pruning is not None and request.pruning.rolling
    default = n_ctx if rolls else n_ctx - n
    return HeadPlan(
        session=session,
        head=head,
        model=model.placement.model,
        budget=min(request.max_tokens or default, most - n),
        stop=request.stop,
        ignore_eos=request.ignore_eos,
        sampling=request.sampling,
        root=cache_root(model.placement.model, request.cache_salt)
        if request.prompt_cache and request.join is None and request.pruning is None
        else b"",
        join=request.join,
        join_root=b""
        if request.join is None
        else chunk_root(model.placement.model, request.cache_salt),
        fetch=request.cache_fetch,
        pruning=request.pruning,
        trained=model.n_ctx_train,
    )


def new_journal(
    plan: HeadPlan,
    prompt: Tokens,
    request: GenerationRequest,
    *,
    created: float,
) -> SessionJournal:
    """Return the journal of a session that begins, of a request that says who guesses."""
    return SessionJournal(
        session=plan.session,
        model=plan.model,
        sampling=plan.sampling,
        stop=plan.stop,
        budget=plan.budget,
        ignore_eos=plan.ignore_eos,
        prompt=tuple(prompt.tolist()),
        created=created,
        label=request.label,
        speculation=request.speculation or NO_SPECULATION,
        draft_length=request.draft_length,
        draft_depth=request.draft_depth,
        draft_tree=request.draft_tree,
        root=plan.root,
        pruning=plan.pruning,
    )


def plan_journal(
    journal: SessionJournal,
    vocabulary: Vocabulary,
    after: int,
    *,
    head: PeerId,
    trained: int = 0,
) -> HeadPlan:
    """Return the plan of a session that goes on, from the token with index ``after``.

    ``trained`` as in ``HeadPlan``.

    Raises :class:`CorruptData` (``bad_journal``) for a journal that no head wrote, and
    :class:`InvalidRequest` (``bad_parameter``) for an ``after`` outside of any answer to it.
    """
    fault = _journal_fault(journal, vocabulary)
    if fault is not None:
        raise CorruptData(f"The journal of a session is broken: {fault}.", code="bad_journal")
    if not 0 <= after <= journal.budget:
        raise InvalidRequest(
            f"The answer has at most {journal.budget} tokens; it cannot be shown from {after} on.",
            code="bad_parameter",
            parameter="from",
        )
    return HeadPlan(
        session=journal.session,
        head=head,
        model=journal.model,
        budget=journal.budget,
        stop=journal.stop,
        ignore_eos=journal.ignore_eos,
        sampling=journal.sampling,
        root=journal.root,
        pruning=journal.pruning,
        trained=trained,
    )


def _journal_fault(journal: SessionJournal, vocabulary: Vocabulary) -> str | None:
    n_vocab = len(vocabulary.pieces)
    if not _SESSION_ID.fullmatch(journal.session):
        return "its session id is none"
    if not journal.prompt or not all(0 <= token < n_vocab for token in journal.prompt):
        return "its prompt is empty or holds an unknown token"
    if not max(1, len(journal.tokens)) <= journal.budget <= MAX_BUDGET:
        return f"it holds {len(journal.tokens)} tokens of at most {journal.budget}"
    if len(journal.root) not in (0, LINK_BYTES):
        return "its cache root is none"
    if journal.pruning is not None and journal.root:
        return "it is pruned and keeps blocks"
    if len(journal.stop) > MAX_STOP_STRINGS or len(journal.label) > MAX_LABEL_LENGTH:
        return "it has too many stop strings, or too long a label"
    if not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in journal.stop):
        return "it has an empty or too long a stop string"
    ends = frozenset() if journal.ignore_eos else vocabulary.end_tokens
    for sampled in journal.tokens:
        known = 0 <= sampled.token < n_vocab and all(0 <= t < n_vocab for t, _ in sampled.top)
        if not known or sampled.token in ends:
            return f"token {sampled.token} is unknown, or ends the answer"
    try:
        journal.sampling.check(n_vocab)
        if journal.pruning is not None:
            check(journal.pruning)
    except PyAgentError as error:
        return error.message.rstrip(".")
    return None


def not_ready(name: str) -> Unavailable:
    """Return the error for a model whose head this node cannot be yet."""
    return Unavailable(
        f"This node cannot be the head of {name} yet.",
        code="head_not_ready",
        remedy="Ask again in a moment; see 'pyagent-node status'.",
    )
