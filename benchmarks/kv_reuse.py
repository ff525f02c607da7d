"""The time to the first token behind a prefix that was computed before, here or elsewhere.

Three daemons hold a model in three ranks.  A prompt of about 2,000 tokens is asked for; then again
with another ending, so that every rank finds the blocks of its own layers; then the ranks move on
by one node, so that every rank finds them at a peer.  After that the links are made slow and the
same is measured again.  Each round has a tenant of its own (``cache_salt``), who finds nothing of
the others'.  What a node sends ahead on its own account is turned off.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from pyagent_node.base.errors import DeadlineExceeded
from pyagent_node.benchmarks.kv_texts import texts
from pyagent_node.benchmarks.kv_types import ReuseRow
from pyagent_node.benchmarks.shaped import answer, reshape_to, shaped_swarm
from pyagent_node.benchmarks.swarm import LocalNode
from pyagent_node.inference.generation import NO_SPECULATION
from pyagent_node.inference.models.architectures import model_shape
from pyagent_node.inference.models.gguf_header import read_header
from pyagent_node.node.api.schema import LoadRequest, Progress, PullRequest
from pyagent_node.node.client import Answer, Ask

Say = Callable[[str], None]

RANKS: Final = 3
N_CTX: Final = 3072
PREFIX_CHARACTERS: Final = 8200
"""About 2,000 tokens of English."""
ENOUGH: Final = 0.9
"""The part of a prompt that is found when all of its blocks are kept."""
KEPT_SECONDS: Final = 60.0
SETTLE_SECONDS: Final = 3.0
"""Time for nodes to tell each other what they hold."""
SLOW: Final = ("100 Mbit, 50 ms", "rtt=50ms,rate=100mbit")
FAST: Final = ("loopback", "")
TOKENS: Final = 4
"""Of every answer."""


class _Times:
    """What was measured over one link."""

    def __init__(self) -> None:
        self.computed: list[Answer] = []
        self.local: list[Answer] = []
        self.remote: list[Answer] = []


class _Asker:
    """Asks one node for the prefix with endings that were not asked for before."""

    def __init__(self, node: LocalNode, model: str) -> None:
        self._node = node
        self._model = model
        prose = (text for name, text in texts() if not name.endswith(".py"))
        self._prefix = "\n\n".join(prose)[:PREFIX_CHARACTERS]

    def ask(self, salt: str, ending: int, *, cache: bool = True) -> Answer:
        return answer(
            self._node,
            Ask(
                model=self._model,
                prompt=f"{self._prefix}\n\nQuestion {ending}: what does the text say? Answer:",
                max_tokens=TOKENS,
                ignore_eos=True,
                temperature=0.0,
                cache_salt=salt,
                prompt_cache=cache,
                speculation=NO_SPECULATION,
            ),
        )

    def until_kept(self, salt: str) -> None:
        """Ask until every rank finds its blocks; raises :class:`DeadlineExceeded`."""
        deadline = time.monotonic() + KEPT_SECONDS
        while True:
            found = self.ask(salt, 0)
            if found.cached_tokens > ENOUGH * found.prompt_tokens:
                return
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    "The blocks of a prompt were not kept.", code="bench_stalled"
                )


def _request(model: str, nodes: list[LocalNode], layers: int, shift: int) -> LoadRequest:
    cut = tuple(layers * rank // RANKS for rank in range(1, RANKS))
    return LoadRequest(
        model=model,
        layers=cut,
        nodes=tuple(nodes[(rank + shift) % RANKS].peer_id for rank in range(RANKS)),
        n_ctx=N_CTX,
        standbys=0,
        spares=0,
    )


def measure(path: str, levels: tuple[str, ...], *, rounds: int, say: Say) -> Iterator[ReuseRow]:
    """Yield two rows for each level; raises what the swarm raises."""
    layers = model_shape(read_header(Path(path))).n_layers
    for level in levels:
        say(f"  first tokens with blocks at {level}")
        fast, slow = _level(path, level, layers=layers, rounds=rounds, say=say)
        expected = [each.token_ids for each in fast.computed]
        yield _row(level, FAST[0], fast, expected)
        yield _row(level, SLOW[0], slow, expected)


def _level(path: str, level: str, *, layers: int, rounds: int, say: Say) -> tuple[_Times, _Times]:
    fast, slow = _Times(), _Times()
    flags = ("--kv-stream", "0", "--kv-level", level)
    with shaped_swarm(RANKS, flags=flags, say=say) as nodes:
        client = nodes[0].client
        model = client.pull(PullRequest(source=f"file:{path}")).name
        client.load(_request(model, nodes, layers, 0))
        asker = _Asker(nodes[0], model)
        salts = [f"tenant {i}" for i in range(2 * rounds)]
        for i, salt in enumerate(salts):
            asker.ask(salt, 0)
            asker.until_kept(salt)
            if i < rounds:
                fast.computed.append(asker.ask(salt, 1, cache=False))
                fast.local.append(asker.ask(salt, 1))
        client.apply(_request(model, nodes, layers, 1), _quiet)
        time.sleep(SETTLE_SECONDS)
        fast.remote += [asker.ask(salt, 1) for salt in salts[:rounds]]
        reshape_to(nodes, SLOW[1], model)
        time.sleep(SETTLE_SECONDS)
        for near, far in zip(salts[:rounds], salts[rounds:], strict=True):
            slow.computed.append(asker.ask(near, 1, cache=False))
            slow.local.append(asker.ask(near, 1))
            slow.remote.append(asker.ask(far, 1))
    return fast, slow


def _row(level: str, link: str, times: _Times, expected: list[tuple[int, ...]]) -> ReuseRow:
    def median(answers: list[Answer]) -> float:
        return statistics.median(each.ttft_seconds for each in answers) * 1000

    computed, remote = median(times.computed), median(times.remote)
    answers = (*times.computed, *times.local, *times.remote)
    return ReuseRow(
        level=level,
        link=link,
        prompt_tokens=times.computed[0].prompt_tokens,
        recompute_ms=round(computed, 1),
        local_ms=round(median(times.local), 1),
        remote_ms=round(remote, 1),
        local_cached=min(each.cached_tokens for each in times.local),
        remote_cached=min(each.cached_tokens for each in times.remote),
        loss=round(max(0.0, remote / computed - 1), 3),
        identical=all(each.token_ids == expected[0] for each in answers),
    )


def _quiet(progress: Progress) -> None:
    """Take a progress report."""
