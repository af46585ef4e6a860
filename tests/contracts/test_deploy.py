"""The files of `deploy/` say what the server does: flags there are, times that fit together, no root.

What it is not: a run of systemd, nginx or a container engine.
"""

from __future__ import annotations

import configparser
import re
import shlex
from pathlib import Path

from puna.cli import config_file, flags
from puna.settings import ServeSettings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def test_the_configuration_is_one_with_all_that_is_commented_out_too(tmp_path: Path) -> None:
    text = (DEPLOY / "puna.toml").read_text()
    defaults = ServeSettings()
    assert ServeSettings(**config_file.read(ServeSettings, DEPLOY / "puna.toml")) == defaults
    whole = tmp_path / "puna.toml"
    whole.write_text(re.sub(r'^# (?=[a-z-]+ = |\[|")', "", text, flags=re.MULTILINE))
    found = ServeSettings(**config_file.read(ServeSettings, whole))
    assert found.models == ("llama3.2:3b",)
    assert found.alias == ("gpt-4o-mini=llama3.2:3b",)
    assert found.option == ("llama3.2:3b.quant=Q4_K_M", "llama3.2:3b.kv-memory=4")


def test_the_unit_starts_what_there_is_and_waits_for_the_drain() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "puna.service")
    service = unit["Service"]
    words = shlex.split(service["ExecStart"])
    assert words[1:4] == ["serve", "--config", "/etc/puna/puna.toml"]
    assert int(service["TimeoutStopSec"]) > ServeSettings().drain_seconds + 5
    assert service["KillSignal"] == "SIGTERM"
    assert (service["DynamicUser"], service["NoNewPrivileges"], service["CapabilityBoundingSet"]) == ("yes", "yes", "")


def test_nginx_streams_and_lets_go_of_connections_first() -> None:
    text = (DEPLOY / "nginx.conf").read_text()
    assert text.count("{") == text.count("}")
    assert "proxy_buffering off;" in text
    # Each path's requests bear the name that the client used: a path with headers of its own would lose these.
    before, _, paths = text.partition("location ")
    assert "proxy_set_header Host $host;" in before
    assert "proxy_set_header" not in paths
    assert "http2 on" not in re.sub(r"#.*", "", text)  # nginx 1.22, Debian's, has no such word
    assert f"server 127.0.0.1:{ServeSettings().port};" in text
    assert int(re.search(r"keepalive_timeout (\d+)s", text)[1]) < 75  # type: ignore[index]


def test_the_container_runs_without_root_and_starts_what_there_is() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    # By number, as Kubernetes' runAsNonRoot wants it, and the one that was made.
    assert [line.split()[1] for line in lines if line.startswith("USER ")] == ["10001:10001"]
    assert "--uid 10001 --gid puna" in "\n".join(lines)
    stages = [line for line in lines if line.startswith("FROM ")]
    assert len(stages) == 2
    assert all(":" in stage.split()[1] and not stage.split()[1].endswith(":latest") for stage in stages)
    [entry] = [line for line in lines if line.startswith("ENTRYPOINT ")]
    words = re.findall(r'"([^"]*)"', entry)
    assert flags.read(ServeSettings, words[2:]).host == "0.0.0.0"
    assert f"EXPOSE {ServeSettings().port}" in lines
