"""`octavo experiment --live` on real Ray nodes: it runs to its end under every policy, and says what came of it."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.hot_model import write_hot_model
from tests.support.served_cluster import environment, octavo

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SCENARIO = """
name: A short one
model: {{path: {model}}}
hosts: {{window_s: 1}}
max_num_seqs: 16
max_num_batched_tokens: 64
live:
  nodes: 2
  row_us: 300
  config: {{device: cpu, experts_device: cpu, kv_cache_bytes: 4194304, expert_slots: 6, balance_interval_s: 1.0}}
phases:
  - {{duration_s: 6, concurrency: 12, prompt_tokens: 8, output_tokens: 12}}
  - {{duration_s: 3, rate: 4, prompt_tokens: 8, output_tokens: 6, text: {{code: 1}}}}
policies: [static, incremental]
faults:
  - {{at_s: 4, kind: slow, expert: 1, for_s: 0.5, factor: 2}}
"""


def test_a_scenario_runs_live_to_its_end(tmp_path: Path) -> None:
    model = write_hot_model(tmp_path / "hot")
    config, html = tmp_path / "short.yaml", tmp_path / "report.html"
    config.write_text(SCENARIO.format(model=model))
    command = [*octavo(), "experiment", str(config), "--live", "--html", str(html)]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=700, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["type"], line["policy"], line["where"]) for line in lines] == [
        ("run", "static", "live"),
        ("run", "incremental", "live"),
    ]
    for line in lines:
        assert line["unfinished"] == 0
        assert line["completed"] > 12
        assert line["output_throughput"] > 0
        assert 0 < line["balancedness"] <= 1
        assert line["mean_hosts"] >= 7.5, "eight expert processes"
    page = html.read_text()
    assert "A short one, live" in page
    assert "incremental" in page
