"""The time to the first token behind a prefix that was computed before, here or elsewhere.

Three daemons hold a model in three ranks.  A prompt of about 2,000 tokens is asked for; then again
with another ending, so that every rank finds the blocks of its own layers; then the ranks move on
by one node, so that every rank finds them at a peer.  After that the links are made slow and the
same is measured again; and once more with links over which fetching should take just as long as
computing, where the choice between the two is hardest.  Where the cost model did not fetch
everything, that is asked for too, of another tenant.  Each measurement has a tenant of its own
(``cache_salt``), who finds nothing of the others'.  What a node sends ahead on its own account is
turned off.
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
from pyagent_node.inference.generation import NO_SPECULATION, FetchWhen
from pyagent_node.inference.models.architectures import ModelShape, model_shape
from pyagent_node.inference.models.gguf_header import read_header
from pyagent_node.node.answers import Answer, Ask
from pyagent_node.node.api.schema import LoadRequest, Progress, PullRequest
from pyagent_node.sharding.kv_codec import EXPECTED_SIZE, level_named

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
LATENCY: Final = "50ms"
TOKENS: Final = 4
"""Of every answer."""


class _Times:
    """What was measured over one link."""

    def __init__(self) -> None:
        self.computed: list[Answer] = []
        self.local: list[Answer] = []
        self.remote: list[Answer] = []
        self.fetched: list[Answer] = []
        """With everything fetched, where the model did not."""


class _Asker:
    """Asks one node for the prefix with endings that were not asked for before."""

    def __init__(self, node: LocalNode, model: str) -> None:
        self._node = node
        self._model = model
        prose = (text for name, text in texts() if not name.endswith(".py"))
        self._prefix = "\n\n".join(prose)[:PREFIX_CHARACTERS]

    def ask(
        self, salt: str, ending: int, *, cache: bool = True, fetch: FetchWhen = "auto"
    ) -> Answer:
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
                cache_fetch=fetch,
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


def measure(
    path: str, levels: tuple[str, ...], *, rounds: int, close: tuple[str, ...], say: Say
) -> Iterator[ReuseRow]:
    """Yield two rows for each level, a third for ``close`` ones; raises what the swarm raises."""
    for level in levels:
        say(f"  first tokens with blocks at {level}")
        measured = _level(path, level, rounds=rounds, close=level in close, say=say)
        expected = [each.token_ids for each in measured[0][1].computed]
        for link, times in measured:
            yield _row(level, link, times, expected)


def _level(
    path: str, level: str, *, rounds: int, close: bool, say: Say
) -> list[tuple[str, _Times]]:
    shape = model_shape(read_header(Path(path)))
    flags = ("--kv-stream", "0", "--kv-level", level)
    with shaped_swarm(RANKS, flags=flags, say=say) as nodes:
        client = nodes[0].client
        model = client.pull(PullRequest(source=f"file:{path}")).name
        client.load(_request(model, nodes, shape.n_layers, 0))
        asker = _Asker(nodes[0], model)
        salts = [f"tenant {i}" for i in range((2 + 2 * close) * rounds + 1)]
        fast = _Times()
        for i, salt in enumerate(salts):
            asker.ask(salt, 0)
            asker.until_kept(salt)
            if i < rounds:
                fast.computed.append(asker.ask(salt, 1, cache=False))
                fast.local.append(asker.ask(salt, 1))
        near = salts[-1]  # the first to be fetched: after that it is near
        client.apply(_request(model, nodes, shape.n_layers, 1), _quiet)
        time.sleep(SETTLE_SECONDS)
        _remote(asker, salts, fast, rounds)
        measured = [(FAST[0], fast)]
        links: list[tuple[str, str]] = [SLOW]
        if close:
            links.append(_close_link(fast, shape, level))
        for name, link in links:
            say(f"  {name}")
            times = _Times()
            reshape_to(nodes, link, model)
            time.sleep(SETTLE_SECONDS)
            for _ in range(rounds):
                times.computed.append(asker.ask(near, 1, cache=False))
                times.local.append(asker.ask(near, 1))
            _remote(asker, salts, times, rounds)
            measured.append((name, times))
    return measured


def _remote(asker: _Asker, salts: list[str], times: _Times, rounds: int) -> None:
    """Ask for what other nodes have; uses salts up, from the end."""
    for _ in range(rounds):
        found = asker.ask(salts.pop(), 1)
        times.remote.append(found)
        if found.cached_tokens <= ENOUGH * found.prompt_tokens and salts:
            times.fetched.append(asker.ask(salts.pop(), 1, fetch="always"))


def _close_link(fast: _Times, shape: ModelShape, level: str) -> tuple[str, str]:
    """Return a link over which a rank's blocks take as long as computing took."""
    layers = -(-shape.n_layers // RANKS)
    row = 2 * 2 * shape.n_head_kv * shape.head_dim * EXPECTED_SIZE[level_named(level)]
    size = fast.computed[0].prompt_tokens * layers * row
    rate = max(1, round(8e-6 * size / statistics.median(a.ttft_seconds for a in fast.computed)))
    return f"{rate} Mbit, 50 ms", f"rtt={LATENCY},rate={rate}mbit"


def _row(level: str, link: str, times: _Times, expected: list[tuple[int, ...]]) -> ReuseRow:
    def median(answers: list[Answer]) -> float:
        return statistics.median(each.ttft_seconds for each in answers) * 1000

    computed, remote = median(times.computed), median(times.remote)
    fetched = median(times.fetched or times.remote)
    answers = (*times.computed, *times.local, *times.remote, *times.fetched)
    prompt, cached = times.computed[0].prompt_tokens, min(a.cached_tokens for a in times.remote)
    choice = "fetch" if cached > ENOUGH * prompt else "part" if cached else "compute"
    return ReuseRow(
        level=level,
        link=link,
        prompt_tokens=prompt,
        recompute_ms=round(computed, 1),
        local_ms=round(median(times.local), 1),
        remote_ms=round(remote, 1),
        local_cached=min(each.cached_tokens for each in times.local),
        remote_cached=cached,
        fetch_ms=round(fetched, 1),
        choice=choice,
        better="fetch" if fetched < computed else "compute",
        ratio=round(remote / min(fetched, computed), 3),
        identical=all(each.token_ids == expected[0] for each in answers),
    )


def _quiet(progress: Progress) -> None:
    """Take a progress report."""
