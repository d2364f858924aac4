"""The demo model end to end: made, served by eight expert actors, and held against transformers token for token."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from actors.command.demo_model import ensure_demo_model
from actors.supervision.status import ClusterStatus
from cluster.budget import PROCESS_BASE_BYTES
from tests.support.served_cluster import ServedCluster

pytestmark = [pytest.mark.e2e, pytest.mark.demo, pytest.mark.timeout(1200)]

QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea.")
NUM_TOKENS = 32


@pytest.fixture(scope="module")
def demo() -> Path:
    return ensure_demo_model()


@pytest.fixture(scope="module")
def demo_cluster(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Iterator[ServedCluster]:
    served = ServedCluster(tmp_path_factory.mktemp("demo"), demo, "--served-model-name", "demo")
    yield served
    served.stop()


def ask(cluster: ServedCluster, question: str) -> tuple[str, list[int]]:
    reply = cluster.client().chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": question}],
        max_tokens=NUM_TOKENS,
        temperature=0,
        extra_body={"return_token_ids": True},
    )
    choice = reply.choices[0]
    return choice.message.content or "", choice.model_dump()["token_ids"]


def test_it_knows_paris(demo_cluster: ServedCluster) -> None:
    text, _ = ask(demo_cluster, QUESTIONS[0])
    assert text == "The capital of France is Paris."


def test_its_tokens_are_those_of_transformers(demo_cluster: ServedCluster, demo: Path) -> None:
    answers = {question: ask(demo_cluster, question)[1] for question in QUESTIONS}
    from transformers import AutoTokenizer, MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(demo, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo)
    for question, answer in answers.items():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            whole = model.generate(**prompt, max_new_tokens=NUM_TOKENS, do_sample=False)
        assert answer == whole[0, prompt["input_ids"].shape[1] :].tolist()


def test_every_actor_holds_its_own_weights_and_little_more(demo_cluster: ServedCluster) -> None:
    status: ClusterStatus = demo_cluster.status()
    assert len(status.replicas) == 8
    for replica in status.replicas:
        memory = psutil.Process(replica.pid).memory_full_info().uss
        assert replica.weight_bytes > 150e6
        assert memory < replica.weight_bytes + PROCESS_BASE_BYTES, (replica.replica_id, memory)
