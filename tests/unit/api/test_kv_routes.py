"""The routes about KV blocks, and the client's way to them."""

from __future__ import annotations

import pytest
import trio

from pyagent_node.base.errors import Unavailable
from pyagent_node.node.client import Client
from pyagent_node.simulations.api import TOKEN


async def using(api, function):
    """Run ``function(client)`` in a thread, as the command line does."""

    def run():
        with Client(api.url, TOKEN) as client:
            return function(client)

    return await trio.to_thread.run_sync(run)


async def test_what_the_client_gets(api):
    view = await using(api, lambda c: c.kv.view())
    assert view == api.services.kv.answer
    assert view.loads.hit_rate == 0.75
    assert (await using(api, lambda c: c.kv.clear())).blocks == 100
    assert api.services.kv.cleared == 1


async def test_an_error_of_the_store_is_told(api):
    api.services.kv.error = Unavailable("no disk", code="disk_error")
    for ask in (lambda c: c.kv.view(), lambda c: c.kv.clear()):
        with pytest.raises(Unavailable) as caught:
            await using(api, ask)
        assert caught.value.code == "disk_error"
