"""The model that drafts for this node's sessions: loaded whole, next to what the node serves."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import trio

from pyagent_node.base.errors import Conflict, PyAgentError
from pyagent_node.base.types import Slice
from pyagent_node.inference.drafting.combined import CombinedDrafters
from pyagent_node.inference.drafting.model import ModelDrafters
from pyagent_node.inference.drafting.suffix import SuffixDrafters
from pyagent_node.inference.models.architectures import model_shape
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.pipeline.speculators import Speculators
from pyagent_node.inference.runner import RunnerSpec, open_slice_runner, open_tokenizer_runner

logger = logging.getLogger("pyagent_node.drafter")

FIRST_PAUSE: Final = 1.0
"""Before a drafter that failed is loaded again; each pause after is twice as long."""
LONGEST_PAUSE: Final = 60.0


class DraftModel(msgspec.Struct, frozen=True):
    """Which stored model drafts, and for how many sessions of what length."""

    name: str
    n_ctx: int
    n_seq: int
    threads: int | None = None


async def keep_drafting(
    spec: DraftModel, store: ModelStore, speculators: Speculators, suffix: SuffixDrafters
) -> None:
    """Have the model among the drafters for as long as it can be, and load it again when it dies.

    It is offered by its name and, as ``NAME+suffix``, together with the suffix drafter.
    """
    pause = FIRST_PAUSE
    while True:
        try:
            async with _loaded(spec, store, speculators, suffix) as failed:
                logger.info("%s drafts", spec.name)
                pause = FIRST_PAUSE
                await failed.wait()
            logger.warning("the drafter %s has died; it is loaded again", spec.name)
        except PyAgentError as error:
            logger.warning("%s cannot draft: %s %s", spec.name, error, error.remedy or "")
        await trio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


@asynccontextmanager
async def _loaded(
    spec: DraftModel, store: ModelStore, speculators: Speculators, suffix: SuffixDrafters
) -> AsyncIterator[trio.Event]:
    """Offer the model while the context lasts; the event is set when it has died."""
    combined = f"{spec.name}+{suffix.name}"
    for name in (spec.name, combined):
        if name in speculators.names:
            raise Conflict(
                f"There is a drafter {name} already.",
                code="drafter_exists",
                remedy="Keep the model under another name.",
            )
    digest = store.find(spec.name).digest
    whole = Slice(0, model_shape(store.model_file(digest).header).n_layers, head=True)
    path = str(await trio.to_thread.run_sync(store.make_slice, digest, whole))
    async with open_tokenizer_runner(path) as tokenizer:
        pieces = tuple(await tokenizer.pieces())
    loading = RunnerSpec(path, whole, spec.n_ctx, spec.n_seq, spec.threads)
    async with open_slice_runner(loading) as runner:
        model = ModelDrafters(spec.name, runner, pieces)
        with speculators.offering(CombinedDrafters(combined, suffix, model), model):
            yield runner.failed
