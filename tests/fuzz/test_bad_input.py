"""The corpus of bad input: each request in `corpus/http.json` gets the status, code and param that it says.

`{"$repeat": [piece, times]}` stands for a long string or array; `raw`, a list of pieces of text, for a body that is no
JSON. The model has a vocabulary of 300 and a context of 512 tokens.
"""

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.front import ask, make_front
from tests.support.scripted_coordinator import ScriptedCoordinator, saying

CORPUS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("corpus").joinpath("http.json").read_text())


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad_input")


def unfolded(value: Any) -> Any:
    """Long values as they are meant."""
    if isinstance(value, dict):
        if "$repeat" in value:
            piece, times = value["$repeat"]
            return unfolded(piece) * times
        return {key: unfolded(one) for key, one in value.items()}
    return [unfolded(one) for one in value] if isinstance(value, list) else value


def text_of(pieces: Any) -> str:
    return pieces if isinstance(pieces, str) else "".join(map(unfolded, pieces))


def sent(case: dict[str, Any]) -> dict[str, Any]:
    """As arguments for a client."""
    body = text_of(case["raw"]) if "raw" in case else json.dumps(unfolded(case["body"]))
    headers = {"Content-Type": "application/json", **case.get("headers", {})}
    content = None if case["body"] is None and "raw" not in case else body.encode()
    return {"method": case.get("method", "POST"), "url": text_of(case["path"]), "content": content, "headers": headers}


@pytest.mark.parametrize("case", CORPUS, ids=[case["name"] for case in CORPUS])
def test_bad_input_gets_the_answer_that_the_corpus_says(model_dir: Path, case: dict[str, Any]) -> None:
    coordinator = ScriptedCoordinator(saying([7]))
    front = make_front(model_dir, coordinator)

    async def request(client: httpx2.AsyncClient) -> httpx2.Response:
        return await client.request(**sent(case))

    response = ask(front, request)
    assert response.status_code == case["status"], response.text[:500]
    if case["status"] == 200:
        return
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (case["code"], case["param"]), error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) < 1000, "an error does not repeat what was sent"
    assert coordinator.submits == [], "nothing of it reached a coordinator"
    assert front.metrics.unexpected._value.get() == 0


def test_every_case_has_a_name_of_its_own() -> None:
    assert len({case["name"] for case in CORPUS}) == len(CORPUS) > 100
