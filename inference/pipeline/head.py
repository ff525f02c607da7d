"""The pure core of a session at its head: the answer, its events, and the attempts to compute it.

The shell (``engine``, ``driver``) sends what the core answers and hands it every result.  A result
is turned into the next step at once, before the reader of the answer has seen the token, so that a
slow reader costs nothing until it lags far behind (see ``shown``); then the session waits for it.

An attempt (see ``attempt``) that fails in a way that passes is closed and the session *suspended*;
the shell begins another one when there are ranks for it.  The answer does not notice: the journal
of tokens is all that an attempt starts from, and what an earlier attempt still says is not heard.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyagent_node.base.errors import (
    LimitExceeded,
    PyAgentError,
    RunnerFailed,
    error_from_info,
)
from pyagent_node.base.types import ACTIVATIONS, PeerId, Placement, SessionId
from pyagent_node.inference.backend import Tokens
from pyagent_node.inference.backend_names import ADOPTED, MAX_CLASS, MAX_CLASSES
from pyagent_node.inference.drafting.port import Draft
from pyagent_node.inference.generation import (
    GenerationEvent,
    SpeculationUsage,
    Usage,
)
from pyagent_node.inference.kv.budgets import Evicted, believable, positions
from pyagent_node.inference.pipeline.activations import unsupported
from pyagent_node.inference.pipeline.attempt import Attempt, Embed
from pyagent_node.inference.pipeline.flights import Chunk, Landed, Route
from pyagent_node.inference.pipeline.frames import (
    MAX_SOURCES,
    Held,
    Joined,
    Restored,
    Result,
    StageError,
)
from pyagent_node.inference.pipeline.head_plan import HeadPlan, Vocabulary
from pyagent_node.inference.pipeline.journal import Outcome
from pyagent_node.inference.pipeline.origins import Origin, check_origins
from pyagent_node.inference.pipeline.recovery import Patience
from pyagent_node.inference.pipeline.restoring import bad_result, holders, parted
from pyagent_node.inference.pipeline.shown import ShownAnswer
from pyagent_node.inference.pipeline.speculation import Ask, Speculation
from pyagent_node.inference.pipeline.stage_errors import NOT_JOINED
from pyagent_node.inference.pipeline.stage_types import Outgoing, peer_lost
from pyagent_node.inference.sampling import Sampled
from pyagent_node.sharding.kv_keys import BLOCK_TOKENS


class HeadCore:
    """State of one session at its head; suspended until :meth:`begin`."""

    def __init__(
        self,
        plan: HeadPlan,
        prompt: Tokens,
        vocabulary: Vocabulary,
        now: float,
        speculation: Speculation | None = None,
    ) -> None:
        self.plan = plan
        self.speculation = speculation
        self.prompt = prompt
        self.started = now
        self.first_token: float | None = None
        self._shown = ShownAnswer(vocabulary, plan.stop)
        self.answer = self._shown.tokens
        """The tokens so far: the journal, together with the prompt."""
        self.attempt: Attempt | None = None
        """What computes the answer now; ``None`` while suspended."""
        self.epoch = 0
        """The epoch of the last attempt."""
        self.fed: tuple[int, float] | None = None
        """How many tokens were computed for the first one of the answer, in how many seconds."""
        self.over = False
        """Whether no more events will be made."""
        self.failovers = 0
        self.patience = Patience(now)
        self._error: PyAgentError | None = None
        self._placement: Placement | None = None
        self._limit = plan.budget
        self._begun = False
        self._classes: list[str] = []
        self.trail: tuple[Origin, ...] = ()
        """The ranks of the last attempt that had a result."""
        self._told = False
        self._recomputed = 0
        self._reached = 0
        self._cached = 0
        self._joined = 0
        self._joined_landmarks = 0
        self._joins = plan.join is not None
        self._evicted: Evicted | None = None
        self._holders: tuple[PeerId, ...] = ()
        self._parted: tuple[Held, ...] = ()
        self._paused_from = now
        self._longest_pause = 0.0

    # ---- attempts --------------------------------------------------------------------------

    @property
    def known(self) -> bool:
        """Whether some of the journal was computed before, so that its blocks may be had."""
        return self._reached > 0 or bool(self.answer)

    def begin(
        self,
        session: SessionId,
        placement: Placement,
        embed: Embed | None,
        now: float,
        blocks: int = 0,
        *,
        seconds: float = 0.0,
    ) -> Sequence[Outgoing]:
        """Compute on over ``placement``, as ``session`` on the wire.

        Returns what admits it and asks for its leading ``blocks``, if there are to be any; nothing
        when the answer turns out to be over.  ``seconds`` is what a token of a prompt takes.
        """
        assert self.attempt is None, "an attempt is closed before the next begins"
        plan, n = self.plan, len(self.prompt)
        self._placement, self.epoch = placement, placement.epoch
        if self.over or self._ended(now):
            return ()
        most = positions(plan.pruning, n, n_ctx=placement.n_ctx, trained=plan.trained)
        self._limit = min(plan.budget, most - n)
        if len(self.answer) >= self._limit:
            self.fail(self._too_long())
            return ()
        if placement.crossing not in ACTIVATIONS:
            self.fail(unsupported(placement.crossing))
            return ()
        if self.answer and not self.failovers:  # another head's, see recall
            self.failovers, self._reached = 1, n + len(self.answer)
        self.attempt = Attempt(
            Route(
                session, plan.head, placement, plan.sampling, plan.root, plan.fetch, plan.pruning
            ),
            self.prompt,
            self.answer,
            n + self._limit,
            embed,
            now,
        )
        if self.speculation is not None:
            self.speculation.begun()
        rest = 0
        if self._parted:  # all was computed but the last token, and is handed over
            blocks, rest = divmod(n + len(self.answer) - 1, BLOCK_TOKENS)
        adopts = (blocks or rest) and plan.fetch != "never"
        opening = self.attempt.open(self.trail if adopts else ())
        if self._joins and plan.join is not None:
            return opening, self.attempt.join(plan.join, plan.join_root, self._holders, now)
        if not blocks and not rest:
            return (opening,)
        held = self._parted if rest else ()
        wish = self.attempt.restore(
            blocks, self._holders, now, rest=rest, held=held, seconds=seconds
        )
        return opening, wish

    def on_restored(self, sender: PeerId, message: Restored | Joined) -> bool:
        """Take a rank's word on what it has; returns whether the attempt can begin now."""
        attempt = self.attempt
        if attempt is None or self.over:
            return False
        try:
            return attempt.on_restored(sender, message)
        except PyAgentError as error:
            self.fail(error)
            return True

    def interrupt(self, error: PyAgentError, now: float) -> list[Outgoing]:
        """Take an error of the attempt: suspend the session if it passes, else end it.

        Returns what closes the attempt.
        """
        attempt = self.attempt
        if attempt is None or self.over:
            return []
        if error.code == NOT_JOINED:
            self._joins = False
        got = attempt.computed > attempt.began_at
        self._begun = self._begun or got
        if not self.patience.forgives(
            error,
            epoch=self.epoch,
            begun=self._begun,
            got=got,
            held=self._shown.held and not attempt.waiting,
            now=now,
        ):
            self.fail(error)
            return []
        self.failovers += got
        self._count(attempt)
        parts = got and bool(self.answer) and error.code == "stale_epoch" and bool(self.plan.root)
        if got:
            self._parted = parted(attempt.route.placement) if parts else ()
        self._holders = holders(attempt.route.placement, self._holders, MAX_SOURCES)
        self.attempt = None
        return attempt.close(parts=parts)

    def _count(self, attempt: Attempt) -> None:
        """Count what an attempt, which ends now, has computed again."""
        if attempt.computed <= attempt.began_at:
            return
        again = min(attempt.computed, self._reached) - attempt.began_at
        if not self._reached:
            self._cached = attempt.began_at
        self._joined = max(self._joined, attempt.joined)
        self._joined_landmarks = max(self._joined_landmarks, attempt.joined_landmarks)
        again -= attempt.joined
        self._recomputed += max(0, again)
        self._reached = max(self._reached, attempt.computed)

    def give_up(self) -> None:
        """End a suspended session with the error that nothing cured in time."""
        error = self.patience.error
        assert error is not None, "only an error suspends a session"
        error.message += " Nothing could take over in time."
        self.fail(error)

    def close(self) -> list[Outgoing]:
        """Return what frees the session on every rank; it is over here too."""
        self.over = True
        attempt, self.attempt = self.attempt, None
        return [] if attempt is None else attempt.close()

    def next_chunk(self) -> Chunk | None:
        """Return the chunk of the journal to send now, if there is one."""
        attempt, spec = self.attempt, self.speculation
        if attempt is None or self.over:
            return None
        guessing = spec is not None and spec.asked and bool(self.answer)
        return attempt.next_chunk(hold=self._shown.held or guessing)

    def next_move(self, now: float) -> Outgoing | Ask | None:
        """Say what to send, or to ask the drafter, when the journal is sent but its last token."""
        attempt, spec = self.attempt, self.speculation
        if attempt is None or spec is None or self.over or self._shown.held:
            return None
        return spec.next_move(attempt, self.answer, now)

    def take_draft(
        self, ask: Ask, draft: Draft | None, seconds: float, now: float
    ) -> Outgoing | None:
        """Take the drafter's answer; returns the step to send, if it is of use still."""
        attempt, spec = self.attempt, self.speculation
        if attempt is None or spec is None or self.over or self._shown.held:
            return None
        return spec.take(attempt, self.answer, ask, draft, seconds, now)

    # ---- what comes back -------------------------------------------------------------------

    def on_result(self, sender: PeerId, result: Result, now: float) -> Sequence[Outgoing]:
        """Take a result of the tail; returns what to send now: the next step, if one is due."""
        attempt = self.attempt
        if attempt is None or self.over:
            return ()
        try:
            landed = attempt.on_result(sender, result, now)
            if result.trail and sender == attempt.tail:
                check_origins(result.trail)
                self.trail = result.trail
            if landed is None:
                return ()
            if not believable(result.evicted):
                raise bad_result(sender, "it counts cells that cannot be")
            for sampled in landed.sampled:
                self._shown.check(sampled, sender)
        except PyAgentError as error:
            self.fail(error)
            return ()
        self._note_classes(result.classes, adopted=attempt.began_at > 0)
        self._evicted = result.evicted or self._evicted
        spec = self.speculation
        if spec is not None:
            spec.landed(landed, result.spent, now)
        if self._on_tokens(landed, result.spent, now):
            return ()
        if spec is not None:
            return self._speculate(spec, attempt, landed, now)
        return () if self._shown.held else (attempt.send_token(self.answer[-1].token, now),)

    def _note_classes(self, classes: Sequence[str], *, adopted: bool) -> None:
        """Note who computes the attempt; a hostile tail cannot make that long.

        Ranks that meant to go on from KV of other classes have not ``adopted`` any where all was
        computed again.
        """
        for name in classes[:MAX_CLASSES]:
            each = name if adopted else name.removesuffix(ADOPTED)
            if each not in self._classes and len(self._classes) < MAX_CLASSES:
                self._classes.append(each[:MAX_CLASS])

    def _speculate(
        self, spec: Speculation, attempt: Attempt, landed: Landed, now: float
    ) -> Sequence[Outgoing]:
        spec.heard(landed.sampled, attempt.tokens_known)
        out = attempt.cancel(landed.void) if landed.void else []
        if not (self._shown.held or spec.busy):
            out += spec.moves(attempt, self.answer, now)
        return out

    def _on_tokens(self, landed: Landed, compute_seconds: float, now: float) -> bool:
        """Add tokens to the answer, up to one that ends it; returns whether it is over."""
        plan = self.plan
        step_seconds = now - landed.flight.sent_at
        if self.first_token is None:
            step_seconds = compute_seconds = 0.0
            self.first_token = now
            attempt = self.attempt
            if attempt is not None and attempt.fed_at is not None and not attempt.joined:
                self.fed = (landed.flight.stop - attempt.began_at, now - attempt.fed_at)
        elif now - self._paused_from > self._longest_pause:
            self._longest_pause = now - self._paused_from
        self._paused_from = now
        if self.patience.error is not None:
            self.patience.cured()
        for sampled in landed.sampled:
            if self._shown.ends(sampled.token) and not plan.ignore_eos:
                self._finish("stop", now)
                return True
            self._shown.add(sampled, step_seconds, compute_seconds)
            if self._ended(now):
                return True
            step_seconds = compute_seconds = 0.0
        if len(self.answer) >= self._limit:
            self.fail(self._too_long())
        self._shown.look()
        return self.over

    def _ended(self, now: float) -> bool:
        """Finish an answer whose last token is there."""
        if self._shown.stopped:
            self._finish("stop", now)
        elif len(self.answer) >= self.plan.budget:
            self._finish("length", now)
        return self.over

    def recall(self, tokens: Sequence[Sampled], after: int, now: float) -> None:
        """Start from an earlier head's tokens; those from index ``after`` on become events.

        Called once, before the first attempt.  An answer shorter than ``after`` ends in an error.
        """
        self._shown.skip = after
        for sampled in tokens:
            self._shown.check(sampled, self.plan.head)
            self._shown.add(sampled, 0.0, 0.0)
        self._begun = True
        self.first_token = now if tokens else None
        self._paused_from = now
        self._shown.look()

    def on_error(self, sender: PeerId, message: StageError, now: float) -> list[Outgoing]:
        """Take a rank's word that it gave the session up; returns what closes the attempt."""
        if self.attempt is None or sender not in self.attempt.peers:
            return []
        error = error_from_info(message.error)
        error.facts.setdefault("rank", message.rank)
        error.facts.setdefault("peer_id", message.peer_id)
        if isinstance(error, RunnerFailed):
            error.message = (
                f"The runner of rank {message.rank} on node {message.peer_id} failed:"
                f" {error.message}"
            )
            error.remedy = error.remedy or "It is being started again; ask again in a moment."
        return self.interrupt(error, now)

    def peer_down(self, peer: PeerId, now: float) -> list[Outgoing]:
        """Interrupt the attempt if one of its ranks was on ``peer``."""
        attempt = self.attempt
        if attempt is not None and peer in attempt.peers:
            for rank in attempt.route.placement.ranks:
                if rank.peer_id == peer:
                    return self.interrupt(peer_lost(rank.rank, peer), now)
        return []

    def fail(self, error: PyAgentError) -> None:
        """End the session with ``error``, after the events that came before it."""
        if not self.over:
            self.over = True
            self._error = error

    # ---- what is shown ---------------------------------------------------------------------

    @property
    def generated(self) -> int:
        """The number of tokens so far."""
        return len(self.answer)

    @property
    def guesses(self) -> SpeculationUsage | None:
        """What guessing has come to; ``None`` without."""
        return None if self.speculation is None else self.speculation.usage

    @property
    def outcome(self) -> Outcome:
        """How the session ended."""
        if self._error is not None:
            return "failed"
        return "finished" if self._told else "left"

    def take(self, now: float) -> tuple[GenerationEvent | None, bool]:
        """Return the next event to show, and whether there is room to go on with a held answer.

        Raises the error that ended the session, after its last event.
        """
        event, room = self._shown.take()
        if event is None and self._error is not None:
            raise self._error
        if room:
            self._paused_from = now
            if self.attempt is not None:
                self.attempt.last_progress = now
        elif event is not None and self.over and not self._shown.waiting:
            self._told = self._error is None
        return event, room

    def _finish(self, reason: str, now: float) -> None:
        placement = self._placement
        assert placement is not None, "an answer ends on a placement"
        if self._shown.skip:
            self.fail(
                LimitExceeded(
                    f"The answer ended after {len(self.answer)} tokens.",
                    code="beyond_end",
                    remedy="Ask for the stream from an earlier token.",
                    tokens=len(self.answer),
                )
            )
            return
        self.over = True
        first = now if self.first_token is None else self.first_token
        if self.attempt is not None:
            self._count(self.attempt)
        usage = Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.answer),
            ttft_seconds=first - self.started,
            seconds=now - self.started,
            failovers=self.failovers,
            recomputed_tokens=self._recomputed,
            stall_seconds=self._longest_pause,
            speculation=self.guesses,
            classes=tuple(self._classes),
            cached_tokens=self._cached,
            joined_tokens=self._joined,
            joined_landmarks=self._joined_landmarks,
            evicted=self._evicted,
        )
        self._shown.finish(reason, usage, placement)

    def _too_long(self) -> PyAgentError:
        n = len(self.prompt)
        return LimitExceeded(
            f"The model was placed anew with a context of {n + self._limit} tokens,"
            f" which the prompt and {len(self.answer)} tokens of the answer fill.",
            code="context_full",
            remedy="Load the model with a longer context (model load --context) and ask again.",
            n_ctx=n + self._limit,
        )
