"""What Ray Serve is handed: typed arguments, bounded queues. The deployment itself runs in the end-to-end tests."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from actors.channels import WireCredentials
from cluster.config import ClusterConfig, ConfigError
from tests.support.checkpoints import write_mixtral
from tests.support.front import run
from tests.support.tokenizers import write_byte_tokenizer

with warnings.catch_warnings():  # Ray Serve's own models use a form of pydantic's Field that is deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
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


def test_a_configuration_and_its_fields_deploy_the_same() -> None:
    one, two = build_app(ClusterConfig(model="/m")), build_app({"model": "/m"})
    assert [node.name for node in _deployments(one)] == [node.name for node in _deployments(two)]


def test_a_front_door_from_endpoints(tmp_path: Path) -> None:
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

    async def work() -> None:
        front = await open_front(config, endpoints)
        assert (front.model_id, front.max_model_len, front.system_fingerprint) == ("served", 100, "fp_1")
        assert (front.vocab_size, front.tokenizer.vocab_size) == (310, 300)
        assert front.eos_ids == {2}
        assert front.request_timeout_s == 12.0
        assert front.limits == limits_of(config)
        assert not front.coordinators.all_connected
        await front.close()

    run(work())


def _deployments(application: Any) -> list[Any]:
    return [application._bound_deployment]
