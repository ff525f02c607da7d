"""Contexts whose sketches lie spread over nodes: what nodes make of one context is the same."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.sharding.context.defaults import (
    decode_centre,
    default_model,
    encode_centre,
)
from pyagent_node.sharding.context.records import Version
from pyagent_node.sharding.context.shares import ALL_GROUPS, part_of
from pyagent_node.simulations.contexts import DIMENSIONS, ENCODER, toy_document, toy_vector
from tests.unit.context.context_pair import SHELF, A, B, C, pair, state

LINES = [f"The {a} of the {b} sleeps." for a in ("cat", "dog", "owl") for b in ("baker", "king")]
CENTRE = encode_centre(np.mean([toy_vector(line) for line in LINES], axis=0))


async def test_sketches_of_both_forms_stand_around_the_context_s_centre(autojump_clock):
    """What the writer put into the record is what any holder of the body makes of it."""
    info = msgspec.structs.replace(SHELF, centre=CENTRE)
    text = "\n\n".join(LINES)
    record, bodies = toy_document(SHELF.id, "a.txt", text, Version(1, C), centre=CENTRE)
    async with pair() as it:
        it.log.become(state(contexts={"shelf": info}))
        await it.stores[0].put_bodies(bodies)
        ids = [body.id for body in bodies]
        parts = await it.services[1].client.parts(A, SHELF.id, ids, ALL_GROUPS)
    packed, weights = record.packed()
    row = 0
    for chunk in record.chunks:
        part = parts[record.id_of(chunk.same)]
        own = slice(row, row + chunk.windows)
        order = np.argsort(part.at())
        # Bodies have vectors in float16, so a sign right at its border may be the other one.
        assert np.unpackbits(part.rows()[order] ^ packed[own]).mean() < 0.01
        assert np.allclose(part.scales()[order], weights[own], rtol=2e-3)
        row += chunk.windows
    (body, *_) = bodies
    plain = part_of(body, default_model(ENCODER, DIMENSIONS), ALL_GROUPS)
    order = np.argsort(plain.at())  # so the centre does say something
    assert np.unpackbits(plain.rows()[order] ^ packed[: len(plain)]).mean() > 0.05


def test_a_centre_fits_its_vectors_and_its_axes_are_made_once() -> None:
    axes = default_model(ENCODER, DIMENSIONS, CENTRE)
    assert np.array_equal(axes.model.centre, decode_centre(CENTRE, DIMENSIONS))
    assert np.array_equal(axes.buckets.centre, axes.model.centre)
    assert default_model(ENCODER, DIMENSIONS, CENTRE) is axes
    assert default_model(ENCODER, DIMENSIONS).model.centre.any() == 0
    assert encode_centre(None) == b""
    for data in (CENTRE[:-2], CENTRE + b"\0\0", b"\0"):
        with pytest.raises(InvalidRequest) as caught:
            default_model(ENCODER, DIMENSIONS, data)
        assert caught.value.code == "bad_vectors"


async def test_a_question_of_another_length_than_the_centre_is_refused(autojump_clock):
    info = msgspec.structs.replace(SHELF, centre=CENTRE)
    async with pair() as it:
        it.log.become(state(contexts={"shelf": info}))
        client = it.services[1].client
        assert (await client.likely(A, SHELF.id, toy_vector("cat"), ALL_GROUPS))[2] == []
        with pytest.raises(InvalidRequest) as caught:
            await client.likely(A, SHELF.id, np.ones(8, np.float32), ALL_GROUPS)
        assert caught.value.code == "bad_vectors"
        assert it.services[0].peer_id == A
        assert it.services[1].peer_id == B
