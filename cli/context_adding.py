"""Adding files to a context: only what is new or changed is sent, with progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyagent_node.base.errors import (
    Conflict,
    CorruptData,
    DeadlineExceeded,
    InvalidRequest,
    LimitExceeded,
    NotFound,
    PyAgentError,
    Refused,
    Unsupported,
)
from pyagent_node.cli.context_files import (
    File,
    can_be_text,
    check_size,
    find,
    read,
    source_of,
)
from pyagent_node.cli.output import duration, size
from pyagent_node.cli.progress import Reporter
from pyagent_node.node.api.schema import Progress

if TYPE_CHECKING:
    from pyagent_node.cli.app import App
    from pyagent_node.node.api.context_schema import AddReply, DocumentView

_NO_TEXT: Final = frozenset({"binary_file", "no_text"})
_OF_A_FILE: Final = frozenset(
    {
        "bad_context_source",
        "bad_context_text",
        "broken_document",
        "context_record_too_large",
        "document_too_large",
        "document_too_slow",
        "encrypted_document",
        "file_changing",
        "file_not_found",
        "file_not_permitted",
        "text_too_large",
        *_NO_TEXT,
    }
)
"""What is wrong with one file only, so that others can be added all the same."""


class Adding:
    """Adds to the context ``name`` and keeps count."""

    def __init__(self, app: App, name: str) -> None:
        self._app = app
        self._name = name
        self._client = app.client().contexts
        self._held: dict[str, DocumentView] = {
            row.source: row for row in self._client.show(name).documents
        }
        self._counts: Counter[str] = Counter()
        self._tokens = 0
        self._bytes = 0
        self._failed: list[PyAgentError] = []

    def add_data(self, source: str, data: bytes, modified: int) -> None:
        """Add bytes that came from elsewhere; raises what is wrong with them."""
        check_size(len(data), source)
        with Reporter(self._app.out, stream_json=False) as report:
            self._send(source, data, modified, report)

    def add_paths(self, paths: Sequence[Path], name: str | None, *, prune: bool) -> None:
        """Add files and folders; one file by itself raises what is wrong with it."""
        found: dict[str, File] = {}
        folders: list[str] = []
        for path in paths:
            files = find(path, name)
            found |= {file.source: file for file in files}
            if path.is_dir():
                folders.append(_prefix(path, name))
        alone = len(paths) == 1 and not folders
        total, done = sum(file.size for file in found.values()), 0
        with Reporter(self._app.out, stream_json=False) as report:
            for file in found.values():
                text = f"adding to {self._name}"
                report(Progress(step="files", text=text, done=done, total=total))
                self._file(file, report, alone=alone)
                done += file.size
        gone = [s for s in self._held if s not in found and s.startswith(tuple(folders))]
        if gone and folders:
            self._gone(gone, prune=prune)

    def finish(self, seconds: float) -> None:
        """Say what it came to; raise if something could not be added."""
        counts = dict(self._counts)
        summary = {
            "context": self._name,
            "added": counts.get("added", 0),
            "changed": counts.get("changed", 0),
            "unchanged": counts.get("unchanged", 0),
            "removed": counts.get("removed", 0),
            "no_text": counts.get("no text", 0),
            "failed": len(self._failed),
            "tokens": self._tokens,
            "bytes": self._bytes,
            "seconds": round(seconds, 3),
        }

        def show() -> None:
            said = ", ".join(f"{count} {what}" for what, count in counts.items()) or "nothing"
            sent = f"; {self._tokens:,} tokens ({size(self._bytes)})" if self._tokens else ""
            self._app.out.text(f"{self._name}: {said}{sent} in {duration(seconds)}")

        self._app.out.result({"summary": summary}, show)
        if self._failed:
            first = self._failed[0]
            count = len(self._failed)
            raise type(first)(
                f"{count} file{'s' if count > 1 else ''} could not be added.",
                code=first.code,
                remedy="The lines above say why; the others are there.",
            )

    def _file(self, file: File, report: Reporter, *, alone: bool) -> None:
        try:
            if not can_be_text(file.path):
                raise Unsupported(
                    f"{file.path} is not text.",
                    code="binary_file",
                    remedy="Text of any sort, HTML and PDF can be added.",
                )
            content = read(file)
            self._send(file.source, content.data, content.modified, report)
        except (
            Conflict,
            CorruptData,
            DeadlineExceeded,
            InvalidRequest,
            LimitExceeded,
            NotFound,
            Refused,
            Unsupported,
        ) as error:
            if alone or error.code not in _OF_A_FILE:
                raise
            self._skip(file, error)

    def _skip(self, file: File, error: PyAgentError) -> None:
        self._app.out.line({"skipped": {"source": file.source, "error": error.to_info()}})
        if error.code in _NO_TEXT:
            self._counts["no text"] += 1
            return
        self._counts["failed"] += 1
        self._failed.append(error)
        self._app.out.note(f"not added: {error}")

    def _send(self, source: str, data: bytes, modified: int, report: Reporter) -> None:
        from pyagent_node.node.context_api import digest_of  # noqa: PLC0415

        held = self._held.get(source)
        if held is not None and held.current and held.digest == digest_of(data):
            self._counts["unchanged"] += 1
            return

        def told(progress: Progress) -> None:
            # In a log, a line for each document would be many.
            if progress.step != "embed" or self._app.out.notes.is_terminal:
                report(progress)

        reply = self._client.add(self._name, source, data, modified=modified, report=told)
        self._note(reply, len(data))

    def _note(self, reply: AddReply, data_bytes: int) -> None:
        self._counts[reply.status] += 1
        self._app.out.line({"document": reply})
        if reply.status != "unchanged":
            self._tokens += reply.tokens
            self._bytes += data_bytes
        if reply.note:
            self._app.out.note(f"{reply.source}: {reply.note}")

    def _gone(self, gone: Sequence[str], *, prune: bool) -> None:
        if not prune:
            self._app.out.note(
                f"{len(gone)} documents are of files that are there no more; --prune removes them."
            )
            return
        for source in gone:
            self._client.remove(self._name, source)
            self._counts["removed"] += 1
            self._app.out.line({"removed": source})


def _prefix(path: Path, name: str | None) -> str:
    return f"{name if name is not None else source_of(path)}/"
