"""What the shell of the Raft engines asks of a core: tikv's, or PySyncObj's.

:class:`pyagent_node.native.RaftCore` says what each method promises; the other core is
:class:`pyagent_node.consensus.pysyncobj_core.PySyncCore`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from pyagent_node.consensus.raft_messages import PROTOCOL
from pyagent_node.native import RaftConf, RaftCore, RaftEntry


class Ready(Protocol):
    """See :class:`pyagent_node.native.RaftReady`."""

    @property
    def messages(self) -> list[tuple[int, str, bytes]]:
        """To be sent now."""
        ...

    @property
    def persisted_messages(self) -> list[tuple[int, str, bytes]]:
        """To be sent when everything is durable."""
        ...

    @property
    def entries(self) -> list[RaftEntry]:
        """To be made durable."""
        ...

    @property
    def hard_state(self) -> tuple[int, int, int] | None:
        """``(term, vote, commit)``."""
        ...

    @property
    def must_sync(self) -> bool:
        """Whether the write must have reached the disk."""
        ...

    @property
    def snapshot(self) -> tuple[int, int, RaftConf, bytes] | None:
        """``(index, term, conf, data)``."""
        ...

    @property
    def committed(self) -> list[RaftEntry]:
        """To be applied."""
        ...

    @property
    def read_states(self) -> list[tuple[int, bytes]]:
        """``(index, context)``."""
        ...


class Status(Protocol):
    """See :class:`pyagent_node.native.RaftStatus`."""

    @property
    def term(self) -> int:
        """The current term."""
        ...

    @property
    def leader(self) -> int:
        """The leader's id, 0 when none is known."""
        ...

    @property
    def role(self) -> str:
        """``"leader"``, ``"follower"``, ``"candidate"``, ``"precandidate"`` or ``"learner"``."""
        ...

    @property
    def commit(self) -> int:
        """The last entry known to be committed."""
        ...

    @property
    def last_index(self) -> int:
        """The last entry of the log."""
        ...

    @property
    def conf(self) -> RaftConf:
        """The configuration as applied here."""
        ...

    @property
    def pending_conf(self) -> bool:
        """Whether the leader may still have a configuration change to apply."""
        ...

    @property
    def progress(self) -> list[tuple[int, int, bool, str]]:
        """``(id, matched, recently active, state)``."""
        ...


class Core(Protocol):
    """See :class:`pyagent_node.native.RaftCore`."""

    @property
    def term(self) -> int:
        """The current term."""
        ...

    @property
    def role(self) -> str:
        """See :class:`Status`."""
        ...

    @property
    def leader(self) -> int:
        """The leader's id, 0 when none is known."""
        ...

    @property
    def snapshot_wanted(self) -> bool:
        """Whether a follower waits for a newer snapshot."""
        ...

    def tick(self) -> None:
        """Let one tick pass."""
        ...

    def set_election_ticks(self, ticks: int) -> None:
        """Set the election timeout."""
        ...

    def campaign(self) -> None:
        """Stand for election now."""
        ...

    def step(self, sender: int, message: bytes, trust: int = 2) -> None:
        """Take a message, as far as its sender's word counts."""
        ...

    def propose(self, data: bytes, context: bytes = b"") -> tuple[int, int]:
        """Append a command on the leader."""
        ...

    def propose_conf(
        self, voters: Sequence[int], learners: Sequence[int], context: bytes = b""
    ) -> tuple[int, int] | None:
        """Propose voters and learners on the leader."""
        ...

    def read_index(self, context: bytes) -> None:
        """Ask for a linearizable read."""
        ...

    def transfer(self, to: int) -> None:
        """Begin to hand the leadership over."""
        ...

    def has_ready(self) -> bool:
        """Whether :meth:`ready` has something."""
        ...

    def ready(self) -> Ready:
        """Take what has to be done."""
        ...

    def advance(self) -> Ready:
        """Say that it is durable."""
        ...

    def advance_apply(self, index: int) -> None:
        """Say what is applied."""
        ...

    def apply_conf(self, entry: RaftEntry) -> RaftConf:
        """Apply a committed change of the configuration."""
        ...

    def snapshot(self, index: int, data: bytes) -> tuple[int, int, RaftConf, bytes]:
        """Keep a snapshot."""
        ...

    def compact(self, index: int) -> None:
        """Drop entries from memory."""
        ...

    def report_unreachable(self, node_id: int) -> None:
        """Say that messages were lost."""
        ...

    def report_snapshot(self, node_id: int, ok: bool) -> None:
        """Say how sending a snapshot ended."""
        ...

    def status(self) -> Status:
        """The core's view of itself."""
        ...

    def take_log(self) -> list[tuple[str, str]]:
        """Take the core's log lines."""
        ...


class NewCore(Protocol):
    """Makes a core from what is durable."""

    def __call__(
        self,
        node_id: int,
        *,
        conf: RaftConf,
        term: int,
        vote: int,
        commit: int,
        snapshot_index: int,
        snapshot_term: int,
        snapshot_data: bytes,
        entries: Sequence[RaftEntry],
        heartbeat_ticks: int,
        election_ticks: int,
        max_message_bytes: int,
        max_inflight: int,
        max_uncommitted_bytes: int,
    ) -> Core:
        """Return a core."""
        ...


class Kind(NamedTuple):
    """What one engine has of its own: a name, a protocol on the mesh, a core."""

    name: str
    protocol: str
    new_core: NewCore


RAFT_RS = Kind("raft-rs", PROTOCOL, RaftCore)
