"""The one door to py-libp2p: its Noise handshake, keys and ids, without the rest of it.

``import libp2p`` brings QUIC, WebSocket, TLS, UPnP, a DHT, three HTTP clients and 45 to 67 MB of
memory into the process, and configures logging.  Of all that a node uses a handful of modules.
So the packages above those are lazy: they get their path at once and run their own code when
somebody asks for a name in them (``libp2p.new_host``), as PEP 562 allows.  While we import,
``libp2p.custom_types``, which names the QUIC stream class in a type alias, gets an empty class.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from collections.abc import Callable
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_LAZY: Final = ("libp2p", "libp2p.transport", "libp2p.transport.quic", "libp2p.pubsub")
_STREAM: Final = "libp2p.transport.quic.stream"


def _lazy_package(name: str, spec: ModuleSpec) -> types.ModuleType:
    module = importlib.util.module_from_spec(spec)

    def load(attribute: str) -> object:
        if attribute.startswith("__") and attribute != "__version__":
            raise AttributeError(attribute)  # a question about the module, not a use of it
        module.__dict__.pop("__getattr__", None)
        if spec.loader is not None:
            spec.loader.exec_module(module)
        return getattr(module, attribute)

    hook: Callable[[str], object] = load
    module.__dict__["__getattr__"] = hook
    sys.modules[name] = module
    return module


@contextmanager
def _lazily() -> Iterator[None]:
    if "libp2p" in sys.modules:  # somebody has paid already
        yield
        return
    for name in _LAZY:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)
        module = _lazy_package(name, spec)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    stream = types.ModuleType(_STREAM)
    stream.__dict__["QUICStream"] = type("QUICStream", (), {})
    sys.modules[_STREAM] = stream
    try:
        yield
    finally:
        del sys.modules[_STREAM]


with _lazily():
    from libp2p.abc import IRawConnection
    from libp2p.connection_types import ConnectionType
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.crypto.x25519 import create_new_key_pair as create_new_noise_key_pair
    from libp2p.io.abc import EncryptedMsgReadWriter
    from libp2p.io.exceptions import IOException
    from libp2p.peer.id import ID
    from libp2p.security.noise.exceptions import InvalidSignature, PeerIDMismatchesPubkey
    from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
    from libp2p.security.noise.transport import Transport as NoiseTransport
    from libp2p.security.secure_session import SecureSession

# Its complaints about hostile handshakes are ours to make: one line, named and counted.
logging.getLogger("libp2p").setLevel(logging.CRITICAL)

__all__ = [
    "ID",
    "NOISE",
    "ConnectionType",
    "EncryptedMsgReadWriter",
    "IOException",
    "IRawConnection",
    "InvalidSignature",
    "NoiseTransport",
    "PeerIDMismatchesPubkey",
    "SecureSession",
    "create_new_key_pair",
    "create_new_noise_key_pair",
]
