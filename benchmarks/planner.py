"""The planner against reality: two real daemons, one of which computes slower.

    python -m pyagent_node.benchmarks.planner MODEL.gguf --share 0.33

Two daemons on loopback hold a model in two ranks.  The runners of the second are stopped and
continued in turn, so that they compute for ``share`` of the time (of a quiet machine), or compute
with a slower ``--backend``: mlx is, on processors.  Three placements take turns: the
layers cut in the middle, the cut that the planner chose from its estimates before anything was
loaded, and the one that it chooses from what sessions of the equal cut showed.  Printed are tokens
a second of each, the medians of the rounds, and what the planner predicted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec
import psutil

from pyagent_node.base.types import PeerId
from pyagent_node.benchmarks.swarm import LocalNode, local_swarm
from pyagent_node.inference.generation import NO_SPECULATION, ChatMessage
from pyagent_node.node.answers import Answer, Ask
from pyagent_node.node.api.placement_schema import PlanView
from pyagent_node.node.api.schema import LoadRequest, PullRequest

PERIOD_SECONDS: Final = 0.004
"""How often a slow runner is stopped and continued: about the time of one token."""
LOOK_SECONDS: Final = 0.05
"""How often the slow node's runners are looked for."""
N_CTX: Final = 1024
PROMPT: Final = "Tell a long story about a lighthouse, a storm and a lost dog. " * 6


class Cut(NamedTuple):
    """A placement: where the layers are cut, and the nodes in order."""

    name: str
    layers: tuple[int, ...]
    nodes: tuple[PeerId, ...]
    predicted: float | None


class ArmReport(msgspec.Struct, frozen=True):
    """One placement: medians over the rounds; ``predicted`` tokens a second, if it was planned."""

    name: str
    layers: tuple[int, ...]
    nodes: tuple[str, ...]
    tokens_per_second: float
    first_token_ms: float
    predicted: float | None


class PlannerReport(msgspec.Struct, frozen=True):
    """The whole experiment; ``gain`` is measured over equal, the median of the rounds' ratios."""

    bench: str
    share: float
    backend: str | None
    tokens: int
    rounds: int
    arms: tuple[ArmReport, ...]
    gain: float


def main() -> None:
    """Run it and print JSON."""
    parser = argparse.ArgumentParser(description="The planner's cut against an equal one.")
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--share", type=float, default=0.33, help="of the time that one computes")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", help="what the second daemon computes with, at full speed")
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.limit is not None:
        limit(options.limit, options.share)
        return
    report = measure(
        options.model,
        share=options.share if options.backend is None else 1.0,
        backend=options.backend,
        tokens=options.tokens,
        rounds=options.rounds,
    )
    print(msgspec.json.format(msgspec.json.encode(report)).decode())


def measure(
    path: str, *, share: float, backend: str | None, tokens: int, rounds: int
) -> PlannerReport:
    """Run the experiment."""
    with local_swarm(2, say=_say) as nodes, _limited(nodes[1], share):
        client = nodes[0].client
        model = client.pull(PullRequest(source=f"file:{path}")).name
        chosen = None if backend is None else f"{nodes[1].peer_id}={backend}"
        estimated = client.plan(_request(model, chosen))
        n_layers = estimated.ranks[-1].layers[1]
        peers = tuple(node.peer_id for node in nodes)
        names = {node.peer_id: node.name for node in nodes}
        cuts = [
            Cut("equal", (n_layers // 2,), peers, None),
            _planned("estimated", estimated),
        ]
        _run(
            nodes[0], _request(model, chosen, cuts[0]), tokens
        )  # what its sessions show is measured
        measured = client.plan(_request(model, chosen))
        for view in (estimated, measured):
            _show(view)
        cuts.append(_planned("measured", measured))
        found: dict[str, list[tuple[float, float]]] = {cut.name: [] for cut in cuts}
        for number in range(rounds):
            for cut in cuts:
                found[cut.name].append(_run(nodes[0], _request(model, chosen, cut), tokens))
                _say(f"  round {number}: {cut.name} {found[cut.name][-1][0]:.1f} tokens/s")
    arms = tuple(
        ArmReport(
            cut.name,
            cut.layers,
            tuple(names[peer] for peer in cut.nodes),
            statistics.median(speed for speed, _ in found[cut.name]),
            statistics.median(first for _, first in found[cut.name]),
            cut.predicted,
        )
        for cut in cuts
    )
    pairs = zip(found["measured"], found["equal"], strict=True)
    gain = statistics.median(best[0] / equal[0] for best, equal in pairs)
    return PlannerReport("planner", share, backend, tokens, rounds, arms, gain)


def _show(view: PlanView) -> None:
    for line in view.explanation:
        _say(f"  {line}")
    for node in view.nodes:
        speed = f"{node.decode_bytes_per_second / 1e9:.2f} GB/s ({node.source})"
        _say(
            f"  {node.name}: {speed}, {node.prefill_flops_per_second / 1e9:.0f} GFLOPS; {node.why}"
        )


def _planned(name: str, view: PlanView) -> Cut:
    cut = tuple(rank.layers[1] for rank in view.ranks[:-1])
    peers = tuple(rank.peer_id for rank in view.ranks)
    return Cut(name, cut, peers, 1 / view.token_seconds)


def _request(model: str, backend: str | None, cut: Cut | None = None) -> LoadRequest:
    return LoadRequest(
        model=model,
        ranks=2 if cut is None else None,
        layers=None if cut is None else cut.layers,
        nodes=None if cut is None else cut.nodes,
        n_ctx=N_CTX,
        n_seq=1,
        standbys=0,
        spares=0,
        backend=backend,
    )


def _run(node: LocalNode, request: LoadRequest, tokens: int) -> tuple[float, float]:
    """Return tokens a second after the first, and milliseconds to the first."""
    node.client.apply(request)
    ask = Ask(
        model=request.model,
        messages=(ChatMessage("user", PROMPT),),
        max_tokens=tokens,
        temperature=0.0,
        seed=1,
        speculation=NO_SPECULATION,
        cache_salt=str(time.time_ns()),
    )
    began, times = time.perf_counter(), list[float]()
    for piece in node.client.generate(ask):
        if not isinstance(piece, Answer):
            times += [time.perf_counter()] * len(piece.token_ids)
    return (len(times) - 1) / (times[-1] - times[0]), (times[0] - began) * 1000


@contextlib.contextmanager
def _limited(node: LocalNode, share: float) -> Iterator[None]:
    """Slow the runners of a node down while the context lasts, from a process beside us."""
    if share >= 1:
        yield
        return
    module = [sys.executable, "-m", "pyagent_node.benchmarks.planner", "-"]
    with subprocess.Popen([*module, "--limit", str(node.pid), "--share", str(share)]) as process:
        try:
            yield
        finally:
            process.terminate()


def limit(pid: int, share: float) -> None:
    """Let the children of a process run for ``share`` of the time, until it or we shall end."""
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    runners: list[int] = []
    looked = 0.0

    def signal_all(number: int) -> None:
        for runner in runners:
            with contextlib.suppress(ProcessLookupError):
                os.kill(runner, number)

    with contextlib.suppress(psutil.Error):
        daemon = psutil.Process(pid)
        while not ended and os.getppid() != 1:
            if time.monotonic() - looked > LOOK_SECONDS:
                runners, looked = [child.pid for child in daemon.children()], time.monotonic()
            began = time.monotonic()
            time.sleep(PERIOD_SECONDS * share)
            ran = time.monotonic() - began  # longer than asked for, on a busy machine
            try:
                signal_all(signal.SIGSTOP)
                time.sleep(ran * (1 - share) / share)
            finally:
                signal_all(signal.SIGCONT)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
