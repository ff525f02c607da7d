"""How many layers show every kind of layer that a file has.

Weights of one model are kept in different types (K-quants give some layers more bits), and
llama.cpp picks its kernels by type.  What is tried on the first layers is true of all when every
kind is there.
"""

from __future__ import annotations

from collections import defaultdict

from pyagent_node.inference.models.architectures import layer_of
from pyagent_node.inference.models.gguf_types import GgufHeader


def layers_of_every_kind(header: GgufHeader) -> int:
    """Return the least n so that the first n layers have each pair (tensor, type, shape) of all.

    0 for a file without layers.
    """
    first: dict[tuple[object, ...], int] = defaultdict(lambda: len(header.tensors))
    for name, tensor in header.tensors.items():
        layer = layer_of(name)
        if layer is not None:
            kind = (layer[1], tensor.type, tensor.shape)
            first[kind] = min(first[kind], layer[0])
    return max(first.values(), default=-1) + 1
