"""What a drafter rank is worth, by how far it is.

    python -m pyagent_node.simulations.drafter_rank

In the simulator, on virtual time, so that the figures hardly depend on the machine: three ranks of
the toy model, 10 ms a step each and the same for a guess, and a drafter that is always right: the
most that there is to gain.
"""

from __future__ import annotations

import trio
from trio.testing import MockClock

from pyagent_node.base.types import Drafting
from pyagent_node.consensus.commands import SetDrafting
from pyagent_node.inference.generation import Finished, Generated, GenerationRequest
from pyagent_node.inference.sampling import SamplingParams
from pyagent_node.node.api.schema import Progress
from pyagent_node.simulations.pipeline import MODEL, NAME, peer
from pyagent_node.simulations.placements import HostingWorld, open_hosting_world

TRIPS_MS = (20, 50, 100)
AWAY_MS = (0, 5, 20, 100)
TOKENS = 150
DRAFTER = 3


async def rate(world: HostingWorld, speculation: str) -> tuple[float, list[int]]:
    """Return tokens a second of one answer, and its tokens."""
    request = GenerationRequest(
        NAME,
        tokens=tuple(range(40)),
        max_tokens=TOKENS,
        sampling=SamplingParams(seed=3, temperature=0.7),
        speculation=speculation,
    )
    tokens: list[int] = []
    speed = 0.0
    async with world.nodes[0].pipeline.engine.generate(request) as events:
        async for event in events:
            if isinstance(event, Generated):
                tokens.append(event.token)
            elif isinstance(event, Finished):
                speed = event.usage.tokens_per_second
    return speed, tokens


async def compare(trip_ms: float, away_ms: float) -> tuple[float, float]:
    """Return tokens a second without a drafter rank and with one that is ``away_ms`` away.

    ``trip_ms`` is the round trip between any two ranks.
    """
    async with open_hosting_world(4, latency=trip_ms / 2000, one_way=True) as world:
        for number in range(3):
            world.network.set_latency(peer(number), peer(DRAFTER), away_ms / 2000)
        placement = await world.place((3, 7), (0, 1, 2))
        drafting = Drafting(drafter=MODEL, peer_id=peer(DRAFTER))
        await world.nodes[0].consensus.propose(SetDrafting(MODEL, drafting, placement.epoch))
        placement = world.nodes[0].consensus.state.placements[MODEL]
        await world.nodes[0].board.wait_ready(placement, _quiet, drafter=True)
        plain, wanted = await rate(world, "none")
        await rate(world, NAME)  # what passes and guesses take is learnt
        guessed, tokens = await rate(world, NAME)
        if tokens != wanted:
            raise AssertionError("guesses changed the answer")
        return plain, guessed


def _quiet(progress: Progress) -> None:
    """Take a progress report."""


def main() -> None:
    """Print a table."""
    print("trip ms  drafter away ms  plain tok/s  with it tok/s  times")
    for trip in TRIPS_MS:
        for away in AWAY_MS:
            clock = MockClock(autojump_threshold=0)
            plain, guessed = trio.run(compare, trip, away, clock=clock)
            print(f"{trip:7}  {away:15}  {plain:11.1f}  {guessed:13.1f}  {guessed / plain:5.2f}")


if __name__ == "__main__":
    main()
