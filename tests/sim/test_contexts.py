"""Contexts over a swarm of real nodes that die and come while documents are added and found."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from copy import deepcopy

import pytest
import trio

from pyagent_node.base.contexts import ContextInfo
from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import ContextPolicy
from pyagent_node.consensus.commands import SetMeshSetting
from pyagent_node.node.context_mesh import ContextService
from pyagent_node.sharding.context.port import Answer
from pyagent_node.sharding.context.shares import ALL_GROUPS
from pyagent_node.simulations.contexts import ENCODER, removal, toy_document, toy_vector
from pyagent_node.simulations.machine import Machine
from pyagent_node.simulations.swarm import Swarm, open_swarm
from pyagent_node.simulations.trace import Trace

pytestmark = pytest.mark.slow

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in ("ar", "el", "on", "ut") for c in "lmnrstxz"]
HITS = 4


def story(number: int) -> str:
    """A text about something of its own."""
    rng = random.Random(number)
    lines = [" ".join(rng.choices(WORDS, k=12)) + "." for _ in range(12)]
    lines.insert(rng.randrange(len(lines)), f"The {topic(number)} opens with key {number * 7919}.")
    return "\n\n".join(lines)


def topic(number: int) -> str:
    rng = random.Random(f"topic {number}")
    return " ".join("".join(rng.choices("aeioubdfgklmnprst", k=7)) for _ in range(3))


class World:
    def __init__(self, swarm: Swarm, info: ContextInfo) -> None:
        self.swarm, self.info = swarm, info

    def node(self, number: int) -> ContextService:
        machine = self.swarm.machines[number]
        assert machine.parts is not None, machine.failures
        return machine.parts.contexts

    async def add(self, number: int, at: int, text: str | None = None) -> None:
        """Add a document, again until a node takes it."""
        while True:
            machine = self.swarm.machines[at]
            if machine.parts is None:
                machine = self.swarm.up()[0]
            assert machine.parts is not None
            service = machine.parts.contexts
            source = f"story{number}.txt"
            version = service.catalog(self.info.id).next_version(source, service.peer_id)
            record, bodies = toy_document(self.info.id, source, text or story(number), version)
            try:
                await service.publish(record, bodies)
                return
            except PyAgentError:
                await trio.sleep(0.5)

    async def ask(self, number: int, at: int) -> Answer:
        question = f"what opens the {topic(number)}"
        return await self.node(at).search(self.info, question, toy_vector(question), count=HITS)

    def restored(self, copies: int = 2) -> bool:
        """Whether every chunk of every document lies at all of its owners, and nowhere else."""
        up = self.swarm.up()
        services = [machine.parts.contexts for machine in up if machine.parts is not None]
        catalogs = [service.catalog(self.info.id) for service in services]
        if len({catalog.slots() for catalog in catalogs}) != 1:
            return False
        here = {service.peer_id for service in services}
        for chunk in catalogs[0].chunk_ids():
            place = catalogs[0].locate(chunk)
            assert place is not None
            bucket = place[0].chunks[place[1]].bucket
            owners = services[0].reach.owners(bucket)
            if not set(owners) <= here or len(owners) != min(copies, len(here)):
                return False
            if any(service.reach.owners(bucket) != owners for service in services):
                return False
            held = {service.peer_id for service in services if service.store.holds(chunk)}
            if held != set(owners):
                return False
        return True

    async def calm(self) -> None:
        """Wait until everything is where it belongs."""
        with trio.fail_after(120):
            while not self.restored():  # noqa: ASYNC110 - of many nodes
                await trio.sleep(0.5)


@asynccontextmanager
async def world(nodes: int, *, seed: int = 1, patience: int = 10) -> AsyncIterator[World]:
    trace = Trace(trio.current_time)
    async with open_swarm(seed, trace) as swarm:
        await swarm.form(nodes)
        await swarm.propose(SetMeshSetting("context_patience", patience))
        first = swarm.machines[0].parts
        assert first is not None
        info = await first.contexts.create("shelf", ContextPolicy(), encoder=ENCODER)
        await trio.sleep(4)
        yield World(swarm, info)


def gist(answer: Answer) -> list[tuple[str, str, float]]:
    return [(hit.source, hit.text, hit.score) for hit in answer.hits]


async def test_what_is_added_at_one_node_is_found_at_every_node(autojump_clock):
    async with world(4) as it:
        for number in range(12):
            await it.add(number, at=number % 4)
        await it.calm()
        for number in range(12):
            answers = [await it.ask(number, at) for at in range(4)]
            assert answers[0].hits[0].source == f"story{number}.txt"
            assert str(number * 7919) in answers[0].hits[0].text
            assert all(gist(answer) == gist(answers[0]) for answer in answers)
            assert all(answer.missing == 0 for answer in answers)
            assert all(1 <= answer.nodes_asked <= answer.nodes == 4 for answer in answers)
        held = [len(it.node(at).store.held()) for at in range(4)]
        chunks = len(list(it.node(0).catalog(it.info.id).chunk_ids()))
        assert sum(held) == 2 * chunks
        assert max(held) < 2 * chunks


async def test_two_nodes_die_and_one_comes_while_documents_are_added_and_asked_for(autojump_clock):
    async with world(4) as it:
        for number in range(8):
            await it.add(number, at=number % 4)
        await it.calm()
        before = {number: gist(await it.ask(number, 0)) for number in range(8)}
        asked = wrong = 0
        done = trio.Event()

        async def keep_asking() -> None:
            nonlocal asked, wrong
            while not done.is_set():
                number = asked % 8
                answer = await it.ask(number, 0)
                asked += 1
                good = bool(answer.hits) and answer.hits[0].source == f"story{number}.txt"
                wrong += not good
                await trio.sleep(0.2)

        async def keep_adding() -> None:
            for number in range(8, 40):
                await it.add(number, at=number % 4)
                await trio.sleep(1.5)

        async def trouble() -> None:
            await trio.sleep(3)
            it.swarm.kill(it.swarm.machines[3])
            await trio.sleep(2)
            newcomer = it.swarm.add()
            await it.swarm.start(newcomer)
            await it.swarm.admit(newcomer)
            await trio.sleep(25)  # longer than the mesh's patience: its chunks are copied
            it.swarm.kill(it.swarm.machines[2])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_asking)
            async with trio.open_nursery() as both:
                both.start_soon(keep_adding)
                both.start_soon(trouble)
            await it.calm()
            done.set()
        assert asked > 50
        assert wrong == 0
        services = [m.parts.contexts for m in it.swarm.up() if m.parts is not None]
        assert len(services) == 3
        for number in range(40):
            question = f"what opens the {topic(number)}"
            answers = [
                await s.search(it.info, question, toy_vector(question), count=HITS)
                for s in services
            ]
            assert answers[0].hits[0].source == f"story{number}.txt"
            assert all(gist(answer) == gist(answers[0]) for answer in answers)
            assert all(answer.missing == 0 for answer in answers)
        # What was there before is found as before (with more documents, scores of words differ).
        for number, hits in before.items():
            answer = await it.ask(number, 0)
            assert answer.hits[0].text == hits[0][1]


def spread_out(it: World, spread: bool) -> bool:
    """Whether every node has the sketches that it is to have, and no others."""
    for machine in it.swarm.up():
        if machine.parts is None:
            return False
        service = machine.parts.contexts
        info = service.find("shelf")
        catalog, share = service.catalog(info.id), service.store.share(info.id)
        own = service.keeper.own_groups() if spread else ALL_GROUPS
        if info.spread != spread or catalog.lacking(share, own, bare_only=not spread):
            return False
        whole = any(record.windows and not record.whole for record in catalog.documents())
        if spread and (whole or share.beyond(own)):
            return False
    return it.restored()


async def until_spread(it: World, spread: bool) -> None:
    with trio.fail_after(120):
        while not spread_out(it, spread):  # noqa: ASYNC110 - of many nodes
            await trio.sleep(0.5)


@pytest.mark.parametrize("spread", [False, True])
async def test_two_nodes_die_and_one_comes_and_every_answer_stays_as_it_was(autojump_clock, spread):
    """Nothing is added meanwhile, so all hits of all answers are those of before, in both forms."""
    async with world(5, patience=3) as it:
        await it.swarm.propose(SetMeshSetting("context_index_bytes", 0 if spread else None))
        for number in range(10):
            await it.add(number, at=number % 5)
        await it.calm()
        await until_spread(it, spread)
        before = [gist(await it.ask(number, 0)) for number in range(10)]
        asked = 0
        wrong: list[tuple[int, int]] = []
        done = trio.Event()

        async def keep_asking() -> None:
            nonlocal asked
            while not done.is_set():
                number, at = asked % 10, asked % 3
                answer = await it.ask(number, at)
                asked += 1
                if gist(answer) != before[number] or answer.missing:
                    wrong.append((number, at))
                await trio.sleep(0.2)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_asking)
            await trio.sleep(2)
            it.swarm.kill(it.swarm.machines[4])
            newcomer = it.swarm.add()
            await it.swarm.start(newcomer)
            await it.swarm.admit(newcomer)
            await trio.sleep(8)  # longer than the mesh's patience: its chunks are copied
            it.swarm.kill(it.swarm.machines[3])
            await it.calm()
            await until_spread(it, spread)
            done.set()
        assert asked > 20
        assert wrong == []
        numbers = [machine.number for machine in it.swarm.up()]
        assert len(numbers) == 4
        assert newcomer.number in numbers
        for number in range(10):
            for at in numbers:
                assert gist(await it.ask(number, at)) == before[number]


async def test_sketches_are_spread_and_brought_back_while_nodes_die_and_come(autojump_clock):
    async with world(5) as it:
        for number in range(10):
            await it.add(number, at=number % 5)
        await it.calm()
        asked = 0
        wrong: list[int] = []
        done = trio.Event()

        async def keep_asking() -> None:
            nonlocal asked
            while not done.is_set():
                number = asked % 10
                answer = await it.ask(number, 0)
                asked += 1
                if not answer.hits or answer.hits[0].source != f"story{number}.txt":
                    wrong.append(number)
                await trio.sleep(0.2)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_asking)
            await it.swarm.propose(SetMeshSetting("context_index_bytes", 0))
            await until_spread(it, True)
            full = it.node(0).catalog(it.info.id).windows
            here = sum(len(part) for part in it.node(0).store.share(it.info.id).copy().values())
            assert here < full  # of five nodes each has two fifths of the windows
            answers = [await it.ask(number, 1) for number in range(10)]
            assert all(answer.missing == 0 for answer in answers)
            assert any(answer.probed for answer in answers)
            it.swarm.kill(it.swarm.machines[4])
            newcomer = it.swarm.add()
            await it.swarm.start(newcomer)
            await it.swarm.admit(newcomer)
            for number in range(10, 16):
                await it.add(number, at=number % 4)
            await trio.sleep(25)  # longer than the mesh's patience
            it.swarm.kill(it.swarm.machines[3])
            await until_spread(it, True)
            for number in range(16):
                for machine in it.swarm.up():
                    answer = await it.ask(number, machine.number)
                    assert answer.hits[0].source == f"story{number}.txt"
                    assert answer.missing == 0
            await it.swarm.propose(SetMeshSetting("context_index_bytes", None))
            await until_spread(it, False)
            done.set()
        assert asked > 50
        assert wrong == []
        for number in range(16):
            answers = [await it.ask(number, machine.number) for machine in it.swarm.up()]
            assert all(gist(answer) == gist(answers[0]) for answer in answers)
            assert all(answer.probed == answer.missing == 0 for answer in answers)


async def test_a_changed_document_is_answered_from_its_new_text_at_once(autojump_clock):
    async with world(4) as it:
        for number in range(4):
            await it.add(number, at=0)
        await it.calm()
        await it.add(2, at=1, text=f"The {topic(2)} opens with a hairpin.")
        for at in range(4):
            answer = await it.ask(2, at)
            assert "hairpin" in answer.hits[0].text
            assert all(str(2 * 7919) not in hit.text for hit in answer.hits)
        await trio.sleep(40)
        assert it.restored()  # so that nobody holds chunks of the old text


async def test_a_removed_document_is_gone_everywhere_also_where_a_node_was_away(autojump_clock):
    async with world(3) as it:
        for number in range(3):
            await it.add(number, at=number)
        await it.calm()
        it.swarm.kill(it.swarm.machines[2])
        service = it.node(0)
        version = service.catalog(it.info.id).next_version("story1.txt", service.peer_id)
        await service.publish(removal(it.info.id, "story1.txt", version), [])
        await it.swarm.start(it.swarm.machines[2])
        await it.calm()
        for at in range(3):
            answer = await it.ask(1, at)
            assert all(hit.source != "story1.txt" for hit in answer.hits)


async def test_two_nodes_add_to_the_same_context_apart_and_nothing_is_lost(autojump_clock):
    async with world(4) as it:
        peers = [machine.peer_id for machine in it.swarm.machines]
        for a in peers[:2]:
            for b in peers[2:]:
                it.swarm.network.cut(a, b)
        for number in range(6):
            await it.add(number, at=0)
            await it.add(10 + number, at=3)
        await it.add(20, at=0, text=f"The {topic(20)} opens with a spoon.")
        await it.add(20, at=3, text=f"The {topic(20)} opens with a fork.")
        for a in peers[:2]:
            for b in peers[2:]:
                it.swarm.network.heal(a, b)
        await it.calm()
        for number in (*range(6), *range(10, 16)):
            for at in range(4):
                answer = await it.ask(number, at)
                assert answer.hits[0].source == f"story{number}.txt"
        winners = {(await it.ask(20, at)).hits[0].text for at in range(4)}
        assert len(winners) == 1


async def test_a_dropped_context_leaves_nothing(autojump_clock):
    async with world(3) as it:
        await it.add(1, at=0)
        await it.calm()
        it.swarm.kill(it.swarm.machines[2])
        await it.node(1).drop("shelf")
        await it.swarm.start(it.swarm.machines[2])
        with trio.fail_after(60):
            machines = it.swarm.machines
            while any(m.contexts.known() for m in machines):  # noqa: ASYNC110 - of many nodes
                await trio.sleep(0.5)


async def test_a_node_that_restarts_has_what_it_had_and_gets_the_rest(autojump_clock):
    async with world(3) as it:
        for number in range(3):
            await it.add(number, at=0)
        await it.calm()
        machine: Machine = it.swarm.machines[2]
        it.swarm.kill(machine)
        for number in range(3, 6):
            await it.add(number, at=0)
        await it.swarm.start(machine)
        await it.calm()
        before = it.node(0).reach.epoch
        await trio.sleep(30)
        assert it.node(0).reach.epoch == before  # it was not away for long enough to lose anything
        assert (await it.ask(4, 2)).hits[0].source == "story4.txt"


async def collected(it: World, floor: int = 1) -> None:
    """Wait until no node knows of anything removed."""

    def over() -> bool:
        parts = [machine.parts for machine in it.swarm.up()]
        services = [each.contexts for each in parts if each is not None]
        standings = [service.catalog(it.info.id).standing for service in services]
        removals = [service.catalog(it.info.id).removals() for service in services]
        return all(each.settled >= floor for each in standings) and not any(removals)

    with trio.fail_after(120):
        while not over():  # noqa: ASYNC110 - of many nodes
            await trio.sleep(0.5)


async def remove(it: World, number: int, at: int) -> None:
    service, source = it.node(at), f"story{number}.txt"
    version = service.catalog(it.info.id).next_version(source, service.peer_id)
    await service.publish(removal(it.info.id, source, version), [])


async def test_removals_are_forgotten_once_all_have_them_and_nothing_comes_back(autojump_clock):
    async with world(3) as it:
        await it.swarm.propose(SetMeshSetting("context_grace", 1))
        for number in range(4):
            await it.add(number, at=number % 3)
        await it.calm()
        away = it.swarm.machines[2]
        before = deepcopy(away.contexts)
        it.swarm.kill(away)
        await remove(it, 1, at=0)
        await trio.sleep(60)
        assert it.node(0).catalog(it.info.id).removals()
        assert it.node(0).held_up(it.info.id) == (away.peer_id,)
        await it.swarm.start(away)
        await collected(it)
        assert it.node(0).settler.forgotten == 1
        await it.add(1, at=2)  # there it counts on from above what was removed
        await it.calm()
        for at in range(3):
            assert (await it.ask(1, at)).hits[0].source == "story1.txt"
        await remove(it, 1, at=1)
        await collected(it, floor=4)
        it.swarm.kill(away)
        away.contexts = before  # the disk of an earlier day, with what was removed twice
        await it.swarm.start(away)
        newcomer = it.swarm.add()
        await it.swarm.start(newcomer)
        await it.calm()
        await collected(it, floor=4)
        for at in range(4):
            assert it.node(at).catalog(it.info.id).get("story1.txt") is None
            assert (await it.ask(2, at)).hits[0].source == "story2.txt"


def settled_without_lost(it: World) -> bool:
    """Whether every node has the sketches that it is to have, but for those of lost chunks."""
    for machine in it.swarm.up():
        if machine.parts is None:
            return False
        service = machine.parts.contexts
        info = service.find("shelf")
        share, own = service.store.share(info.id), service.keeper.own_groups()
        documents = service.catalog(info.id).documents()
        whole = any(record.windows and not record.whole for record in documents)
        lacking = service.server.lacking(info, own, bare_only=False)
        if not info.spread or lacking or whole or share.beyond(own):
            return False
    return True


async def test_a_context_that_lost_bodies_for_good_comes_to_rest(autojump_clock):
    """It is spread all the same, all nodes answer alike, and say what is lost until it is back."""
    async with world(5, patience=3) as it:
        for number in range(10):
            await it.add(number, at=number % 5)
        await it.calm()
        before = [gist(await it.ask(number, 0)) for number in range(10)]
        owners: dict[frozenset[str], int] = {}
        for chunk in it.node(0).catalog(it.info.id).chunk_ids():
            place = it.node(0).catalog(it.info.id).locate(chunk)
            assert place is not None
            pair = frozenset(it.node(0).reach.owners(place[0].chunks[place[1]].bucket))
            if it.node(0).peer_id not in pair:  # the one that proposes
                owners[pair] = owners.get(pair, 0) + 1
        both, count = max(owners.items(), key=lambda each: (each[1], sorted(each[0])))
        gone = [machine for machine in it.swarm.machines if machine.peer_id in both]
        for machine in gone:
            it.swarm.kill(machine)
        await it.swarm.propose(SetMeshSetting("context_index_bytes", 0))

        def lost() -> list[int]:
            services = [m.parts.contexts for m in it.swarm.up() if m.parts is not None]
            return [len(service.lost(service.find("shelf"))) for service in services]

        with trio.fail_after(120):
            while lost() != [count] * 3 or not settled_without_lost(it):  # noqa: ASYNC110
                await trio.sleep(0.5)
        for number in range(10):
            answers = [await it.ask(number, machine.number) for machine in it.swarm.up()]
            assert {answer.lost for answer in answers} == {count}
            assert all(answer.missing == 0 for answer in answers)
            assert len({tuple(gist(answer)) for answer in answers}) == 1
        # One of them comes back with its disk: nothing is lost any more.
        await it.swarm.start(gone[0])
        with trio.fail_after(120):
            while any(lost()) or not spread_out(it, True):  # noqa: ASYNC110 - of many nodes
                await trio.sleep(0.5)
        for number in range(10):
            for machine in it.swarm.up():
                answer = await it.ask(number, machine.number)
                assert (answer.lost, answer.missing) == (0, 0)
                assert gist(answer)[0][:2] == before[number][0][:2]
