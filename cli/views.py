"""Rich views of what the daemon says: the status as tables, for one look and for ``--watch``."""

from __future__ import annotations

import time

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pyagent_node.base.mesh import PeerInfo
from pyagent_node.base.types import EXACT_ACTIVATIONS
from pyagent_node.cli.output import duration, short, size
from pyagent_node.inference.generation import SessionView, SpeculationUsage
from pyagent_node.node.api.kv_schema import KvView
from pyagent_node.node.api.schema import PlacementView, RankView, StatusView

RESERVE_STYLE = {
    "hot": "green",
    "disk": "cyan",
    "loading": "yellow",
    "missing": "yellow",
    "failed": "bold red",
    "unknown": "dim",
}
STATE_STYLE = {"ready": "green", "loading": "yellow", "failed": "bold red", "unknown": "dim"}


def status_view(status: StatusView) -> RenderableType:
    """Return the whole status: node, mesh, peers, ranks, sessions."""
    parts: list[RenderableType] = [_head(status)]
    parts += [Text(""), Text(f"Peers ({len(status.peers)})", style="bold")]
    parts.append(peers_view(status.peers))
    for placement in status.placements:
        parts += [Text(""), placement_view(placement)]
    if not status.placements:
        parts += [
            Text(""),
            Text("No model is loaded: `pyagent-node model load smollm2-135m`.", style="dim"),
        ]
    if status.sessions:
        parts += [Text(""), Text(f"Sessions ({len(status.sessions)})", style="bold")]
        parts.append(_sessions(status.sessions))
    return Group(*parts)


def _head(status: StatusView) -> Table:
    node, mesh, consensus = status.node, status.mesh, status.consensus
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    up = duration(max(0.0, time.time() - node.started))
    table.add_row("node", f"{node.name}  {node.peer_id}")
    table.add_row("", f"version {node.version}, up {up}, {size(node.memory_bytes)} resident")
    for address in node.addresses:
        table.add_row("", address)
    table.add_row("API", node.api)
    if mesh is None:
        table.add_row("mesh", "none")
    else:
        expires = mesh.certificate_expires
        note = ""
        if expires is not None:
            left = expires - time.time()
            note = f", certificate {f'for {duration(left)}' if left > 0 else 'expired'}"
        table.add_row("mesh", f"{mesh.name}  {mesh.mesh_id[:12]}")
        table.add_row("", f"{mesh.visibility}, this node is {mesh.role}{note}")
    if consensus is not None:
        part = f"this node is {consensus.role}"
        if consensus.role == "leader":
            part = "this node leads"
        elif consensus.leader:
            part += f", {short(consensus.leader)} leads"
        else:
            part += ", no leader"
        table.add_row("log", f"{consensus.engine}, {part}, entry {consensus.index}")
        if consensus.problem is not None:
            table.add_row("", Text(consensus.problem.message, style="yellow"))
    if status.kv is not None:
        table.add_row("KV", _kept(status.kv))
    return table


def _kept(kv: KvView) -> str:
    """Return the KV blocks in a line."""
    tiers = ", ".join(
        f"{size(tier.bytes)} {'in memory' if tier.name == 'memory' else 'on disk'}"
        for tier in kv.tiers
        if tier.state != "off"
    )
    found = f", sessions found {kv.loads.hit_rate:.0%} of their blocks" if kv.loads.loads else ""
    return f"{tiers or 'no blocks are kept'}{found}"


def peers_view(peers: tuple[PeerInfo, ...]) -> RenderableType:
    """Return the peers with their round trips."""
    if not peers:
        return Text("none connected", style="dim")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("name", "peer", "role", "rtt", "address"):
        table.add_column(column, justify="right" if column == "rtt" else "left")
    for peer in sorted(peers, key=lambda p: (p.name, p.peer_id)):
        rtt = f"{peer.rtt_ms:.1f} ms" if peer.rtt_ms is not None else "-"
        address = peer.addresses[0] if peer.addresses else "-"
        table.add_row(peer.name, short(peer.peer_id), peer.role, rtt, address)
    return table


def placement_view(placement: PlacementView) -> RenderableType:
    """Return one model's ranks with layers and load."""
    title = Text.assemble(
        (placement.name, "bold"),
        f"  {placement.model[:12]}  epoch {placement.epoch},"
        f" context {placement.n_ctx} x {placement.n_seq} sessions  ",
        ("ready", "green") if placement.ready else ("not ready", "yellow"),
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    columns = ("rank", "layers", "node", "state", "sessions", "queued", "memory", "tok/s")
    reserved = any(rank.standbys or rank.spares for rank in placement.ranks)
    pruned = any(rank.evicted_cells for rank in placement.ranks)
    more = [*["KV given up"] * pruned, *["standbys and spares"] * reserved]
    for column in (*columns, *more):
        left = column in ("layers", "node", "state", "standbys and spares")
        table.add_column(column, justify="left" if left else "right")
    for rank in placement.ranks:
        first, last = rank.layers
        state = Text(rank.state, style=STATE_STYLE[rank.state])
        if rank.detail and rank.state != "ready":
            state.append(f" ({rank.detail})", style="dim")
        speed = rank.tokens_per_second
        table.add_row(
            str(rank.rank),
            f"{first}-{last - 1}{' + head' if rank.head else ''}",
            f"{rank.name or '?'} {short(rank.peer_id)}",
            state,
            _count(rank.sessions),
            _count(rank.queued),
            size(rank.memory_bytes) if rank.memory_bytes is not None else "-",
            f"{speed:.1f}" if speed is not None else "-",
            *([_given_up(rank)] if pruned else []),
            *([_reserves(rank)] if reserved else []),
        )
    parts: list[RenderableType] = [title, table]
    prepared = placement.prepared
    if prepared is not None:
        ranks = ", ".join(
            f"{first}-{last - 1} on {node}"
            for (first, last), node in zip(prepared.layers, prepared.nodes, strict=True)
        )
        text = f"changing to {ranks}: {prepared.ready} of {len(prepared.nodes)} loaded beside"
        parts.append(Text(f"{text} (by {prepared.by})", "yellow"))
    if placement.activations != EXACT_ACTIVATIONS:
        parts.append(Text(f"activations cross in {placement.activations}", "dim"))
    guessing = _placed_guessing(placement)
    return Group(*parts, guessing) if guessing else Group(*parts)


def _given_up(rank: RankView) -> str:
    """Return what sessions of a rank gave up of their KV."""
    if rank.evicted_cells is None or rank.evicted_bytes is None:
        return "-"
    return f"{rank.evicted_cells} cells, {size(rank.evicted_bytes)}"


def _placed_guessing(placement: PlacementView) -> Text:
    """Return who guesses for requests that do not say, and how the drafter rank fares."""
    text = Text()
    if placement.speculation is not None:
        text.append(f"guessing: {placement.speculation}")
    for value, what in (
        (placement.draft_length, "guesses a step"),
        (placement.draft_depth, "steps in flight"),
    ):
        if value is not None:
            text.append(f"{', ' if text else ''}{value} {what}")
    if placement.draft_tree:
        text.append(f"{', ' if text else ''}in a tree")
    drafter = placement.drafter
    if drafter is None:
        return text
    text.append(f"{'; ' if text else ''}{drafter.name} drafts on {drafter.node} ")
    text.append(drafter.state, style=STATE_STYLE[drafter.state])
    if drafter.detail and drafter.state != "ready":
        text.append(f" ({drafter.detail})", style="dim")
    if drafter.sessions is not None:
        text.append(f", {drafter.sessions} sessions")
    if drafter.memory_bytes is not None:
        text.append(f", {size(drafter.memory_bytes)}")
    return text


def _reserves(rank: RankView) -> Text:
    """Return who could take a rank over, and how ready they are."""
    text = Text()
    for reserve in (*rank.standbys, *rank.spares):
        text.append(", " if text else "")
        text.append(f"{reserve.name} ")
        text.append(reserve.state, style=RESERVE_STYLE[reserve.state])
    return text


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _sessions(sessions: tuple[SessionView, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("session", "model", "asked on", "prompt", "answer", "tok/s", "guessing"):
        left = column in ("session", "model", "asked on")
        table.add_column(column, justify="left" if left else "right")
    for session in sessions:
        table.add_row(
            session.session[:8],
            session.model,
            short(session.head),
            str(session.prompt_tokens),
            str(session.completion_tokens),
            f"{session.tokens_per_second:.1f}",
            _guessing(session.speculation),
        )
    return table


def _guessing(usage: SpeculationUsage | None) -> str:
    if usage is None:
        return "-"
    return f"{usage.drafter} {usage.acceptance:.0%}, {usage.tokens_per_pass:.1f} tok/pass"
