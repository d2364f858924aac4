"""Peers are processes of their own: the lines between them and us, their deaths, and what is missing."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import transformers

from experiments.engine_bench.failures import BenchError
from experiments.engine_bench.peers.process import JsonProcess
from experiments.engine_bench.peers.registry import PEERS, PeerContestant, find_peer, parse_env
from experiments.engine_bench.peers.transformers_peer import TransformersPeer
from tests.support.checkpoints import write_mixtral

FAKE = replace(PEERS["transformers"], name="fake", module="tests.support.fake_peer")


@pytest.fixture
def peer() -> Iterator[PeerContestant]:
    started = PeerContestant(FAKE, "any", 2)
    yield started
    started.close()


def test_a_peer_answers_prompts_whatever_its_library_prints(peer: PeerContestant) -> None:
    assert (peer.name, peer.is_ours, peer.prefills_first) == ("fake", False, True)
    assert peer.facts == {"library": "fake 1.0", "threads": 2, "env": {}}
    run = peer.generate([[1, 2], [5, 6]], 3).run
    assert run.tokens == ((3, 4, 5), (7, 8, 9))
    assert run.arrivals_s == ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0))
    assert peer.facts == {"library": "fake 1.0", "threads": 2, "env": {}, "answered": 2}
    assert peer.memory()["num_processes"] == 1


def test_an_error_is_said_and_the_peer_lives_on(peer: PeerContestant) -> None:
    with pytest.raises(BenchError, match=r"^fake: RuntimeError: seven is refused$"):
        peer.generate([[7]], 1)
    assert peer.generate([[1]], 1).run.tokens == ((2,),)


def test_a_death_is_said_with_the_last_words(peer: PeerContestant) -> None:
    with pytest.raises(BenchError, match=r"^fake ended unexpectedly: eight is fatal$"):
        peer.generate([[8]], 1)
    with pytest.raises(BenchError, match="ended unexpectedly"):
        peer.generate([[1]], 1)


def test_a_model_that_does_not_load_leaves_no_process() -> None:
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(BenchError, match=r"^fake: ValueError: no such model$"):
        PeerContestant(FAKE, "broken", 1)
    assert {child.pid for child in psutil.Process().children()} <= before


def test_closing_ends_a_process_that_is_busy() -> None:
    code = "import sys, time; sys.stdin.readline(); print('{}', flush=True); time.sleep(600)"
    process = JsonProcess("busy", [sys.executable, "-c", code], {})
    pid = process.pid
    process.close()
    assert not psutil.pid_exists(pid)


def test_our_own_settings_do_not_bind_a_peer_but_what_is_asked_for_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    code = "import json, os, sys; sys.stdin.readline(); print(json.dumps(dict(os.environ)))"
    plain = JsonProcess("env", [sys.executable, "-c", code], {})
    asked = JsonProcess("env", [sys.executable, "-c", code], {}, parse_env(["OMP_WAIT_POLICY=ACTIVE", "X=a=b"]))
    plain.close()
    asked.close()
    assert not {"OMP_NUM_THREADS", "OMP_WAIT_POLICY"} & set(plain.facts)
    assert (asked.facts["OMP_WAIT_POLICY"], asked.facts["X"]) == ("ACTIVE", "a=b")
    with pytest.raises(BenchError, match="--peer-env is 'X', but must be NAME=VALUE"):
        parse_env(["X"])


def test_an_unknown_peer_is_refused_by_name() -> None:
    with pytest.raises(BenchError, match=r"--peer is 'vllm', but must be one of transformers, llama\.cpp"):
        find_peer("vllm")


def test_a_missing_library_is_one_line_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_peer("transformers") is PEERS["transformers"]
    monkeypatch.setattr(
        "experiments.engine_bench.peers.registry.PEERS", {"odd": replace(FAKE, name="odd", imported="no_such_library")}
    )
    with pytest.raises(BenchError, match=r"^--peer odd needs transformers, which .* does not have: install it there"):
        find_peer("odd")
    with pytest.raises(BenchError, match="--peer-python /nowhere/python does not run"):
        find_peer("odd", "/nowhere/python")


def test_a_library_may_lie_where_the_peers_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a_library_elsewhere.py").touch()
    odd = replace(FAKE, name="odd", imported="a_library_elsewhere")
    monkeypatch.setattr("experiments.engine_bench.peers.registry.PEERS", {"odd": odd})
    with pytest.raises(BenchError, match="does not have"):
        find_peer("odd")
    assert find_peer("odd", env={"PYTHONPATH": str(tmp_path)}) is odd


def test_transformers_says_what_its_own_generate_says(tmp_path: Path) -> None:
    """And tries both ways of computing experts, once for each batch size."""
    threads = torch.get_num_threads()
    oracle = write_mixtral(tmp_path)
    peer = TransformersPeer(str(tmp_path), threads)
    prompts = [[1, 17, 42, 99, 5, 6, 7, 8], [1, 3, 3, 7, 200, 201, 202, 203]]
    answer = peer.handle({"prompts": prompts, "output_len": 6})
    generated = oracle.generate(
        torch.tensor(prompts),
        attention_mask=torch.ones(2, 8, dtype=torch.long),
        generation_config=transformers.GenerationConfig(
            max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
        ),
    )
    assert answer["tokens"] == generated[:, 8:].tolist()
    for times in answer["arrivals_s"]:
        assert len(times) == 6
        assert times == sorted(times)
    assert set(answer["facts"]) == {"experts_b2_prefill", "experts_b2_decode"}
    assert set(answer["facts"].values()) <= {"eager", "grouped_mm"}
