"""Which device torch computes on, how much memory it has, and torch's errors as errors of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple, get_args

import torch  # pyright: ignore[reportMissingImports]

from pyagent_node.base.errors import InvalidRequest, LimitExceeded, PyAgentError, Unavailable
from pyagent_node.inference.llama.memory import available_memory

DeviceName = Literal["cpu", "cuda", "mps"]
DEVICES: Final[tuple[DeviceName, ...]] = get_args(DeviceName)
DTypeName = Literal["f32", "f16"]

_NO_MEMORY: Final = ("can't allocate memory", "not enough memory", "out of memory")


class Device(NamedTuple):
    """Where and in which numbers a slice computes.

    ``dtype`` is that of matrices.  ``least_rows``: fewer rows are computed next to rows of zeros,
    because libraries compute one to three of them by other ways than more; with ``singly`` rows are
    multiplied one by one instead, because that is faster (see ``docs/backends.md``).
    """

    name: DeviceName
    dtype: DTypeName
    least_rows: int

    @property
    def singly(self) -> bool:
        """Whether a few rows are multiplied one by one: f16 on a processor."""
        return self.name == "cpu" and self.dtype == "f16"

    @property
    def number(self) -> torch.dtype:
        """The dtype of matrices as torch has it."""
        return torch.float16 if self.dtype == "f16" else torch.float32

    @property
    def cache(self) -> torch.dtype:
        """The dtype of cells; processors compute attention in f16 slower."""
        return torch.float32 if self.name == "cpu" else self.number

    @property
    def cache_bytes(self) -> int:
        """Bytes of a number in a cell."""
        return 4 if self.cache == torch.float32 else 2


def choose_device(name: str | None = None, dtype: str | None = None) -> Device:
    """Return the device of a name; without one CUDA where it is, then Apple's GPU, else processors.

    Matrices are f16 where nothing is said.  Raises :class:`InvalidRequest` (``bad_parameter``) for
    what is not known or not there.
    """
    there: dict[str, bool] = {
        "cuda": bool(torch.cuda.is_available()),
        "mps": bool(torch.backends.mps.is_available()),
        "cpu": True,
    }
    found = name or next(known for known, here in there.items() if here)
    for known in DEVICES:
        if known == found and there[known]:
            break
    else:
        usable = ", ".join(known for known, here in there.items() if here)
        raise InvalidRequest(
            f"torch cannot compute on {found[:40]!r} here, only on: {usable}.",
            code="bad_parameter",
            parameter="device",
        )
    if dtype not in (None, "f32", "f16"):
        raise InvalidRequest(
            f"Numbers of type {str(dtype)[:40]!r} are not f32 or f16.",
            code="bad_parameter",
            parameter="dtype",
        )
    kind: DTypeName = "f32" if dtype == "f32" else "f16"
    return Device(known, kind, 4 if known == "cpu" else 8)


def free_memory(device: Device) -> int:
    """Return the bytes that can be taken on the device."""
    if device.name == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return available_memory()


def exactness(device: Device) -> str:
    """Name the class of slices whose bits are alike: one library, one sort of processor."""
    version = str(torch.__version__)
    if device.name == "cuda":
        where = str(torch.cuda.get_device_name())
    elif device.name == "mps":
        where = "apple"
    else:
        where = f"{torch.backends.cpu.get_cpu_capability()}/{torch.get_num_threads()}"
    return f"torch/{version}/{device.name}/{where}/{device.dtype}"


@contextlib.contextmanager
def torch_errors(doing: str) -> Iterator[None]:
    """Map what torch raises while ``doing`` ("to compute") something.

    :class:`LimitExceeded` (``not_enough_memory``), else :class:`Unavailable` (``decode_failed``).
    """
    try:
        yield
    except PyAgentError:
        raise
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
            words in text for words in _NO_MEMORY
        ):
            raise LimitExceeded(
                f"There was not enough memory {doing}.",
                code="not_enough_memory",
                remedy="Load with a shorter context or fewer sequences, or spread the model over"
                " more nodes.",
            ) from error
        first = text.splitlines()[0][:200] if text else type(error).__name__
        raise Unavailable(f"torch failed {doing}: {first}", code="decode_failed") from error
