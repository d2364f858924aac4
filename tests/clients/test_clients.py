"""Clients that others wrote, at their pinned versions, against a served cluster: they must find what they expect."""

import pytest

from tests.clients.conftest import Outcomes
from tests.clients.runs import Client

pytestmark = [pytest.mark.clients, pytest.mark.e2e, pytest.mark.timeout(900)]

CLIENTS = (
    Client("openai1", "openai_client.py"),
    Client("openai2", "openai_client.py"),
    Client("openai3", "openai_client.py"),
    Client("langchain_openai", "langchain_client.py"),
    Client("litellm", "litellm_client.py"),
    Client("lm_eval", "lm_eval_client.py"),
    Client("guidellm", "guidellm_client.py"),
    Client("locust", "locust_client.py"),
    Client("schemathesis", "schemathesis_client.py"),
)
CASES = [
    pytest.param(client, check, id=f"{client.environment}-{check}") for client in CLIENTS for check in client.checks
]


@pytest.mark.parametrize(("client", "check"), CASES)
def test_a_client_finds_what_it_expects(client: Client, check: str, outcomes: Outcomes) -> None:
    outcome = outcomes(client)[check]
    if outcome.outcome == "unsupported":
        pytest.skip(f"the server does not do this: {outcome.text}")
    assert outcome.outcome == "passed", outcome.text
