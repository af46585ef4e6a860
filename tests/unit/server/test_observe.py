"""What is seen: metrics, their names and labels, the dashboard, the log, the audit log, traces."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import puna
from puna.errors import StoppedError
from puna.gateway.scripted import ScriptedBackend, saying
from puna.server import journal, observe
from puna.server.app import create_app
from puna.server.caller import Caller
from puna.server.exchange import CURRENT, Exchange
from puna.server.metrics import BETWEEN_TOKENS, MODELS_MOST, Gaps, Metrics, Sight
from puna.server.observe import Observatory, human, record_of
from puna.server.service import Call, Service, collect
from puna.server.traces import Traces, traces
from puna.types import Activity, Event, Message, ModelCard, ModelState, Request, Sampling, Usage

DASHBOARD = Path(__file__).resolve().parents[3] / "deploy" / "grafana" / "puna-grafana.json"
CALLER = Caller("0123456789ab", "alice")

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: bytes) -> Samples:
    """Every sample of Prometheus's text, read by the library's own parser."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float | None:
    """One sample's value."""
    return found.get((name, tuple(sorted(labels.items()))))


async def answered(observatory: Observatory, backend: ScriptedBackend, **request: Any) -> None:
    """Have a call answered whole."""
    service: Service = create_app(backend, observatory=observatory).state.service
    call = Call("call-1", CALLER, "chat", "the name that was asked for")
    await collect(service.answer(call, backend, Request("abcde", **request)))


def test_what_a_call_leaves_behind() -> None:
    observatory = Observatory()
    backend = ScriptedBackend(saying("Hel", "lo", "!"))
    asyncio.run(answered(observatory, backend))
    asyncio.run(answered(observatory, backend, sampling=Sampling(max_tokens=3)))
    found = samples(observatory.metrics.text(Sight()))
    model = {"model_name": "scripted"}
    assert value(found, "vllm:prompt_tokens_total", **model) == 10
    assert value(found, "vllm:generation_tokens_total", **model) == 9
    assert value(found, "vllm:request_success_total", **model, finished_reason="stop") == 1
    assert value(found, "vllm:request_success_total", **model, finished_reason="length") == 1
    assert value(found, "vllm:time_to_first_token_seconds_count", **model) == 2
    assert value(found, "vllm:e2e_request_latency_seconds_count", **model) == 2
    assert value(found, "vllm:request_prompt_tokens_bucket", **model, le="5.0") == 2
    assert value(found, "vllm:inter_token_latency_seconds_count", **model) == 2  # between three pieces, and of one none
    assert value(found, "vllm:prefix_cache_queries_total", **model) == 10
    assert value(found, "vllm:prefix_cache_hits_total", **model) == 0
    assert value(found, "puna_calls_total", **model, operation="chat") == 2
    assert observatory.open == {}


def test_how_calls_end() -> None:
    async def failing(_: Request) -> AsyncGenerator[Event]:
        yield Event(text="a", token_ids=(1,))
        raise StoppedError("The engine failed.")

    observatory = Observatory()

    async def work() -> None:
        backend = ScriptedBackend(failing)
        with pytest.raises(StoppedError):
            await answered(observatory, backend)
        backend = ScriptedBackend(saying("a", "b", "c"))
        service: Service = create_app(backend, observatory=observatory).state.service
        call = Call("left", CALLER, "chat", "scripted", stream=True)
        async with aclosing(service.answer(call, backend, Request("abc"))) as events:
            async for _ in events:
                assert [watcher.call.id for watcher in observatory.open.values()] == ["left"]
                assert [watcher.state for watcher in observatory.open.values()] == ["answering"]
                break  # the client leaves

    asyncio.run(work())
    found = samples(observatory.metrics.text(Sight()))
    assert value(found, "vllm:request_success_total", model_name="scripted", finished_reason="error") == 1
    assert value(found, "vllm:request_success_total", model_name="scripted", finished_reason="abort") == 1
    assert observatory.open == {}


def test_gaps_are_a_histogram_like_any_other() -> None:
    seconds = [0.0, 0.0005, 0.001, 0.0011, 0.3, 79.0, 80.0, 81.0, 5000.0]
    registry = CollectorRegistry()
    theirs = Histogram(
        "vllm:inter_token_latency_seconds", "x", ["model_name"], buckets=BETWEEN_TOKENS, registry=registry
    )
    counts = [0] * (len(BETWEEN_TOKENS) + 1)
    for each in seconds:
        theirs.labels("m").observe(each)
        counts[observe.bisect_left(BETWEEN_TOKENS, each)] += 1
    gaps = Gaps()
    gaps.add("m", counts, sum(seconds))
    ours = CollectorRegistry()
    ours.register(gaps)
    expected = {key: n for key, n in samples(generate_latest(registry)).items() if not key[0].endswith("_created")}
    assert samples(generate_latest(ours)) == expected


def test_models_that_are_told_apart_are_not_too_many() -> None:
    metrics = Metrics()
    labels = {metrics.model(f"model {at}") for at in range(MODELS_MOST * 2)}
    assert len(labels) == MODELS_MOST + 1
    assert "other" in labels
    assert metrics.model("model 0") == "model 0"


SIGHT = Sight(
    states=(ModelState(ModelCard("a"), loaded=True, resident=7), ModelState(ModelCard("b"))),
    activities=(("a", Activity(2, 3, 100, 25, 10, 65, 16, 4096, 9, 80, 20, 30, 8, 6, 1, 2, 0.5, 1.5, 0.25)),),
    resident=1000, available=2000, uptime=3.5, streams=4, draining=True,
)  # fmt: skip


def test_what_engines_say() -> None:
    found = samples(Metrics().text(SIGHT))
    expected = {
        "vllm:num_requests_running": 2, "vllm:num_requests_waiting": 3, "vllm:kv_cache_usage_perc": 0.25,
        "vllm:num_preemptions_total": 1, "vllm:spec_decode_num_draft_tokens_total": 8,
        "vllm:spec_decode_num_accepted_tokens_total": 6, "puna_engine_steps_total": 9, "puna_computed_tokens_total": 80,
        "puna_reused_tokens_total": 20, "puna_evictions_total": 2, "puna_page_tokens": 16, "puna_page_bytes": 4096,
        "puna_model_resident_bytes": 7,
    }  # fmt: skip
    assert {name: value(found, name, model_name="a") for name in expected} == expected
    states = {state: value(found, "puna_pages", model_name="a", state=state) for state in ("used", "cached", "free")}
    assert states == {"used": 25, "cached": 10, "free": 65}
    parts = {part: value(found, "puna_engine_seconds_total", model_name="a", part=part) for part in ("schedule", "run")}
    assert parts == {"schedule": 0.5, "run": 1.5}
    singles = {
        "puna_models_loaded": 1, "puna_models_served": 2, "puna_streams_open": 4, "puna_memory_resident_bytes": 1000,
        "puna_memory_available_bytes": 2000, "puna_uptime_seconds": 3.5, "puna_draining": 1,
    }  # fmt: skip
    assert {name: value(found, name) for name in singles} == singles


def exchange(**changes: Any) -> Exchange:
    """A request that is over."""
    return Exchange(
        **({"id": "req_1", "method": "POST", "path": "/v1/x", "route": "/v1/{what}", "status": 200} | changes)
    )


def test_labels_are_no_clients_text() -> None:
    observatory = Observatory()
    for at in range(100):
        observatory.exchanged(exchange(method=f"FROB{at}", path=f"/{at}", route="", status=404))
    observatory.exchanged(exchange())
    observatory.exchanged(exchange(status=429, refused="rate_limit_exceeded"))
    found = samples(observatory.metrics.text(Sight()))
    http = {key: n for key, n in found.items() if key[0] == "puna_http_requests_total"}
    assert sorted(http.values()) == [1, 1, 100]
    assert value(found, "puna_http_requests_total", route="none", method="other", status="404") == 100
    assert value(found, "puna_http_requests_total", route="/v1/{what}", method="POST", status="200") == 1
    assert value(found, "puna_refused_total", reason="rate_limit_exceeded") == 1


def test_two_servers_do_not_count_for_each_other() -> None:
    first, second = Observatory(), Observatory()
    asyncio.run(answered(first, ScriptedBackend()))
    assert b'vllm:prompt_tokens_total{model_name="scripted"} 5.0' in first.metrics.text(Sight())
    assert b"vllm:prompt_tokens_total{" not in second.metrics.text(Sight())


def test_observing_fails_no_call(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Traces):
        def __init__(self) -> None: ...

        def begin(self, *_: Any) -> Any:
            raise ZeroDivisionError

    observatory = Observatory(traces=Broken())
    monkeypatch.setattr(observatory.metrics, "prompt_tokens", None)
    monkeypatch.setattr(observatory.metrics, "http", None)
    asyncio.run(answered(observatory, ScriptedBackend()))
    observatory.exchanged(exchange())
    assert observatory.metrics.failures._value.get() == 3
    assert "observing failed" in caplog.text


# -- the dashboard -------------------------------------------------------------------------------------------------


def expressions(node: Any) -> list[str]:
    """Every expression of a dashboard, those of its variables too."""
    if isinstance(node, list):
        return [found for each in node for found in expressions(each)]
    if not isinstance(node, dict):
        return []
    own = [node["expr"]] if "expr" in node else []
    if isinstance(node.get("query"), str) and node["query"].startswith("label_values"):
        own.append(node["query"])
    return own + [found for each in node.values() for found in expressions(each)]


def names(expression: str) -> set[str]:
    """The metrics that an expression reads."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|by \([^)]*\)", "", expression)
    words = set(re.findall(r"\b[a-z][a-z_]*:?[a-z_0-9]+", bare))
    return {word for word in words if word.startswith(("vllm:", "puna_"))}


def test_the_dashboard_reads_what_there_is_and_all_of_it() -> None:
    observatory = Observatory()
    backend = ScriptedBackend(saying("Hel", "lo"))
    asyncio.run(answered(observatory, backend))
    observatory.exchanged(exchange(refused="x"))
    there = {name for name, _ in samples(observatory.metrics.text(SIGHT)) if not name.endswith("_created")}
    every = expressions(json.loads(DASHBOARD.read_text("utf-8")))
    read = set().union(*map(names, every))
    assert len(every) > 30
    assert read - there == set()
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in there}
    shown = {re.sub(r"_bucket$", "", name) for name in read}
    assert families - shown == {"puna_page_tokens", "puna_page_bytes", "puna_local_pages", "puna_local_page_bytes",
                                "puna_reused_tokens_total"}  # fmt: skip
    for expression in every:  # labels exist too
        for label in re.findall(r"by \(([^)]*)\)", expression):
            assert set(label.split(", ")) <= {"le", "model_name", "finished_reason", "operation", "state", "part",
                                              "status", "route", "reason"}  # fmt: skip


def test_a_wrong_name_in_a_dashboard_is_found() -> None:
    assert names('sum by (le) (rate(vllm:nothing_bucket{model_name=~"$model"}[5m])) / puna_x') == {
        "vllm:nothing_bucket", "puna_x",
    }  # fmt: skip
    assert expressions({"panels": [{"targets": [{"expr": "up"}]}]}) == ["up"]


# -- logs ----------------------------------------------------------------------------------------------------------


def test_lines_of_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def work(**options: Any) -> list[dict[str, Any]]:
        file = tmp_path / "folder" / f"{len(list(tmp_path.rglob('*')))}.jsonl"
        observatory = Observatory(audit=file, **options)
        seen = exchange(key="0123456789ab", name="alice", address="10.0.0.1", path="/v1/x\n\x1b[31mred")
        token = CURRENT.set(seen)
        await answered(observatory, ScriptedBackend(saying("secret ", "answer")))
        CURRENT.reset(token)
        observatory.exchanged(seen)
        await observatory.close()
        assert file.stat().st_mode & 0o077 == 0
        return [json.loads(line) for line in file.read_text().splitlines()]

    [record] = asyncio.run(work(log="json"))
    told = {name: record[name] for name in ("id", "key", "name", "model", "operation", "prompt_tokens", "finish")}
    assert told == {
        "id": "req_1", "key": "0123456789ab", "name": "alice", "model": "scripted", "operation": "chat",
        "prompt_tokens": 5, "finish": "stop",
    }  # fmt: skip
    assert (record["completion_tokens"], record["status"], record["route"]) == (13, 200, "/v1/{what}")
    assert record["first_token_seconds"] >= 0
    assert "prompts" not in record
    assert [json.loads(line)["id"] for line in capfd.readouterr().err.splitlines()] == ["req_1"]
    [record] = asyncio.run(work(log="line", log_prompts=True))
    assert record["prompts"] == ["abcde"]
    [line] = capfd.readouterr().err.splitlines()
    assert "scripted: 5 read, 13 made" in line
    assert "\x1b" not in line
    assert "secret" not in json.dumps(record)
    assert asyncio.run(work()) != []
    assert capfd.readouterr().err == ""


def test_a_conversation_in_the_log_is_cut_with_a_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "PROMPT_CHARS", 10)
    assert observe._words(Request((Message("user", "hi"),))) == "user: hi"
    assert observe._words(Request("x" * 11)) == "x" * 10 + "… (11 characters)"
    assert observe._words(Request((1, 2, 3))) == "1\n2\n3"
    assert "refused" in record_of(exchange(refused="no"))
    assert human(exchange(status=500, error="StoppedError", seconds=1.25)).startswith(
        "200"[:0] + "500  POST  /v1/x  1.250 s"
    )


def test_a_journal_that_cannot_keep_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_MOST", 2)
    written = journal.Journal(tmp_path / "log")
    monkeypatch.setattr(journal.threading.Thread, "start", lambda self: None)  # as if the disk stood still
    for at in range(10):
        written.write(f"{at}\n")
    assert written.dropped == 8
    written._queue.get()
    written.write("next\n")
    assert written.dropped == 0
    assert json.loads(list(written._queue.queue)[-1].splitlines()[1])["count"] == 8  # type: ignore[union-attr]


def test_a_journal_whose_file_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    written = journal.Journal(tmp_path / "file" / "log")
    for _ in range(3):
        written.write("x\n")
    written.close()
    assert "cannot be written" in capfd.readouterr().err


# -- traces --------------------------------------------------------------------------------------------------------


def test_spans() -> None:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="needs puna[otel]")
    exporter = memory.InMemorySpanExporter()
    observatory = Observatory(traces=Traces(exporter))
    seen = exchange(traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    token = CURRENT.set(seen)
    asyncio.run(answered(observatory, ScriptedBackend(saying("Hello"))))
    CURRENT.reset(token)

    async def failing(_: Request) -> AsyncGenerator[Event]:
        raise StoppedError("It has a secret.")
        yield

    with pytest.raises(StoppedError):
        asyncio.run(answered(observatory, ScriptedBackend(failing)))
    first, second = exporter.get_finished_spans()
    assert first.name == "chat scripted"
    assert f"{first.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{first.parent.span_id:016x}" == "b7ad6b7169203331"
    told = dict(first.attributes)
    assert told.pop("gen_ai.response.time_to_first_chunk") >= 0
    assert told == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "puna", "gen_ai.request.model": "scripted",
        "gen_ai.request.stream": False, "gen_ai.response.id": "call-1", "gen_ai.response.model": "scripted",
        "gen_ai.usage.input_tokens": 5, "gen_ai.usage.output_tokens": 5, "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("stop",),
    }  # fmt: skip
    assert second.parent is None
    assert second.attributes["error.type"] == "StoppedError"
    assert "secret" not in first.to_json() + second.to_json()


def test_a_trace_parent_that_is_none() -> None:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="needs puna[otel]")
    exporter = memory.InMemorySpanExporter()
    span = Traces(exporter).begin("chat", "m", "id", False, {"traceparent": "00-zz\r\n", "tracestate": "," * 500})
    assert span.parent is None


def test_traces_only_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    assert traces() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert traces() is None
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with caplog.at_level(logging.ERROR):
        assert traces() is None
    assert "puna[otel]" in caplog.text


def test_a_collector_is_sent_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a socket, as a collector reads it: OTLP in protobuf, by HTTP."""
    sent = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="needs puna[otel]")
    came: list[tuple[str, str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            came.append((self.path, self.headers["Content-Type"], body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
            monkeypatch.setenv("OTEL_SERVICE_NAME", "the-lab")
            made = traces()
            assert made is not None
            parent = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
            span = made.begin("chat", "cria", "req_1", True, parent)
            made.end(span, model="cria", finishes=["stop"], prompt=7, reused=4, made=5, error="", first=0.25)
            made.close()
        finally:
            collector.shutdown()
            thread.join()
    [(path, kind, body)] = came
    assert (path, kind) == ("/v1/traces", "application/x-protobuf")
    [resource] = sent.ExportTraceServiceRequest.FromString(body).resource_spans
    assert ("service.name", "the-lab") in [(each.key, each.value.string_value) for each in resource.resource.attributes]
    [told] = resource.scope_spans[0].spans
    assert (told.name, told.trace_id.hex(), told.parent_span_id.hex()) == ("chat cria", "a" * 32, "b" * 16)
    tokens = {each.key: each.value.int_value for each in told.attributes if each.key.endswith("_tokens")}
    assert tokens == {
        "gen_ai.usage.input_tokens": 7, "gen_ai.usage.output_tokens": 5, "gen_ai.usage.cache_read.input_tokens": 4,
    }  # fmt: skip


def test_a_server_without_traces_imports_none() -> None:
    program = "import sys, puna.server.app; print([name for name in sys.modules if 'opentelemetry.sdk' in name])"
    source = str(Path(puna.__file__).resolve().parents[1])
    done = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": source}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_usage_of_a_call_that_saw_nothing() -> None:
    observatory = Observatory()
    watcher = observatory.begin(Call("c", CALLER, "embeddings", "m"))
    assert watcher.state == "waiting"
    watcher.event(Event(prefilled=3))
    assert watcher.state == "reading"
    watcher.end(Usage(3, 1, 0), None)
    watcher.end(Usage(3, 1, 0), None)  # a second end is none
    found = samples(observatory.metrics.text(Sight()))
    assert value(found, "vllm:prompt_tokens_total", model_name="m") == 3
    assert value(found, "vllm:prefix_cache_hits_total", model_name="m") == 1
    assert value(found, "vllm:time_to_first_token_seconds_count", model_name="m") is None
