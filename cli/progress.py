"""Showing how far a long operation is: bars on a terminal, plain lines in a log, JSON lines."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING

from pyagent_node.cli.output import Output, size
from pyagent_node.node.api.schema import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

LINE_SECONDS = 5.0
"""Time between two plain lines of one step."""


class Reporter(AbstractContextManager["Reporter"]):
    """Takes :class:`Progress` reports and shows them on stderr.

    ``stream_json`` also prints each report as a line on stdout with ``--json``.
    """

    def __init__(self, out: Output, *, stream_json: bool = True) -> None:
        self._out = out
        self._stream_json = stream_json
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._shown: dict[str, float] = {}
        self._texts: dict[str, str] = {}

    def __enter__(self) -> Reporter:
        if not self._out.json and self._out.notes.is_terminal:
            self._bars = _bars(self._out)
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, report: Progress) -> None:
        """Show one report."""
        if self._out.json:
            if self._stream_json:
                self._out.line({"progress": report})
        elif self._bars is not None:
            self._bar(self._bars, report)
        else:
            self._plain(report)

    def _bar(self, bars: Bars, report: Progress) -> None:
        task = self._tasks.get(report.step)
        amount = describe(report)
        if task is None:
            task = bars.add_task(report.text or report.step, total=report.total, amount=amount)
            self._tasks[report.step] = task
        bars.update(
            task,
            description=report.text or report.step,
            completed=report.done,
            total=report.total,
            amount=amount,
        )

    def _plain(self, report: Progress) -> None:
        now = time.monotonic()
        ended = report.total is not None and report.done >= report.total
        fresh = self._texts.get(report.step) != report.text
        due = now - self._shown.get(report.step, 0.0) >= LINE_SECONDS
        if fresh or due or ended:
            self._texts[report.step] = report.text
            self._shown[report.step] = now
            amount = describe(report)
            amount = "" if amount in report.text else amount
            self._out.note(f"{report.text or report.step}{f' ({amount})' if amount else ''}")


def describe(report: Progress) -> str:
    """Return the amount in words: ``12.0 MB of 98.4 MB``; empty when nothing is counted."""
    if report.unit == "bytes":
        done, total = size(report.done), size(report.total or 0)
    else:
        done, total = str(report.done), f"{report.total} {report.unit}"
    if report.total is None:
        return done if report.done else ""
    return f"{done} of {total}"


def _bars(out: Output) -> Bars:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn  # noqa: PLC0415
    from rich.progress import TimeElapsedColumn as Elapsed  # noqa: PLC0415

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[amount]}", markup=False),
        Elapsed(),
        console=out.notes,
        transient=True,
    )
