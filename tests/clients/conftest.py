"""One served cluster for all clients: a tiny model behind `octavo serve`, as a person would start it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.clients.environments import ClientEnvironment
from tests.clients.runs import Client, Outcome
from tests.support.checkpoints import write_mixtral
from tests.support.served_cluster import ServedCluster
from tests.support.tokenizers import write_byte_tokenizer

MAX_NUM_SEQS, MAX_WAITING = 16, 48
CONTEXT = 1024
# ChatML with tools, as Hermes and Qwen write them.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Call one: <tool_call>{...}</tool_call><|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Outcomes = Callable[[Client], dict[str, Outcome]]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral of 4 layers and 8 experts, stored in fp16."""
    path = tmp_path_factory.mktemp("clients-model") / "tiny"
    path.mkdir()
    write_mixtral(path, layers=4, experts=8, max_context=CONTEXT, dtype=torch.float16)
    write_byte_tokenizer(path, chat_template=TEMPLATE)
    return path


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[ServedCluster]:
    """The cluster; its queue is short, so that a client can be refused."""
    served = ServedCluster(
        tmp_path_factory.mktemp("clients-home"),
        model_dir,
        *("--max-num-seqs", str(MAX_NUM_SEQS), "--max-waiting-requests", str(MAX_WAITING)),
    )
    yield served
    served.stop()


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Outcomes:
    """Runs each client's script once, when it is first asked about, and starts no cluster before there is a client."""
    known: dict[Client, dict[str, Outcome]] = {}

    def of(client: Client) -> dict[str, Outcome]:
        environment = ClientEnvironment(client.environment)
        if not environment.is_made:
            pytest.skip(f"no environment for {client.environment}: `make clients` makes it")
        if client not in known:
            served: ServedCluster = request.getfixturevalue("cluster")
            server = {
                "url": served.url,
                "model": "tiny",
                "model_dir": str(served.model),
                "scratch": str(tmp_path_factory.mktemp(client.environment)),
                "facts": {"context": CONTEXT, "max_num_seqs": MAX_NUM_SEQS, "max_waiting": MAX_WAITING},
            }
            known[client] = client.run(server)
        return known[client]

    return of
