"""A scenario from beginning to end: daemons up, model placed, question asked twice, links counted.

The first answer is made over perfect links: what the tokens must be.  The second is made over the
scenario's links while its time line runs.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import msgspec

from pyagent_node.base.errors import DeadlineExceeded, PyAgentError
from pyagent_node.base.types import Digest
from pyagent_node.benchmarks.swarm import LocalNode, interruptible, running
from pyagent_node.inference.generation import ChatMessage
from pyagent_node.node import offline
from pyagent_node.node.answers import Answer, Ask
from pyagent_node.node.api.schema import LoadRequest, ModelView, PlacementView, PullRequest
from pyagent_node.node.config import load_settings
from pyagent_node.simulations.lab import namespaces
from pyagent_node.simulations.lab.ground import Ground, homes, on_hosts, on_shaped
from pyagent_node.simulations.lab.results import (
    AnswerFigures,
    GroundKind,
    LabResult,
    LinkFigures,
    RouterFigures,
    TransferFigures,
)
from pyagent_node.simulations.lab.scenario import Scenario
from pyagent_node.simulations.lab.timeline import Act, Timeline, moments

Say = Callable[[str], None]

SETTLE_SECONDS = 180.0
ANSWER_SECONDS = 900.0
"""How long the answer may take in all; nobody waits for ever for a swarm that does not heal."""
POLL_SECONDS = 0.2
USUAL_VOTERS = 7
"""As many vote unless the mesh's settings say otherwise."""
N_CTX = 2048


class _Timed(msgspec.Struct, frozen=True):
    answer: Answer
    pauses: tuple[float, ...]


class Play:
    """One run of a scenario on a ground.  ``say`` gets lines for the user."""

    def __init__(self, scenario: Scenario, ground: Ground, model: Path, say: Say) -> None:
        self._scenario = scenario
        self._ground = ground
        self._model = model
        self._say = say
        self._asked = ground.nodes[scenario.asked]

    def run(self, kind: GroundKind) -> LabResult:
        """Start everything, ask, and return what was seen; errors as they come."""
        scenario, ground = self._scenario, self._ground
        self._give_model()
        ground.conditions(True)
        with ground.at(scenario.asked):
            began = time.monotonic()
            nodes = list(ground.nodes.values())
            with running(nodes, say=self._say):
                self._await_voters(len(nodes))
                joined = time.monotonic() - began
                self._say(f"{len(nodes)} nodes are one mesh after {joined:.1f} s.")
                rtt = self._round_trips()  # now: a transfer fills the queues
                model, transfer = self._transfer()
                placement, loading = self._place(model)
                expected = self._undisturbed(placement.name)
                self._say("Asking again over the links of the scenario ...")
                timed = self._disturbed(placement.name)
                links, router = self._counted()
                return LabResult(
                    scenario=scenario.name,
                    ground=kind,
                    hosts=tuple(host.name for host in scenario.hosts),
                    ranks=scenario.holders,
                    prompt=scenario.answer.prompt,
                    text=timed.answer.text,
                    token_ids=timed.answer.token_ids,
                    identical=timed.answer.token_ids == expected.answer.token_ids,
                    join_seconds=joined,
                    load_seconds=loading,
                    transfer=transfer,
                    rtt_ms=rtt,
                    undisturbed=_figures(expected),
                    disturbed=_figures(timed),
                    links=links,
                    router=router,
                )

    # Before the question -------------------------------------------------------------------------

    def _give_model(self) -> None:
        """Put the model's file on every host, or on the one that is asked."""
        nodes = list(self._ground.nodes.values())
        for node in nodes if self._scenario.model.everywhere else nodes[:1]:
            store = offline.open_store(node.home, load_settings(node.home, environ={}))
            offline.pull_model(store, f"file:{self._model}")

    def _await_voters(self, count: int) -> None:
        """Wait until every node is in the log and as many vote as shall: an odd number."""
        wanted = min(count - 1 + count % 2, USUAL_VOTERS)

        def voting() -> bool:
            now = self._asked.client.status().consensus
            if now is None or now.joint or now.leader is None:
                return False
            return len(now.voters) >= wanted and len(now.voters) + len(now.learners) >= count

        _await(voting, "not every node had its place in the log")

    def _transfer(self) -> tuple[ModelView, TransferFigures | None]:
        """Let the mesh know the model; time its way to another host where that is the plan."""
        model = self._asked.client.pull(PullRequest(source=f"file:{self._model}"))
        if self._scenario.model.everywhere:
            return model, None
        name = next(name for name in self._ground.nodes if name != self._scenario.asked)
        self._say(f"Sending the model from {self._scenario.asked} to {name} ...")
        node = self._ground.nodes[name]
        with self._ground.at(name):
            try:
                self._await_known(node, model.digest)
                began = time.monotonic()
                node.client.pull(PullRequest(source=model.digest))
                seconds = time.monotonic() - began
            finally:
                node.close()  # its connections belong to that host
        return model, TransferFigures(
            source=self._scenario.asked, target=name, bytes=model.size, seconds=seconds
        )

    def _await_known(self, node: LocalNode, digest: Digest) -> None:
        def known() -> bool:
            return any(model.digest == digest for model in node.client.models().models)

        _await(known, "the mesh did not learn of the model")

    def _place(self, model: ModelView) -> tuple[PlacementView, float]:
        scenario, plan = self._scenario, self._scenario.model
        count = scenario.rank_count
        cuts = plan.layers
        if cuts is None and model.n_layers is not None:
            cuts = tuple(model.n_layers * rank // count for rank in range(1, count))
        began = time.monotonic()
        placement = self._asked.client.load(
            LoadRequest(
                model=model.digest,
                ranks=count,
                layers=cuts,
                nodes=tuple(self._ground.nodes[name].peer_id for name in scenario.holders),
                n_ctx=N_CTX,
                standbys=plan.standbys,
                spares=plan.spares,
            )
        )
        _await(self._kept_ready, "what is kept ready for the ranks was not loaded")
        seconds = time.monotonic() - began
        self._say(f"The model is placed on {', '.join(scenario.holders)} after {seconds:.1f} s.")
        return placement, seconds

    def _kept_ready(self) -> bool:
        placements = self._asked.client.placements()
        reserves = [
            reserve
            for placement in placements
            for rank in placement.ranks
            for reserve in (*rank.standbys, *rank.spares)
        ]
        return all(p.ready for p in placements) and all(
            r.state in ("hot", "disk") for r in reserves
        )

    def _round_trips(self) -> dict[str, float]:
        """Return the round trips that the asked daemon itself measured, in milliseconds."""
        names = {node.peer_id: name for name, node in self._ground.nodes.items()}
        peers = self._asked.client.peers().peers
        return {
            names[peer.peer_id]: round(peer.rtt_ms, 3)
            for peer in peers
            if peer.rtt_ms is not None and peer.peer_id in names
        }

    # The answers ---------------------------------------------------------------------------------

    def _undisturbed(self, model: str) -> _Timed:
        self._say("Asking over perfect links ..." if self._ground.network else "Asking ...")
        self._ground.conditions(False)
        try:
            return self._ask(model)
        finally:
            self._ground.conditions(True)

    def _ask(self, model: str) -> _Timed:
        question = self._scenario.answer
        ask = Ask(
            model=model,
            messages=(ChatMessage("user", question.prompt),),
            max_tokens=question.tokens,
            temperature=question.temperature,
            seed=question.seed,
            ignore_eos=True,
        )
        pauses: list[float] = []
        last = 0.0
        for piece in self._asked.client.generate(ask):
            if isinstance(piece, Answer):
                return _Timed(piece, tuple(pauses))
            now = time.monotonic()
            if last:
                pauses.append(now - last)
            last = now
        raise AssertionError("the client raises unless an answer came")

    def _disturbed(self, model: str) -> _Timed:
        """Answer while the time line runs; what has not begun when the answer is there does not."""
        network = self._ground.network
        with self._patience(), Follower(self._scenario.timeline, self._act, self._say):
            if network is not None:
                network.start_timeline()
            timed = self._ask(model)
        if network is not None:
            network.stop_timeline()
        return timed

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        """End the asked daemon, and so the wait for its answer, when it takes too long."""
        late = threading.Event()

        def give_up() -> None:
            late.set()
            assert self._asked.process is not None
            self._asked.process.kill()

        timer = threading.Timer(ANSWER_SECONDS, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        except PyAgentError:
            if not late.is_set():
                raise
            raise DeadlineExceeded(
                f"The answer was not there after {ANSWER_SECONDS:.0f} s.", code="lab_failed"
            ) from None
        finally:
            timer.cancel()

    def _act(self, act: Act) -> None:
        node = self._ground.nodes[act.host]
        if act.do == "kill":
            node.kill()
        else:
            node.start()

    # Afterwards ----------------------------------------------------------------------------------

    def _counted(self) -> tuple[tuple[LinkFigures, ...], RouterFigures | None]:
        network = self._ground.network
        if network is None:
            return (), None
        stats = network.stats()
        names = [host.name for host in self._scenario.hosts]
        links = tuple(
            LinkFigures(
                source=names[flow.source],
                target=names[flow.target],
                packets=flow.traffic.sent,
                bytes=flow.traffic.bytes,
                lost=flow.traffic.lost,
                queue=flow.traffic.queue,
                cut=flow.traffic.cut,
            )
            for flow in stats.flows
        )
        router = RouterFigures(
            packets=stats.packets,
            late_ms_p50=stats.late_ms_p50,
            late_ms_p99=stats.late_ms_p99,
            overruns=stats.overruns,
            held_over=stats.held_over,
        )
        return links, router


class Follower:
    """A thread that follows a time line while the block lasts: says what happens, and does it.

    What an act raised is raised at the end of the block, unless that ends with an error anyway.
    """

    def __init__(self, timeline: Timeline, act: Callable[[Act], None], say: Say) -> None:
        self._moments = moments(timeline)
        self._do = act
        self._say = say
        self._over = threading.Event()
        self._error: PyAgentError | None = None
        self._thread = threading.Thread(target=self._follow, name="lab-timeline", daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()  # a daemon that is half started could not be ended
        if error is None and self._error is not None:
            raise self._error

    def _follow(self) -> None:
        began = time.monotonic()
        for moment in self._moments:
            if self._over.wait(max(0.0, began + moment.at - time.monotonic())):
                return
            self._say(f"{moment.at:7.1f} s  {moment.text}")
            if moment.act is None:
                continue
            try:
                self._do(moment.act)
            except PyAgentError as error:
                self._error = error
                return


def run_scenario(
    text: str,
    scenario: Scenario,
    model: Path,
    *,
    kind: GroundKind = "hosts",
    keep: bool = False,
    say: Say = lambda _: None,
) -> LabResult:
    """Run a scenario and clean up, whatever happens; ``keep`` leaves the homes with their logs.

    Raises :class:`Unsupported` (``no_lab``, ``not_shapeable``), :class:`Unavailable`
    (``lab_failed``, ``daemon_not_started``) and what the daemons raise.
    """
    if kind == "hosts":
        namespaces.check()
    with interruptible(), homes(keep=keep) as root:
        if keep:
            say(f"The homes and logs of the nodes stay in {root}.")
        ground = on_hosts(text, scenario, root) if kind == "hosts" else on_shaped(scenario, root)
        with ground as ready:
            return Play(scenario, ready, model, say).run(kind)


def _figures(timed: _Timed) -> AnswerFigures:
    answer, pauses = timed.answer, timed.pauses or (0.0,)
    return AnswerFigures(
        tokens=answer.completion_tokens,
        tokens_per_second=round(answer.tokens_per_second, 3),
        ttft_seconds=round(answer.ttft_seconds, 4),
        seconds=round(answer.seconds, 3),
        stall_seconds=round(max(pauses), 3),
        pause_ms=round(statistics.median(pauses) * 1000, 3),
        failovers=answer.failovers,
        recomputed_tokens=answer.recomputed_tokens,
    )


def _await(condition: Callable[[], bool], what: str) -> None:
    """Ask again and again; an error of the daemon's (an election is under way) means not yet."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        with contextlib.suppress(PyAgentError):
            if condition():
                return
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"Within {SETTLE_SECONDS:.0f} s {what}.",
                code="lab_failed",
                remedy="Run it again with --keep and read the logs of the daemons.",
            )
        time.sleep(POLL_SECONDS)
