"""Where a node keeps its files: keys, meshes, models, settings, the state of its daemon.

Without ``PYAGENT_HOME`` the paths follow the XDG base directories (or their like on macOS and
Windows); with it everything lies below that one directory.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import msgspec
import platformdirs

from pyagent_node.base.errors import ConfigError, CorruptData, NotFound
from pyagent_node.base.files import (
    FileLock,
    check_private,
    create_exclusive,
    make_private_dir,
    read_limited,
    write_atomic,
)
from pyagent_node.base.types import Digest, PeerId
from pyagent_node.node.identity import NodeKey

APP = "pyagent-node"
_MAX_TOKEN_FILE = 256
_MAX_STATE_FILE = 16_384


class DaemonState(msgspec.Struct, frozen=True):
    """What a running daemon says of itself in :attr:`Home.state_path`.

    ``started`` is in Unix seconds; ``api_url`` is the base of the HTTP API.
    """

    pid: int
    api_url: str
    peer_id: PeerId
    mesh_id: Digest | None
    version: str
    started: float


class Home:
    """The directories of one node.  Nothing is created before it is needed."""

    def __init__(
        self, root: Path, *, config_dir: Path | None = None, state_dir: Path | None = None
    ) -> None:
        self.root = root
        self._config_dir = config_dir or root
        self._state_dir = state_dir or root

    @classmethod
    def default(cls, environ: Mapping[str, str] = os.environ) -> Home:
        """Return the home that ``PYAGENT_HOME`` names, or the user's own."""
        named = environ.get("PYAGENT_HOME", "")
        if named:
            root = Path(named).expanduser()
            if root.exists() and not root.is_dir():
                raise ConfigError(
                    f"PYAGENT_HOME is {named!r}, which is not a directory.",
                    code="bad_home",
                    remedy="Set it to a directory, or unset it.",
                )
            return cls(root.absolute())
        return cls(
            Path(platformdirs.user_data_dir(APP, appauthor=False)),
            config_dir=Path(platformdirs.user_config_dir(APP, appauthor=False)),
            state_dir=Path(platformdirs.user_state_dir(APP, appauthor=False)),
        )

    @property
    def key_path(self) -> Path:
        """The node's private key (PEM, 0600)."""
        return self.root / "node.key"

    @property
    def token_path(self) -> Path:
        """The bearer token of the HTTP API (0600)."""
        return self.root / "api.token"

    @property
    def meshes_dir(self) -> Path:
        """One directory for each mesh that this node is in."""
        return self.root / "meshes"

    def mesh_dir(self, mesh_id: Digest) -> Path:
        """The profile and the log of one mesh."""
        return self.meshes_dir / mesh_id

    def log_dir(self, mesh_id: Digest) -> Path:
        """The replicated log of one mesh."""
        return self.mesh_dir(mesh_id) / "log"

    def contexts_dir(self, mesh_id: Digest) -> Path:
        """What this node keeps of the contexts of one mesh."""
        return self.mesh_dir(mesh_id) / "contexts"

    @property
    def active_path(self) -> Path:
        """Holds the id of the mesh last created or joined."""
        return self.meshes_dir / "active"

    @property
    def kv_dir(self) -> Path:
        """KV blocks of earlier prompts."""
        return self.root / "kv"

    @property
    def speeds_path(self) -> Path:
        """How fast slices were measured to be (see ``speeds``)."""
        return self.root / "speeds.json"

    @property
    def models_dir(self) -> Path:
        """The model store, unless the setting ``model_dir`` moves it."""
        return self.root / "models"

    @property
    def config_path(self) -> Path:
        """The settings file, ``config.toml``."""
        return self._config_dir / "config.toml"

    @property
    def state_path(self) -> Path:
        """Written by a running daemon: see :class:`DaemonState`."""
        return self._state_dir / "daemon.json"

    @property
    def log_path(self) -> Path:
        """What a daemon in the background prints."""
        return self._state_dir / "daemon.log"

    def lock(self) -> FileLock:
        """Return the lock that the daemon holds while it runs.

        Entering it raises :class:`Conflict` (``in_use``): "The home ... is in use by process N".
        """
        return FileLock(self._state_dir / "daemon.lock", f"The home {self.root}")

    def node_key(self) -> NodeKey:
        """Return the node's key, created on first use."""
        return NodeKey.load_or_create(self.key_path)

    def api_token(self) -> str:
        """Return the bearer token of the HTTP API, created on first use."""
        path = self.token_path
        if not path.exists():
            create_exclusive(path, secrets.token_urlsafe(32).encode() + b"\n")
        data = read_limited(path, _MAX_TOKEN_FILE)
        check_private(path)
        token = data.decode("ascii", "replace").strip()
        if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
            raise CorruptData(
                f"{path} does not hold an API token.",
                code="bad_token_file",
                remedy="Remove the file: a new token is made when it is next needed.",
                path=str(path),
            )
        return token

    def write_state(self, state: DaemonState) -> None:
        """Say that a daemon runs."""
        make_private_dir(self.state_path.parent)
        write_atomic(self.state_path, msgspec.json.encode(state))

    def read_state(self) -> DaemonState | None:
        """Return what the last daemon wrote, or ``None``; it may have died since."""
        try:
            return msgspec.json.decode(
                read_limited(self.state_path, _MAX_STATE_FILE), type=DaemonState
            )
        except (NotFound, msgspec.DecodeError):
            return None

    def clear_state(self) -> None:
        """Say that no daemon runs; idempotent."""
        self.state_path.unlink(missing_ok=True)
