"""What is done about a placement that is not well."""

from __future__ import annotations

import random

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from pyagent_node.base.types import Digest, Drafting, PeerId, Placement, Rank, Slice
from pyagent_node.consensus.checks import check_command
from pyagent_node.consensus.commands import SetDrafting, SetPlacement, SetStandbys
from pyagent_node.inference.pipeline.plan_types import ModelShape, NodeFacts
from pyagent_node.inference.pipeline.reserves import ReserveOptions, choose_reserves
from pyagent_node.node.api.schema import LoadRequest
from pyagent_node.node.detector import Health
from pyagent_node.node.drafts import with_reserves
from pyagent_node.node.keeping import HostState
from pyagent_node.node.placement_messages import RankReport, ReserveReport
from pyagent_node.node.planning import Swarm
from pyagent_node.node.replacement import (
    CUT_OFF_SECONDS,
    CUT_SECONDS,
    MAX_STREAK,
    NOT_READY_SECONDS,
    RESERVE_LOST_SECONDS,
    Outlook,
    heal,
)

MODEL = Digest("7" * 64)
PEERS = A, B, C, D, E, F = tuple(PeerId(name) for name in "ABCDEF")
CUTS = (Slice(0, 3, False), Slice(3, 7, False), Slice(7, 10, True))
SHAPE = ModelShape("toy", (1000,) * 10, (1,) * 10, 1000, 1, 0, 1)
NEED = SHAPE.needs(CUTS[1], n_ctx=8, n_seq=1)
PLENTY = 100 * NEED


def placement(
    *peers: PeerId, standbys: dict[int, str] | None = None, spares: dict[int, str] | None = None
) -> Placement:
    """Return a placement; standbys and spares are given as letters."""
    ranks = tuple(
        Rank(
            at,
            CUTS[at],
            peer,
            tuple(map(PeerId, (standbys or {}).get(at, ""))),
            tuple(map(PeerId, (spares or {}).get(at, ""))),
        )
        for at, peer in enumerate(peers)
    )
    return Placement(MODEL, 5, ranks, 8, 1)


def facts(*peers: PeerId, memory: int = PLENTY) -> dict[PeerId, NodeFacts]:
    """Return nodes with so much free memory."""
    return {peer: NodeFacts(peer, peer, memory, 1, 1e9, 1e9) for peer in peers}


def report(rank: int, state: HostState = "ready", *, streak: int = 0) -> RankReport:
    """Return a rank's report."""
    return RankReport(MODEL, 5, rank, state, failures=streak, streak=streak)


def reserve(rank: int, state: HostState = "ready", *, loaded: bool = True) -> ReserveReport:
    """Return a standby's report."""
    return ReserveReport(MODEL, 5, rank, CUTS[rank], loaded, state)


def outlook(placed: Placement, dead: str = "", **changes: object) -> Outlook:
    """Return a mesh of six nodes in which everything is well but for ``changes``."""
    health: dict[PeerId, Health] = {p: "dead" if p in dead else "alive" for p in PEERS}
    reserves = {
        (peer, rank.rank): reserve(rank.rank, loaded=peer in rank.standbys)
        for rank in placed.ranks
        for peer in (*rank.standbys, *rank.spares)
    }
    well = Outlook(
        health=health,
        good=frozenset(p for p in PEERS if p not in dead),
        ranks={rank.rank: report(rank.rank) for rank in placed.ranks},
        reserves=reserves,
        facts=facts(*PEERS),
        shape=SHAPE,
    )
    return msgspec.structs.replace(well, **changes)


def moved(placed: Placement, seen: Outlook) -> list[str]:
    """Return the nodes of the ranks after the healing, which must be a new placement."""
    command = heal(placed, seen).command
    assert isinstance(command, SetPlacement)
    check_command(command)
    assert command.after_epoch == placed.epoch
    assert [rank.slice for rank in command.ranks] == [rank.slice for rank in placed.ranks]
    return [rank.peer_id for rank in command.ranks]


def test_a_placement_that_is_well_is_left_alone() -> None:
    placed = placement(A, B, C)
    assert heal(placed, outlook(placed)).command is None
    placed = placement(A, B, C, standbys={0: "D"}, spares={1: "E"})
    seen = outlook(placed, standbys=0, spares=0)
    command = heal(placed, seen).command
    assert isinstance(command, SetStandbys)  # more than is wanted
    assert command.standbys == ((), (), ())


def test_suspicion_moves_nothing() -> None:
    placed = placement(A, B, C, standbys={1: "D"})
    health: dict[PeerId, Health] = dict.fromkeys(PEERS, "alive")
    for state in ("suspect", "unknown"):
        seen = outlook(placed, health={**health, B: state}, standbys=1, settled=False)
        assert heal(placed, seen).command is None


def test_a_hot_standby_comes_first_then_one_that_loads_then_a_spare_then_anyone() -> None:
    placed = placement(A, B, C, standbys={1: "DE"}, spares={1: "F"})
    reserves = {(D, 1): reserve(1, "loading"), (E, 1): reserve(1), (F, 1): reserve(1, loaded=False)}
    assert moved(placed, outlook(placed, "B", reserves=reserves)) == [A, E, C]
    reserves[E, 1] = reserve(1, "failed")
    assert moved(placed, outlook(placed, "B", reserves=reserves)) == [A, D, C]
    reserves[D, 1] = reserve(1, "failed")
    assert moved(placed, outlook(placed, "B", reserves=reserves)) == [A, F, C]
    reserves[F, 1] = reserve(1, "failed", loaded=False)
    seen = outlook(placed, "B", reserves=reserves)
    assert moved(placed, seen) == [A, A, C]  # the only nodes left hold ranks


def test_dead_nodes_are_no_standbys() -> None:
    placed = placement(A, B, C, standbys={1: "DE"})
    command = heal(placed, outlook(placed, "BD")).command
    assert isinstance(command, SetPlacement)
    assert command.ranks[1] == Rank(1, CUTS[1], E)


def test_a_hot_standby_needs_no_memory_but_a_cold_one_does() -> None:
    placed = placement(A, B, C, standbys={1: "D"}, spares={1: "E"})
    poor = facts(*PEERS, memory=NEED // 2)
    assert moved(placed, outlook(placed, "B", facts=poor)) == [A, D, C]
    healing = heal(placed, outlook(placed, "BD", facts=poor))
    assert healing.command is None
    assert "no other node has room for rank 1" in healing.problems[0]
    assert moved(placed, outlook(placed, "BD", facts=None)) == [A, E, C]  # it may have room


def test_memory_is_promised_once() -> None:
    placed = placement(A, B, C)
    room = {**facts(A, memory=1), **facts(D, E, memory=int(1.5 * NEED / 0.9))}
    assert sorted(moved(placed, outlook(placed, "BC", facts=room))) == [A, D, E]
    only = {**facts(A, memory=1), **facts(D, memory=int(1.5 * NEED / 0.9))}
    healing = heal(placed, outlook(placed, "BC", facts=only))
    assert isinstance(healing.command, SetPlacement)
    assert [r.peer_id for r in healing.command.ranks] == [A, D, C]
    assert len(healing.problems) == 1


def test_a_runner_that_fails_again_and_again_moves() -> None:
    placed = placement(A, B, C)
    ranks = {at: report(at) for at in range(3)}
    ranks[1] = report(1, "ready", streak=MAX_STREAK - 1)
    assert heal(placed, outlook(placed, ranks=ranks)).command is None
    ranks[1] = report(1, "failed", streak=MAX_STREAK)
    assert moved(placed, outlook(placed, ranks=ranks)) == [A, D, C]


def test_a_runner_that_does_not_come_back_moves_to_a_hot_standby_only() -> None:
    placed = placement(A, B, C, standbys={1: "D"})
    ranks = {at: report(at) for at in range(3)}
    ranks[1] = report(1, "loading", streak=1)
    seen = outlook(placed, ranks=ranks, not_ready={1: NOT_READY_SECONDS - 1})
    assert heal(placed, seen).command is None
    seen = outlook(placed, ranks=ranks, not_ready={1: NOT_READY_SECONDS})
    assert moved(placed, seen) == [A, D, C]
    cold = {(D, 1): reserve(1, "loading")}
    assert heal(placed, msgspec.structs.replace(seen, reserves=cold)).command is None
    # The first load of a rank may take as long as it likes.
    ranks[1] = report(1, "fetching")
    seen = outlook(placed, ranks=ranks, not_ready={1: 1000.0})
    assert heal(placed, seen).command is None


def test_of_two_that_lose_each_other_the_one_with_more_losses_moves() -> None:
    placed = placement(A, B, C, standbys={0: "D", 1: "D", 2: "D"})
    assert heal(placed, outlook(placed, cut={(A, B): 1.0}, standbys=1)).command is None
    assert moved(placed, outlook(placed, cut={(A, B): CUT_SECONDS})) == [A, D, C]
    both = {(B, A): CUT_SECONDS, (C, B): CUT_SECONDS}
    assert moved(placed, outlook(placed, cut=both)) == [A, D, C]
    first = {(A, B): CUT_SECONDS, (A, C): CUT_SECONDS}
    assert moved(placed, outlook(placed, cut=first)) == [D, B, C]


def test_neighbours_are_separated_without_a_standby_too_if_later() -> None:
    placed = placement(A, B, C)
    early = heal(placed, outlook(placed, cut={(A, B): CUT_OFF_SECONDS - 0.1})).command
    assert isinstance(early, SetStandbys)
    assert moved(placed, outlook(placed, cut={(A, B): CUT_OFF_SECONDS})) == [A, D, C]


def test_the_expelled_lose_their_ranks_at_once() -> None:
    placed = placement(A, B, C, standbys={0: "B", 1: "D"}, spares={2: "B"})
    seen = outlook(placed, expelled=frozenset({B}), good=frozenset(PEERS) - {B})
    command = heal(placed, seen).command
    assert isinstance(command, SetPlacement)
    assert command.ranks[1].peer_id == D
    assert all(B not in (*r.standbys, *r.spares) for r in command.ranks)


def test_a_draining_node_gets_a_standby_first_and_gives_its_rank_to_it_then() -> None:
    placed = placement(A, B, C)
    seen = outlook(placed, draining=frozenset({B}), good=frozenset(PEERS) - {B})
    command = heal(placed, seen).command
    assert isinstance(command, SetStandbys)
    assert [len(peers) for peers in command.standbys] == [0, 1, 0]
    (standby,) = command.standbys[1]
    placed = placement(A, B, C, standbys={1: standby})
    loading = msgspec.structs.replace(seen, reserves={(standby, 1): reserve(1, "loading")})
    assert heal(placed, loading).command is None
    ready = msgspec.structs.replace(seen, reserves={(standby, 1): reserve(1)})
    assert moved(placed, ready) == [A, standby, C]


def test_draining_nodes_are_given_nothing() -> None:
    placed = placement(A, B, C, standbys={0: "D"})
    seen = outlook(
        placed, draining=frozenset({D, E}), good=frozenset(PEERS) - {D, E}, standbys=1, spares=1
    )
    command = heal(placed, seen).command
    assert isinstance(command, SetStandbys)
    assert not {D, E} & {p for peers in (*command.standbys, *command.spares) for p in peers}


def test_standbys_are_looked_for_only_when_all_is_quiet() -> None:
    placed = placement(A, B, C)
    assert heal(placed, outlook(placed, standbys=1)).command is not None
    for change in (
        {"settled": False},
        {"facts": None},
        {"shape": None},
        {"ranks": {0: report(0), 1: report(1, "loading"), 2: report(2)}},
        {"ranks": {0: report(0), 1: report(1)}},
    ):
        assert heal(placed, outlook(placed, standbys=1, **change)).command is None


def test_a_dead_standby_is_waited_for_a_while() -> None:
    placed = placement(A, B, C, standbys={0: "D", 1: "E", 2: "F"})
    seen = outlook(placed, "D", standbys=1, dead_for={D: RESERVE_LOST_SECONDS - 1})
    assert heal(placed, seen).command is None
    seen = outlook(placed, "D", standbys=1, dead_for={D: RESERVE_LOST_SECONDS})
    command = heal(placed, seen).command
    assert isinstance(command, SetStandbys)
    assert D not in command.standbys[0]
    assert command.standbys[1:] == ((E,), (F,))


def test_own_numbers_of_a_placement_count_more_than_the_meshs() -> None:
    placed = msgspec.structs.replace(placement(A, B, C), want_standbys=0, want_spares=2)
    command = heal(placed, outlook(placed, standbys=2, spares=0)).command
    assert isinstance(command, SetStandbys)
    assert [len(p) for p in command.standbys] == [0, 0, 0]
    assert [len(p) for p in command.spares] == [2, 2, 2]


def test_a_drafter_moves_from_a_node_that_is_gone_or_leaves() -> None:
    drafting = Drafting("auto", 4, None, MODEL, D)
    placed = msgspec.structs.replace(placement(A, B, C), drafting=drafting)
    quiet = {"standbys": 0, "spares": 0, "drafter": SHAPE}
    assert heal(placed, outlook(placed, **quiet)).command is None
    away = outlook(placed, "D", dead_for={D: RESERVE_LOST_SECONDS - 1}, **quiet)
    assert heal(placed, away).command is None
    gone = outlook(placed, "D", dead_for={D: RESERVE_LOST_SECONDS}, **quiet)
    leaves = outlook(placed, draining=frozenset({D}), good=frozenset({A, B, C, F}), **quiet)
    whole = SHAPE.needs(Slice(0, 10, head=True), n_ctx=8, n_seq=1)
    known = facts(A, B, C, E, memory=whole) | facts(F, memory=2 * whole)
    for seen in (gone, leaves):
        command = heal(placed, msgspec.structs.replace(seen, facts=known)).command
        assert command == SetDrafting(
            MODEL, Drafting("auto", 4, None, MODEL, F), placed.epoch
        )  # the only one with room
        check_command(command)
    full = msgspec.structs.replace(gone, facts=facts(A, B, C, E, F, memory=whole))
    assert heal(placed, full).command is None  # it goes on when its node is back
    full = msgspec.structs.replace(leaves, facts=facts(A, B, C, F, memory=whole))
    command = heal(placed, full).command
    assert command == SetDrafting(MODEL, Drafting("auto", 4), placed.epoch)


def test_a_drafter_leaves_only_a_node_that_shall_have_nothing() -> None:
    drafting = Drafting("auto", 4, None, MODEL, D)
    placed = msgspec.structs.replace(placement(A, B, C), drafting=drafting)
    quiet = {"standbys": 0, "spares": 0}
    assert heal(placed, outlook(placed, **quiet)).command is None
    dead = outlook(placed, dead=(D,), **quiet)
    assert heal(placed, dead).command is None  # answers do without until it is back
    for leaving in ({"draining": frozenset({D})}, {"expelled": frozenset({D})}):
        seen = msgspec.structs.replace(outlook(placed, **quiet), **leaving)
        command = heal(placed, seen).command
        assert command == SetDrafting(MODEL, Drafting("auto", 4), placed.epoch)
        check_command(command)


def test_reserves_share_memory_and_stay_where_they_are() -> None:
    ranks = placement(A, B, C).ranks
    nodes = list(facts(D, E, memory=int(1.6 * NEED / 0.9)).values())
    options = ReserveOptions(n_ctx=8, n_seq=1, standbys=2, spares=1)
    chosen = choose_reserves(SHAPE, ranks, nodes, options, good=frozenset())
    used = [p for rank in chosen for p in rank.standbys]
    assert sorted(used) == [D, E]  # room for one each
    assert sum(bool(rank.spares) for rank in chosen) == 3
    good = frozenset({D, E})
    assert choose_reserves(SHAPE, chosen, [], options, good=good) == chosen
    pending = msgspec.structs.replace(options, pending={D: NEED, E: NEED})
    assert all(r.standbys == () for r in choose_reserves(SHAPE, ranks, nodes, pending, good=good))
    tired = [nodes[0], msgspec.structs.replace(nodes[1], share=0.0)]
    asked = choose_reserves(SHAPE, ranks, tired, options, good=frozenset())
    assert {p for rank in asked for p in (*rank.standbys, *rank.spares)} == {nodes[0].peer_id}


def test_a_rank_moves_to_a_node_that_wants_no_work_only_if_there_is_no_other() -> None:
    placed = placement(A, B, C)
    known = facts(*PEERS)
    known[D] = msgspec.structs.replace(known[D], share=0.0)
    assert D not in moved(placed, outlook(placed, dead="B", facts=known))
    none = {peer: msgspec.structs.replace(node, share=0.0) for peer, node in known.items()}
    assert moved(placed, outlook(placed, dead="B", facts=none)) == [A, D, C]


def test_a_node_with_the_bytes_is_preferred_as_spare() -> None:
    ranks = placement(A, B, C).ranks
    nodes = list(facts(D, E, F).values())
    nodes[2] = msgspec.structs.replace(nodes[2], held=(Slice(0, 10, True),))
    options = ReserveOptions(n_ctx=8, n_seq=1, standbys=0, spares=1)
    chosen = choose_reserves(SHAPE, ranks, nodes, options, good=frozenset())
    assert [rank.spares for rank in chosen] == [(F,)] * 3


@given(st.integers(0, 100_000))
def test_healing_always_ends_and_never_names_the_dead(seed: int) -> None:
    rng = random.Random(seed)

    def some(most: int) -> str:
        return "".join(rng.sample(PEERS, rng.randint(0, most)))

    ranks = []
    for at in range(3):
        first, *others = rng.sample(PEERS, rng.randint(1, 4))
        cut = rng.randint(0, len(others))
        ranks.append(Rank(at, CUTS[at], first, tuple(others[:cut]), tuple(others[cut:])))
    placed = Placement(MODEL, 5, tuple(ranks), 8, 1)
    dead = some(3)
    drained = frozenset(map(PeerId, some(2)))
    expelled = frozenset(map(PeerId, some(1)))
    seen = outlook(
        placed,
        dead,
        draining=drained,
        expelled=expelled,
        good=frozenset(p for p in PEERS if p not in dead) - drained - expelled,
        standbys=rng.randint(0, 3),
        spares=rng.randint(0, 3),
        facts=facts(*PEERS, memory=rng.choice([1, int(1.2 * NEED), PLENTY])),
        dead_for=dict.fromkeys(PEERS, 100.0),
        cut={tuple(rng.sample(PEERS, 2)): 10.0} if rng.random() < 0.2 else {},
    )
    for _ in range(10):
        command = heal(placed, seen).command
        if command is None:
            break
        check_command(command)
        if isinstance(command, SetPlacement):
            placed = msgspec.structs.replace(placed, ranks=command.ranks)
            fresh = {r.peer_id for r in command.ranks} - {r.peer_id for r in ranks}
            assert fresh <= seen.good
        else:
            placed = msgspec.structs.replace(
                placed,
                ranks=tuple(
                    msgspec.structs.replace(r, standbys=s, spares=p)
                    for r, s, p in zip(placed.ranks, command.standbys, command.spares, strict=True)
                ),
            )
            named = {p for r in placed.ranks for p in (*r.standbys, *r.spares)}
            assert not named & (expelled | drained | set(map(PeerId, dead)))
        seen = msgspec.structs.replace(
            seen,
            ranks={r.rank: report(r.rank) for r in placed.ranks},
            reserves={
                (p, r.rank): reserve(r.rank, loaded=p in r.standbys)
                for r in placed.ranks
                for p in (*r.standbys, *r.spares)
            },
        )
    else:
        raise AssertionError("it never comes to rest")


def test_only_nodes_that_know_how_activations_cross_take_over() -> None:
    known = {
        peer: msgspec.structs.replace(node, activations=("f32", "f16") if peer in "ABCF" else ())
        for peer, node in facts(*PEERS).items()
    }
    placed = msgspec.structs.replace(placement(A, B, C, spares={1: "D"}), activations="f16")
    assert moved(placed, outlook(placed, "B", facts=known)) == [A, F, C]
    plain = msgspec.structs.replace(placed, activations="")
    assert moved(plain, outlook(plain, "B", facts=known)) == [A, D, C]
    command = heal(placed, outlook(placed, standbys=1, spares=1, facts=known)).command
    assert isinstance(command, SetStandbys)
    assert set().union(*command.standbys, *command.spares) <= {A, B, C, F}
    assert F in set().union(*command.standbys)


def test_reserves_of_a_plan_know_how_activations_cross() -> None:
    nodes = [
        msgspec.structs.replace(node, activations=("f32", "f16") if peer in "ABCF" else ())
        for peer, node in facts(*PEERS).items()
    ]
    for ask, able in (("f16", {A, B, C, F}), (None, set(PEERS))):
        ranks = with_reserves(
            SHAPE,
            placement(A, B, C).ranks,
            Swarm(nodes, {}),
            LoadRequest(model="toy", standbys=2, spares=2, activations=ask),
            {},
            before=placement(A, B, C, standbys={0: "D"}),
            n_ctx=8,
            n_seq=1,
        )
        found = {peer for rank in ranks for peer in (*rank.standbys, *rank.spares)}
        assert found <= able
        assert (D in found) is (ask is None)
