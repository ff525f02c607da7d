"""``/pyagent/auth/1``: both sides show their credentials and tell each other the verdict.

The dialler opens one stream for it.  Each side sends :class:`Credentials` and, having judged the
other's, a :class:`Verdict`.  The peer's id is proven by Noise already, so credentials need not
prove anything but what their issuer says of that id.
"""

from __future__ import annotations

import math
import re
from typing import Final

import msgspec
import trio

from pyagent_node.base.errors import (
    ErrorInfo,
    LimitExceeded,
    PyAgentError,
    Refused,
    Unavailable,
    error_from_info,
)
from pyagent_node.base.limits import KIB
from pyagent_node.base.mesh import FrameStream
from pyagent_node.base.wire import Codec, Frame
from pyagent_node.node.mesh.authoriser import MAX_CREDENTIALS, Authoriser, PeerAdmission

PROTOCOL: Final = "/pyagent/auth/1"
MAX_HEADER: Final = MAX_CREDENTIALS + 8 * KIB
"""Bytes in a frame of this protocol."""
VERDICT_SECONDS: Final = 0.5
"""How long a peer that we refuse may take to say what it thinks of us."""
_CODE: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")


class Credentials(msgspec.Struct, frozen=True, tag="credentials"):
    """What the sender has to show; see :class:`Authoriser`."""

    credentials: bytes


class Verdict(msgspec.Struct, frozen=True, tag="verdict"):
    """What the sender thinks of the receiver's credentials."""

    error: ErrorInfo | None = None


AUTH: Final[Codec[Credentials | Verdict]] = Codec("auth", Credentials, Verdict)


async def exchange(stream: FrameStream, authoriser: Authoriser) -> tuple[PeerAdmission, bytes]:
    """Authorise the peer and be authorised; return who it is and what it showed.

    Raises the peer's refusal of us, or else ours of it (:class:`Refused`), and
    :class:`Unavailable` when the peer went away in between.  The caller sets the deadline.
    """
    shown = authoriser.credentials()
    if len(shown) > MAX_CREDENTIALS:
        raise LimitExceeded("This node's own credentials are too long.", code="bad_credentials")
    await stream.send(Frame(AUTH.encode(Credentials(shown))))
    first = await _receive(stream)
    if not isinstance(first, Credentials):
        raise Refused("The peer showed no credentials.", code="no_credentials")
    admission: PeerAdmission | None = None
    refusal: PyAgentError | None = None
    try:
        if len(first.credentials) > MAX_CREDENTIALS:
            raise Refused("The credentials are too long.", code="credentials_too_long")
        admission = authoriser.judge(stream.peer, first.credentials)
    except PyAgentError as error:
        refusal = error
    second: Credentials | Verdict | None = None
    try:
        await stream.send(Frame(AUTH.encode(Verdict(refusal.to_info() if refusal else None))))
        with trio.move_on_after(math.inf if refusal is None else VERDICT_SECONDS):
            second = await _receive(stream)
    except Unavailable:
        if refusal is not None:
            raise refusal from None
        raise
    if isinstance(second, Verdict) and second.error is not None:
        raise _from_peer(second.error)
    if refusal is not None:
        raise refusal
    if admission is None or not isinstance(second, Verdict):
        raise Refused("The peer gave no verdict.", code="no_credentials")
    return admission, first.credentials


async def _receive(stream: FrameStream) -> Credentials | Verdict:
    frame = await stream.receive()
    if frame is None:
        raise Unavailable("The peer left before it was authorised.", code="handshake_failed")
    return AUTH.decode(frame.header)


def _from_peer(info: ErrorInfo) -> PyAgentError:
    """Return the peer's refusal, its text made safe to show."""
    error = error_from_info(info)
    code = info.code if _CODE.fullmatch(info.code) else "refused"
    kind = type(error) if isinstance(error, Refused | LimitExceeded | Unavailable) else Refused
    message = _printable(error.message)
    remedy = _printable(error.remedy) if error.remedy else None
    return kind(f"The peer refuses this node: {message}", code=code, remedy=remedy)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:500]
