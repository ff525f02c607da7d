"""How many layers show every kind of layer."""

from __future__ import annotations

from gguf import GGMLQuantizationType as Type

from pyagent_node.inference.models.gguf_types import ByteRange, GgufHeader, GgufTensor
from pyagent_node.inference.models.layer_kinds import layers_of_every_kind


def header(*tensors: tuple[str, Type, int]) -> GgufHeader:
    made = {
        name: GgufTensor(name, (32, rows), kind, ByteRange(0, 0)) for name, kind, rows in tensors
    }
    return GgufHeader(
        version=3, alignment=32, fields={}, tensors=made, length=0, data_start=0, file_size=0
    )


def test_layers_count_until_the_last_new_kind() -> None:
    def layer(i: int, kind: Type = Type.Q4_K, rows: int = 8) -> list[tuple[str, Type, int]]:
        return [(f"blk.{i}.attn_q.weight", Type.Q4_K, 8), (f"blk.{i}.attn_v.weight", kind, rows)]

    def count(*layers: list[tuple[str, Type, int]]) -> int:
        return layers_of_every_kind(header(*(t for each in layers for t in each)))

    output = [("output.weight", Type.Q6_K, 99)]
    assert count(output) == 0
    assert count(layer(0), layer(1), layer(2), output) == 1
    assert count(layer(0), layer(1), layer(2, Type.Q6_K), layer(3, Type.Q6_K)) == 3
    assert count(layer(0, Type.Q6_K), layer(1), layer(2, Type.Q6_K)) == 2
    assert count(layer(0), layer(1, rows=16)) == 2
