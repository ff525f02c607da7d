"""A model that drafts on the head: it comes, guesses, dies and comes back; no token changes."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import trio

from pyagent_node.inference.drafting.port import DrafterFactory
from pyagent_node.inference.drafting.suffix import SuffixDrafters
from pyagent_node.inference.generation import (
    Finished,
    Generated,
    GenerationRequest,
    SpeculationUsage,
)
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.stored_model import About
from pyagent_node.inference.pipeline.engine import PipelineEngine
from pyagent_node.inference.pipeline.speculators import Speculators
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.node.draft_model import DraftModel, keep_drafting

from .real_pipeline import NAME, open_real_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.model, pytest.mark.timeout(300)]

N = 24


async def ask(
    engine: PipelineEngine, name: str, depth: int = 1, *, tree: bool = False
) -> tuple[list[int], SpeculationUsage | None]:
    """Ask for a story."""
    request = GenerationRequest(
        NAME,
        prompt="Once upon a time there was a river that",
        max_tokens=N,
        ignore_eos=True,
        sampling=SamplingParams(seed=5, temperature=0.8, repetition_penalty=1.1),
        speculation=name,
        draft_length=None if name == "none" else 4,
        draft_depth=depth,
        draft_tree=tree,
    )
    tokens: list[int] = []
    async with engine.generate(request) as events:
        async for event in events:
            if isinstance(event, Generated):
                tokens.append(event.token)
            else:
                assert isinstance(event, Finished)
                usage = event.usage.speculation
    return tokens, usage


class Watched(Speculators):
    """Tells when a drafter comes and goes."""

    def __init__(self, suffix: SuffixDrafters) -> None:
        super().__init__([suffix])
        self.come, self.gone = trio.Event(), trio.Event()

    @contextmanager
    def offering(self, *factories: DrafterFactory) -> Iterator[None]:
        """Set the events."""
        with super().offering(*factories):
            self.come.set()
            self.gone = trio.Event()
            yield
        self.come = trio.Event()
        self.gone.set()


async def test_a_drafter_comes_guesses_dies_and_comes_back(
    bundled_model: Path, tmp_path: Path
) -> None:
    store = ModelStore(tmp_path)
    digest = store.add_file(bundled_model, about=About(NAME)).digest
    suffix = SuffixDrafters()
    speculators = Watched(suffix)
    async with open_real_pipeline(
        store, digest, (10, 20), n_ctx=256, n_seq=2, speculators=speculators
    ) as pipeline:
        engine = pipeline.head.engine
        plain, _ = await ask(engine, "none")
        others = {child.pid for child in psutil.Process().children()}
        async with trio.open_nursery() as nursery:
            spec = DraftModel(NAME, 256, 2)
            nursery.start_soon(keep_drafting, spec, store, speculators, suffix)
            await speculators.come.wait()
            for name, depth in ((NAME, 1), (NAME, 3), (f"{NAME}+suffix", 1)):
                tokens, usage = await ask(engine, name, depth)
                assert tokens == plain
                assert usage is not None
                # the model itself, by the same noise: wrong only where a penalty makes it so
                assert usage.accepted >= N // 3
                assert not usage.failed
            for name, depth in ((NAME, 1), (NAME, 2), (f"{NAME}+suffix", 1), ("suffix", 1)):
                tokens, usage = await ask(engine, name, depth, tree=True)
                assert tokens == plain
                assert usage is not None
                assert usage.accepted > 0 or name == "suffix"
                assert not usage.failed
            (pid,) = {child.pid for child in psutil.Process().children()} - others
            got: list[list[int]] = []

            async def read() -> None:
                got.append((await ask(engine, "auto"))[0])

            async with trio.open_nursery() as reading:
                reading.start_soon(read)
                await trio.lowlevel.checkpoint()
                await trio.to_thread.run_sync(functools.partial(os.kill, pid, signal.SIGKILL))
                await speculators.gone.wait()
            assert got == [plain]
            await speculators.come.wait()
            assert (await ask(engine, "auto"))[0] == plain
            nursery.cancel_scope.cancel()
    assert speculators.names == ("none", "auto", "suffix")
