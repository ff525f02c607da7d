"""``status`` says what each rank gave up of its KV, where one did."""

from __future__ import annotations

import msgspec
import pytest
from rich.console import Console

from pyagent_node.base.types import PeerId
from pyagent_node.cli.views import placement_view
from pyagent_node.node.api.schema import PlacementView, RankView


def rank(number: int, cells: int | None) -> RankView:
    return RankView(
        rank=number,
        layers=(number, number + 1),
        head=number == 1,
        peer_id=PeerId("12D3KooW" + "x" * 44),
        name=f"node{number}",
        state="ready",
        evicted_cells=cells,
        evicted_bytes=None if cells is None else cells * 7680,
    )


@pytest.mark.parametrize("cells", [None, 0, 1000])
def test_the_column_is_there_where_a_rank_gave_cells_up(cells: int | None) -> None:
    view = msgspec.convert(
        {
            "model": "0" * 64,
            "name": "m",
            "epoch": 1,
            "n_ctx": 4096,
            "n_seq": 4,
            "ready": True,
            "ranks": [msgspec.to_builtins(rank(number, cells)) for number in (0, 1)],
        },
        PlacementView,
    )
    console = Console(width=200)
    with console.capture() as shown:
        console.print(placement_view(view))
    assert ("KV given up" in shown.get()) == bool(cells)
    assert shown.get().count("1000 cells, 7.7 MB") == (2 if cells else 0)
