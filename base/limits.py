"""Every bound of the project in one place; reaching one is an error to whoever caused it."""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

MAX_HEADER: Final = 64 * KIB
"""Bytes in the MessagePack header of a frame."""
MAX_TAIL: Final = 64 * MIB
"""Bytes in the raw tail of a frame."""

MAX_STREAMS_PER_PEER: Final = 64
"""Inbound streams that one peer may hold open."""
MAX_PEERS: Final = 256
"""Connections of one node."""
MAX_SESSIONS: Final = 64
"""Generations in progress on one stage."""
MAX_SESSIONS_PER_PEER: Final = 32
"""Generations that one head may hold open on one stage."""
MAX_QUEUED_STEPS: Final = 256
"""Step frames waiting in one stage."""

HANDSHAKE_SECONDS: Final = 10.0
"""Longest time for a connection to be secured and authorised."""
DIAL_SECONDS: Final = 10.0
"""Longest time for one dial attempt."""
RPC_SECONDS: Final = 15.0
"""Default deadline of a request to a peer."""
STEP_SECONDS: Final = 120.0
"""Longest time a head waits for one step of a pipeline."""

CHUNK_BYTES: Final = 1 * MIB
"""Bytes in one verified chunk of a model file (the last may be shorter)."""
