"""Which backend each node of a placement computes with: what was asked for against what is there.

Pure.  Where nothing is asked for each node chooses for itself (``backend_names.choose``), and what
it will choose is told here from its facts.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyagent_node.base.errors import InvalidRequest, PyAgentError, Unsupported
from pyagent_node.base.types import (
    ACTIVATIONS,
    AUTO_BACKEND,
    EXACT_ACTIVATIONS,
    Backends,
    PeerId,
    Rank,
    backend_of,
)
from pyagent_node.inference.backend_names import (
    DEFAULT,
    Choice,
    check_choice,
    choose,
    install_hint,
)
from pyagent_node.inference.formats.config import ARCHITECTURES
from pyagent_node.inference.pipeline.plan_speeds import faster_backend
from pyagent_node.inference.pipeline.plan_types import NodeFacts
from pyagent_node.node.planning import find_node


def with_backends(
    nodes: Sequence[NodeFacts],
    wanted: str | None,
    architecture: str,
    *,
    swarm: Sequence[NodeFacts] = (),
    before: Backends = (),
) -> tuple[list[NodeFacts], Backends]:
    """Return the nodes that can do what is asked for, and who shall use which backend.

    ``wanted`` is a name for every node, or ``NODE=NAME,...`` for some of them; nodes are then
    named by name or peer id.  Those of the ``swarm`` that get no rank may be named, too: they may
    be standbys.  What was said ``before`` of a node that is away now stays; what was said of one
    that has lost that backend is forgotten, for a planner may have said it.

    Raises :class:`InvalidRequest` (``bad_backend``, ``unknown_node``, ``ambiguous_node``) and
    :class:`Unsupported` (``backend_missing``, ``unsupported_architecture``).
    """
    if not wanted:
        return list(nodes), ()
    if "=" not in wanted:
        return _everywhere(nodes, check_choice(wanted), architecture, swarm or nodes)
    chosen: dict[PeerId, str] = {}
    for part in wanted.split(","):
        who, _, name = part.partition("=")
        said = [peer for peer, name_of in before if (peer, name_of) == (who.strip(), name.strip())]
        if said and not any(node.peer_id in said for node in swarm or nodes):
            chosen[said[0]] = name.strip()
            continue
        node = find_node(who.strip(), list(swarm or nodes))
        if node.peer_id in chosen:
            raise InvalidRequest(f"{node.name} is named twice.", code="bad_backend")
        _check_architecture(check_choice(name.strip()), architecture)
        if not has(node, name.strip()):
            if said:
                continue
            raise _missing(name.strip(), [node])
        if name.strip() != AUTO_BACKEND:
            chosen[node.peer_id] = name.strip()
    return list(nodes), tuple(sorted(chosen.items()))


def _everywhere(
    nodes: Sequence[NodeFacts], name: str, architecture: str, swarm: Sequence[NodeFacts]
) -> tuple[list[NodeFacts], Backends]:
    if name == AUTO_BACKEND:
        return list(nodes), ()
    _check_architecture(name, architecture)
    able = [node for node in nodes if has(node, name)]
    if nodes and not able:
        raise _missing(name, nodes)
    told = [node.peer_id for node in swarm if has(node, name)]
    return able, tuple(sorted((peer, name) for peer in told))


def has(node: NodeFacts, name: str) -> bool:
    """Whether a node has a backend; every node has llama.cpp."""
    installed = {state.name for state in node.backends if state.installed}
    return name in {AUTO_BACKEND, DEFAULT, *installed}


def with_activations(nodes: Sequence[NodeFacts], wanted: str | None) -> tuple[list[NodeFacts], str]:
    """Return the nodes that can pass activations on in ``wanted``, and what the log is to say.

    Raises :class:`InvalidRequest` (``bad_parameter``) and :class:`Unsupported`
    (``unsupported_activations``), where no node knows how.
    """
    if wanted in (None, EXACT_ACTIVATIONS):
        return list(nodes), ""
    if wanted not in ACTIVATIONS:
        raise InvalidRequest(
            f"Activations cannot cross in {wanted[:40]!r}.",
            code="bad_parameter",
            remedy=f"Choose one of {', '.join(ACTIVATIONS)}.",
            parameter="activations",
        )
    able = [node for node in nodes if wanted in node.activations]
    if nodes and not able:
        raise Unsupported(
            f"No node can pass activations on in {wanted}: their versions are too old.",
            code="unsupported_activations",
            remedy=f"Update them, or load the model with --activations {EXACT_ACTIVATIONS}.",
        )
    return able, wanted


def chosen_backend(node: NodeFacts, backends: Backends, architecture: str) -> Choice:
    """Return the backend that a node will use for a model, and why."""
    wanted = backend_of(backends, node.peer_id)
    if wanted == AUTO_BACKEND and architecture not in ARCHITECTURES:
        return Choice(DEFAULT, "the only one that knows this architecture")
    try:
        return choose(wanted, node.backends)
    except PyAgentError:
        return Choice(DEFAULT, "nothing else is known of the node")


def best_backends(
    nodes: Sequence[NodeFacts], backends: Backends, architecture: str
) -> tuple[Backends, dict[PeerId, Choice]]:
    """Return who shall use which backend, and each node's choice with its reason.

    A node that was asked for nothing is told to use another backend than it would choose where it
    measured that one clearly faster with this model.
    """
    named = dict(backends)
    choices: dict[PeerId, Choice] = {}
    for node in nodes:
        choice = chosen_backend(node, backends, architecture)
        if node.peer_id not in named and architecture in ARCHITECTURES:
            better = faster_backend(node, choice)
            if better.name != choice.name:
                named[node.peer_id] = better.name
            choice = better
        choices[node.peer_id] = choice
    return tuple(sorted(named.items())), choices


def explain_backends(
    ranks: Sequence[Rank], nodes: Sequence[NodeFacts], backends: Backends, architecture: str
) -> tuple[str, ...]:
    """Say which backend each rank will use and why; nothing where that is llama.cpp everywhere."""
    known = {node.peer_id: node for node in nodes}
    lines: list[str] = []
    plain = not backends
    for rank in ranks:
        node = known.get(rank.peer_id)
        if node is None:
            continue
        name, why = chosen_backend(node, backends, architecture)
        plain = plain and name == DEFAULT
        version = next((s.version for s in node.backends if s.name == name), "")
        shown = f"{name} {version}".strip()
        lines.append(f"rank {rank.rank}: {node.name} computes with {shown} ({why})")
    return () if plain else tuple(lines)


def _check_architecture(name: str, architecture: str) -> None:
    if name not in (AUTO_BACKEND, DEFAULT) and architecture not in ARCHITECTURES:
        raise Unsupported(
            f"The backend {name} cannot compute models of the architecture {architecture[:64]!r}.",
            code="unsupported_architecture",
            remedy=f"Use {DEFAULT}, or a model of {', '.join(ARCHITECTURES)}.",
        )


def _missing(name: str, nodes: Sequence[NodeFacts]) -> Unsupported:
    names = ", ".join(sorted(node.name for node in nodes))
    return Unsupported(
        f"The backend {name} is not installed on {names}.",
        code="backend_missing",
        remedy=f"{install_hint(name)} (on that node, then start it again).",
        backend=name,
    )
