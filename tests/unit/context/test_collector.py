"""Documents that are over are removed: by the node that added them, by others much later."""

from pathlib import Path

import msgspec

from pyagent_node.base.types import PeerId
from pyagent_node.node.context_collector import OTHERS_SECONDS, OWN_SECONDS, Collector
from pyagent_node.sharding.context.records import Version

from .context_world import World, one_node


def collector(world: World) -> Collector:
    return Collector(world.mesh, clock=lambda: world.clock[0])


async def test_what_is_over_is_removed_some_time_later(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await world.create(max_age_seconds=100)
        await world.create("kept")
        await world.add("a.txt", "some words")
        await world.add("a.txt", "some words", "kept")
        here = collector(world)
        world.clock[0] += 100
        assert await here.look() == 0  # nobody answers from it, but it is there still
        assert await world.ask("some words") == []
        world.clock[0] += OWN_SECONDS
        assert await here.look() == 1
        assert await here.look() == 0
        catalog = world.mesh.catalog(world.mesh.find("docs").id)
        assert not list(catalog.chunk_ids())
        assert (await world.add("a.txt", "some words")).status == "added"
        assert await world.ask("some words", "kept") == ["a.txt"]
        assert here.removed == 1


async def test_documents_of_nodes_that_are_gone_are_removed_by_others(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await world.create(max_age_seconds=100)
        await world.add("a.txt", "some words")
        catalog = world.mesh.catalog(world.mesh.find("docs").id)
        (record,) = catalog.documents()
        other = msgspec.structs.replace(record, version=Version(2, PeerId("12D3KooWother")))
        await world.mesh.publish(other, ())
        here = collector(world)
        world.clock[0] += 100 + OWN_SECONDS
        assert await here.look() == 0
        world.clock[0] += OTHERS_SECONDS
        assert await here.look() == 1


async def test_what_left_the_window_is_removed(tmp_path: Path) -> None:
    async with one_node(tmp_path) as world:
        await world.create(max_tokens=4)
        for number in range(3):
            world.clock[0] += 1
            await world.add(f"{number}.txt", f"words of {number}")
        here = collector(world)
        assert await here.look() == 0
        world.clock[0] += OWN_SECONDS
        assert await here.look() == 2
        assert await world.ask("words of 2") == ["2.txt"]
