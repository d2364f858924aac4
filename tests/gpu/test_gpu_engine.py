"""On a real GPU: the engine's promises, and experts behind the wire that are those in the process, bit for bit."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch

from actors.expert.actor import ExpertActor
from cluster.prompt_lookup import PromptLookupConfig
from model.dispatch import combine, dispatch
from model.numerics import same_bits
from protos.coordinator_pb2 import Sampling, Submit
from tests.actors.test_engine import mixed_requests, prompts
from tests.support.checkpoints import write_mixtral
from tests.support.engines import TinyModel, request, tell_fresh
from tests.support.experts import map_of
from tests.support.fake_replicas import actor_arguments, entry, remote
from tests.support.gpu import CUDA, needs_gpu
from tests.support.tiny_cluster import tiny_cluster
from tests.support.tokenizers import write_byte_tokenizer

pytestmark = [pytest.mark.gpu, needs_gpu, pytest.mark.anyio]

HIDDEN = 256


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu-engine") / "mixtral"
    write_mixtral(path, hidden=HIDDEN, ffn=512, head_dim=64, dtype=torch.bfloat16)
    write_byte_tokenizer(path, 300)
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> TinyModel:
    return TinyModel.load(path, "bf16", "cuda")


async def test_nothing_but_the_request_decides_what_is_told(model: TinyModel) -> None:
    asked = mixed_requests(12)
    expected = [(await tell_fresh(model, [one]))[0].exact for one in asked]
    settings = ({}, {"chunk": 16}, {"num_blocks": 14}, {"microbatches": 2}, {"prefix_caching": False})
    for one in settings:
        assert [story.exact for story in await tell_fresh(model, asked, **one)] == expected, one


async def test_guessing_ahead_changes_no_token(model: TinyModel) -> None:
    asked = [request(prompt * 3, max_tokens=24) for prompt in prompts(4, seed=8, longest=12)]
    plain = await tell_fresh(model, asked)
    guessed = await tell_fresh(
        model, asked, prompt_lookup=PromptLookupConfig(tokens=4, ngram_max=3, ngram_min=1, max_batch=8)
    )
    assert [story.exact for story in guessed] == [story.exact for story in plain]


@pytest.mark.parametrize("lane", [0, HIDDEN], ids=["grpc", "shm"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
async def test_remote_experts_are_local_ones(path: Path, model: TinyModel, lane: int, device: str) -> None:
    """With the coordinator on the GPU, and its experts there too or on the CPU."""
    kernel = "bf16" if device == "cuda" else "fp32"
    local = model.local if device == "cuda" else TinyModel.load(path, kernel).local
    asked = mixed_requests(6)
    async with AsyncExitStack() as stack:
        facts = []
        for number, group in enumerate(([0, 2], [1], [3])):
            actor = ExpertActor(**actor_arguments(path, f"r{number}", group, kernel) | {"device": device})
            await actor.start()
            stack.push_async_callback(actor.stop)
            facts.append(await actor.wait_settled())
            assert facts[-1]["state"] == "ready", facts[-1]
        replicas = [entry(fact) for fact in facts]
        experts = await stack.enter_async_context(remote(map_of(*replicas, experts=4), lane=lane))
        for tokens in (1, 2, 7, 33, 120):
            for layer in range(2):
                generator = torch.Generator().manual_seed(tokens)
                x_TD = torch.randn(tokens, HIDDEN, generator=generator).to(CUDA)
                plan = dispatch(x_TD, torch.randn(tokens, 4, generator=generator).to(CUDA), 2)
                answers = combine(await experts.run(layer, plan), plan)
                here = plan if device == "cuda" else dispatch(x_TD.cpu(), _scores(tokens), 2)
                expected = combine(local.run(layer, here), here)
                assert same_bits(answers.cpu(), expected.cpu()), (tokens, layer)
        told = await tell_fresh(model, asked, experts=experts)
        alone = [(await tell_fresh(model, [one], experts=experts))[0].exact for one in asked]
        assert [story.exact for story in told] == alone
        if device == "cuda":
            assert alone == [(await tell_fresh(model, [one]))[0].exact for one in asked]
        assert experts.stats.retries == 0


async def test_actors_on_the_gpu_give_the_tokens_of_one_process(path: Path, model: TinyModel) -> None:
    asked = prompts(6, seed=9)
    expected = [(await tell_fresh(model, [request(one, max_tokens=16)]))[0].tokens for one in asked]
    async with tiny_cluster(path, expert_device="cuda", device="cuda") as cluster:

        async def tokens(number: int) -> list[int]:
            submit = Submit(
                request_id=number,
                prompt_token_ids=asked[number],
                max_tokens=16,
                ignore_eos=True,
                sampling=Sampling(temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=1),
            )
            return [token async for output in cluster.client.generate(submit) for token in output.token_ids]

        assert await asyncio.gather(*(tokens(number) for number in range(6))) == expected


def _scores(tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    torch.randn(tokens, HIDDEN, generator=generator)
    return torch.randn(tokens, 4, generator=generator)
