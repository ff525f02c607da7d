"""What a session's driver does with its drafter, all of which may take time."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.inference.backend import Tokens
from pyagent_node.inference.drafting.port import Draft, PreparedDrafter, TreeDrafter
from pyagent_node.inference.pipeline.speculation import Ask, Speculation
from pyagent_node.inference.sampling import Sampled

logger = logging.getLogger("pyagent_node.pipeline")

DRAFT_SECONDS: Final = 2.0
"""A drafter that takes longer over one draft is not asked again."""
PREPARE_SECONDS: Final = 300.0
"""How long a drafter may take over the prompt; the answer goes on meanwhile, without guesses."""
CLOSE_SECONDS: Final = 1.0
TOLD_AT_ONCE: Final = 4096
"""Tokens that a drafter takes in before other tasks get a turn."""


async def prepare(spec: Speculation, prompt: Tokens, answer: Sequence[Sampled]) -> None:
    """Let the drafter read the prompt, next to the ranks that do."""
    await catch_up(spec, prompt, answer)
    drafter = spec.drafter
    if isinstance(drafter, PreparedDrafter) and not spec.failed:
        try:
            with trio.move_on_after(PREPARE_SECONDS) as scope:
                await drafter.prepare()
            if scope.cancelled_caught:
                spec.give_up(f"the prompt was not read within {PREPARE_SECONDS:.0f} s")
        except Exception as error:  # whatever it is, the answer goes on
            spec.give_up(error)
    spec.prepared = True


async def catch_up(spec: Speculation, prompt: Tokens, answer: Sequence[Sampled]) -> None:
    """Tell the drafter what it has not seen of the prompt and of the answer."""
    n = len(prompt)
    while not spec.failed and spec.told < n:
        spec.tell(prompt[spec.told : spec.told + TOLD_AT_ONCE].tolist())
        await trio.lowlevel.checkpoint()
    if not spec.failed and spec.told < n + len(answer):
        spec.tell([sampled.token for sampled in answer[spec.told - n :]])


async def propose(spec: Speculation, ask: Ask) -> Draft | None:
    """Ask the drafter; ``None`` when it failed or took too long, and is not asked again."""
    spec.busy = True
    try:
        with trio.move_on_after(DRAFT_SECONDS):
            drafter = spec.drafter
            if ask.tree and isinstance(drafter, TreeDrafter):
                return await drafter.propose_tree(ask.ahead, ask.limit, floor=ask.floor)
            return await drafter.propose(ask.ahead, ask.limit, floor=ask.floor)
        spec.give_up(f"no draft within {DRAFT_SECONDS:.0f} s")
    except Exception as error:  # whatever it is, the answer goes on
        spec.give_up(error)
    finally:
        spec.busy = False
    return None


async def release(spec: Speculation | None) -> None:
    """Close the drafter, if there is one."""
    if spec is None:
        return
    with trio.move_on_after(CLOSE_SECONDS, shield=True):
        try:
            await spec.drafter.aclose()
        except PyAgentError as error:
            logger.warning("drafter %s did not close: %s", spec.drafter.name, error)
