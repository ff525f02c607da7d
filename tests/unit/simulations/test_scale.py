"""What the scale benchmark counts and draws."""

from __future__ import annotations

from xml.etree import ElementTree

import msgspec
import pytest

from pyagent_node.base.types import PeerId
from pyagent_node.base.wire import Frame
from pyagent_node.consensus.raft_messages import PROTOCOL as RAFT_PROTOCOL
from pyagent_node.inference.pipeline.frames import PIPE_PROTOCOL
from pyagent_node.node.rpc import PROTOCOL as RPC_PROTOCOL
from pyagent_node.simulations.scale import PHASES, Size
from pyagent_node.simulations.scale_plot import plot
from pyagent_node.simulations.traffic import Meter, Period, Sent, purpose_of

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")
encode = msgspec.msgpack.encode


def call(tag: str) -> Frame:
    """A request or a reply, as ``node.rpc`` frames it."""
    return Frame(encode({"type": "call", "id": 1, "body": {"type": tag}}))


@pytest.mark.parametrize(
    ("protocol", "frame", "purpose"),
    [
        (PIPE_PROTOCOL, Frame(b"x"), "pipe"),
        (RAFT_PROTOCOL, Frame(encode({"type": "hello"})), "hello"),
        (RAFT_PROTOCOL, Frame(encode({"type": "piece"}), b"tail"), "raft"),
        (RPC_PROTOCOL, call("ask_facts"), "facts"),
        (RPC_PROTOCOL, call("here"), "presence"),
        (RPC_PROTOCOL, Frame(encode({"type": "cancel", "id": 1})), "other"),
        (RPC_PROTOCOL, Frame(b"\xc1"), "other"),
        (RAFT_PROTOCOL, Frame(b""), "other"),
        ("/pyagent/new/1", Frame(b""), "other"),
    ],
)
def test_frames_by_purpose(protocol: str, frame: Frame, purpose: str) -> None:
    assert purpose_of(protocol, frame) == purpose


def test_a_meter_counts_by_phase_node_and_second() -> None:
    now = 0.0
    meter = Meter(lambda: now)
    meter.frame(A, B, PIPE_PROTOCOL, Frame(b"before any phase"))
    meter.begin("quiet", 2)
    for _ in range(8):
        meter.frame(A, B, PIPE_PROTOCOL, Frame(b"12", b"34"))
    meter.frame(A, A, PIPE_PROTOCOL, Frame(b"to itself"))
    now = 2.0
    meter.begin("faults", 2)
    now = 4.0
    quiet, faults = meter.periods(2)
    assert (quiet.phase, quiet.seconds) == ("quiet", 2.0)
    assert quiet.total == quiet.mean["pipe"] == Sent(2.0, 24.0)
    assert quiet.most == Sent(4.0, 48.0)
    assert faults.total == Sent(0.0, 0.0)


def size(nodes: int) -> Size:
    """Figures of a size."""
    sent = Sent(nodes / 7, nodes * 11.0)
    periods = tuple(
        Period(phase=p, seconds=1.0, mean={"raft": sent}, total=sent, most=sent) for p in PHASES
    )
    return Size(
        nodes=nodes,
        seed=1,
        virtual_seconds=10.0,
        wall_seconds=1.0,
        cpu_seconds=nodes / 10,
        join_seconds=5.0,
        memory_bytes=1,
        faults=0,
        requests=0,
        periods=periods,
        violations=(),
        trace_digest="",
    )


@pytest.mark.parametrize("nodes", [(3,), (10, 50, 200)])
def test_the_plot_is_svg_and_the_same_every_time(nodes: tuple[int, ...]) -> None:
    drawn = plot([size(n) for n in nodes])
    assert drawn == plot([size(n) for n in reversed(nodes)])
    names = {element.text for element in ElementTree.fromstring(drawn).iter() if element.text}
    assert {*PHASES, "raft", "simulator", *map(str, nodes)} <= names
    assert "nan" not in drawn
