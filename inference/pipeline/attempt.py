"""The steps of a session over one placement: what to send next, and which result is due.

A session that loses a rank goes on with a new attempt, under a wire session of its own, that feeds
the journal again: the prompt in the very chunks of the first time, then the generated tokens in
steps of up to ``MAX_DECODE_ROWS``, which a runner computes in shapes that its self-test found
bit-identical to single tokens.  Hence every cell of the new ranks is that of the old ones.

A step may carry guesses, and steps may be sent on the assumption that all guesses before them are
right (see ``frames``).  The result of a step says how many were: what was sent on a wrong
assumption is void, is cancelled where it still can be, and the next step begins where the answer
ends.  Where the answer left the principal path of a tree, the next step begins at that place and
*carries* the tokens since then again, for the ranks before the last one.

An attempt may begin from KV blocks that the ranks still have or can get (see ``restoring``): it
then waits for their word, and feeds the journal from where all of them are.  Or it joins KV of
pieces of the prompt (see ``joining``): then it leaves out what all ranks have of these.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from pyagent_node.base.types import PeerId
from pyagent_node.inference.backend import MAX_DECODE_ROWS, Activations, Tokens
from pyagent_node.inference.kv.budgets import GUESSES
from pyagent_node.inference.kv.pieces import JoinPlan, Marks
from pyagent_node.inference.pipeline.flights import Chunk, Flight, Landed, Route, came_true
from pyagent_node.inference.pipeline.frames import (
    CancelSteps,
    CloseSession,
    Held,
    Joined,
    OpenSession,
    Restore,
    Restored,
    Result,
    Step,
    chunk_end,
    pack_tail,
)
from pyagent_node.inference.pipeline.joining import Joining, wish
from pyagent_node.inference.pipeline.origins import Origin
from pyagent_node.inference.pipeline.restoring import Restoring, bad_result
from pyagent_node.inference.pipeline.stage_types import MAX_STEPS_PER_SESSION, Outgoing
from pyagent_node.inference.sampling import Sampled
from pyagent_node.inference.trees import principal
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS

Embed = Callable[[Tokens], Activations]


class Attempt:
    """One wire session: ``prompt``, then the ``answer`` so far, then token after token.

    ``answer`` is the session's own list, which grows while the attempt lasts.  ``embed`` is
    ``None`` when one rank holds the whole model.
    """

    def __init__(  # noqa: PLR0917 - private to the head
        self,
        route: Route,
        prompt: Tokens,
        answer: Sequence[Sampled],
        positions: int,
        embed: Embed | None,
        now: float,
    ) -> None:
        self.route = route
        self.last_progress = now
        self._prompt = prompt
        self._answer = answer
        self._positions = positions
        self.embed = embed
        ranks = route.placement.ranks
        self._entry = ranks[0].peer_id
        self.tail = ranks[-1].peer_id
        """Who sends the results."""
        self.peers = frozenset(rank.peer_id for rank in ranks)
        self._window = min(len(ranks) + 1, MAX_STEPS_PER_SESSION)
        self._total = len(prompt) + len(answer)
        self.position = 0
        """Where the next step begins."""
        self.carried = 0
        """So many tokens before the last one are to be sent again, with the next step."""
        self.ahead: tuple[int, ...] = ()
        """The guesses in flight: what follows the answer if all of them are right."""
        self.computed = 0
        """The tokens that every rank has computed, or restored."""
        self.began_at = 0
        """The tokens that were restored."""
        self.fed_at: float | None = None
        """When the first step was sent."""
        self.joined = 0
        """The tokens whose cells are those of pieces."""
        self.joined_landmarks = 0
        """Those of them of which some rank has only the landmarks."""
        self.restoring: Restoring | Joining | None = None
        """The wait for what the ranks can restore or join; nothing is sent before its end."""
        self._gaps: dict[int, int] = {}
        self._sent = 0
        self._flights: deque[Flight] = deque()

    # ---- what goes out ---------------------------------------------------------------------

    def open(self, former: tuple[Origin, ...] = (), landmarks: Marks | None = None) -> Outgoing:
        """Return the message that admits the session; the arguments as in ``OpenSession``."""
        route, n = self.route, len(self._prompt)
        placement = route.placement
        return Outgoing(
            self._entry,
            OpenSession(
                session=route.session,
                model=placement.model,
                epoch=placement.epoch,
                rank=0,
                head=route.head,
                positions=self._positions,
                prompt_tokens=n,
                sampling=route.sampling,
                root=route.root,
                former=former,
                pruning=route.pruning,
                landmarks=landmarks,
            ),
        )

    def restore(
        self,
        blocks: int,
        sources: Sequence[PeerId],
        now: float,
        *,
        rest: int = 0,
        held: tuple[Held, ...] = (),
        seconds: float = 0.0,
    ) -> Outgoing:
        """Return the wish for the KV of the journal's leading blocks, to follow on :meth:`open`.

        ``rest`` tokens more are with those who ``held`` them; ``seconds`` as in ``Restore``.
        """
        route = self.route
        self.restoring = Restoring(route.placement, blocks, now, rest)
        n = len(self._prompt)
        stop = blocks * BLOCK_TOKENS + rest
        parts = [self._prompt[:stop]]
        if stop > n:
            parts.append(self.tokens(Chunk(n, stop)))
        tokens = cast("Tokens", np.concatenate(parts))
        placement = route.placement
        wish = Restore(
            route.session,
            placement.model,
            placement.epoch,
            0,
            stop - rest,
            tuple(sources),
            rest,
            held,
            seconds,
            route.fetch,
        )
        return Outgoing(self._entry, wish, pack_tail(tokens, None))

    def join(self, plan: JoinPlan, root: bytes, sources: Sequence[PeerId], now: float) -> Outgoing:
        """Return the wish for the KV of pieces of the prompt, to follow on :meth:`open`."""
        placement = self.route.placement
        self.restoring = Joining(placement, plan, now)
        return wish(
            self.route.session,
            placement,
            root,
            plan,
            self._prompt,
            sources,
            landmarks=self.route.pruning is not None,
        )

    def on_restored(self, sender: PeerId, message: Restored | Joined) -> bool:
        """Take a rank's word; returns whether it is time to begin.

        Raises :class:`CorruptData` (``bad_result``).
        """
        wait = self.restoring
        if isinstance(wait, Joining) and isinstance(message, Joined):
            if wait.take(sender, message):
                self._gaps = wait.gaps()
                self.joined = sum(stop - start for start, stop in self._gaps.items())
                self.joined_landmarks = wait.landmarks()
                self.start(0)
                return True
        elif (
            isinstance(wait, Restoring)
            and isinstance(message, Restored)
            and wait.take(sender, message)
        ):
            self.start(wait.position(len(self._prompt), self._total))
            return True
        return False

    def start(self, position: int) -> None:
        """Begin to feed the journal at ``position``."""
        self.restoring = None
        self.position = self.computed = self.began_at = position

    def close(self, *, parts: bool = False) -> list[Outgoing]:
        """Return what frees the session on every rank; see ``CloseSession`` for ``parts``."""
        placement = self.route.placement
        model, epoch, session = placement.model, placement.epoch, self.route.session
        return [
            Outgoing(rank.peer_id, CloseSession(session, model, epoch, rank.rank, parts))
            for rank in placement.ranks
        ]

    def next_chunk(self, *, hold: bool = False) -> Chunk | None:
        """Return the chunk to send now, or ``None`` when the window is full or all is sent.

        The window lets every rank work on another chunk of the prompt at the same time; the short
        steps after it may fill every queue on the way.  With ``hold`` the last token stays here.
        """
        if self.restoring is not None:
            return None
        start, n = self.position, len(self._prompt)
        flying = len(self._flights)
        if start < n:
            if flying >= self._window:
                return None
            gap = min((at for at in self._gaps if at > start), default=n)
            return Chunk(start, min(gap, chunk_end(start, n)))
        stop = self._total - hold * (1 + self.carried)
        if start >= stop or flying >= MAX_STEPS_PER_SESSION:
            return None
        return Chunk(start, min(start + MAX_DECODE_ROWS, stop))

    def tokens(self, chunk: Chunk) -> Tokens:
        """Return the tokens of ``chunk``."""
        n = len(self._prompt)
        if chunk.start < n:
            return self._prompt[chunk.start : chunk.stop]
        answer = self._answer[chunk.start - n : chunk.stop - n]
        return np.array([sampled.token for sampled in answer], dtype=np.int32)

    def send_chunk(self, chunk: Chunk, rows: Activations | None, now: float) -> Outgoing:
        """Return the step for the chunk that :meth:`next_chunk` gave, with its embeddings."""
        assert chunk.start == self.position, "chunks are sent in order"
        self.fed_at = now if self.fed_at is None else self.fed_at
        sample = chunk.stop == self._total
        flight = Flight(self._sent, chunk.stop, chunk.stop - chunk.start, sample, now)
        return self._step(flight, self.tokens(chunk), rows)

    def send_token(self, token: int, now: float) -> Outgoing:
        """Return the step for the last token of the answer."""
        known = (*self._carry(), token)
        tokens = cast("Tokens", np.array(known, dtype=np.int32))
        rows = None if self.embed is None else self.embed(tokens)
        stop, n, flights = self.position + len(known), len(known), len(self._flights)
        flight = Flight(self._sent, stop, n, True, now, "token", token, (), (), 0.0, flights + 1)
        return self._step(flight, tokens, rows)

    def send_carried(self, now: float) -> Outgoing:
        """Return a step with some of the tokens to be sent again, where they are too many."""
        n = MAX_DECODE_ROWS
        assert self.carried >= n, "fewer go with the next step"
        tokens = cast("Tokens", np.array(self._carry()[:n], dtype=np.int32))
        rows = None if self.embed is None else self.embed(tokens)
        left = self.carried - n
        out = self._step(Flight(self._sent, self.position + n, n, False, now), tokens, rows)
        self.carried = left
        return out

    def send_guesses(
        self,
        first: int,
        guesses: tuple[int, ...],
        follows: Sequence[int],
        draft_seconds: float,
        now: float,
    ) -> Outgoing:
        """Return a step with ``guesses`` for what comes after ``first``.

        That is the last token of the answer, or, with guesses in flight, a guess of the token that
        comes after those: the step is then a child of the last one.  Where the guesses form a tree,
        ``follows`` has for each the index of the guess that it follows, -1 for ``first``.
        """
        carry = self._carry()
        known = len(carry) + 1
        assert known <= MAX_DECODE_ROWS, "more are sent before"
        parents = tuple([known + index for index in follows])
        straight = principal(parents, known, len(guesses))
        if straight == len(guesses):
            parents = ()
        ids = cast("Tokens", np.array((*carry, first, *guesses), dtype=np.int32))
        rows = None if self.embed is None else self.embed(ids)
        child = self.guesses_in_flight > 0
        self.ahead += (first, *guesses[:straight]) if child else guesses[:straight]
        flight = Flight(
            self._sent,
            self.position + known + straight,
            len(ids),
            True,
            now,
            "child" if child else "token",
            first,
            guesses,
            parents,
            draft_seconds,
            len(self._flights) + 1,
        )
        return self._step(flight, ids, rows)

    def _carry(self) -> list[int]:
        """Return the tokens that are to be sent again before the last one."""
        answer, n = self._answer, self.carried
        return [sampled.token for sampled in answer[len(answer) - 1 - n : -1]] if n else []

    def _step(self, flight: Flight, tokens: Tokens, rows: Activations | None) -> Outgoing:
        route = self.route
        placement = route.placement
        step = Step(
            route.session,
            placement.model,
            placement.epoch,
            0,
            flight.step,
            self.position,
            flight.n,
            flight.sample,
            0.0,
            len(flight.guesses),
            flight.step - 1 if flight.kind == "child" else None,
            flight.parents,
            self.computed if flight.kind == "child" else 0,
        )
        self._sent += 1
        self.carried = 0
        self.position = self._gaps.get(flight.stop, flight.stop)
        self._flights.append(flight)
        return Outgoing(self._entry, step, pack_tail(tokens, rows, placement.crossing))

    def cancel(self, void: Sequence[Flight]) -> list[Outgoing]:
        """Return what spares the ranks steps that are void; the last one knows by itself."""
        placement = self.route.placement
        first, stop = void[0].step, void[-1].step + 1
        return [
            Outgoing(
                rank.peer_id,
                CancelSteps(
                    self.route.session, placement.model, placement.epoch, rank.rank, first, stop
                ),
            )
            for rank in placement.ranks[:-1]
        ]

    # ---- what comes back -------------------------------------------------------------------

    def on_result(self, sender: PeerId, result: Result, now: float) -> Landed | None:
        """Take a result of the tail; returns the next tokens of the answer when it has them.

        The caller adds the tokens to the answer.  Raises :class:`CorruptData` (``bad_result``).
        """
        if sender != self.tail:
            return None
        flights = self._flights
        if not flights or flights[0].step != result.step:
            raise bad_result(sender, f"step {result.step} was not due")
        flight = flights.popleft()
        self.last_progress = now
        if not flight.sample:
            self.computed = flight.stop
            return None
        sampled, guesses = result.sampled, flight.guesses
        right = len(sampled) - 1
        if not 0 <= right <= len(guesses):
            raise bad_result(sender, f"it holds {len(sampled)} tokens for {len(guesses)} guesses")
        self._total += len(sampled)
        if not flights and not guesses:
            self.computed = flight.stop
            return Landed(flight, sampled)
        straight = came_true(sender, flight, [one.token for one in sampled[:right]])
        holds = straight == right == flight.straight
        # a rank that is alone has the cells of what came true
        held = right if self.embed is None else straight
        self.computed = flight.stop - flight.straight + held
        if flights and holds and flights[0].first == sampled[-1].token:
            self.ahead = self.ahead[right + 1 :]
            return Landed(flight, sampled)
        void = tuple(flights)
        flights.clear()
        self.position = self.computed
        self.carried = right - held
        self.ahead = ()
        return Landed(flight, sampled, void)

    @property
    def waiting(self) -> bool:
        """Whether a result is due."""
        return bool(self._flights)

    @property
    def tokens_known(self) -> int:
        """The tokens of the prompt and of the answer."""
        return self._total

    @property
    def room(self) -> int:
        """How many guesses in a row there may be, none being in flight.

        Ranks give up no cells of a session while many guesses are unsettled; they get to it soon.
        """
        left = self._positions - self._total - 1
        return left if self.route.pruning is None else min(left, GUESSES)

    @property
    def at_last_token(self) -> bool:
        """Whether all was sent but the last token of the answer."""
        sent = self._total - 1 - self.carried
        return self.position == sent and self.position >= len(self._prompt)

    @property
    def guesses_in_flight(self) -> int:
        """The steps under way that continue the answer; the next one is a child of the last."""
        flights = self._flights
        if not flights or flights[-1].kind == "feed":
            return 0
        return sum(1 for flight in flights if flight.kind != "feed")
