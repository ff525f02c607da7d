"""Cuts slices out of GGUF files on disk; :mod:`slice_plan` decides what a slice consists of."""

from __future__ import annotations

from pathlib import Path

from pyagent_node.base.errors import InvalidRequest
from pyagent_node.base.types import Slice
from pyagent_node.inference.models.architectures import is_whole
from pyagent_node.inference.models.copying import write_copy
from pyagent_node.inference.models.model_file import ModelFile
from pyagent_node.inference.models.slice_plan import (
    DUMMY_VOCAB,
    FORMAT_KEY,
    SLICE_FORMAT,
    SLICE_KEY,
    VOCABULARY,
    SlicePlan,
    slice_plan,
    vocabulary_plan,
)

__all__ = [
    "DUMMY_VOCAB",
    "FORMAT_KEY",
    "SLICE_FORMAT",
    "SLICE_KEY",
    "VOCABULARY",
    "SlicePlan",
    "slice_plan",
    "vocabulary_plan",
    "write_slice",
]


def write_slice(source: Path | ModelFile, part: Slice, path: Path) -> SlicePlan:
    """Write the slice ``part`` of ``source`` to ``path``: temporary name, sync, rename.

    Raises the errors of :func:`slice_plan`, :class:`Unavailable` (``bytes_missing``, ``disk_full``)
    and :class:`InvalidRequest` (``bad_slice``) for the whole model, which needs no copy.  On any
    error nothing is left behind.
    """
    file = source if isinstance(source, ModelFile) else ModelFile.open(source)
    plan = slice_plan(file.header, part)
    if is_whole(part, plan.shape.n_layers):
        raise InvalidRequest("The whole model is used as it is.", code="bad_slice")
    write_copy(file, plan.copy, path)
    return plan
