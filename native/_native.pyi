"""Types of the Rust module in ``native/src``; a test checks the one against the other."""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

__all__ = [
    "Blake3",
    "HeldTensor",
    "RaftConf",
    "RaftCore",
    "RaftDropped",
    "RaftEntry",
    "RaftReady",
    "RaftRefused",
    "RaftStatus",
    "SuffixCorpus",
    "SuffixIndex",
    "TensorTap",
    "XSalsa20",
    "attention_rows",
    "blake3",
    "gumbel",
    "hash_chain",
    "hash_file",
    "kv_decode",
    "kv_encode",
    "kv_moved",
    "lsh_probes",
    "sample",
    "sketch_pack",
    "sketch_scan",
]

@final
class Blake3:
    """BLAKE3 of data that comes in pieces."""

    def __new__(cls) -> Blake3: ...
    def update(self, data: Buffer, /) -> None:
        """Add the bytes of a buffer."""

    def digest(self) -> bytes:
        """The digest (32 bytes) of everything added so far."""

    def hexdigest(self) -> str:
        """The digest of everything added so far, as 64 hexadecimal digits."""

@final
class RaftConf:
    """Who votes and who follows, by Raft node id; each tuple is sorted.

    ``voters_outgoing`` is not empty while a joint change is under way: then a decision takes a
    majority of ``voters`` and one of ``voters_outgoing``.  ``learners_next`` are outgoing voters
    that become learners at its end; ``auto_leave`` says that the leader ends it by itself.
    Raises ``ValueError`` for an id of 0, one given twice, or sets that contradict each other.
    An empty configuration is that of a node that has not yet heard of any mesh.
    """

    def __new__(
        cls,
        voters: Sequence[int] = (),
        learners: Sequence[int] = (),
        voters_outgoing: Sequence[int] = (),
        learners_next: Sequence[int] = (),
        auto_leave: bool = False,
    ) -> RaftConf: ...
    @property
    def voters(self) -> tuple[int, ...]:
        """The voters (while joint: the incoming ones)."""

    @property
    def learners(self) -> tuple[int, ...]:
        """The nodes that follow the log and do not vote."""

    @property
    def voters_outgoing(self) -> tuple[int, ...]:
        """The voters of the configuration that is being left."""

    @property
    def learners_next(self) -> tuple[int, ...]:
        """The outgoing voters that will be learners."""

    @property
    def auto_leave(self) -> bool:
        """Whether the leader ends the joint configuration by itself."""

    @property
    def joint(self) -> bool:
        """Whether a joint change is under way."""

@final
class RaftEntry:
    """One entry of the log.

    ``kind`` is 0 for a command, 1 for a change of the configuration.  ``data`` is empty in the
    entry that a new leader begins with and in the one that ends a joint change; ``data`` of a
    configuration entry is the core's own encoding.
    """

    def __new__(
        cls, index: int, term: int, kind: int, data: bytes, context: bytes = b""
    ) -> RaftEntry: ...
    @property
    def index(self) -> int:
        """The place in the log, from 1."""

    @property
    def term(self) -> int:
        """The term of the leader that appended it."""

    @property
    def kind(self) -> int:
        """0: command (or empty); 1: configuration change."""

    @property
    def data(self) -> bytes:
        """The command."""

    @property
    def context(self) -> bytes:
        """What the proposer attached."""

@final
class RaftReady:
    """What has to be done next; see :class:`RaftCore` for the order.

    A message is ``(to, kind, bytes)`` with ``kind`` one of ``"append"``, ``"append_response"``,
    ``"vote"``, ``"vote_response"``, ``"prevote"``, ``"prevote_response"``, ``"heartbeat"``,
    ``"heartbeat_response"``, ``"snapshot"``, ``"timeout_now"``, ``"read_index"``,
    ``"read_index_response"``.
    """

    @property
    def messages(self) -> list[tuple[int, str, bytes]]:
        """To be sent now, before anything is durable."""

    @property
    def persisted_messages(self) -> list[tuple[int, str, bytes]]:
        """To be sent only after snapshot, entries and hard state are durable."""

    @property
    def entries(self) -> list[RaftEntry]:
        """To be made durable; they replace whatever the log holds from the first one's index on."""

    @property
    def hard_state(self) -> tuple[int, int, int] | None:
        """``(term, vote, commit)`` to be made durable, ``None`` when unchanged."""

    @property
    def must_sync(self) -> bool:
        """Whether the write must have reached the disk before it is acknowledged.

        ``False`` when there is nothing to write but a new commit index.
        """

    @property
    def snapshot(self) -> tuple[int, int, RaftConf, bytes] | None:
        """``(index, term, conf, data)``: replaces state and log; goes before ``entries``."""

    @property
    def committed(self) -> list[RaftEntry]:
        """To be applied, in order; each index comes exactly once in the life of a core."""

    @property
    def read_states(self) -> list[tuple[int, bytes]]:
        """``(index, context)`` of reads that may be answered once ``index`` is applied."""

@final
class RaftStatus:
    """A core's view of itself."""

    @property
    def term(self) -> int:
        """The current term."""

    @property
    def vote(self) -> int:
        """Who got this node's vote in the term, 0 for nobody."""

    @property
    def leader(self) -> int:
        """The leader's id, 0 when none is known."""

    @property
    def role(self) -> str:
        """``"leader"``, ``"follower"``, ``"candidate"``, ``"precandidate"`` or ``"learner"``.

        A follower without a vote (also one that is in no configuration) is a learner.
        """

    @property
    def commit(self) -> int:
        """The last entry known to be committed."""

    @property
    def applied(self) -> int:
        """The last entry that the caller said to have applied."""

    @property
    def last_index(self) -> int:
        """The last entry of the log, durable or not."""

    @property
    def first_index(self) -> int:
        """The first entry that is still kept."""

    @property
    def conf(self) -> RaftConf:
        """The configuration as applied here."""

    @property
    def pending_conf(self) -> bool:
        """Whether the leader may still have a configuration change to apply."""

    @property
    def transferee(self) -> int:
        """To whom the leadership is being handed over, 0 for nobody."""

    @property
    def uncommitted_bytes(self) -> int:
        """The size of what the leader has proposed and not seen committed."""

    @property
    def progress(self) -> list[tuple[int, int, bool, str]]:
        """``(id, matched, active, state)`` sorted by id; empty but on the leader.

        ``active``: heard of within an election timeout (``election_ticks``); ``state`` is
        ``"probe"``, ``"replicate"`` or ``"snapshot"``.
        """

@final
class RaftCore:
    """One node of a Raft group (tikv's ``raft``), without I/O, clock or randomness.

    It keeps the log after the last compaction in memory; making it durable is the caller's work.
    PreVote and CheckQuorum are on, reads are the safe ReadIndex.

    The caller's loop: feed :meth:`tick`, :meth:`step`, :meth:`propose`... as they come; while
    :meth:`has_ready`:

    1. ``r = ready()``.  From here to ``advance`` nothing else may be fed (``RuntimeError``).
    2. Send ``r.messages``.
    3. Make ``r.snapshot``, then ``r.entries`` and ``r.hard_state`` durable (one write).
    4. Send ``r.persisted_messages``.
    5. ``light = advance()``: the write counts as durable.  Send ``light.messages``; keep
       ``light.hard_state`` (a new commit index) for the next write, no need to sync it.
    6. If there is a snapshot, put it in the place of the state (no :meth:`advance_apply`).  Apply
       ``r.committed`` and then ``light.committed``, in order: :meth:`apply_conf` for each entry of
       kind 1, commands to the state machine, empty ones skipped.  Then ``advance_apply(index of the
       last one)``; reads of ``r.read_states`` may be answered once their index is applied.
    7. If :attr:`snapshot_wanted`, give it a :meth:`snapshot` of what is applied now.

    A node starts from its last durable snapshot: ``conf`` is the configuration at
    ``snapshot_index``, ``entries`` are those after it, without gaps (what was compacted in memory
    only may be left out or not), and everything committed after ``snapshot_index`` is handed out
    again.  **The founder of a group starts at ``snapshot_index=1, snapshot_term=1`` with itself as
    the only voter** (``term=1, vote=0, commit=1``, ``snapshot_data`` its first state): so a node
    that joins with nothing (all zeros, an empty ``conf``) is sent that state first.

    Election timeouts are never drawn here: they last :meth:`set_election_ticks` ticks, to be drawn
    again by the caller when ``term`` or ``role`` changed.  It begins as ``election_ticks``.

    Everybody is believed to be what it says it is: :meth:`step` checks that a message is whole,
    meant for this node, by its sender, and that its numbers are possible; whether the
    sender may take part at all is the caller's question.  For the group to make progress after
    changes of membership a node has to take messages, also requests for votes, from nodes that are
    not in its own (perhaps old) configuration.

    Raises ``RaftRefused`` for what is wrong in itself, ``RaftDropped`` for what cannot be done
    now, ``RuntimeError`` for calls out of order and after a failure inside the core, which is
    final: the node must stop.
    """

    def __new__(
        cls,
        node_id: int,
        *,
        conf: RaftConf,
        term: int,
        vote: int,
        commit: int,
        snapshot_index: int,
        snapshot_term: int,
        snapshot_data: bytes,
        entries: Sequence[RaftEntry],
        heartbeat_ticks: int,
        election_ticks: int,
        max_message_bytes: int,
        max_inflight: int,
        max_uncommitted_bytes: int,
    ) -> RaftCore: ...
    @property
    def node_id(self) -> int:
        """This node's Raft id."""

    @property
    def term(self) -> int:
        """The current term."""

    @property
    def role(self) -> str:
        """See :attr:`RaftStatus.role`."""

    @property
    def leader(self) -> int:
        """The leader's id, 0 when none is known."""

    @property
    def snapshot_wanted(self) -> bool:
        """Whether a follower waits for a newer snapshot; :meth:`snapshot` answers that.

        A node takes no snapshot older than its own place in the configuration, so one that has
        just been added often needs a new one.  The snapshot need not be durable here.
        """

    def tick(self) -> None:
        """Let one tick pass."""

    def set_election_ticks(self, ticks: int) -> None:
        """Set the election timeout: ``election_ticks <= ticks < 2 * election_ticks``."""

    def campaign(self) -> None:
        """Stand for election now (by PreVote); nothing on a leader or a node without a vote."""

    def step(self, sender: int, message: bytes, trust: int = 2) -> None:
        """Take a message that came from node ``sender``.

        ``trust`` says what counts of it: 2 everything, 1 what a node without a vote says (answers
        and reads), 0 that only unless it is of a later term.

        Raises ``RaftRefused`` for a malformed one, one whose sender, addressee, kind, term or
        indices cannot be; nothing has changed then.
        """

    def propose(self, data: bytes, context: bytes = b"") -> tuple[int, int]:
        """Append a command on the leader; returns the ``(index, term)`` it got.

        It is committed when an entry with both comes back in ``committed``, and lost when another
        one comes at that index.  ``RaftDropped``: not the leader, a transfer is under way, or too
        much is uncommitted.  ``RaftRefused``: empty, or larger than ``max_message_bytes``.
        """

    def propose_conf(
        self, voters: Sequence[int], learners: Sequence[int], context: bytes = b""
    ) -> tuple[int, int] | None:
        """Propose these voters and learners on the leader; returns ``(index, term)``.

        One change of one voter goes in one step, anything more by joint consensus, which the
        leader ends by itself.  ``None`` when it is the configuration already.  ``RaftRefused``: no
        voters, more than 256 nodes, an id of 0, twice or in both.  ``RaftDropped`` as for
        :meth:`propose`, or another change is under way.
        """

    def read_index(self, context: bytes) -> None:
        """Ask for a linearizable read; ``context`` (1 to 64 bytes) comes back in ``read_states``.

        Works on every node that knows a leader.  **Never use a context twice**, not even after a
        restart: an old answer would count for the new read.  The answer may get lost: ask again
        after a while.  ``RaftDropped``: no leader, too many reads pending, or a new
        leader that has not committed anything yet.
        """

    def transfer(self, to: int) -> None:
        """Begin to hand the leadership to a voter; given up after an election timeout.

        ``RaftRefused``: ``to`` is no voter; ``RaftDropped``: not the leader.
        """

    def has_ready(self) -> bool:
        """Whether :meth:`ready` has something."""

    def ready(self) -> RaftReady:
        """Take what has to be done; :meth:`advance` must follow."""

    def advance(self) -> RaftReady:
        """Say that what :meth:`ready` gave is durable; returns what follows from that at once.

        Only ``messages``, ``committed`` and ``hard_state`` may be filled.
        """

    def advance_apply(self, index: int) -> None:
        """Say that all entries up to ``index`` are applied.

        Raises ``ValueError`` when it goes back, beyond what was handed out, or past a
        configuration entry that :meth:`apply_conf` has not seen.
        """

    def apply_conf(self, entry: RaftEntry) -> RaftConf:
        """Apply a committed entry of kind 1, in order; returns the configuration that holds now.

        A change that is impossible in the present configuration changes nothing (the same on
        every node).  A leader that has no vote afterwards steps down.  Raises ``ValueError`` for
        an entry that was not handed out or not yet due.
        """

    def snapshot(self, index: int, data: bytes) -> tuple[int, int, RaftConf, bytes]:
        """Keep ``data`` as the state after entry ``index``, for followers that lag behind.

        Returns ``(index, term, conf, data)``, to be made durable.  ``index`` must be applied and
        not before the last snapshot (``ValueError``).
        """

    def compact(self, index: int) -> None:
        """Drop the entries up to ``index`` (at most the snapshot's) from memory."""

    def report_unreachable(self, node_id: int) -> None:
        """Say that messages to a node were lost."""

    def report_snapshot(self, node_id: int, ok: bool) -> None:
        """Say how sending a message of kind ``"snapshot"`` ended; must follow each of them."""

    def status(self) -> RaftStatus:
        """The core's view of itself."""

    def take_log(self) -> list[tuple[str, str]]:
        """Take the core's log lines since the last call (at most the newest 256).

        ``(level, message)`` with ``level`` one of ``"critical"``, ``"error"``, ``"warning"``,
        ``"info"``.
        """

class RaftDropped(Exception):
    """It cannot be done now, and may be tried again later or elsewhere."""

class RaftRefused(ValueError):
    """A message or a proposal that is wrong in itself."""

@final
class SuffixCorpus:
    """Texts of past sessions, and what may come next in another text by them.

    It never reserves more than ``max_bytes`` (65,536 to 2 GiB) and forgets the oldest texts for
    that; a token takes about 60 to 100 bytes.  Adding takes less than a microsecond a token, on
    average; guessing some microseconds.
    """

    def __new__(cls, max_bytes: int) -> SuffixCorpus: ...
    def add(self, tokens: Sequence[int]) -> None:
        """Add a text; guesses never lead from one text into another."""

    def propose(
        self, tail: Sequence[int], limit: int, min_match: int, floor: float = 0.0
    ) -> tuple[list[int], list[float]]:
        """Guess what comes after ``tail``, of which the last 64 tokens are looked at.

        As :meth:`SuffixIndex.propose`; nothing is learnt about how often it is right.
        """

    def __len__(self) -> int:
        """How many tokens are remembered."""

    @property
    def nbytes(self) -> int:
        """The memory that is reserved for it, in bytes."""

@final
class SuffixIndex:
    """A text that grows, and what may come next by what followed the same tokens earlier in it.

    A suffix automaton (Blumer et al., 1985) whose edges count how often they were taken.  A token
    takes constant time on average (less than a microsecond) and about 60 to 100 bytes, 200 at
    worst.  Beyond ``max_tokens`` (2 to 2**26) the older half of the text is forgotten.
    """

    def __new__(cls, max_tokens: int) -> SuffixIndex: ...
    def extend(self, tokens: Sequence[int], weight: float = 1.0) -> None:
        """Add tokens (each from 0 to 2**32 - 2).

        Every token also shows whether it was to be expected: that is what confidences are learnt
        from, with a ``weight`` of 0 (nothing is learnt) to 1.  Nothing is added when ``ValueError``
        or ``TypeError`` is raised.
        """

    def propose(
        self, ahead: Sequence[int], limit: int, min_match: int, floor: float = 0.0
    ) -> tuple[list[int], list[float]]:
        """Guess up to ``limit`` tokens that come after the text and ``ahead``.

        The longest suffix that has occurred before says what comes: what followed it most often,
        or, of equals, most recently; and so on from there.  Ends where less than ``min_match``
        tokens match, and where all guesses together are less likely than ``floor``.  Returns the
        tokens and for each the probability that it is right given that those before it are.
        """

    def alternatives(
        self, ahead: Sequence[int], limit: int, min_match: int, floor: float = 0.0
    ) -> tuple[list[int], list[float]]:
        """Guess the token after the text and ``ahead`` in up to ``limit`` ways.

        What followed the longest suffix that has occurred before, the most frequent first, then
        what followed shorter ones, down to ``min_match`` tokens.  Ends where a guess is less likely
        than ``floor``.  Returns the tokens and for each the probability that it is right.
        """

    def __len__(self) -> int:
        """How many tokens are remembered."""

    @property
    def matched(self) -> int:
        """How many of the last tokens have occurred in the same order earlier."""

    @property
    def nbytes(self) -> int:
        """The memory that is reserved for it, in bytes."""

@final
class TensorTap:
    """Copies one tensor out of every llama.cpp graph that runs while the tap is armed.

    ``name`` is the tensor's exact name (``"l_out-9"``), ``capacity`` the most floats that an armed
    array may hold.  The keyword arguments are the addresses of ``ggml_get_name``, ``ggml_nbytes``
    and ``ggml_backend_tensor_get`` in the library that runs the graph; a wrong address crashes the
    process.  Give :attr:`callback` and :attr:`user_data` to the context as ``cb_eval`` and
    ``cb_eval_user_data``, and keep the tap alive for as long as the context.

    The callback runs without the interpreter lock.  A tap that is not armed asks for nothing and
    costs next to nothing.

    ``tensor_set`` is the address of ``ggml_backend_tensor_set``, for tensors that are to be
    written, ``get_data`` that of ``ggml_get_data``, for tensors in this process's own memory whose
    pages are to be given back.  ``early`` is the name of another tensor, after which a graph may be
    left: see :meth:`arm`.
    """

    def __new__(
        cls,
        name: str,
        capacity: int,
        *,
        get_name: int,
        nbytes: int,
        tensor_get: int,
        tensor_set: int | None = None,
        early: str | None = None,
        get_data: int | None = None,
    ) -> TensorTap: ...
    @property
    def callback(self) -> int:
        """The address of the callback, for ``cb_eval``."""

    @property
    def user_data(self) -> int:
        """The address to give as ``cb_eval_user_data``."""

    @property
    def capacity(self) -> int:
        """The most floats that an armed array may hold."""

    def arm(self, out: NDArray[np.float32], /, *, early: bool = False) -> None:
        """Send what the tap sees from now on into ``out`` (C-contiguous, writable), from its start.

        A batch that runs as several graphs is appended piece by piece.  Arming again starts
        anew.  Do not read or write ``out`` while a graph runs.  With ``early`` it is the early
        tensor that is copied, and what comes after it in its graph is not computed: nothing else
        that comes out of the call means anything.
        """

    def collect(self) -> int:
        """Disarm; return how many floats were written since ``arm``.

        Returns -1 when some tensor did not fit.  Raises ``ValueError`` when the tap is not armed.
        """

    def query(
        self,
        prefix: str,
        out: NDArray[np.float32],
        rows: NDArray[np.int32],
        /,
        *,
        layers: int,
        call_rows: int,
    ) -> None:
        """Send the queries of ``rows`` of the next call, which has ``call_rows``, into ``out``.

        Queries are the tensors named ``prefix`` and a layer's number; of several with one name the
        last counts.  ``out`` (C-contiguous, writable) holds a row for each of ``rows`` in each of
        ``layers`` layers.  The call must be one graph.  Raises ``ValueError`` for numbers that do
        not fit together.
        """

    def queried(self) -> bool:
        """Stop taking queries; return whether those of every layer came, in the expected size.

        Raises ``ValueError`` when none were asked for.
        """

    def watch(self, prefix: str, /, *, tensor_bytes: int) -> None:
        """Note tensors whose names begin with ``prefix`` in the next graphs, until :meth:`found`.

        ``tensor_bytes`` is what a tensor without its data takes: ``ggml_tensor_overhead()`` less 32
        for the object around it.
        """

    def skip(self, on: bool, /) -> None:
        """Leave every graph at its first node from now on, or let graphs run again; disarms.

        llama.cpp gives the rows of a call their KV cells before it computes: afterwards the cells
        are there, and hold what was in that memory before.
        """

    def found(self) -> list[HeldTensor]:
        """Stop watching; return what was seen, by name, the largest view of each.

        A view has the name of what it is a view of, and words in brackets after it.
        """

@final
class HeldTensor:
    """A tensor that a :class:`TensorTap` has seen and that can be read later, from any thread.

    The memory behind it must stay where it was, as a KV cache does while its context lives.
    """

    @property
    def name(self) -> str:
        """The name of what it is a view of (``"cache_k_l9"``)."""

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""

    def read(self, offset: int, size: int, /) -> bytes:
        """Copy bytes ``[offset, offset + size)``.

        Raises ``ValueError`` when they are not all in it.
        """

    def write(self, offset: int, data: Buffer, /) -> None:
        """Put ``data`` at ``offset``, in a tensor of a tap that was made with ``tensor_set``.

        Raises ``ValueError`` when it does not all fit in.
        """

    def release(self, offset: int, size: int, /) -> int | None:
        """Give the whole pages among bytes ``[offset, offset + size)`` back to the system.

        Returns how many bytes those were: they are read as zeros from now on.  Elsewhere than on
        Linux nothing is done and ``None`` returned.  The tap must have been made with
        ``tensor_set`` and ``get_data``.  Raises ``ValueError`` for bytes that are not all in the
        tensor, and ``OSError``.
        """

    def resident(self, offset: int, size: int, /) -> int | None:
        """Return how many of bytes ``[offset, offset + size)`` are in memory; errors as above.

        ``None`` where the system does not say.  A page that was only read since it was given back
        counts too.
        """

@final
class XSalsa20:
    """The XSalsa20 stream cipher (Bernstein, "Extending the Salsa20 nonce"), one direction of it.

    ``key`` has 32 bytes, ``nonce`` 24.
    """

    def __new__(cls, key: Buffer, nonce: Buffer) -> XSalsa20: ...
    def apply(self, data: Buffer, /) -> bytes:
        """Encrypt or decrypt (the same thing) the next bytes of the stream."""

def blake3(data: Buffer, /) -> bytes:
    """The BLAKE3 digest (32 bytes) of a buffer."""

def hash_file(
    path: str | PathLike[str], chunk_bytes: int, progress: Callable[[int], object] | None = None
) -> tuple[bytes, bytes]:
    """Return the BLAKE3 digest of a file, and the digests of its chunks, concatenated.

    Every chunk but the last has ``chunk_bytes`` bytes; an empty file has no chunk.  ``progress`` is
    called with the bytes done so far about once a mebibyte; what it raises ends the work and is
    passed on, and so are signals such as Ctrl-C.  Raises ``OSError`` (with the file's name) when
    the file cannot be read, ``ValueError`` when it is not a regular file, ``chunk_bytes`` is out
    of range or there are more than 2**20 chunks.
    """

def hash_chain(parent: Buffer, tokens: NDArray[np.int32], block: int) -> bytes:
    """Return the hash chain of the whole blocks of ``tokens``, as concatenated digests.

    Each digest is BLAKE3 of the digest before it (``parent``, 32 bytes, for the first) followed by
    the block's ``block`` tokens as little-endian 32-bit integers.  Tokens after the last whole
    block do not count.
    """

def kv_encode(
    level: int,
    keys: Buffer,
    values: Buffer,
    *,
    tokens: int,
    heads: int,
    width: int,
    rope_base: float = 0.0,
    rope_halves: bool = False,
    first: int = 0,
) -> bytes:
    """Return the rows of one layer for up to 64 tokens as a block; see ``sharding.kv_codec``.

    ``keys`` and ``values`` hold ``tokens`` rows of ``heads * width`` little-endian f16 each.
    ``rope_base`` is the base of the rotation that the keys have been through, 0 when it is not
    known; ``rope_halves`` says that it turns number i with number i + width / 2 of a head.  The
    first ``first`` tokens are kept finer than the others.  Raises ``ValueError`` for numbers out of
    range, rows of another length, and NaN or infinity at a level that is not exact.
    """

def kv_decode(block: Buffer, /) -> tuple[int, int, int, int, bytes, bytes]:
    """Return what a block holds: (level, tokens, heads, width, keys, values).

    Raises ``ValueError`` for anything but a whole and undamaged block.
    """

def kv_moved(
    keys: Buffer, delta: int, *, width: int, rope_base: float, rope_halves: bool = False
) -> bytes:
    """Return rows of rotated keys as they are ``delta`` positions further on.

    ``keys`` are heads of ``width`` little-endian f16 each, any number of them; the rotation is told
    as for :func:`kv_encode`.  Raises ``ValueError`` for numbers out of range and for rows of
    another length.
    """

def attention_rows(
    keys: list[HeldTensor],
    first: int,
    queries: NDArray[np.float32],
    limits: NDArray[np.int32],
    /,
    *,
    heads: int,
    kv_heads: int,
    width: int,
    scale: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """Return where rows attended, summed over the rows: mass, peak and entropy.

    ``keys`` are the key caches of the layers, in rows of ``kv_heads`` heads of ``width`` f16; the
    cells begin at row ``first``.  ``queries`` (1-d) holds for each layer and row ``heads`` heads of
    ``width`` numbers.  Row ``r`` sees the first ``limits[r]`` cells, at least one; n is the most
    of them.  The weights of a row and head are the softmax of ``scale`` times the dot products.

    Mass (layers * n numbers) is the mean over the heads, peak (n) the most in any head of any
    layer, entropy (one a layer) the mean over the heads, in nats.  Raises ``ValueError`` for
    numbers that do not fit together.
    """

def gumbel(seed: int, position: int, n: int) -> NDArray[np.float64]:
    """Return the Gumbel noise of the tokens ``0 <= token < n`` at a position.

    ``seed`` and ``position`` are unsigned 64-bit integers, ``n`` is at most 2**24.  The generator
    is Philox4x32-10 (Salmon et al., SC 2011) with the seed as key (low word first) and the counter
    ``(token // 2, position low word, position high word, 0)``.  An even token takes the first two
    output words, an odd one the last two, as one number with its first word on top; the upper 52
    bits ``b`` of that give ``u = (b + 0.5) / 2**52``, and the noise is ``-ln(-ln(u))``: the same
    bits on every platform.
    """

def sample(
    logits: NDArray[np.float32],
    history: NDArray[np.int32],
    position: int,
    *,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    frequency_penalty: float,
    presence_penalty: float,
    bias_tokens: NDArray[np.int32],
    bias_values: NDArray[np.float32],
    top_logprobs: int,
    noisy: bool = False,
) -> tuple[int, float, list[tuple[int, float]]]:
    """Choose the token at ``position``, as a function of the arguments alone.

    ``logits`` has one entry a token, finite or -inf (never to be chosen); ``history`` holds the
    session's tokens so far.  All arithmetic is in doubles, in a fixed order, and gives the same
    token on every platform.  The steps:

    1. ``bias_values`` are added to the logits of ``bias_tokens``.
    2. For each distinct token of the history: a positive logit is divided by
       ``repetition_penalty``, another one multiplied; then ``frequency_penalty`` times its
       occurrences is taken off, then ``presence_penalty``.
    3. ``temperature == 0`` ends here with the argmax.  Otherwise a token's log-weight is
       ``(x - max x) / temperature`` and its weight the exponential of that.
    4. ``top_k`` (0 = off) keeps the k highest logits.
    5. ``top_p`` (1 = off) keeps the fewest highest logits whose weights add up to at least
       ``top_p`` of the weight of all that step 4 left; always at least one.
    6. ``min_p`` (0 = off) keeps the tokens whose weight is at least ``min_p`` (the highest is 1).
    7. The token with the highest sum of log-weight and :func:`gumbel` noise wins.

    Ties go to the lowest token.  ``top_logprobs == -1`` returns ``(token, nan, [])``; otherwise the
    second element is the log-probability of the token and the third the ``top_logprobs`` likeliest
    tokens with theirs, likeliest first (fewer when fewer have a finite logit), all of the
    softmax of ``logits`` as given, before any step.  With ``noisy`` the third element has the
    tokens that step 7 puts first, the winner and those after it, instead of the likeliest; where
    nothing is truncated, runners-up are looked for among the 256 likeliest.

    Raises ``ValueError`` for a value out of range (NaN or +inf logits, no logits, nothing but -inf,
    a token outside the vocabulary, a parameter outside its range) and ``TypeError`` for a wrong
    type.
    """

def sketch_pack(values: NDArray[np.float32], bits: int, /) -> NDArray[np.uint8]:
    """Return the signs of rows of ``bits`` values, ``bits / 8`` bytes a row.

    Bit ``i % 8`` (from the lowest) of byte ``i / 8`` of a row says that value ``i`` is positive.
    ``values`` holds the rows one after the other; ``bits`` is a multiple of 8 up to 4096.  Raises
    ``ValueError`` for other sizes and for values that are not finite or larger than 1e15.
    """

def sketch_scan(
    sketches: NDArray[np.uint8],
    query: NDArray[np.float32],
    count: int,
    /,
    weights: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Return the rows and scores of the ``count`` sketches that agree best with ``query``.

    A sketch's score is the sum of the query's values, negated where the sketch's bit is 0, times
    its weight (1 without ``weights``).  Best first, of equal ones the lower row first; all of them
    when there are fewer.  ``sketches`` holds rows of ``len(query) / 8`` bytes.  The same arguments
    give the same result on every machine.  Raises ``ValueError`` for sizes that do not fit and for
    numbers that are not finite or larger than 1e15.
    """

def lsh_probes(
    query: NDArray[np.float32], count: int, /
) -> tuple[NDArray[np.uint32], NDArray[np.float64]]:
    """Return the ``count`` buckets nearest to ``query`` (1 to 30 values) and what they cost.

    Bit ``i`` of a bucket's number is the sign of value ``i``.  The query's own bucket comes first,
    at no cost; the others by the sum of the squares of the values whose sign they flip.  Raises
    ``ValueError`` for other sizes and for values that are not finite or larger than 1e15.
    """
