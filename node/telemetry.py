"""The node's metrics, for Prometheus.

:class:`Telemetry` owns its registry (nothing is global, so a test may have many).  What other
parts count in their own plain structs is read when it is scraped: see :meth:`Telemetry.bridge`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, Literal

import msgspec
import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
PREFIX: Final = "pyagent_"

_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Sample(msgspec.Struct, frozen=True):
    """One number that another part of the node counts.

    ``name`` comes without the prefix and without ``_total``; samples of one name share their
    ``help`` and the keys of their ``labels``.
    """

    name: str
    help: str
    value: float
    kind: Literal["counter", "gauge"] = "counter"
    labels: Mapping[str, str] = {}


Source = Callable[[], Iterable[Sample]]


class _Bridge(Collector):
    def __init__(self) -> None:
        self.sources: list[Source] = []

    def collect(self) -> Iterator[Metric]:
        """Yield a family for each name, in the order of first appearance."""
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for source in self.sources:
            for sample in source():
                family = families.get(sample.name)
                if family is None:
                    make = CounterMetricFamily if sample.kind == "counter" else GaugeMetricFamily
                    family = make(PREFIX + sample.name, sample.help, labels=list(sample.labels))
                    families[sample.name] = family
                family.add_metric(list(sample.labels.values()), sample.value)
        yield from families.values()


class RequestMetrics:
    """The HTTP API.

    * ``pyagent_http_requests_total{route, method, status}``: requests ended; ``route`` is the
      route's pattern (``other`` for unknown paths), status 499 a client that hung up.
    * ``pyagent_http_request_seconds{route}``: their duration.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            PREFIX + "http_requests",
            "HTTP requests ended.",
            ("route", "method", "status"),
            registry=registry,
        )
        self.seconds = Histogram(
            PREFIX + "http_request_seconds",
            "Duration of HTTP requests.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )


class GenerationMetrics:
    """Generations asked for through this node's API (this node is their head).

    * ``pyagent_generations_total{model, outcome}``: ended, by finish reason (``stop``,
      ``length``), ``cancelled`` or the error's code.
    * ``pyagent_generations_running``: in progress.
    * ``pyagent_prompt_tokens_total{model}``, ``pyagent_completion_tokens_total{model}``.
    * ``pyagent_cached_tokens_total{model}``: of prompts, those whose KV was there already;
      ``pyagent_recomputed_tokens_total{model}``: computed again after a loss of ranks or heads.
    * ``pyagent_ttft_seconds{model}``: time to the first token.
    * ``pyagent_token_seconds{model}``: time a token after the first, mean of a generation.
    * ``pyagent_speculation_tokens_total{model, drafter, verdict}``: guesses that were sent, by
      ``verdict`` (``accepted``, ``rejected``); ``pyagent_speculation_passes_total{model, drafter}``
      steps of such answers, ``pyagent_speculation_cancelled_total{model, drafter}`` steps of them
      that were sent for nothing.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.ended = Counter(
            PREFIX + "generations", "Generations ended.", ("model", "outcome"), registry=registry
        )
        self.running = Gauge(
            PREFIX + "generations_running", "Generations in progress.", registry=registry
        )
        self.prompt_tokens = Counter(
            PREFIX + "prompt_tokens", "Tokens of prompts.", ("model",), registry=registry
        )
        self.completion_tokens = Counter(
            PREFIX + "completion_tokens", "Tokens generated.", ("model",), registry=registry
        )
        self.cached_tokens = Counter(
            PREFIX + "cached_tokens",
            "Tokens of prompts that were not computed.",
            ("model",),
            registry=registry,
        )
        self.recomputed_tokens = Counter(
            PREFIX + "recomputed_tokens", "Tokens computed again.", ("model",), registry=registry
        )
        drafted = ("model", "drafter")
        self.guesses = Counter(
            PREFIX + "speculation_tokens",
            "Guesses sent.",
            (*drafted, "verdict"),
            registry=registry,
        )
        self.passes = Counter(
            PREFIX + "speculation_passes", "Steps of guessed answers.", drafted, registry=registry
        )
        self.cancelled = Counter(
            PREFIX + "speculation_cancelled", "Steps sent for nothing.", drafted, registry=registry
        )
        self.ttft = Histogram(
            PREFIX + "ttft_seconds",
            "Time to the first token.",
            ("model",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.token = Histogram(
            PREFIX + "token_seconds",
            "Mean time a token after the first.",
            ("model",),
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
            registry=registry,
        )


class Telemetry:
    """All metrics of one node.

    Besides the structs below: ``pyagent_process_resident_bytes``,
    ``pyagent_process_cpu_seconds_total``, ``pyagent_process_open_files`` (where the system tells)
    and whatever was given to :meth:`bridge`.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.http = RequestMetrics(self.registry)
        self.generation = GenerationMetrics(self.registry)
        self._bridge = _Bridge()
        self._bridge.sources.append(_process_samples)
        self.registry.register(self._bridge)

    def bridge(self, source: Source) -> None:
        """Add the samples of ``source`` to every scrape; it is called on the event loop."""
        self._bridge.sources.append(source)

    def render(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self.registry)


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(psutil.Process(os.getpid()).memory_info().rss)


def _process_samples() -> Iterator[Sample]:
    process = psutil.Process(os.getpid())
    times = process.cpu_times()
    yield Sample(
        "process_resident_bytes",
        "Resident memory of the daemon, runners not included.",
        process.memory_info().rss,
        "gauge",
    )
    yield Sample("process_cpu_seconds", "CPU time of the daemon.", times.user + times.system)
    if hasattr(process, "num_fds"):
        yield Sample("process_open_files", "Open descriptors.", process.num_fds(), "gauge")
