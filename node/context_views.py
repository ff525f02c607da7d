"""What the contexts of a node show of themselves in metrics."""

from __future__ import annotations

from collections.abc import Iterator

from pyagent_node.node.context_mesh import ContextService
from pyagent_node.node.telemetry import Sample


def samples(contexts: ContextService) -> Iterator[Sample]:
    """Yield what is counted, for ``/metrics``."""
    store, mover, search = contexts.store, contexts.mover, contexts.searcher
    text = "Bytes of chunks of contexts that this node keeps."
    yield Sample("context_bytes", text, store.used_bytes, "gauge")
    text = "Chunks of contexts that this node keeps."
    yield Sample("context_chunks", text, len(store.held()), "gauge")
    text = "Documents of contexts that this node knows."
    known = sum(len(contexts.catalog(info.id)) for info in contexts.contexts())
    yield Sample("context_documents", text, known, "gauge")
    text = "Documents added or removed at this node."
    yield Sample("context_published", text, contexts.published)
    yield Sample("context_questions", "Questions to contexts at this node.", search.questions)
    text = "Nodes that were asked for these questions."
    yield Sample("context_nodes_asked", text, search.asked)
    text = "Nodes that were asked for sketches for these questions."
    yield Sample("context_nodes_probed", text, search.probed)
    text = "Bytes of spread sketches that this node keeps."
    kept = sum(contexts.share(info.id).size for info in contexts.contexts())
    yield Sample("context_sketch_bytes", text, kept, "gauge")
    text = "Chunks whose sketches this node is to keep and could not get."
    yield Sample("context_sketches_lacking", text, contexts.keeper.lacking, "gauge")
    text = "Candidate chunks that could be had from no node."
    yield Sample("context_missing", text, search.missing)
    text = "Records of documents that came from peers."
    yield Sample("context_records_merged", text, contexts.sync.merged)
    moves = (("copied", mover.copied), ("released", mover.released), ("collected", mover.collected))
    for what, count in moves:
        text = "Chunks that came here, went to others, or belong to no document any more."
        yield Sample("context_moved", text, count, labels={"what": what})
    text = "Chunks that this node owns and could not get."
    yield Sample("context_lacking", text, mover.lacking, "gauge")
    for way, size in (("in", contexts.client.bytes_in), ("out", contexts.client.bytes_out)):
        text = "Bytes of records and chunks that this node asked for or sent."
        yield Sample("context_wire_bytes", text, size, labels={"direction": way})
    text = "Times that other owners were committed at this node's word."
    yield Sample("context_owner_changes", text, contexts.steward.changes)
