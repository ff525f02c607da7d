"""What PySyncObj is given to work with: numbered nodes, a transport, settings.  Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyagent_node.base.errors import ConfigError
from pyagent_node.consensus.pysyncobj_log import CoreLog
from pyagent_node.consensus.pysyncobj_messages import Message, RequestVote, TimeoutNow, Vote
from pyagent_node.consensus.pysyncobj_stock import stock

_BaseNode: Any = stock().Node
_Conf: Any = stock().SyncObjConf


class Node(_BaseNode):  # type: ignore[misc]  # it is untyped
    """PySyncObj's ``Node``, with a number for its id: sets of them have one order everywhere."""

    id: int


class Wire:
    """PySyncObj's ``Transport``: turns the dictionaries that it sends into messages."""

    ready = True

    def __init__(self, send: Callable[[int, Message], None]) -> None:
        self._send = send

    def send(self, node: Node, message: dict[str, Any]) -> None:
        """Queue a message; any but these three types is a path that must not be reached."""
        match message["type"]:
            case "request_vote":
                index, term = message["last_log_index"], message["last_log_term"]
                self._send(node.id, RequestVote(message["term"], index, term, ask=False))
            case "response_vote":
                self._send(node.id, Vote(message["term"], ask=False))
            case "timeout_now":
                self._send(node.id, TimeoutNow(message["term"]))
            case other:
                raise AssertionError(other)

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Take the callbacks that PySyncObj sets; the core calls its methods itself."""
        if not name.startswith("setOn"):
            raise AttributeError(name)
        return lambda *_callback: None


def conf_of(log: CoreLog, heartbeat_ticks: int, election_ticks: int) -> object:
    """Return PySyncObj's settings: no thread, no fork, no file, and time in ticks.

    Raises :class:`ConfigError` (``bad_timing``).
    """
    if not 0 < 3 * heartbeat_ticks < election_ticks:
        raise ConfigError(
            f"{election_ticks} ticks without a leader's message are too few if one comes every"
            f" {heartbeat_ticks}.",
            code="bad_timing",
            remedy="Make the election timeout more than three times the heartbeat.",
        )
    return _Conf(
        autoTick=False,
        useFork=False,
        journalFile=log,
        dynamicMembershipChange=False,
        appendEntriesUseBatch=False,
        raftMinTimeout=float(election_ticks),
        raftMaxTimeout=2.0 * election_ticks,
        appendEntriesPeriod=float(heartbeat_ticks),
        leaderFallbackTimeout=float(election_ticks),
        connectionTimeout=2.0 * election_ticks,
    )
