"""What can be done with the model store while no daemon runs: the command line's fallback.

The store may be opened by several processes; a pull takes a lock between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import trio

from pyagent_node.base.errors import PyAgentError
from pyagent_node.base.types import Digest
from pyagent_node.inference.formats.convert import Converted, Format, Type, convert
from pyagent_node.inference.models.architectures import model_shape
from pyagent_node.inference.models.pull import pull
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.stored_model import StoredModel
from pyagent_node.node.api.schema import Check, ModelsReply, ModelView, Progress
from pyagent_node.node.config import Settings
from pyagent_node.node.home import Home

Report = Callable[[Progress], None]


def open_store(home: Home, settings: Settings) -> ModelStore:
    """Open the model store of a home."""
    return ModelStore(settings.models_dir(home))


def pull_model(
    store: ModelStore,
    source: str,
    *,
    sha256: str | None = None,
    name: str | None = None,
    report: Report | None = None,
) -> ModelView:
    """Bring a model into the store; errors as for :func:`inference.models.pull.pull`."""

    def progress(done: int, total: int | None) -> None:
        if report is not None:
            report(Progress(step="download", text=f"Fetching {source}", done=done, total=total))

    async def run() -> StoredModel:
        return await pull(store, source, sha256=sha256, name=name, progress=progress)

    return view(store, trio.run(run))


def convert_model(
    source: Path,
    target: Path,
    *,
    to: Format,
    type: Type,
    tokenizer: Path | None = None,
    report: Report | None = None,
) -> Converted:
    """Write a model in another format; errors as for :func:`inference.formats.convert.convert`."""

    def progress(done: int, total: int) -> None:
        if report is not None:
            text = f"Converting {source.name}"
            report(Progress(step="convert", text=text, done=done, total=total))

    return convert(source, target, to=to, type=type, tokenizer=tokenizer, report=progress)


def list_models(store: ModelStore) -> ModelsReply:
    """List what the store holds."""
    return ModelsReply(tuple(view(store, model) for model in store.list()))


def remove_model(store: ModelStore, digest: Digest) -> None:
    """Delete a model's files."""
    store.remove(digest)


def model_path(store: ModelStore, name: str) -> Path | None:
    """Return the whole file of the model called ``name``, ``None`` when it is not all here."""
    try:
        return store.find(name).path
    except PyAgentError:
        return None


def view(store: ModelStore, model: StoredModel) -> ModelView:
    """Return a stored model as the admin API shows it."""
    try:
        shape = model_shape(store.model_file(model.digest).header)
    except PyAgentError:
        shape = None  # its first bytes are not here yet
    return ModelView(
        digest=model.digest,
        name=model.name,
        size=model.size,
        local_bytes=model.bytes_held,
        architecture=shape.architecture if shape else None,
        n_layers=shape.n_layers if shape else None,
        n_ctx_train=shape.n_ctx_train if shape else None,
    )


def check_models(store: ModelStore) -> Iterator[Check]:
    """Read every whole model and compare each chunk with its digest."""
    for model in store.list():
        name = f"model {model.name}"
        if model.path is None:
            yield Check(
                name=name,
                result="ok",
                detail=f"{model.bytes_held} of {model.size} bytes here, each checked on arrival",
            )
            continue
        try:
            for index in range(store.manifest(model.digest).count):
                store.read_chunk(model.digest, index)
        except PyAgentError as error:
            yield Check(
                name=name,
                result="failed",
                detail=error.message,
                remedy=f"`pyagent-node model rm {model.digest[:12]}`, then pull it again.",
            )
        else:
            yield Check(name=name, result="ok", detail=f"{model.size} bytes, every chunk checked")
