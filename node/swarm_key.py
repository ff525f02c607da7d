"""The pre-shared key of a private mesh in the standard ``swarm.key`` format.

Source: https://github.com/libp2p/specs/blob/master/pnet/Private-Networks-PSK-V1.md.  The file has
three lines: ``/key/swarm/psk/1.0.0/``, an encoding (``/base16/``, ``/base64/`` or ``/bin/``), and
the 32-byte key in it.
"""

from __future__ import annotations

import base64
import binascii
import os

from pyagent_node.base.errors import CorruptData

PSK_BYTES = 32
MAX_SWARM_KEY_FILE = 1024
_HEADER = b"/key/swarm/psk/1.0.0/"


def new_psk() -> bytes:
    """Return a fresh key from the system's random generator."""
    return os.urandom(PSK_BYTES)


def format_swarm_key(psk: bytes) -> bytes:
    """Return the file content for ``psk`` in base16, the form that every program reads."""
    if len(psk) != PSK_BYTES:
        raise _malformed(f"a key has {PSK_BYTES} bytes, not {len(psk)}")
    return _HEADER + b"\n/base16/\n" + psk.hex().encode() + b"\n"


def parse_swarm_key(data: bytes) -> bytes:
    """Return the key in a ``swarm.key`` file.

    Raises :class:`CorruptData` (``bad_swarm_key``) saying what is wrong, never the key.
    """
    lines = data.split(b"\n", 2)
    if lines[0].rstrip(b"\r") != _HEADER:
        raise _malformed(f"the first line is not {_HEADER.decode()}")
    if len(lines) < 3:
        raise _malformed("it ends before the key")
    encoding, body = lines[1].rstrip(b"\r"), lines[2]
    try:
        if encoding == b"/base16/":
            psk = binascii.unhexlify(body.strip())
        elif encoding == b"/base64/":
            psk = base64.b64decode(body.strip(), validate=True)
        elif encoding == b"/bin/":
            psk = body if len(body) == PSK_BYTES else body.removesuffix(b"\n").removesuffix(b"\r")
        else:
            raise _malformed("the second line is not /base16/, /base64/ or /bin/")
    except (binascii.Error, ValueError):
        raise _malformed("the third line is not in the encoding that the second names") from None
    if len(psk) != PSK_BYTES:
        raise _malformed(f"a key has {PSK_BYTES} bytes, not {len(psk)}")
    return psk


def _malformed(why: str) -> CorruptData:
    return CorruptData(
        f"The swarm key is malformed: {why}.",
        code="bad_swarm_key",
        remedy="Copy the file again from a node of the private network.",
    )
