"""What Ray Serve is handed: typed arguments, bounded queues. The deployment itself runs in the end-to-end tests."""

import warnings
from pathlib import Path
from typing import Any

import httpx2
import pytest

from actors.channels import WireCredentials
from actors.front import proxy_guard
from actors.front.front_door import LONGEST_HOLD_S
from actors.front.http_app import create_app
from cluster.config import ClusterConfig, ConfigError
from tests.support.checkpoints import write_mixtral
from tests.support.front import MODEL, make_front, run
from tests.support.scripted_coordinator import ScriptedCoordinator, saying
from tests.support.tokenizers import EOS_ID, write_byte_tokenizer

with warnings.catch_warnings():  # Ray Serve's own models use a form of pydantic's Field that is deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    from ray.serve._private.http_util import RequestIdMiddleware

    from actors.ingress import build_app, limits_of, open_front, parse_args
    from actors.supervision.launch import Endpoints


def test_the_texts_of_a_command_line_do() -> None:
    config = parse_args({"model": "/m", "replicas": "2", "request_timeout_s": "5", "device": "cpu"})
    assert config == ClusterConfig(model="/m", replicas=2, request_timeout_s=5.0, device="cpu")


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"model": "/m", "replica": 2}, "unknown argument 'replica'"),
        ({}, "argument 'model' is missing"),
        ({"model": "/m", "replicas": "two"}, "replicas"),
        ({"model": "/m", "replicas": 0}, "replicas is 0"),
        ({"model": "/m", "transport": "carrier-pigeon"}, "transport"),
        ({"model": ""}, "model is ''"),
    ],
)
def test_a_wrong_argument_is_named(args: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_app(args)


def test_both_queues_are_bounded() -> None:
    config = ClusterConfig(model="/m", max_num_seqs=10, max_waiting_requests=20, coordinators=2, drain_timeout_s=7)
    limits = limits_of(config)
    assert limits.max_requests == 2 * (10 + 20) + 1
    (deployment,) = [node for node in _deployments(build_app(config)) if node.name == "ingress"]
    assert deployment.max_ongoing_requests > limits.max_requests, "refusals and health checks still get in"
    assert deployment.max_queued_requests == 256
    assert deployment.num_replicas == 1
    assert deployment._deployment_config.graceful_shutdown_timeout_s == 7


def test_each_ingress_replica_has_limits_of_its_own() -> None:
    config = ClusterConfig(model="/m", ingresses=3, resume_s=12.0)
    (deployment,) = [node for node in _deployments(build_app(config)) if node.name == "ingress"]
    assert deployment.num_replicas == 3
    assert limits_of(config).max_requests == limits_of(ClusterConfig(model="/m")).max_requests
    assert limits_of(config).resume_s == 12.0


def test_a_refusal_speaks_for_others_for_less_time_than_a_standing_queue_is_long() -> None:
    assert limits_of(ClusterConfig(model="/m")).hold_s == LONGEST_HOLD_S == 0.25
    assert limits_of(ClusterConfig(model="/m", max_queue_wait_s=2.0)).hold_s == pytest.approx(0.1)


def test_a_configuration_and_its_fields_deploy_the_same() -> None:
    one, two = build_app(ClusterConfig(model="/m")), build_app({"model": "/m"})
    assert [node.name for node in _deployments(one)] == [node.name for node in _deployments(two)]


def test_a_front_door_from_endpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mixtral(tmp_path, vocab=310)
    write_byte_tokenizer(tmp_path, 300)
    endpoints = Endpoints(
        coordinators=("127.0.0.1:1", "127.0.0.1:2"),
        credentials=WireCredentials("a-token-for-tests-only"),
        model_path=str(tmp_path),
        served_model_name="served",
        max_model_len=100,
        system_fingerprint="fp_1",
    )
    config = ClusterConfig(model=str(tmp_path), request_timeout_s=12.0)

    monkeypatch.delenv(proxy_guard.CALLBACK_VARIABLE, raising=False)

    async def work() -> None:
        front = await open_front(config, endpoints)
        assert (front.model_id, front.max_model_len, front.system_fingerprint) == ("served", 100, "fp_1")
        assert (front.vocab_size, front.tokenizer.vocab_size) == (310, 300)
        assert front.eos_ids == {2}
        assert front.request_timeout_s == 12.0
        assert front.limits == limits_of(config)
        assert not front.coordinators.all_connected
        assert not front.is_guarded
        await front.close()
        monkeypatch.setenv(proxy_guard.CALLBACK_VARIABLE, proxy_guard.CALLBACK)
        front = await open_front(config, endpoints)
        assert front.is_guarded
        await front.close()

    run(work())


def _deployments(application: Any) -> list[Any]:
    return [application._bound_deployment]


def test_ingresses_between_two_limits_are_serves_to_count() -> None:
    config = ClusterConfig(
        model="/m",
        min_ingresses=1,
        max_ingresses=4,
        ingresses=2,
        target_ingress_requests=30,
        scale_up_s=1.0,
        scale_down_s=90.0,
    )
    (deployment,) = _deployments(build_app(config))
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.initial_replicas) == (1, 4, 2)
    assert (scaling.target_ongoing_requests, scaling.downscale_delay_s) == (30, 90.0)
    (fixed,) = _deployments(build_app(ClusterConfig(model="/m", ingresses=2)))
    assert fixed._deployment_config.autoscaling_config is None


def test_a_front_door_has_room_for_all_coordinators_that_there_may_be() -> None:
    config = ClusterConfig(model="/m", min_coordinators=1, max_coordinators=3)
    assert limits_of(config) == limits_of(ClusterConfig(model="/m", coordinators=3))


@pytest.mark.parametrize("own", ["call-7", None])
def test_an_answer_through_serves_proxy_says_one_id_once(tmp_path: Path, own: str | None) -> None:
    """Serve names every request and says so itself: ours is that name, and not said once more."""
    front = make_front(tmp_path, ScriptedCoordinator(saying([70], EOS_ID)))
    app = RequestIdMiddleware(create_app(front, says_request_ids=False))

    async def work() -> None:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://octavo") as client:
            headers = {} if own is None else {"X-Request-Id": own}
            body = {"model": MODEL, "prompt": "p"}
            response = await client.post("/v1/completions", json=body, headers=headers)
            (said,) = response.headers.get_list("x-request-id")
            assert said == own or own is None
            assert response.json()["id"] == f"cmpl-{said}"

    run(work())
