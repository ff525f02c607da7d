"""GGUF models as encoders of contexts: vectors, processes, identities, peers, settings."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import trio

from pyagent_node.base.errors import (
    ConfigError,
    Conflict,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PyAgentError,
    Unavailable,
    Unsupported,
)
from pyagent_node.base.types import ContextPolicy, Digest
from pyagent_node.inference.gguf_embedder import GgufEmbedder, GgufIdentity
from pyagent_node.inference.llama.embedder import BATCH_TEXTS, GgufEncoder, batches
from pyagent_node.inference.models.downloads import Progress
from pyagent_node.inference.models.store import ModelStore
from pyagent_node.inference.models.stored_model import About, StoredModel
from pyagent_node.node import context_encoder
from pyagent_node.node.api.context_schema import CreateContextRequest, QueryRequest
from pyagent_node.node.api.following import nobody
from pyagent_node.node.context_encoder import Encoders
from pyagent_node.node.context_local import LocalContexts
from pyagent_node.node.context_store import open_context_store
from pyagent_node.node.contexts import Contexts
from pyagent_node.sharding.context.defaults import axes_of, calibration_texts, decode_centre
from pyagent_node.sharding.context.minilm import IDENTITY

from .tiny_bert import WIDTH, write_tiny_bert

DIGESTS = Digest("ab" * 32), Digest("cd" * 32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture
def embedder(tiny: Path) -> Iterator[GgufEmbedder]:
    opened = GgufEmbedder(tiny, GgufIdentity(*DIGESTS), dimensions=WIDTH, threads=1)
    yield opened
    opened.close()


def test_a_vector_is_that_of_the_text_alone(tiny: Path) -> None:
    encoder = GgufEncoder(tiny, threads=1)
    texts = ["the cat sat on a mat.", "a bell rings", "", "the " * 500, *["dog"] * 70]
    together = encoder.embed(texts)
    alone = np.concatenate([encoder.embed([text]) for text in texts])
    assert together.shape == (len(texts), WIDTH)
    assert np.allclose(together, alone, atol=1e-3)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert abs(float(together[0] @ together[1])) < 0.999
    encoder.close()
    encoder.close()


def test_pooling_is_what_the_file_says(tmp_path: Path) -> None:
    texts = ["the cat sat on a mat", "a bell rings in the tower"]
    rows = {}
    for pooling in (0, 1, 2):
        encoder = GgufEncoder(write_tiny_bert(tmp_path / "t.gguf", pooling=pooling), threads=1)
        rows[pooling] = encoder.embed(texts)
        encoder.close()
    assert np.array_equal(rows[0], rows[1])  # none: the mean
    assert not np.allclose(rows[1], rows[2], atol=1e-2)
    with pytest.raises(Unsupported) as caught:
        GgufEncoder(write_tiny_bert(tmp_path / "t.gguf", pooling=4), threads=1)
    assert caught.value.code == "no_encoder"


def test_batches_hold_texts_of_about_the_same_length() -> None:
    lengths = [5, 400, 7, 600, 6, *[1] * 200]
    found = list(batches(lengths))
    assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
    assert max(map(len, found)) <= BATCH_TEXTS
    assert list(batches([])) == []


def test_in_a_process_of_its_own(embedder: GgufEmbedder, tiny: Path) -> None:
    inside = GgufEncoder(tiny, threads=1)
    texts = [f"the cat sat on a mat {word}" for word in ("dog", "bell") * 50]
    assert np.allclose(embedder.embed(texts), inside.embed(texts), atol=1e-3)
    inside.close()
    assert embedder.count_tokens("the cat") == 2
    assert embedder.count_tokens("cat " * 40_000) == 40_000
    assert embedder.embed([]).shape == (0, WIDTH)


@pytest.mark.parametrize("texts", [["x" * 70_000], ["\ud800"]])
def test_bad_texts_are_refused(embedder: GgufEmbedder, texts: list[str]) -> None:
    with pytest.raises((LimitExceeded, InvalidRequest)):
        embedder.embed(texts)
    embedder.embed(["the cat"])


def test_a_process_that_dies_is_an_error_and_starts_again(embedder: GgufEmbedder) -> None:
    before = embedder.embed(["the cat"])
    (child,) = psutil.Process().children()
    child.kill()
    child.wait()
    with pytest.raises(Unavailable) as caught:
        embedder.embed(["the cat"])
    assert caught.value.code == "encoder_failed"
    assert np.array_equal(embedder.embed(["the cat"]), before)
    embedder.close()
    assert psutil.Process().children() == []


def test_a_file_that_is_no_encoder(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF but not really")
    broken = GgufEmbedder(path, GgufIdentity(*DIGESTS), dimensions=WIDTH, threads=1)
    with pytest.raises(PyAgentError) as caught:
        broken.embed(["the cat"])
    assert caught.value.code.startswith("gguf")
    broken.close()


def test_words_before_texts_are_part_of_the_identity(tiny: Path) -> None:
    wanted = GgufIdentity(*DIGESTS, "query: ", "")
    assert GgufIdentity.parse(str(wanted)) == wanted
    assert GgufIdentity.parse(str(GgufIdentity(*DIGESTS))) == GgufIdentity(*DIGESTS)
    odd = GgufIdentity(*DIGESTS, "a/b", "é %/")
    assert GgufIdentity.parse(str(odd)) == odd
    for text in (
        IDENTITY,
        "gguf/x/y",
        f"gguf/{DIGESTS[0]}",
        f"gguf/{DIGESTS[0]}/{DIGESTS[1]}/a/b/c/d/e",
    ):
        assert GgufIdentity.parse(text) is None
    with pytest.raises(ConfigError):
        GgufIdentity(*DIGESTS, "é" * 40, "").checked()
    asking = GgufEmbedder(tiny, wanted, dimensions=WIDTH, threads=1)
    vector = asking.embed_question("the cat")
    assert np.allclose(vector, asking.embed(["query: the cat"])[0], atol=1e-3)
    assert not np.allclose(vector, asking.embed(["the cat"])[0], atol=1e-2)
    asking.close()


def _held(store: ModelStore, path: Path) -> StoredModel:
    return store.add_file(path, about=About("tiny"))


async def test_a_context_keeps_the_encoder_it_was_made_with(tmp_path: Path, tiny: Path) -> None:
    """New contexts get the chosen one; another node, told nothing, fetches it when asked."""
    store = ModelStore(tmp_path / "models")
    model = _held(store, tiny)
    chosen = Encoders(store, chosen="tiny", threads=1)
    fetched: list[Digest] = []
    empty = ModelStore(tmp_path / "others")

    async def fetch(wanted: StoredModel, told: Progress) -> Path:
        fetched.append(wanted.digest)
        told(1, 1)
        path = _held(empty, tiny).path
        assert path is not None
        return path

    other = Encoders(empty, threads=1, fetch=fetch)
    async with open_context_store(tmp_path / "c", limit_bytes=1 << 30) as bodies:
        mesh = LocalContexts("me", bodies, clock=lambda: 1e6)  # type: ignore[arg-type]
        contexts = Contexts(mesh, chosen, held=bodies.held)
        view = await contexts.create(CreateContextRequest("docs", ContextPolicy()))
        assert view.encoder == str(GgufIdentity(model.digest, model.manifest))
        info = mesh.find("docs")
        opened = await chosen.open(view.encoder, nobody)
        assert opened.centre is not None
        assert np.allclose(decode_centre(info.centre, opened.dimensions), opened.centre, atol=1e-3)
        for name, text in (("a", "the cat sat on a mat"), ("b", "a bell rings in the tower")):
            await contexts.add("docs", name, text.encode(), modified=0, report=nobody)
        for encoders in (chosen, other):
            asked = Contexts(mesh, encoders, held=bodies.held)
            reply = await asked.query("docs", QueryRequest(question="a bell rings in the tower"))
            assert reply.hits[0].source == "b"
    assert fetched == [model.digest]
    await chosen.close()
    await other.close()
    assert psutil.Process().children() == []


async def test_an_encoder_that_nobody_has(tmp_path: Path) -> None:
    encoders = Encoders(ModelStore(tmp_path / "models"), chosen="no-such-model")
    with pytest.raises(NotFound) as missing:
        await encoders.choose()
    assert missing.value.code == "model_not_found"
    assert "context_encoder" in missing.value.message
    with pytest.raises(Unavailable) as caught:
        await encoders.open(str(GgufIdentity(*DIGESTS)), nobody)
    assert caught.value.code == "encoder_missing"
    with pytest.raises(Conflict):
        encoders.check("some/other/encoder")


async def test_the_centre_is_kept_and_shifts_the_axes(tmp_path: Path, tiny: Path) -> None:
    store = ModelStore(tmp_path / "models")
    model = _held(store, tiny)
    identity = str(GgufIdentity(model.digest, model.manifest))
    centres = []
    for damage in (False, True, False):
        encoders = Encoders(store, threads=1)
        opened = await encoders.open(identity, nobody)
        assert await encoders.open(identity, nobody) is opened
        assert opened.centre is not None
        centres.append(opened.centre)
        assert np.array_equal(axes_of(opened).model.centre, opened.centre)
        (place,) = (store.root / ".encoders").glob("*/centre")
        if damage:
            place.write_bytes(place.read_bytes()[:-1])
        await encoders.close()
    assert np.allclose(centres[0], centres[2], atol=1e-3)
    assert np.array_equal(centres[0], centres[1])
    assert len(calibration_texts()) >= 100


async def test_an_encoder_that_starts_again_is_counted_and_ended(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_encoder, "ALIVE", 1)
    store = ModelStore(tmp_path / "models")
    model = _held(store, tiny)
    encoders = Encoders(store, threads=1)
    one, two = [
        await encoders.open(str(GgufIdentity(model.digest, model.manifest, words)), nobody)
        for words in ("a ", "b ")
    ]
    assert isinstance(one, GgufEmbedder)
    assert isinstance(two, GgufEmbedder)
    assert (one.runs, two.runs) == (False, True)
    await trio.to_thread.run_sync(one.embed, ["the cat"])  # a long document goes on
    assert (one.runs, two.runs) == (True, False)
    await encoders.close()
    assert psutil.Process().children() == []
    with pytest.raises(Unavailable):
        await trio.to_thread.run_sync(two.embed, ["the cat"])
    assert psutil.Process().children() == []


def test_shutting_down_waits_for_no_request(embedder: GgufEmbedder) -> None:
    embedder.embed(["the cat"])
    (child,) = psutil.Process().children()
    child.suspend()  # it would answer some time
    failed: list[PyAgentError] = []

    def ask() -> None:
        try:
            embedder.embed(["the cat"])
        except PyAgentError as error:
            failed.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    while not embedder._encoder._lock.locked():
        threading.Event().wait(0.001)
    embedder.shut()
    asking.join(5)
    assert [error.code for error in failed] == ["encoder_failed"]
    assert psutil.Process().children() == []
