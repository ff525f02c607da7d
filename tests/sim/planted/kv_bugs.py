"""Bugs of KV blocks: where a session may begin, and what is in its slot then."""

from __future__ import annotations

from pyagent_node.inference.backend import Tokens
from pyagent_node.inference.pipeline import restoring, session_blocks, stage_blocks

from .kit import Bug, both, same, swap

CALM = same(3, 5.0)


def _as_many_as_there_are(*, journal_tokens: int, blocks: int, **_: int) -> int:
    return min(blocks, (journal_tokens - 1) // 64)


_block_chain = stage_blocks.block_chain


def _names_of_lengths(
    root: bytes, tokens: Tokens, prompt_tokens: int, **rest: object
) -> tuple[bytes, ...]:
    return _block_chain(root, tokens * 0, prompt_tokens)


BUGS = (
    Bug(
        "begun_within_a_short_piece",
        "a session begins from all blocks there are, wherever in the prompt that is",
        swap(restoring, "reusable", _as_many_as_there_are),
        CALM,
        frozenset({"tokens"}),
        asks=0.4,
    ),
    Bug(
        "blocks_named_by_length",
        "a block's name says how long the text before it is, but not what it is",
        both(
            *(
                swap(module, "block_chain", _names_of_lengths)
                for module in (restoring, session_blocks, stage_blocks)
            )
        ),
        CALM,
        frozenset({"tokens"}),
        asks=0.4,
    ),
)
