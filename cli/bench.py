"""``bench``: speed, side by side with a baseline in the same run."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click
import msgspec

from pyagent_node.base.files import write_atomic
from pyagent_node.cli.app import App, json_option, pass_app
from pyagent_node.cli.bench_backends import backends
from pyagent_node.cli.bench_consensus import consensus
from pyagent_node.cli.bench_context import context
from pyagent_node.cli.bench_edge import edge
from pyagent_node.cli.bench_failover import failover
from pyagent_node.cli.bench_kv import kv
from pyagent_node.cli.bench_reshard import reshard
from pyagent_node.cli.bench_simulator import simulator
from pyagent_node.cli.bench_speculation import speculation
from pyagent_node.cli.demo import MAX_NODES, N_CTX, model_file, place
from pyagent_node.cli.lists import numbers
from pyagent_node.cli.model import DEFAULT
from pyagent_node.cli.output import size

if TYPE_CHECKING:
    from pyagent_node.benchmarks.pipeline import Report

PROMPT = "Write a short story about a lighthouse keeper and the sea."
DEFAULT_TOKENS, DEFAULT_ROUNDS = 128, 3
FULL_TOKENS, FULL_ROUNDS = 512, 10
SETTLE_SECONDS = 2.0
"""Time for fresh daemons to finish what they do after starting, before memory is read."""


class Storable(Protocol):
    """A report: which benchmark it is of, and when it was taken (Unix seconds)."""

    @property
    def bench(self) -> str:
        """The name of the verb."""
        ...

    @property
    def time(self) -> float:
        """When."""
        ...


@click.group("bench")
def bench_command() -> None:
    """Measure speed; each verb prints a table and stores its figures as JSON."""


bench_command.add_command(backends)
bench_command.add_command(consensus)
bench_command.add_command(simulator)
bench_command.add_command(failover)
bench_command.add_command(reshard)
bench_command.add_command(edge)
bench_command.add_command(kv)
bench_command.add_command(context)
bench_command.add_command(speculation)


@bench_command.command("pipeline")
@click.option("--ranks", default="1,2,3", show_default=True, metavar="N,M,..")
@click.option(
    "--tokens", type=click.IntRange(2, 1500), help=f"An answer (default {DEFAULT_TOKENS})."
)
@click.option("--rounds", type=click.IntRange(1, 1000), help=f"Default {DEFAULT_ROUNDS}.")
@click.option("--full", is_flag=True, help=f"{FULL_ROUNDS} rounds of {FULL_TOKENS} tokens.")
@click.option("--model", default=DEFAULT, show_default=True, help="A source or a file.")
@click.option(
    "--baseline-threads",
    type=click.IntRange(0, 512),
    default=0,
    help="Threads of the one process; 0 (the default) leaves llama-cpp-python's own choice.",
)
@click.option("--output", type=click.Path(dir_okay=False), help="Where to store the figures.")
@json_option
@pass_app
def pipeline(
    app: App,
    *,
    ranks: str,
    tokens: int | None,
    rounds: int | None,
    full: bool,
    model: str,
    baseline_threads: int,
    output: str | None,
) -> None:
    """A model split over daemons on this machine against a plain loop in one process.

    Also what a token's time is spent on, the overhead a hop, and the memory of an idle daemon.
    """
    from pyagent_node.benchmarks import pipeline as bench  # noqa: PLC0415
    from pyagent_node.benchmarks.single import SingleProcess  # noqa: PLC0415
    from pyagent_node.benchmarks.swarm import interruptible, local_swarm  # noqa: PLC0415

    counts = numbers(
        "--ranks",
        ranks,
        int,
        least=1,
        most=MAX_NODES,
        remedy=f"Write numbers from 1 to {MAX_NODES} with commas: 1,2,3.",
    )
    with interruptible():
        path = model_file(app, model)
        plan = bench.Plan(
            path=str(path),
            prompt=PROMPT,
            tokens=tokens or (FULL_TOKENS if full else DEFAULT_TOKENS),
            rounds=rounds or (FULL_ROUNDS if full else DEFAULT_ROUNDS),
            n_ctx=N_CTX,
            baseline_threads=baseline_threads,
        )
        with local_swarm(max(counts), say=app.out.note) as swarm, SingleProcess() as single:
            time.sleep(SETTLE_SECONDS)
            idle = bench.resident_bytes(swarm[-1])
            arms = []
            for count in counts:
                placement = place(app, swarm, path, ranks=count)
                arms.append(
                    bench.measure(
                        plan, count, swarm[0].client, placement.name, single, say=app.out.note
                    )
                )
                swarm[0].client.unload(placement.name)
    report = bench.Report(
        bench="pipeline",
        time=time.time(),
        machine=machine(),
        model=model,
        tokens=plan.tokens,
        rounds=plan.rounds,
        baseline_threads=plan.baseline_threads,
        idle_daemon_bytes=idle,
        arms=tuple(arms),
    )
    stored = store(app, output, report)
    app.out.result(report, lambda: _show(app, report))
    app.out.note(f"Stored in {stored}.")


def machine() -> dict[str, str | int]:
    """Return what figures depend on: processor, cores, versions; no names of people or hosts."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "pyagent_node": metadata.version("pyagent-node"),
        "llama_cpp_python": metadata.version("llama-cpp-python"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def store(app: App, output: str | None, report: Storable) -> Path:
    """Write the figures of a benchmark as JSON, where asked or into the home; return where."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(report.time))
    default = app.home.root / "bench" / f"{report.bench}-{stamp}.json"
    path = Path(output).expanduser() if output else default
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n", 0o644)
    return path


def _show(app: App, report: Report) -> None:
    from rich.table import Table  # noqa: PLC0415

    from pyagent_node.benchmarks.pipeline import UNSTEADY  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="dim")
    names = ("ranks", "tok/s", "one process", "ratio", "first token", "compute", "hops", "head")
    for name in (*names, "a hop p50", "a hop p99", "equal"):
        table.add_column(name, justify="right")
    for arm in report.arms:
        table.add_row(
            str(arm.ranks),
            f"{arm.tokens_per_second:.1f}",
            f"{arm.baseline_tokens_per_second:.1f}",
            f"{arm.ratio:.2f}",
            f"{arm.ttft_seconds * 1000:.0f} ms",
            f"{arm.compute_ms.mean:.2f} ms",
            f"{arm.hop_ms.mean * arm.ranks:.2f} ms",
            f"{arm.head_ms:.2f} ms",
            f"{arm.hop_ms.p50:.2f} ms",
            f"{arm.hop_ms.p99:.2f} ms",
            "yes" if arm.identical else "NO",
        )
    app.out.console.print(table)
    app.out.text(
        f"compute, hops, head: what one token's time is spent on.  {report.rounds} rounds of"
        f" {report.tokens} tokens, greedy, both arms in turn."
    )
    if report.baseline_spread > UNSTEADY:
        app.out.text(
            f"NOTE: one process itself varied by a factor of {report.baseline_spread:.1f}."
            " Something else used the machine, and its busy-waiting threads suffer most from that."
            " Measure again when it is quiet."
        )
    app.out.text(f"An idle daemon without a model: {size(report.idle_daemon_bytes)} resident.")
