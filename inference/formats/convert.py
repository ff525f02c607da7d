"""``model convert``: a model in another format, with its tokenizer and its identity.

Matrices are written in f16 (or f32), norms and biases in f32, as llama.cpp wants them.  What is
written appears under its name when all of it is on disk; on an error nothing is left behind.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np

from pyagent_node.base.errors import Conflict, InvalidRequest, NotFound, Unsupported
from pyagent_node.base.files import mapped, sync_dir, sync_file, write_atomic
from pyagent_node.base.types import Digest, Slice
from pyagent_node.inference.formats.gguf_out import write_gguf
from pyagent_node.inference.formats.identity import (
    TOKENIZER_GGUF,
    TOKENIZER_JSON,
    VERSION,
    ModelIdentity,
    Report,
    manifest_path,
    tensor_digest,
    tokenizer_digest,
)
from pyagent_node.inference.formats.safetensors_out import write_safetensors
from pyagent_node.inference.formats.weights import (
    Array,
    Float,
    Weights,
    expected_shapes,
    open_weights,
)
from pyagent_node.inference.models.copying import write_copy
from pyagent_node.inference.models.model_file import ModelFile
from pyagent_node.inference.models.slice_plan import vocabulary_plan

Format = Literal["safetensors", "gguf"]
Type = Literal["f16", "f32"]
_DTYPES: Final[dict[Type, Float]] = {"f16": np.float16, "f32": np.float32}
_PUBLIC: Final = 0o644
_KEPT: Final = (
    TOKENIZER_JSON,
    TOKENIZER_GGUF,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""What a folder has beside weights that the next one is given too."""


class Converted(msgspec.Struct, frozen=True):
    """What a conversion made: ``weights`` is the digest that says which weights these are."""

    path: str
    format: Format
    type: Type
    bytes: int
    tensors: int
    config: Digest
    tokenizer: str
    weights: Digest


class Tensor(NamedTuple):
    """One tensor on its way, by its GGUF name; ``read`` returns it, rows first."""

    name: str
    shape: tuple[int, ...]
    dtype: Float
    read: Callable[[], Array]


def convert(
    source: Path,
    target: Path,
    *,
    to: Format,
    type: Type = "f16",  # the name of the option
    tokenizer: Path | None = None,
    report: Report | None = None,
) -> Converted:
    """Write the model at ``source`` (a GGUF file or a folder) to ``target`` in another format.

    ``tokenizer`` is a GGUF file with the model's vocabulary, for a folder that has none.
    ``report`` gets bytes done and in all.

    Raises :class:`Conflict` (``file_exists``), :class:`InvalidRequest` (``wrong_slice``) for a
    slice, :class:`Unsupported` (``no_vocabulary``, ``unsupported_architecture``, ``tensor_type``),
    :class:`CorruptData` and the errors of the disk.
    """
    if target.exists() or target.is_symlink():
        raise Conflict(
            f"{target} exists already.", code="file_exists", remedy="Move it, or name another."
        )
    with closing(open_weights(source)) as weights:
        config = weights.config
        if weights.held != Slice(0, config.n_layers, head=True):
            raise InvalidRequest(
                f"{source} holds only layers {weights.held} of a model.", code="wrong_slice"
            )
        vocabulary = _vocabulary(source, tokenizer)
        if to == "gguf" and vocabulary is None:
            raise Unsupported(
                f"{source} has no tokenizer that a GGUF file can hold.",
                code="no_vocabulary",
                remedy="Name a GGUF file of the same model, of any type, with --tokenizer.",
            )
        digests: dict[str, Digest] = {}
        tensors = _tensors(weights, _DTYPES[type], digests, report)
        with _appearing(target, folder=to == "safetensors") as place:
            if to == "safetensors":
                write_safetensors(place, config, tensors, vocabulary)
                _keep_files(source, place, vocabulary)
            else:
                assert vocabulary is not None, "checked"
                write_gguf(place, config, tensors, vocabulary, f16=type == "f16")
            with closing(open_weights(place)) as made:
                identity = ModelIdentity(
                    VERSION, made.config.digest, tokenizer_digest(made), digests
                )
                size = made.nbytes
            if to == "safetensors":
                _write_identity(place, identity)
        if to == "gguf":
            _write_identity(target, identity)
    return Converted(
        str(target),
        to,
        type,
        size,
        len(tensors),
        identity.config,
        identity.tokenizer,
        identity.weights,
    )


def _write_identity(path: Path, identity: ModelIdentity) -> None:
    data = msgspec.json.format(msgspec.json.encode(identity), indent=1)
    write_atomic(manifest_path(path), data + b"\n", _PUBLIC)


def _tensors(
    weights: Weights, dtype: Float, digests: dict[str, Digest], report: Report | None
) -> list[Tensor]:
    """Return the tensors to write; reading one notes its digest and reports how far it is."""
    shapes = expected_shapes(weights)
    sizes = {name: int(np.prod(shape)) * np.dtype(dtype).itemsize for name, shape in shapes.items()}
    total, done = sum(sizes.values()), 0

    def reader(name: str, kind: Float) -> Callable[[], Array]:
        def read() -> Array:
            nonlocal done
            values = weights.tensor(name, kind)
            digests[name] = tensor_digest(
                values if kind is np.float16 else weights.tensor(name, np.float16)
            )
            done += sizes[name]
            if report is not None:
                report(done, total)
            return values

        return read

    kinds = {name: dtype if len(shape) > 1 else np.float32 for name, shape in shapes.items()}
    return [
        Tensor(name, shape, kinds[name], reader(name, kinds[name]))
        for name, shape in shapes.items()
    ]


def _vocabulary(source: Path, named: Path | None) -> ModelFile | None:
    """Return the GGUF file with the tokenizer of a model, ``None`` when there is none."""
    if named is not None and not named.is_file():
        raise NotFound(f"{named} does not exist.", code="file_not_found", path=str(named))
    for path in (named, source, source / TOKENIZER_GGUF):
        if path is not None and path.is_file():
            file = ModelFile.open(path)
            if "tokenizer.ggml.tokens" in file.header.fields:
                return file
            if path == named:
                raise Unsupported(f"{path} holds no vocabulary.", code="no_vocabulary")
    return None


def _keep_files(source: Path, place: Path, vocabulary: ModelFile | None) -> None:
    """Put beside the weights what else a folder has, and the tokenizer of a GGUF file."""
    if vocabulary is not None:
        write_copy(vocabulary, vocabulary_plan(vocabulary.header), place / TOKENIZER_GGUF)
    for name in _KEPT:
        if source.is_dir() and (source / name).is_file() and not (place / name).exists():
            with mapped(source / name, "copying"):
                shutil.copyfile(source / name, place / name)


@contextmanager
def _appearing(target: Path, *, folder: bool) -> Iterator[Path]:
    """Give a temporary place that becomes ``target`` at the end, or goes away on an error."""
    with mapped(target, "writing"):
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        place = made if folder else made / target.name
        with mapped(target, "writing"):
            yield place
            for path in made.iterdir():
                path.chmod(_PUBLIC)
                with path.open("rb+") as file:
                    sync_file(file.fileno())
            if folder:
                made.chmod(0o755)
                sync_dir(made)
            place.rename(target)
            sync_dir(target.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)
