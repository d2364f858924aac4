"""The ingress's client against a real service: many requests on one stream, clean cancels, honest losses."""

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest

from actors.channels import WireCredentials
from actors.front.coordinator_client import CoordinatorClient, CoordinatorLost, OpenRequest
from protos.coordinator_pb2 import (
    FINISH_REASON_ERROR,
    FINISH_REASON_LENGTH,
    FINISH_REASON_UNSPECIFIED,
    PositionLogprobs,
    SequenceOutput,
)
from protos.expert_pb2 import STATUS_INVALID
from tests.support.checkpoints import write_mixtral
from tests.support.engines import GatedExperts, TinyModel, request, tell_fresh
from tests.support.served import CREDENTIALS, served, submit

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path: Path = tmp_path_factory.mktemp("client")
    write_mixtral(path, layers=1, experts=2)
    return TinyModel.load(path)


async def collect(client: CoordinatorClient, *args: object, **fields: object) -> list[SequenceOutput]:
    return [one async for one in client.generate(submit(*args, **fields))]  # type: ignore[arg-type]


async def has_failed(client: CoordinatorClient) -> None:
    """Returns when it has tried to connect: then it knows why that cannot be, however short its time is."""
    failed = asyncio.Event()
    client.watch(failed.set)
    client.open()
    await asyncio.wait_for(failed.wait(), 120)


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for one in outputs for token in one.token_ids]


async def test_many_requests_share_the_stream_whatever_ids_their_callers_gave(model: TinyModel) -> None:
    prompts = [[5, 6, 7], [8] * 40, [9]]
    expected = await tell_fresh(model, [request(prompt, 6) for prompt in prompts])
    async with served(model) as one:
        client = CoordinatorClient(one.address, CREDENTIALS)
        told = await asyncio.gather(*(collect(client, 77, prompt, 6) for prompt in prompts))
        assert client.connected
        assert client.inflight_tokens == 0
        await client.close()
    assert [tokens(outputs) for outputs in told] == [story.tokens for story in expected]
    assert {output.request_id for outputs in told for output in outputs} == {77}
    assert [outputs[-1].finish_reason for outputs in told] == [FINISH_REASON_LENGTH] * 3


async def test_prompt_logprobs_all_come_with_the_first_output(model: TinyModel) -> None:
    """The prompt takes several chunks, and each chunk's scores are a message of their own."""
    prompt = [5 + index % 200 for index in range(100)]
    async with served(model, chunk=16) as one:
        client = CoordinatorClient(one.address, CREDENTIALS)
        outputs = await collect(client, 1, prompt, 3, prompt_logprobs=2)
        scored = await collect(client, 1, prompt, 0, prompt_logprobs=2)
        await client.close()
    assert [place.chosen.token_id for place in outputs[0].prompt_logprobs] == prompt[1:]
    assert all(not output.prompt_logprobs for output in outputs[1:])
    assert [len(scored), len(scored[0].prompt_logprobs), tokens(scored)] == [1, 99, []]
    assert scored[0].finish_reason == FINISH_REASON_LENGTH


async def test_a_refusal_is_an_output(model: TinyModel) -> None:
    async with served(model) as one:
        client = CoordinatorClient(one.address, CREDENTIALS)
        (refused,) = await collect(client, 5, [300])
        await client.close()
    assert (refused.request_id, refused.finish_reason, refused.status) == (
        5,
        FINISH_REASON_ERROR,
        STATUS_INVALID,
    )
    assert refused.error.startswith("prompt_token_ids[0] is 300")


async def test_closing_the_iterator_cancels_the_request(model: TinyModel) -> None:
    experts = GatedExperts(model.experts, shuts_after=10)  # it is not done before it is closed
    async with served(model, experts=experts) as one:
        client = CoordinatorClient(one.address, CREDENTIALS)
        async with aclosing(client.generate(submit(1, [5, 6], 400))) as outputs:
            first = await anext(outputs)
            assert first.finish_reason == FINISH_REASON_UNSPECIFIED
            assert 0 < client.inflight_tokens < 400
        assert client.inflight_tokens == 0
        await asyncio.wait_for(one.engine.live.wait_for_none(), 120)
        assert one.engine.scheduler.counters.generated_tokens < 400
        experts.open()
        assert tokens(await collect(client, 1, [5], 2)), "the stream goes on"
        await client.close()


async def test_cancelling_the_reading_task_cancels_the_request(model: TinyModel) -> None:
    async with served(model) as one:
        client = CoordinatorClient(one.address, CREDENTIALS)
        reading = asyncio.create_task(collect(client, 1, [5, 6], 400))
        await asyncio.wait_for(one.engine.live.wait_for_some(), 120)
        reading.cancel()
        await asyncio.wait_for(one.engine.live.wait_for_none(), 120)
        await asyncio.gather(reading, return_exceptions=True)
        await client.close()


async def test_a_slow_reader_gets_everything_in_few_outputs(model: TinyModel) -> None:
    (story,) = await tell_fresh(model, [request([5, 6], 60)])
    async with served(model) as one:
        client = CoordinatorClient(one.address, CREDENTIALS)
        outputs = client.generate(submit(1, [5, 6], 60))
        told = [await anext(outputs)]
        await asyncio.wait_for(one.engine.live.wait_for_none(), 120)
        await collect(client, 2, [7], 1)  # whatever was on the way has arrived when this is answered
        told += [output async for output in outputs]
        await client.close()
    assert tokens(told) == story.tokens
    assert len(told) <= 3


async def test_a_lost_coordinator_ends_every_open_request_and_is_found_again(model: TinyModel) -> None:
    async with served(model, experts=GatedExperts(model.experts, shuts_after=10)) as first:
        client = CoordinatorClient(first.address, CREDENTIALS)
        both = [asyncio.create_task(collect(client, name, [5, 6], 400)) for name in range(2)]
        await asyncio.wait_for(first.engine.live.wait_for_some(), 120)
        port = first.server.port
        await first.server.stop(0)
        results = await asyncio.wait_for(asyncio.gather(*both, return_exceptions=True), 120)
        assert [type(result) for result in results] == [CoordinatorLost] * 2
        assert str(results[0]).startswith(f"coordinator {first.address}: ")
        assert not client.connected
        assert client.inflight_tokens == 0
    async with served(model, port=port) as second:
        assert second.address == first.address
        assert len(tokens(await collect(client, 1, [5], 3))) == 3
        await client.close()


async def test_what_came_before_the_loss_is_read_before_the_loss() -> None:
    lost = OpenRequest(submit(9, [5], 4), wire_id=1)
    lost.put(SequenceOutput(request_id=1, token_ids=[7]))
    lost.put(SequenceOutput(request_id=1, token_ids=[8]))
    lost.lose("gone")
    output = await lost.take()
    assert (output.request_id, list(output.token_ids)) == (9, [7, 8])
    for _ in range(2):
        with pytest.raises(CoordinatorLost, match="gone"):
            await lost.take()


async def test_scores_alone_do_not_survive_a_loss_as_an_output() -> None:
    lost = OpenRequest(submit(9, [5], 4), wire_id=1)
    lost.put(SequenceOutput(request_id=1, prompt_logprobs=[PositionLogprobs()]))
    lost.lose("gone")
    with pytest.raises(CoordinatorLost, match="gone"):
        await lost.take()


async def test_a_finished_request_is_not_lost() -> None:
    done = OpenRequest(submit(9, [5], 4), wire_id=1)
    done.put(SequenceOutput(request_id=1, token_ids=[7], finish_reason=FINISH_REASON_LENGTH))
    done.lose("gone")
    assert (await done.take()).finish_reason == FINISH_REASON_LENGTH


async def test_tokens_in_flight_shrink_as_they_come() -> None:
    one = OpenRequest(submit(9, [5] * 10, 4), wire_id=1)
    assert one.inflight_tokens == 14
    one.put(SequenceOutput(request_id=1, prompt_logprobs=[PositionLogprobs()]))
    assert one.inflight_tokens == 14
    one.put(SequenceOutput(request_id=1, token_ids=[7]))
    assert one.inflight_tokens == 3
    one.put(SequenceOutput(request_id=1, token_ids=[8, 9]))
    assert one.inflight_tokens == 1


async def test_nobody_at_the_address_is_a_loss_within_the_timeout(model: TinyModel) -> None:
    async with served(model) as one:
        address = one.address
    client = CoordinatorClient(address, CREDENTIALS, connect_timeout_s=2.0)
    await has_failed(client)
    with pytest.raises(CoordinatorLost, match=f"coordinator {address}: .*UNAVAILABLE"):
        await collect(client, 1, [5])
    with pytest.raises(CoordinatorLost):
        await client.snapshot()
    await client.close()


async def test_a_wrong_token_is_a_loss_that_says_so(model: TinyModel) -> None:
    async with served(model) as one:
        client = CoordinatorClient(one.address, WireCredentials("wrong"), connect_timeout_s=2.0)
        await has_failed(client)
        with pytest.raises(CoordinatorLost, match="UNAUTHENTICATED"):
            await collect(client, 1, [5])
        await client.close()


async def test_a_closed_client_ends_its_requests_and_takes_no_more(model: TinyModel) -> None:
    async with served(model, experts=GatedExperts(model.experts, shuts_after=10)) as one:
        client = CoordinatorClient(one.address, CREDENTIALS)
        reading = asyncio.create_task(collect(client, 1, [5, 6], 400))
        await asyncio.wait_for(one.engine.live.wait_for_some(), 120)
        await client.close()
        with pytest.raises(CoordinatorLost, match="the client was closed"):
            await asyncio.wait_for(reading, 120)
        with pytest.raises(CoordinatorLost, match="the client is closed"):
            await collect(client, 1, [5])
        await asyncio.wait_for(one.engine.live.wait_for_none(), 120)


async def test_the_snapshot_is_the_coordinators(model: TinyModel) -> None:
    async with served(model) as one:
        client = CoordinatorClient(one.address, CREDENTIALS)
        assert (await client.snapshot()).coordinator_id == "coordinator-0"
        await client.close()
