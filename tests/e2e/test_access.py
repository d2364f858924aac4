"""Keys and hard clients on a served cluster: Ray Serve's proxy, a process of its own, stands before the ingress."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest

from actors.command.keys_app import add_entry
from actors.front.api_keys import new_key
from actors.front.head_limits import MAX_HEADERS
from tests.support.served_cluster import ServedCluster, command_line, environment, free_port, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ONLY_KEY = "only-key-canary-5b2e"
PROMPT = "prompt-canary-91f7"
WRITE_S = 4.0


class Guarded:
    """A cluster with a keys file, to which keys may be added."""

    def __init__(self, home: Path, model: Path) -> None:
        self.file = home / "keys.json"
        self.key = self.add("alice", requests_per_minute=1000)
        self.cluster = ServedCluster(home, model, "--experts-per-actor", "4", "--api-keys", str(self.file))

    def add(self, name: str, **limits: int) -> str:
        key, entry = new_key(name, **limits)
        add_entry(self.file, entry.model_dump(exclude_none=True))
        return key

    def status(self, path: str, key: str | None = None, method: str = "GET", **more: object) -> int:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.request(method, self.cluster.url + path, headers=headers, timeout=120, **more).status_code  # type: ignore[arg-type]

    def complete(self, key: str | None, **more: object) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, **more}
        return httpx.post(f"{self.cluster.url}/v1/completions", json=body, headers=headers, timeout=120)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Guarded]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTAVO_API_KEY", ONLY_KEY)
        patch.setenv("OCTAVO_HTTP_WRITE_S", str(WRITE_S))
        made = Guarded(tmp_path_factory.mktemp("guarded"), tiny_model)
    yield made
    made.cluster.stop()


def test_only_two_paths_are_open_and_known_keys_open_the_rest(guarded: Guarded) -> None:
    for path in ("/v1/models", "/metrics", "/", "/no/such", "/openapi.json"):
        assert guarded.status(path) == 401
    assert (guarded.status("/health"), guarded.status("/ping")) == (200, 200)
    for key in (guarded.key, ONLY_KEY):
        assert guarded.status("/v1/models", key) == guarded.status("/metrics", key) == 200
        assert guarded.complete(key).status_code == 200
    wrong = guarded.complete("sk-octavo-wrong-wrong-wrong")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
    assert wrong.headers["www-authenticate"].startswith("Bearer")
    assert guarded.complete(guarded.key).headers["x-ratelimit-limit-requests"] == "1000"


def test_a_key_that_is_added_counts_without_a_restart(guarded: Guarded) -> None:
    key = guarded.add("bob", requests_per_minute=2)
    deadline = time.monotonic() + 300
    while guarded.status("/v1/models", key) != 200:
        assert time.monotonic() < deadline, "the file is looked at once a second"
    assert [guarded.complete(key).status_code for _ in range(3)] == [200, 200, 429]
    assert guarded.complete(guarded.key).status_code == 200


def _raw(cluster: ServedCluster, data: bytes) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", cluster.port))
    connection.settimeout(200)
    connection.sendall(data)
    return connection


def _read_all(connection: socket.socket) -> bytes:
    told = b""
    try:
        while piece := connection.recv(65536):
            told += piece
    except ConnectionError:
        pass
    return told


def test_the_proxy_refuses_endless_heads(guarded: Guarded) -> None:
    """Before they end: the connection is not finished by us."""
    many = b"".join(b"x-%d: 1\r\n" % number for number in range(MAX_HEADERS + 5))
    for head, status in ((b"GET /health HTTP/1.1\r\n" + many, b"431"), (b"GET /" + b"x" * 20_000, b"414")):
        with _raw(guarded.cluster, head) as connection:
            assert _read_all(connection).startswith(b"HTTP/1.1 " + status)


def test_headers_that_the_proxy_cannot_read_do_no_harm(guarded: Guarded) -> None:
    for header in (b"X-Request-Id: \xff\xfe", b"X-Session-Id: \xff", b"X-Request-Timeout-Seconds: 0.0001"):
        with _raw(
            guarded.cluster, b"GET /health HTTP/1.1\r\nConnection: close\r\n" + header + b"\r\n\r\n"
        ) as connection:
            assert _read_all(connection).startswith(b"HTTP/1.1 200")


def test_the_proxy_cuts_a_client_that_does_not_read(guarded: Guarded) -> None:
    body = (
        b'{"model": "tiny", "prompt": "a", "max_tokens": 400, "n": 16, "logprobs": 20, "stream": true, '
        b'"ignore_eos": true}'
    )
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {guarded.key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with _raw(guarded.cluster, head.encode() + body) as deaf:
        mine = deaf.getsockname()[1]

        def is_open() -> bool:
            ends = psutil.net_connections("tcp4")
            return any(c.raddr and c.raddr.port == mine and c.status == psutil.CONN_ESTABLISHED for c in ends)

        assert is_open()
        assert guarded.complete(guarded.key).status_code == 200, "nobody else is held"
        deadline = time.monotonic() + 300
        while is_open():
            assert time.monotonic() < deadline, "it was not cut"
            time.sleep(0.2)
        told = _read_all(deaf)
    assert told.startswith(b"HTTP/1.1 200")
    assert b"[DONE]" not in told
    deadline = time.monotonic() + 300
    while guarded.cluster.status().coordinators[0].num_running:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_secrets_and_prompts_are_in_no_log_and_no_command_line(guarded: Guarded) -> None:
    """Of Ray, Serve, the coordinator, the experts and our own command."""
    assert guarded.complete(guarded.key).status_code == 200
    assert guarded.complete(guarded.key, temperature=PROMPT).status_code == 400
    text = guarded.cluster.log.read_text()
    session = Path(text.split("logs ")[1].split(")")[0])
    files = [guarded.cluster.log, *(path for path in session.rglob("*") if path.is_file() and not path.is_symlink())]
    assert any("replica" in path.name for path in files), "Serve's own logs are among them"
    secrets = [PROMPT.encode(), guarded.key.encode(), ONLY_KEY.encode()]
    assert [path for path in files if any(secret in read(path) for secret in secrets)] == []
    for process in guarded.cluster.processes():
        line = command_line(process)
        assert not any(secret.decode() in line for secret in secrets)


def read(path: Path) -> bytes:
    """A file of a cluster that runs: it may be gone by now."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def test_strangers_are_not_served_by_oversight(guarded: Guarded, tmp_path: Path) -> None:
    env = {name: value for name, value in environment(tmp_path).items() if name != "OCTAVO_API_KEY"}
    serve = ["serve", str(guarded.cluster.model), "--port", str(free_port())]
    for more, reason in (
        (["--host", "0.0.0.0"], "give --api-keys FILE or OCTAVO_API_KEY, or say --no-auth"),
        (["--api-keys", os.devnull], "it is no JSON"),
    ):
        refused = run([*serve, *more], env)
        assert refused.returncode == 1
        assert reason in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
