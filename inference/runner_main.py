"""The runner process: ``python -m pyagent_node.inference.runner_main``.

It owns one loaded slice or one vocabulary and answers requests, one at a time.  llama.cpp may abort
or be killed for memory; then this process is gone and the daemon is not.

Its life hangs on its standard input: when that ends the process exits at once, a thread sees to it
even in the middle of a computation.  Whatever way the daemon ends, no runner is left.  (Linux's
parent-death signal is not used: it fires when the *thread* that started the process ends, and a
daemon starts processes from short-lived threads.)  SIGINT and SIGTERM are ignored, since a terminal
or a service manager sends them to the daemon too, which then ends its runners in order.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn, Protocol, TypeVar

import msgspec

from pyagent_node.base.errors import CorruptData, InvalidRequest, LimitExceeded, PyAgentError
from pyagent_node.base.wire import Frame, FrameDecoder, frame_prefix
from pyagent_node.inference.runner_packing import (
    pack_attention,
    pack_kv,
    pack_outputs,
    pack_pieces,
    unpack_kv,
    unpack_steps,
)
from pyagent_node.inference.runner_protocol import (
    MESSAGES_DECODER,
    OPS_DECODER,
    REPLIES,
    REQUESTS,
    AnyReply,
    AnyRequest,
    Apply,
    AttentionReport,
    Chat,
    Decode,
    Decoded,
    Done,
    ExportedKv,
    ExportKv,
    Failed,
    GetAttention,
    GetKvUsage,
    GetPieces,
    ImportKv,
    KvUsageReport,
    LoadSlice,
    LoadTokenizer,
    PieceTable,
    Ping,
    SliceLoaded,
    Tail,
    Text,
    Tokenize,
    TokenizerLoaded,
    TokenList,
)

EXIT_PROTOCOL: Final = 65
"""Exit code when the requests made no sense."""
EXIT_BUG: Final = 70
"""Exit code after an error that nobody foresaw; the traceback is on standard error."""

TOKENIZER_BYTES: Final = 2 << 30
"""Address space that tokenising and templates may take."""

_READ_BYTES: Final = 1 << 16  # above 128 KiB the allocator maps memory anew for each read
_JOIN_BYTES: Final = 1 << 16

Answer = tuple[AnyReply, Tail]


class Service(Protocol):
    """What a runner has become after its first request."""

    def answer(self, request: AnyRequest, tail: Tail) -> Answer:
        """Carry out one request; errors of ours become replies, others end the process."""
        ...


class _SliceService:
    def __init__(self, request: LoadSlice) -> None:
        from pyagent_node.inference.backends import open_chosen  # noqa: PLC0415 - by kind

        self.backend = open_chosen(
            request.backend,
            Path(request.path),
            request.slice,
            n_ctx=request.n_ctx,
            n_seq=request.n_seq,
            threads=request.threads,
        )

    def answer(self, request: AnyRequest, tail: Tail) -> Answer:
        backend = self.backend
        match request:
            case Decode(id, headers):
                steps = unpack_steps(headers, tail, backend.info.n_embd)
                outputs, data = pack_outputs(backend.decode(steps))
                return Decoded(id, outputs), data
            case Apply(id):
                for op in _decoded(OPS_DECODER, tail):
                    backend.apply(op)
                return Done(id), b""
            case ExportKv(id, seq, start, stop):
                kv = backend.export_kv(seq, start, stop)
                packed = pack_kv(kv)
                return ExportedKv(id, kv.codec, packed.layers), packed.tail
            case ImportKv(id, seq, codec, start, stop, layers, kept):
                kv, tokens = unpack_kv(codec, start, stop, layers, tail, with_tokens=True)
                backend.import_kv(seq, msgspec.structs.replace(kv, kept=kept), tokens)
                return Done(id), b""
            case GetAttention(id, seq):
                found = backend.attention(seq)
                layers, n = found.mass.shape
                return AttentionReport(id, n, layers, found.rows), pack_attention(found)
            case GetKvUsage(id, seq):
                return KvUsageReport(id, backend.kv_usage(seq)), b""
            case _:
                raise _wrong_kind(request)


class _TokenizerService:
    def __init__(self, request: LoadTokenizer) -> None:
        from pyagent_node.inference.llama.tokenizer import LlamaTokenizer  # noqa: PLC0415 - by kind

        path = Path(request.path)
        if path.exists():
            # a chat template is a stranger's program: other processes need their memory too
            _limit_memory(path.stat().st_size + TOKENIZER_BYTES)
        self.tokenizer = LlamaTokenizer(path)

    def answer(self, request: AnyRequest, tail: Tail) -> Answer:
        tokenizer = self.tokenizer
        match request:
            case Tokenize(id, add_special, parse_special):
                tokens = tokenizer.tokenize(
                    bytes(tail), add_special=add_special, parse_special=parse_special
                )
                return TokenList(id), tokens.tobytes()
            case Chat(id, as_tokens, now):
                messages = _decoded(MESSAGES_DECODER, tail)
                if as_tokens:
                    return TokenList(id), tokenizer.chat(messages, now=now).tobytes()
                return Text(id), tokenizer.render(messages, now=now).encode()
            case GetPieces(id):
                pieces = tokenizer.pieces()
                return PieceTable(id, len(pieces)), pack_pieces(pieces)
            case _:
                raise _wrong_kind(request)


T = TypeVar("T")


def _limit_memory(more: int) -> None:
    """Let this process map at most ``more`` bytes on top of what it has, where the system can."""
    if sys.platform == "linux":
        import resource  # noqa: PLC0415 - not there on Windows

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _decoded(decoder: msgspec.msgpack.Decoder[T], tail: Tail) -> T:
    try:
        return decoder.decode(tail)
    except msgspec.MsgspecError as error:
        raise CorruptData(
            f"A malformed runner message was refused: {error}", code="malformed_message"
        ) from None


def _wrong_kind(request: AnyRequest) -> InvalidRequest:
    return InvalidRequest(
        f"This runner does not answer {type(request).__name__}.", code="bad_request"
    )


def load(request: AnyRequest) -> tuple[Service, AnyReply]:
    """Carry out the first request; raises what loading raises, or :class:`InvalidRequest`."""
    if isinstance(request, LoadSlice):
        service = _SliceService(request)
        return service, SliceLoaded(request.id, service.backend.info)
    if isinstance(request, LoadTokenizer):
        other = _TokenizerService(request)
        return other, TokenizerLoaded(request.id, other.tokenizer.info)
    raise InvalidRequest("The first request must load something.", code="bad_request")


def serve(receive: Callable[[], Frame], send: Callable[[Frame], None]) -> NoReturn:
    """Answer requests for ever; ``receive`` and ``send`` block.

    A request that cannot be decoded raises; one that fails is answered with :class:`Failed`.
    """
    service: Service | None = None
    while True:
        frame = receive()
        request = REQUESTS.decode(frame.header)
        reply: AnyReply
        tail: Tail = b""
        try:
            if isinstance(request, Ping):
                reply = Done(request.id)
            elif service is None:
                service, reply = load(request)
            else:
                reply, tail = service.answer(request, frame.tail)
            out = Frame(REPLIES.encode(reply), tail)
            frame_prefix(out)  # a reply over the limit is an error to whoever asked
        except PyAgentError as error:
            out = Frame(REPLIES.encode(Failed(request.id, error.to_info())))
        except MemoryError:
            full = LimitExceeded("The runner ran out of memory.", code="not_enough_memory")
            out = Frame(REPLIES.encode(Failed(request.id, full.to_info())))
        send(out)


class _Inbox:
    """Reads requests from a pipe, and ends the process when the pipe ends."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._decoder = FrameDecoder()
        self._frames: deque[Frame] = deque()
        if hasattr(select, "poll"):
            # reading on the main thread saves a switch between threads for every token
            threading.Thread(target=self._watch, daemon=True, name="watch").start()
            self.receive = self._read
        else:
            # not bounded, because the daemon sends a request only after the reply to the one before
            self._queue: queue.SimpleQueue[Frame] = queue.SimpleQueue()
            threading.Thread(target=self._pump, daemon=True, name="stdin").start()
            self.receive = self._queue.get

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._fd, 0)  # wakes up for the end of the pipe only
        poll.poll()
        os._exit(0)

    def _read(self) -> Frame:
        while not self._frames:
            data = os.read(self._fd, _READ_BYTES)
            if not data:
                os._exit(0)
            self._frames.extend(self._decoder.feed(data))
        return self._frames.popleft()

    def _pump(self) -> None:
        try:
            while True:
                self._queue.put(self._read())
        except (PyAgentError, OSError) as error:
            print(f"runner: {error}", file=sys.stderr, flush=True)
            os._exit(EXIT_PROTOCOL)


def _write_all(fd: int, frame: Frame) -> None:
    head = frame_prefix(frame) + frame.header
    tail = memoryview(frame.tail)
    if tail.nbytes <= _JOIN_BYTES:
        head, tail = head + bytes(tail), memoryview(b"")
    for data in (memoryview(head), tail):
        left = data
        while left:
            left = left[os.write(fd, left) :]


def _own_stdout() -> int:
    """Return a private copy of standard output; prints of libraries go to standard error."""
    fd = os.dup(1)
    os.dup2(2, 1)
    if sys.platform == "win32":
        import msvcrt  # noqa: PLC0415 - exists there only

        msvcrt.setmode(fd, os.O_BINARY)
        msvcrt.setmode(0, os.O_BINARY)
    return fd


def main() -> None:
    """Run until standard input ends."""
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    fd = _own_stdout()
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s"
    )
    try:
        serve(_Inbox(0).receive, lambda frame: _write_all(fd, frame))
    except PyAgentError as error:
        print(f"runner: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_PROTOCOL)
    except BrokenPipeError:
        os._exit(0)
    except BaseException:
        logging.getLogger("pyagent_node.runner").exception("unexpected error")
        os._exit(EXIT_BUG)


if __name__ == "__main__":
    main()
