"""A whole cluster on one machine, used as people use it: the openai client, curl, status, a killed expert, Ctrl-C."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import openai
import psutil
import pytest
import torch

from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.storage.checkpoint import Checkpoint
from model.storage.integrity import verified
from model.text.tokenizer import load_tokenizer
from model.transformer import load_local, run_local
from tests.support.served_cluster import ServedCluster, environment, free_port, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

PROMPTS = [f"The {word} of the house is" for word in ("door", "roof", "floor", "wall", "stair", "window", "light")]


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def greedy(tiny_model: Path) -> Callable[[str, int], list[int]]:
    """What one process says, with the very code that the cluster runs, but no cluster."""
    checkpoint = Checkpoint.open(tiny_model)
    backbone, experts = load_local(checkpoint)
    tokenizer = load_tokenizer(tiny_model)

    def generate(prompt: str, num_tokens: int) -> list[int]:
        ids = tokenizer.encode(prompt, add_bos=True)
        kv = KVCache(checkpoint.config, num_blocks=16, block_size=32, dtype=torch.float32, device="cpu")
        table = tuple(range(16))
        done = 0
        out: list[int] = []
        while len(out) < num_tokens:
            batch = ForwardBatch.build([ids[done:]], [done], [table])
            logits = run_local(backbone, batch, kv, experts)
            done = len(ids)
            out.append(int(logits[0].argmax()))
            if out[-1] in tokenizer.eos_ids:
                break
            ids.append(out[-1])
        return out

    return generate


def complete(cluster: ServedCluster, prompt: str, num_tokens: int) -> list[int]:
    reply = cluster.client().completions.create(
        model="tiny", prompt=prompt, max_tokens=num_tokens, temperature=0, extra_body={"return_token_ids": True}
    )
    ids: list[int] = reply.choices[0].model_dump()["token_ids"]
    return ids


def test_the_cluster_says_what_one_process_says(
    cluster: ServedCluster, greedy: Callable[[str, int], list[int]]
) -> None:
    for prompt in PROMPTS[:3]:
        assert complete(cluster, prompt, 24) == greedy(prompt, 24)


def test_many_at_once_get_what_each_gets_alone(cluster: ServedCluster) -> None:
    alone = [complete(cluster, prompt, 16) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(lambda prompt: complete(cluster, prompt, 16), PROMPTS))
    assert together == alone


def test_an_answer_has_the_form_that_was_asked_for(cluster: ServedCluster) -> None:
    """Also after a grammar that ended the process in which it was tried, beside the coordinator's own."""
    schema = {"type": "object", "properties": {"size": {"enum": ["s", "m", "l"]}}, "required": ["size"]}
    form = {"json": {**schema, "additionalProperties": False}, "disable_any_whitespace": True}
    deep = "start: r0\n" + "\n".join(f'r{place}: r{place + 1} "a"' for place in range(5000)) + '\nr5000: "x"'
    client = cluster.client()
    for seed in range(2):
        reply = client.completions.create(
            model="tiny", prompt="A shirt:", max_tokens=60, seed=seed, extra_body={"structured_outputs": form}
        )
        assert json.loads(reply.choices[0].text)["size"] in ("s", "m", "l")
        with pytest.raises(openai.BadRequestError, match="guided_grammar"):
            client.completions.create(model="tiny", prompt="A", extra_body={"guided_grammar": deep})


def test_a_stream_is_the_whole_answer_in_pieces(cluster: ServedCluster) -> None:
    client = cluster.client()
    messages = [{"role": "user", "content": "Say something"}]
    asked = {"model": "tiny", "messages": messages, "max_tokens": 20, "temperature": 0.8, "seed": 7}
    whole = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens <= 20


def test_errors_are_openai_errors(cluster: ServedCluster) -> None:
    url = f"{cluster.url}/v1/completions"
    wrong = httpx.post(url, json={"model": "tiny", "prompt": "x", "temperature": -1}, timeout=120)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "temperature")
    unknown = httpx.post(url, json={"model": "none", "prompt": "x"}, timeout=120)
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_status_is_stable_and_true(cluster: ServedCluster) -> None:
    complete(cluster, PROMPTS[0], 4)
    wait_for(lambda: sum(cluster.status().load.tokens_per_expert) > 0, 60)
    status = json.loads(run(["status", "--json"], cluster.env).stdout)
    assert status["state"] == "ready"
    assert [one["expert_ids"] for one in status["replicas"]] == [[expert] for expert in range(8)]
    assert {one["state"] for one in status["replicas"]} == {"ready"}
    assert {one["kernel"] for one in status["replicas"]} == {"fp16"}
    assert {tuple(one["layers"]) for one in status["replicas"]} == {(0, 3)}
    pids = [one["pid"] for one in (*status["replicas"], *status["coordinators"])]
    assert len(set(pids)) == 9
    assert all(psutil.pid_exists(pid) for pid in pids)
    keys = {"replica_id", "expert_ids", "layers", "pid", "node", "address", "state", "inflight_tokens", "kernel"}
    assert keys <= set(status["replicas"][0])
    assert 0 < status["load"]["balancedness"] <= 1
    assert status["map_epoch"] >= 1
    for_people = run(["status"], cluster.env).stdout
    assert "expert-7-r0" in for_people
    assert "tiny: ready" in for_people


def test_metrics_count_what_was_served(cluster: ServedCluster) -> None:
    complete(cluster, PROMPTS[0], 4)
    text = httpx.get(f"{cluster.url}/metrics", timeout=120).text
    assert "octavo_" in text
    samples = {line.split(" ")[0]: float(line.split(" ")[1]) for line in text.splitlines() if line[:1] not in "#"}
    generated = [value for name, value in samples.items() if name.startswith("octavo_generation_tokens_total")]
    assert sum(generated) >= 4


def test_the_grpc_plane_listens_on_loopback_only(cluster: ServedCluster) -> None:
    status = cluster.status()
    for one in (*status.replicas, *status.coordinators):
        host, _, port = one.address.rpartition(":")
        listening = [c.laddr for c in psutil.Process(one.pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        found = [address.ip.removeprefix("::ffff:") for address in listening if address.port == int(port)]
        assert found == [host] == ["127.0.0.1"]


def test_a_killed_expert_comes_back_and_no_token_changes(cluster: ServedCluster) -> None:
    expected = complete(cluster, PROMPTS[0], 64)
    victim = next(one for one in cluster.status().replicas if one.expert_ids == [3])
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, cluster, PROMPTS[0], 64)
        os.kill(victim.pid, signal.SIGKILL)
        assert answer.result(120) == expected

    def is_back() -> bool:  # also where the supervisor has not missed it yet
        status = cluster.status()
        (now,) = (one for one in status.replicas if one.expert_ids == [3])
        return now.pid != victim.pid and now.state == status.state == "ready"

    wait_for(is_back, 200)
    assert complete(cluster, PROMPTS[0], 64) == expected


def test_a_client_that_leaves_frees_its_place(cluster: ServedCluster) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 500, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60) as stream:
        next(stream.iter_lines())

    def is_free() -> bool:  # in one status: the next may be of a moment before it left
        (now,) = cluster.status().coordinators
        return now.num_running == 0 and now.kv_blocks_free == now.kv_blocks_total

    wait_for(is_free, 180)


def test_starts_that_cannot_be_are_refused_in_one_line(cluster: ServedCluster, tmp_path: Path) -> None:
    elsewhere = environment(tmp_path)
    cases = [
        (["serve", str(cluster.model), "--port", str(cluster.port)], elsewhere, "cannot listen"),
        (["serve", str(cluster.model), "--port", str(free_port())], cluster.env, "already serves"),
        (["serve", "/no/such/model"], elsewhere, "no such directory"),
        (["serve", str(cluster.model), "--kernel", "int3"], elsewhere, "kernel is 'int3'"),
        (["serve", str(cluster.model), "--kv-cache-gib", "9999"], elsewhere, "kv_cache_bytes"),
        (["serve", str(cluster.model), "--experts-per-actor", "3"], elsewhere, "experts_per_actor"),
    ]
    for arguments, env, reason in cases:
        refused = run(arguments, env)
        assert refused.returncode == 1, (arguments, refused)
        assert reason in refused.stderr.splitlines()[-1], (arguments, refused.stderr)
        assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr


def test_a_flipped_bit_in_the_weights_stops_the_start_in_one_line(tmp_path: Path, tiny_model: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(tiny_model, own)
    checkpoint = verified(Checkpoint.open(own), tmp_path).checkpoint
    stored, first, _ = checkpoint.stored("layers.2.experts.5.w1")
    with stored.path.open("r+b") as file:
        file.seek(stored.start + first + 1000)
        byte = file.read(1)[0]
        file.seek(stored.start + first + 1000)
        file.write(bytes([byte ^ 1]))
    refused = run(["serve", str(own), "--port", str(free_port())], environment(tmp_path / "home"))
    assert refused.returncode == 1
    last = refused.stderr.strip().splitlines()[-1]
    for said in ("expert-5-r0", str(stored.path), repr(stored.name), "CRC-32C", "the manifest says"):
        assert said in last, refused.stderr
    assert "Traceback" not in refused.stderr


def test_ctrl_c_drains_and_leaves_nothing(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_DRAIN_TIMEOUT_S", "200")  # what is asked below is long on a slow machine
    served = ServedCluster(tmp_path, tiny_model, "--experts-per-actor", "4", "--replicas", "2")
    status = served.status()
    assert [one.expert_ids for one in status.replicas] == [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2
    processes = served.processes()
    assert len(processes) > 5
    body = {"model": "tiny", "prompt": "a", "max_tokens": 480, "n": 4, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        url = f"{served.url}/v1/completions"
        answer = under_way(served, 4, lambda: pool.submit(httpx.post, url, json=body, timeout=300))
        assert served.stop() == 0
        reply = answer.result(120)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] == 4 * 480
    _, alive = psutil.wait_procs(processes, timeout=240)
    assert not alive, alive
    assert json.loads((tmp_path / "cache/octavo/running.json").read_text() or "{}") == {}


def under_way(served: ServedCluster, num: int, ask: Callable[[], Future[httpx.Response]]) -> Future[httpx.Response]:
    """An answer of so many choices that are being computed; one that was over before it was seen is asked for again."""
    deadline = time.monotonic() + 240
    answer = ask()
    while served.coordinators()[0]["num_running"] < num:
        assert time.monotonic() < deadline, "nobody was seen at work"
        if answer.done():
            assert answer.result().status_code == 200
            answer = ask()
    return answer


@pytest.mark.parametrize(("drain_s", "signals"), [("0.3", 1), ("60", 2)], ids=["no time to drain", "in a hurry"])
def test_sigterm_ends_what_cannot_be_finished_with_a_word(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, drain_s: str, signals: int
) -> None:
    """No stream is cut off without an error event, no socket hangs, nothing is left; a second signal ends the drain."""
    monkeypatch.setenv("OCTAVO_DRAIN_TIMEOUT_S", drain_s)
    served = ServedCluster(tmp_path, tiny_model, "--experts-per-actor", "4")
    served.status()  # joins its Ray
    processes = served.processes()
    body = {"model": "tiny", "prompt": "a", "max_tokens": 480, "ignore_eos": True, "stream": True, "n": 4}
    refused: list[httpx.Response] = []

    def stream() -> str:
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=300) as reply:
            assert reply.status_code == 200
            return "".join(reply.iter_text())

    with ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(stream) for _ in range(16)]

        def everybody_is_in() -> bool:  # who came later would rightly be refused
            (coordinator,) = served.coordinators()
            return bool(coordinator["num_running"] + coordinator["num_waiting"] == 64)

        wait_for(everybody_is_in, 180)
        served.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "draining for up to" in served.log.read_text(), 90)
        if signals == 2:
            wait_for(lambda: [one["state"] for one in served.coordinators()] == ["draining"], 60)  # a moment later
            refused.append(httpx.post(f"{served.url}/v1/completions", json=body, timeout=90))
        assert served.stop(signal.SIGTERM) == 0 if signals == 2 else served.process.wait(200) == 0
        told = [one.result(120) for one in streams]
    for reply in refused:
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
    assert [text for text in told if not text.endswith("data: [DONE]\n\n")] == []
    cut = [text for text in told if '"error"' in text]
    assert cut, "all streams were finished: this test proved nothing"
    assert all("service_unavailable" in text for text in cut)
    _, alive = psutil.wait_procs(processes, timeout=240)
    assert not alive, alive
