"""The meshes that a node is in, as they lie in its home.

A profile is one directory: ``mesh.json`` (genesis, certificate, role, bootstrap addresses),
``swarm.key`` (private meshes; the standard format) and, on the node that created the mesh,
``authority.key``.  A directory without ``mesh.json`` is not there yet: it is written last.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from pyagent_node.base.errors import (
    ConfigError,
    CorruptData,
    InvalidRequest,
    NotFound,
    PyAgentError,
    Refused,
)
from pyagent_node.base.files import check_private, read_limited, write_atomic
from pyagent_node.base.types import Digest
from pyagent_node.node.certificates import DEFAULT_LIFETIME, Certificate, issue
from pyagent_node.node.genesis import (
    DEFAULT_ENGINE,
    ENGINES,
    Genesis,
    Role,
    Visibility,
    check_name,
    decode_genesis,
    new_genesis,
)
from pyagent_node.node.home import Home
from pyagent_node.node.identity import NodeKey
from pyagent_node.node.swarm_key import (
    MAX_SWARM_KEY_FILE,
    format_swarm_key,
    new_psk,
    parse_swarm_key,
)

Clock = Callable[[], float]
"""Returns Unix seconds."""

MAX_BOOTSTRAP = 64
MAX_ADDRESS = 512
_MAX_PROFILE = 65_536
_MESH_ID = re.compile(r"[0-9a-f]{64}")


class MeshProfile:
    """One mesh from this node's side.  ``repr`` shows no secret.

    ``role`` is what this node is in the mesh; ``certificate`` is empty in a public mesh that
    gave none; ``authority_key`` is there on the node that issues certificates and tickets.
    """

    __slots__ = ("authority_key", "bootstrap", "certificate", "genesis", "name", "psk", "role")

    def __init__(
        self,
        genesis: Genesis,
        *,
        name: str,
        role: Role,
        psk: bytes | None,
        certificate: bytes,
        bootstrap: Sequence[str] = (),
        authority_key: NodeKey | None = None,
    ) -> None:
        self.genesis = genesis
        self.name = name
        self.role: Role = role
        self.psk = psk
        self.certificate = certificate
        self.bootstrap = tuple(bootstrap)
        self.authority_key = authority_key

    @property
    def mesh_id(self) -> Digest:
        """The hash of the genesis."""
        return self.genesis.mesh_id

    def authority(self) -> NodeKey:
        """Return the authority key or raise :class:`Refused` (``not_authority``)."""
        if self.authority_key is None:
            raise Refused(
                f"This node does not hold the key that admits members to {self.genesis.name}.",
                code="not_authority",
                remedy=f"Ask on the node that created the mesh ({self.genesis.writer}).",
            )
        return self.authority_key

    def with_certificate(self, certificate: bytes, role: Role, name: str) -> MeshProfile:
        """Return a copy that holds a newly issued certificate."""
        return MeshProfile(
            self.genesis,
            name=name,
            role=role,
            psk=self.psk,
            certificate=certificate,
            bootstrap=self.bootstrap,
            authority_key=self.authority_key,
        )

    def __repr__(self) -> str:
        return f"MeshProfile({self.genesis.name}, {self.mesh_id[:12]}, {self.role})"


class _ProfileFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Literal[1]
    genesis: str
    name: str
    role: Role
    certificate: str
    bootstrap: list[str]


def create_mesh(
    home: Home,
    name: str,
    visibility: Visibility,
    *,
    node_name: str,
    clock: Clock,
    engine: str = DEFAULT_ENGINE,
    bootstrap: Sequence[str] = (),
) -> MeshProfile:
    """Create a mesh whose authority and first voter is this node, save it and make it active.

    The authority key is a key of its own, kept beside the profile (0600); back it up.  Raises
    :class:`InvalidRequest` (``unknown_engine``, ``bad_name``).
    """
    if engine not in ENGINES:
        raise InvalidRequest(
            f"There is no consensus engine {engine[:40]!r}.",
            code="unknown_engine",
            remedy=f"Choose one of {', '.join(ENGINES)}.",
        )
    key = home.node_key()
    authority = NodeKey.generate()
    now = int(clock())
    genesis = new_genesis(
        name,
        visibility,
        authority=authority.peer_id,
        writer=key.peer_id,
        created=now,
        engine=engine,
    )
    certificate = issue(
        authority,
        Certificate(
            mesh_id=genesis.mesh_id,
            peer_id=key.peer_id,
            name=check_name(node_name, "a node"),
            role="voter",
            issued=now,
            expires=now + DEFAULT_LIFETIME,
        ),
    )
    profile = MeshProfile(
        genesis,
        name=node_name,
        role="voter",
        psk=new_psk() if genesis.private else None,
        certificate=certificate,
        bootstrap=bootstrap,
        authority_key=authority,
    )
    save_profile(home, profile)
    set_active(home, profile.mesh_id)
    return profile


def save_profile(home: Home, profile: MeshProfile) -> None:
    """Write ``profile``; a reader sees the old one or the new one."""
    directory = home.mesh_dir(profile.mesh_id)
    if profile.psk is not None:
        write_atomic(directory / "swarm.key", format_swarm_key(profile.psk))
    if profile.authority_key is not None:
        profile.authority_key.save(directory / "authority.key")
    file = _ProfileFile(
        version=1,
        genesis=base64.b64encode(profile.genesis.encode()).decode(),
        name=profile.name,
        role=profile.role,
        certificate=base64.b64encode(profile.certificate).decode(),
        bootstrap=list(profile.bootstrap),
    )
    encoded = msgspec.json.format(msgspec.json.encode(file), indent=2)
    write_atomic(directory / "mesh.json", encoded + b"\n")


def load_profile(home: Home, mesh_id: Digest) -> MeshProfile:
    """Read one profile.

    Raises :class:`NotFound` (``mesh_not_found``) or :class:`CorruptData` (``bad_profile``)
    naming the file.
    """
    directory = home.mesh_dir(mesh_id)
    path = directory / "mesh.json"
    try:
        data = read_limited(path, _MAX_PROFILE)
    except NotFound:
        raise NotFound(
            f"This node is not in the mesh {mesh_id[:16]}.",
            code="mesh_not_found",
            remedy="See the meshes it is in: 'pyagent-node mesh list'.",
        ) from None
    try:
        file = msgspec.json.decode(data, type=_ProfileFile)
        genesis = decode_genesis(base64.b64decode(file.genesis, validate=True))
        certificate = base64.b64decode(file.certificate, validate=True)
        if genesis.mesh_id != mesh_id:
            raise ValueError("it describes another mesh")
        if len(file.bootstrap) > MAX_BOOTSTRAP:
            raise ValueError("it lists too many addresses")
    except (msgspec.DecodeError, CorruptData, ValueError) as error:
        raise CorruptData(
            f"{path} is damaged: {error}.",
            code="bad_profile",
            remedy="Restore it from a backup, or remove its directory and join again.",
            path=str(path),
        ) from None
    psk: bytes | None = None
    if genesis.private:
        key_path = directory / "swarm.key"
        psk = parse_swarm_key(read_limited(key_path, MAX_SWARM_KEY_FILE))
        check_private(key_path)
    authority: NodeKey | None = None
    if (directory / "authority.key").exists():
        authority = NodeKey.load(directory / "authority.key")
        if authority.peer_id != genesis.authority:
            raise CorruptData(
                f"{directory / 'authority.key'} is not the key of this mesh's authority.",
                code="bad_profile",
                remedy="Put the right key back, or move this one away.",
            )
    return MeshProfile(
        genesis,
        name=file.name,
        role=file.role,
        psk=psk,
        certificate=certificate,
        bootstrap=file.bootstrap,
        authority_key=authority,
    )


def mesh_ids(home: Home) -> list[Digest]:
    """Return the ids of the meshes in the home, in a fixed order."""
    try:
        names = sorted(p.name for p in home.meshes_dir.iterdir() if (p / "mesh.json").exists())
    except FileNotFoundError:
        return []
    return [Digest(name) for name in names if _MESH_ID.fullmatch(name)]


def set_active(home: Home, mesh_id: Digest) -> None:
    """Make a mesh the one that is used when the setting ``mesh`` is empty."""
    write_atomic(home.active_path, mesh_id.encode() + b"\n")


def active_profile(home: Home, wanted: str = "") -> MeshProfile:
    """Return the mesh to use: ``wanted`` (a name, an id or the beginning of one), else the last
    created or joined, else the only one.

    Raises :class:`NotFound` (``no_mesh``, ``mesh_not_found``) or :class:`ConfigError`
    (``ambiguous_mesh``).
    """
    ids = mesh_ids(home)
    if not ids:
        raise NotFound(
            "This node is in no mesh yet.",
            code="no_mesh",
            remedy="Run `pyagent-node mesh create NAME`, or `pyagent-node join TICKET`.",
        )
    if not wanted:
        active = _read_active(home)
        if active in ids:
            return load_profile(home, active)
        if len(ids) == 1:
            return load_profile(home, ids[0])
        raise _ambiguous("several meshes are there and none is chosen", ids)
    matches = [i for i in ids if i == wanted or (len(wanted) >= 4 and i.startswith(wanted))]
    if not matches:
        matches = [i for i in ids if load_profile(home, i).genesis.name == wanted]
    if not matches:
        raise NotFound(
            f"This node is in no mesh called {wanted[:80]!r}.",
            code="mesh_not_found",
            remedy="See the meshes it is in: 'pyagent-node mesh list'.",
        )
    if len(matches) > 1:
        raise _ambiguous(f"{wanted[:80]!r} fits several meshes", matches)
    return load_profile(home, matches[0])


def _read_active(home: Home) -> Digest:
    try:
        return Digest(read_limited(home.active_path, 256).decode("ascii", "replace").strip())
    except PyAgentError:
        return Digest("")


def _ambiguous(why: str, ids: Sequence[Digest]) -> ConfigError:
    shown = ", ".join(i[:12] for i in ids[:8])
    return ConfigError(
        f"The mesh is not clear: {why}.",
        code="ambiguous_mesh",
        remedy=f"Set `mesh` to one of: {shown}.",
    )
