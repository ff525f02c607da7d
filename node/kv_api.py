"""The client's part for KV blocks."""

from __future__ import annotations

from pyagent_node.node.api.kv_schema import ClearedReply, KvView
from pyagent_node.node.client_transport import Transport


class KvApiClient:
    """Asks the daemon about the KV blocks that it keeps."""

    def __init__(self, transport: Transport) -> None:
        self._api = transport

    def view(self) -> KvView:
        """Return what is kept, and what it was good for."""
        return self._api.get("/kv", KvView)

    def clear(self) -> ClearedReply:
        """Give up every block."""
        return self._api.post("/kv/clear", None, ClearedReply)
