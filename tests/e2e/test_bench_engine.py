"""`octavo bench engine` on a real cluster, as a person would type it: its lines, its table, and nothing left behind."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.served_cluster import command_line, environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

COMMAND = [sys.executable, "-m", "experiments.bench_engine_cli"]


def test_two_variants_and_a_peer_in_one_run(tiny_model: Path, tmp_path: Path) -> None:
    arguments = [
        *(str(tiny_model), "--batches", "1,3", "--prompt-len", "12", "--output-len", "96", "--repeats", "1"),
        *("--experts-per-actor", "8", "--transport", "auto", "--transport", "grpc", "--peer", "transformers"),
        *("--json-out", str(tmp_path / "lines.jsonl"), "--kernel-speed"),
    ]
    done = subprocess.run(
        [*COMMAND, *arguments], env=environment(tmp_path), capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert (tmp_path / "lines.jsonl").read_text() == done.stdout
    assert [line["type"] for line in lines] == ["setup"] + ["measurement"] * 6 + ["summary"] * 2
    names = ["octavo transport=auto", "octavo transport=grpc", "transformers"]
    assert [one["name"] for one in lines[0]["contestants"]] == names
    for line in lines[1:7]:
        assert line["prefill_tok_s"] > 0
        assert line["decode_tok_s"] > 0
    for line in lines[7:]:
        assert [one["name"] for one in line["contestants"]] == names
        assert [(one["of"], one["to"]) for one in line["ratios"]] == [
            (names[0], names[2]),
            (names[1], names[2]),
            (names[1], names[0]),
        ]
        variants = line["ratios"][2]["agreement"]
        assert variants["equal_sequences"] == variants["sequences"] == line["batch"], "transports change no token"
        assert line["contestants"][0]["kernel_share"]["median"] > 0
        assert line["contestants"][0]["memory"]["num_processes"] == 2
        assert line["contestants"][0]["decode_step"]["messages_per_token"] > 0
    assert "shares of a step" in done.stderr
    left = [one for one in psutil.Process().children(recursive=True) if "octavo-bench" in command_line(one)]
    assert not left


def test_ctrl_c_in_mid_measurement_leaves_nothing_running(tiny_model: Path, tmp_path: Path) -> None:
    arguments = [str(tiny_model), "--batch", "2", "--prompt-len", "8", "--output-len", "64", "--repeats", "100000"]
    with subprocess.Popen(
        [*COMMAND, *arguments, "--experts-per-actor", "8", "--peer", "transformers"],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["type"] == "measurement":
                break
        family = psutil.Process(process.pid).children(recursive=True)
        assert any("ray::Coordinator" in command_line(one) for one in family)
        assert any("transformers_peer" in command_line(one) for one in family)
        process.send_signal(signal.SIGINT)
        rest = [json.loads(line)["type"] for line in process.stdout.read().splitlines()]
        assert set(rest) <= {"measurement", "summary"}
        assert process.wait(200) == 130
    _, alive = psutil.wait_procs(family, timeout=240)
    assert not alive, alive
