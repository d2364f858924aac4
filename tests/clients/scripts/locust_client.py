"""locust, headless: twenty users for twenty seconds, each answer looked at. Runs in an environment of its own."""

import csv
import json
import subprocess
import sys
from pathlib import Path

from checking import Server, main

USERS, SECONDS = 20, 20
LOCUSTFILE = """
import json
import os

from locust import HttpUser, constant, task

MODEL = os.environ["OCTAVO_TEST_MODEL"]


class Reader(HttpUser):
    wait_time = constant(0.1)

    @task(2)
    def chat(self):
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "seed": 1}
        with self.client.post("/v1/chat/completions", json=body, catch_response=True) as answer:
            if answer.status_code != 200 or not answer.json()["usage"]["completion_tokens"]:
                answer.failure(f"{answer.status_code} {answer.text[:200]}")

    @task(1)
    def stream(self):
        body = {"model": MODEL, "prompt": "Hello", "max_tokens": 8, "seed": 1, "stream": True}
        name = "/v1/completions stream"
        with self.client.post("/v1/completions", json=body, stream=True, name=name, catch_response=True) as answer:
            lines = [line for line in answer.iter_lines(decode_unicode=True) if line.startswith("data: ")]
            if answer.status_code != 200 or lines[-1] != "data: [DONE]":
                answer.failure(f"{answer.status_code} {lines[-1:]}")
            elif not any(json.loads(line[6:])["choices"][0]["finish_reason"] for line in lines[:-1]):
                answer.failure("no finish_reason")

    @task(1)
    def models(self):
        self.client.get("/v1/models")
"""


def check_twenty_users_see_no_failure(server: Server) -> None:
    import os

    folder = Path(server.scratch)
    (folder / "reader.py").write_text(LOCUSTFILE)
    command = [sys.executable, "-m", "locust", "-f", "reader.py", "--headless", "--host", server.url]
    ended = subprocess.run(
        [*command, *("-u", str(USERS), "-r", str(USERS), "-t", f"{SECONDS}s", "--csv", "found", "--only-summary")],
        cwd=folder,
        env={**os.environ, "OCTAVO_TEST_MODEL": server.model},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    with (folder / "found_stats.csv").open() as file:
        rows = {row["Name"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"/v1/chat/completions", "/v1/completions stream", "/v1/models", "Aggregated"}
    assert {name: row["Failure Count"] for name, row in rows.items() if row["Failure Count"] != "0"} == {}
    assert int(rows["Aggregated"]["Request Count"]) >= USERS
    print(json.dumps({name: row["Request Count"] for name, row in rows.items()}))


if __name__ == "__main__":
    main(globals())
