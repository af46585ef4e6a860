"""Prometheus metrics: what is counted, under which names.

What it is: the instruments of one server, in a registry of its own, and what engines say of themselves when asked.
What it is not: a place where anything is measured (`observe.py`).
What is surprising: what means the same as in vLLM has vLLM's name (https://docs.vllm.ai/en/stable/usage/metrics/), so
that dashboards made for it work; the rest begins with `puna_`. No label is a client's text: models are those that
answered, routes are templates, reasons are codes of our own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from puna.types import Activity, ModelState

MODELS_MOST = 256
"""Model names that are told apart; later ones are counted as "other"."""

FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
BETWEEN_TOKENS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
WHOLE = (
    0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)


@dataclass(frozen=True)
class Sight:
    """What is true at one moment: every model that may be asked for, what the loaded ones do, and the process's
    memory in bytes."""

    states: tuple[ModelState, ...] = ()
    activities: tuple[tuple[str, Activity], ...] = ()
    resident: int = 0
    available: int = 0
    uptime: float = 0.0
    streams: int = 0
    draining: bool = False


class Metrics:
    """The instruments, and their text."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        model = ("model_name",)

        def counter(name: str, what: str, labels: tuple[str, ...] = model) -> Counter:
            return Counter(name, what, labels, registry=self.registry)

        def histogram(name: str, what: str, buckets: Iterable[float], labels: tuple[str, ...] = model) -> Histogram:
            return Histogram(name, what, labels, buckets=tuple(buckets), registry=self.registry)

        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("vllm:generation_tokens", "Tokens of answers.")
        self.prefix_queries = counter("vllm:prefix_cache_queries", "Tokens of prompts looked for in the prefix cache.")
        self.prefix_hits = counter("vllm:prefix_cache_hits", "Tokens of prompts that were found there.")
        self.success = counter(
            "vllm:request_success", "Answers that ended, by the reason.", ("model_name", "finished_reason")
        )
        self.first_token = histogram("vllm:time_to_first_token_seconds", "Seconds to the first token.", FIRST_TOKEN)
        self.whole = histogram("vllm:e2e_request_latency_seconds", "Seconds to the end of an answer.", WHOLE)
        self.request_prompt = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self.request_generation = histogram("vllm:request_generation_tokens", "Tokens of an answer.", TOKENS)
        self.calls = counter("puna_calls", "Calls of models, by what they are.", ("model_name", "operation"))
        self.http = counter("puna_http_requests", "Requests, by what became of them.", ("route", "method", "status"))
        self.http_seconds = histogram("puna_http_request_seconds", "Seconds of a request.", WHOLE, ("route",))
        self.refused = counter("puna_refused", "Requests that the door refused, by the error's code.", ("reason",))
        self.failures = counter("puna_observing_failures", "Times that observing itself failed.", ())
        self.gaps = Gaps()
        self.registry.register(self.gaps)
        self.sight = Sight()
        self.registry.register(_Seen(self))
        self._models: set[str] = set()

    def model(self, name: str) -> str:
        """The label for a model: its name, while there are not too many."""
        if name in self._models or len(self._models) < MODELS_MOST:
            self._models.add(name)
            return name
        return "other"

    def text(self, sight: Sight) -> bytes:
        """All of it in Prometheus's text format."""
        self.sight = sight
        return generate_latest(self.registry)


class Gaps:
    """A histogram of the seconds between tokens, by model.

    Not the library's: each of its observations takes microseconds, and there is one a token here. An answer counts in a
    list of its own, which is added to these once.
    """

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def add(self, model: str, counts: list[int], total: float) -> None:
        """The gaps of one answer: how many lie in each bucket (the last is for longer ones), and their sum."""
        have = self._counts.setdefault(model, [0] * (len(BETWEEN_TOKENS) + 1))
        for at, count in enumerate(counts):
            have[at] += count
        self._sums[model] = self._sums.get(model, 0.0) + total

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        family = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds", "Seconds between the tokens of an answer.", labels=["model_name"]
        )
        for model, counts in self._counts.items():
            buckets, sofar = [], 0
            for bound, count in zip((*map(str, BETWEEN_TOKENS), "+Inf"), counts, strict=True):
                sofar += count
                buckets.append((bound, float(sofar)))
            family.add_metric([model], buckets, self._sums[model])
        yield family


class _Seen:
    """What is only looked at when somebody asks."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        sight = self._metrics.sight
        gauges: tuple[tuple[str, str, str], ...] = (
            ("vllm:num_requests_running", "Answers under way.", "running"),
            ("vllm:num_requests_waiting", "Answers that wait for their turn.", "waiting"),
            ("puna_page_tokens", "Tokens a page of the cache.", "page_tokens"),
            ("puna_page_bytes", "Bytes a page of the cache.", "page_bytes"),
            ("puna_local_page_bytes", "Bytes a page of layers that see one chunk only.", "local_page_bytes"),
        )
        for name, what, field in gauges:
            gauge = GaugeMetricFamily(name, what, labels=["model_name"])
            for model, activity in sight.activities:
                gauge.add_metric([model], getattr(activity, field))
            yield gauge
        usage = GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "Share of the cache in use, 1 is all.", labels=["model_name"]
        )
        pages = GaugeMetricFamily("puna_pages", "Pages of the cache.", labels=["model_name", "state"])
        local = GaugeMetricFamily(
            "puna_local_pages", "Pages of layers that see one chunk only.", labels=["model_name", "state"]
        )
        for model, activity in sight.activities:
            # Of two kinds of pages the one with less left is what somebody waits for.
            kinds = (
                (activity.pages_used, activity.pages_total), (activity.local_pages_used, activity.local_pages_total)
            )  # fmt: skip
            usage.add_metric([model], max(used / total if total else 0.0 for used, total in kinds))
            for state in ("used", "cached", "free"):
                pages.add_metric([model, state], getattr(activity, f"pages_{state}"))
                local.add_metric([model, state], getattr(activity, f"local_pages_{state}"))
        yield usage
        yield pages
        yield local
        counters: tuple[tuple[str, str, str], ...] = (
            ("vllm:num_preemptions", "Answers put aside for want of pages.", "preemptions"),
            ("vllm:spec_decode_num_draft_tokens", "Tokens guessed.", "guessed_tokens"),
            ("vllm:spec_decode_num_accepted_tokens", "Tokens guessed right.", "right_guesses"),
            ("puna_engine_steps", "Steps of the engine.", "steps"),
            ("puna_computed_tokens", "Tokens computed.", "computed_tokens"),
            ("puna_reused_tokens", "Tokens of prompts that were not computed again.", "reused_tokens"),
            ("puna_evictions", "Pages of the prefix cache given up for others.", "evictions"),
        )
        for name, what, field in counters:
            counter = CounterMetricFamily(name, what, labels=["model_name"])
            for model, activity in sight.activities:
                counter.add_metric([model], getattr(activity, field))
            yield counter
        seconds = CounterMetricFamily("puna_engine_seconds", "Seconds of the engine.", labels=["model_name", "part"])
        for model, activity in sight.activities:
            for part in ("schedule", "run", "sample"):
                seconds.add_metric([model, part], getattr(activity, f"{part}_seconds"))
        yield seconds
        memory = GaugeMetricFamily("puna_model_resident_bytes", "Bytes of a loaded model.", labels=["model_name"])
        for model_state in sight.states:
            if model_state.loaded:
                memory.add_metric([model_state.card.name], model_state.resident)
        yield memory
        singles: tuple[tuple[str, str, float], ...] = (
            ("puna_models_loaded", "Models in memory.", sum(each.loaded for each in sight.states)),
            ("puna_models_served", "Models that may be asked for.", len(sight.states)),
            ("puna_streams_open", "Calls under way, those that wait for a model included.", sight.streams),
            ("puna_memory_resident_bytes", "Bytes of the process in memory.", sight.resident),
            ("puna_memory_available_bytes", "Bytes of memory that are free or can be freed.", sight.available),
            ("puna_uptime_seconds", "Seconds since the start.", sight.uptime),
            ("puna_draining", "1 while the server shuts down.", sight.draining),
        )
        for name, what, value in singles:
            yield GaugeMetricFamily(name, what, value=float(value))
