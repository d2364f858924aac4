"""Every field has limits, contradictions do not get past construction, and secrets stay secret."""

import dataclasses
import pickle
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from cluster.config import ClusterConfig, ConfigError, from_environment
from cluster.prompt_lookup import PromptLookupConfig

TOKEN = "0123456789abcdef"
ARGS: TypeAdapter[ClusterConfig] = TypeAdapter(ClusterConfig)


def make(**changes: Any) -> ClusterConfig:
    return ClusterConfig(**{"model": "/models/mixtral", **changes})


def test_the_defaults_are_those_of_one_machine() -> None:
    config = make()
    assert (config.replicas, config.coordinators, config.experts_per_actor) == (1, 1, 1)
    assert config.bind_host == "127.0.0.1"
    assert config.auth_token is None
    assert config.prefix_caching is True


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("enable_return_routed_experts", 1, "enable_return_routed_experts is 1, but must be true or false"),
        ("prefix_caching", None, "prefix_caching is None, but must be true or false"),
        ("replicas", 0, "replicas is 0, but must be a whole number from 1 to 64"),
        ("replicas", True, "replicas is True"),
        ("replicas", 1.0, "replicas is 1.0"),
        ("coordinators", 65, "coordinators is 65"),
        ("ingresses", 0, "ingresses is 0, but must be a whole number from 1 to 64"),
        ("resume_s", 0, "resume_s is 0, but must be more than 0 and at most 86400 seconds"),
        ("experts_per_actor", 0, "experts_per_actor is 0"),
        ("kv_cache_bytes", 0, "kv_cache_bytes is 0"),
        ("block_size", 48, "block_size is 48, but must divide 128"),
        ("block_size", 256, "block_size is 256"),
        ("max_num_seqs", 0, "max_num_seqs is 0"),
        ("max_num_batched_tokens", 1 << 17, "max_num_batched_tokens is 131072"),
        ("max_model_len", 0, "max_model_len is 0"),
        ("max_waiting_requests", 0, "max_waiting_requests is 0"),
        ("max_waiting_tokens", -1, "max_waiting_tokens is -1"),
        ("speculation", "eagle", "speculation is 'eagle', but must be one of off, prompt_lookup"),
        ("speculation_tokens", 0, "speculation_tokens is 0"),
        ("speculation_ngram_min", 0, "speculation_ngram_min is 0"),
        ("speculation_ngram_max", 65, "speculation_ngram_max is 65"),
        ("speculation_max_batch", 0, "speculation_max_batch is 0"),
        ("expert_threads", 0, "expert_threads is 0"),
        ("coordinator_threads", 0, "coordinator_threads is 0"),
        ("expert_deadline_s", 0, "expert_deadline_s is 0, but must be more than 0"),
        ("expert_deadline_s", float("nan"), "expert_deadline_s is nan"),
        ("request_timeout_s", float("inf"), "request_timeout_s is inf"),
        ("drain_timeout_s", "30", "drain_timeout_s is '30'"),
        ("max_queue_wait_s", 0, "max_queue_wait_s is 0, but must be more than 0"),
        ("device", "tpu", "device is 'tpu', but must be one of auto, cpu, cuda"),
        ("experts_device", "", "experts_device is ''"),
        ("transport", "rdma", "transport is 'rdma', but must be one of auto, shm, grpc"),
        ("kernel", "int3", "kernel is 'int3', but must be one of auto, fp32, fp16, bf16, int8, fp8"),
        ("model", "", "model is '', but must be a text that is not empty"),
        ("model", None, "model is None"),
        ("served_model_name", " ", "served_model_name is ' '"),
        ("bind_host", "a host", "bind_host is 'a host'"),
        ("tls_server_name", "a/name", "tls_server_name is 'a/name'"),
        ("namespace", "-x", "namespace is '-x'"),
        ("namespace", "a" * 64, "namespace is"),
        ("balance", "maybe", "balance is 'maybe', but must be one of off, dry_run, on"),
        ("balance_policy", None, "balance_policy is None"),
        ("balance_policy", "a b", "balance_policy is 'a b', but must be a shipped policy's name or module:function"),
        ("balance_policy", "module:", "balance_policy is 'module:'"),
        ("balance_interval_s", 0, "balance_interval_s is 0, but must be more than 0"),
        ("balance_layer_ranges", 0, "balance_layer_ranges is 0, but must be a whole number from 1 to 4096"),
        ("balance_bytes_per_s", 0, "balance_bytes_per_s is 0"),
        ("expert_slots", 0, "expert_slots is 0"),
        ("expert_num_gpus", -1, "expert_num_gpus is -1"),
        ("expert_num_gpus", 1.5, "expert_num_gpus is 1.5, but must be from 0 to 16 and whole above 1"),
        ("expert_num_gpus", float("nan"), "expert_num_gpus is nan"),
        ("expert_num_gpus", True, "expert_num_gpus is True"),
    ],
)
def test_a_value_out_of_its_limits_is_named_with_them(name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**{name: value})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_num_batched_tokens": 16, "max_num_seqs": 8},
            r"max_num_batched_tokens is 16, .* block_size \(32\)",
        ),
        ({"max_num_batched_tokens": 32}, r"max_num_batched_tokens is 32, .* max_num_seqs \(64\)"),
        ({"speculation_ngram_min": 5}, r"speculation_ngram_min is 5, but must be at most speculation_ngram_max \(4\)"),
        (
            {
                "speculation": "prompt_lookup",
                "speculation_tokens": 32,
                "max_num_batched_tokens": 32,
                "max_num_seqs": 4,
            },
            r"speculation_tokens is 32, but must be less than max_num_batched_tokens \(32\)",
        ),
        ({"tls_cert": "c.pem"}, "tls_cert is given without tls_key"),
        ({"tls_key": "k.pem"}, "tls_key is given without tls_cert"),
        ({"tls_ca": "ca.pem"}, "tls_ca is given without tls_cert"),
        ({"tls_cert": "c", "tls_key": "k", "tls_server_name": "n"}, "tls_server_name is given without tls_ca"),
        ({"experts_device": "cpu", "expert_num_gpus": 0.5}, "expert_num_gpus is 0.5, but experts_device is cpu"),
        ({"kernel": "fp8", "experts_device": "cpu"}, "kernel is fp8, which does not run on experts_device cpu"),
        ({"kernel": "int8", "experts_device": "cuda"}, "kernel is int8, which does not run on experts_device cuda"),
        ({"kernel": "fp16", "device": "cuda"}, "kernel is fp16, which does not run on device cuda"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"bind_host": "0.0.0.0"},
        {"bind_host": "fe80::1%eth0"},
        {"bind_host": "node"},
        {"tls_cert": "c", "tls_key": "k", "tls_ca": "ca"},
        {"tls_cert": "c", "tls_key": "k", "tls_ca": "ca", "tls_server_name": "octavo.internal"},
        {"experts_device": "cpu", "expert_num_gpus": 0},
        {"expert_num_gpus": 0.25},
        {"expert_num_gpus": 2},
        {"block_size": 128, "max_num_batched_tokens": 128},
        {"drain_timeout_s": 1},
        {"speculation": "prompt_lookup", "speculation_tokens": 31, "max_num_batched_tokens": 32, "max_num_seqs": 4},
        {"speculation_tokens": 32, "max_num_batched_tokens": 32, "max_num_seqs": 4},
        {"auth_token": TOKEN},
    ],
)
def test_what_makes_sense_is_accepted(changes: dict[str, Any]) -> None:
    config = make(**changes)
    assert {name: getattr(config, name) for name in changes} == changes


def test_speculation_is_off_unless_it_is_asked_for() -> None:
    assert make().prompt_lookup is None
    assert make(speculation_tokens=9).prompt_lookup is None
    chosen = make(speculation="prompt_lookup", speculation_tokens=9, speculation_ngram_min=3, speculation_max_batch=2)
    assert chosen.prompt_lookup == PromptLookupConfig(tokens=9, ngram_max=4, ngram_min=3, max_batch=2)


@pytest.mark.parametrize(
    "token", ["short", "has a space in the middle", "schlüssel-schlüssel", "line\nbreak-line\nbreak"]
)
def test_a_weak_or_unsendable_token_is_refused_without_showing_it(token: str) -> None:
    with pytest.raises(ConfigError, match=f"auth_token has {len(token)} characters") as caught:
        make(auth_token=token)
    assert token not in str(caught.value)


def test_the_token_is_in_no_repr() -> None:
    assert TOKEN not in repr(make(auth_token=TOKEN))


def test_it_is_frozen_and_travels_between_processes() -> None:
    config = make(auth_token=TOKEN)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.replicas = 2  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, replicas=2).replicas == 2
    with pytest.raises(ConfigError):
        dataclasses.replace(config, replicas=0)


def test_the_arguments_of_a_serve_config_are_the_same_thing() -> None:
    config = ARGS.validate_python({"model": "/m", "replicas": 2, "kv_cache_bytes": None, "drain_timeout_s": 5})
    assert config == ClusterConfig(model="/m", replicas=2, drain_timeout_s=5.0)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"model": "/m", "replicsa": 2}, "replicsa"),
        ({"model": "/m", "block_size": 48}, "block_size is 48"),
        ({"replicas": 2}, "model"),
        ({"model": "/m", "transport": "rdma"}, "transport"),
    ],
)
def test_a_serve_config_is_checked_as_strictly(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        ARGS.validate_python({**args, "auth_token": TOKEN})
    assert TOKEN not in str([error["msg"] for error in caught.value.errors()])


def test_the_model_has_a_say() -> None:
    make(experts_per_actor=2, max_model_len=100).check_model(8, 100)
    with pytest.raises(ConfigError, match="experts_per_actor is 3, but must divide the model's 8 experts"):
        make(experts_per_actor=3).check_model(8, 100)
    with pytest.raises(ConfigError, match="experts_per_actor is 16"):
        make(experts_per_actor=16).check_model(8, 100)
    with pytest.raises(ConfigError, match="max_model_len is 101, but the model's context is 100 tokens"):
        make(max_model_len=101).check_model(8, 100)


@pytest.mark.parametrize(("max_model_len", "limit"), [(None, 512), (100, 100), (512, 512)])
def test_the_context_limit(max_model_len: int | None, limit: int) -> None:
    assert make(max_model_len=max_model_len).context_limit(512) == limit


@pytest.mark.parametrize(("text", "value"), [("1", True), ("true", True), ("False", False), ("0", False)])
def test_a_flag_in_the_environment(text: str, value: bool) -> None:
    config = from_environment(make(), {"OCTAVO_ENABLE_RETURN_ROUTED_EXPERTS": text})
    assert config.enable_return_routed_experts is value
    with pytest.raises(ConfigError, match="OCTAVO_ENABLE_RETURN_ROUTED_EXPERTS is 'perhaps', but must be bool"):
        from_environment(make(), {"OCTAVO_ENABLE_RETURN_ROUTED_EXPERTS": "perhaps"})


def test_the_environment_overrides_field_by_field() -> None:
    base = make(auth_token=TOKEN, replicas=2)
    environ = {
        "OCTAVO_REPLICAS": "3",
        "OCTAVO_AUTH_TOKEN": "",
        "OCTAVO_EXPERT_NUM_GPUS": "0.5",
        "OCTAVO_EXPERTS_DEVICE": "cuda",
        "OCTAVO_MODEL": "/other",
        "OCTAVO_MAX_MODEL_LEN": "77",
        "OCTAVO_DRAIN_TIMEOUT_S": "2.5",
        "OCTAVO_CACHE_DIR": "of somebody else",
        "REPLICAS": "9",
    }
    assert from_environment(base, environ) == dataclasses.replace(
        base,
        replicas=3,
        auth_token=None,
        expert_num_gpus=0.5,
        experts_device="cuda",
        model="/other",
        max_model_len=77,
        drain_timeout_s=2.5,
    )
    assert from_environment(base, {}) == base


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("OCTAVO_REPLICAS", "two", "OCTAVO_REPLICAS is 'two', but must be int"),
        ("OCTAVO_REPLICAS", "", "OCTAVO_REPLICAS is '', but must be int"),
        ("OCTAVO_REPLICAS", "0", "replicas is 0"),
        ("OCTAVO_DRAIN_TIMEOUT_S", "soon", "OCTAVO_DRAIN_TIMEOUT_S is 'soon', but must be float"),
        ("OCTAVO_TRANSPORT", "rdma", "transport is 'rdma'"),
        ("OCTAVO_MAX_MODEL_LEN", "4k", "OCTAVO_MAX_MODEL_LEN is '4k', but must be int"),
    ],
)
def test_nonsense_in_the_environment_is_named(variable: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_environment(make(), {variable: text})


def test_there_are_no_more_layer_ranges_than_layers() -> None:
    make(balance_layer_ranges=4).check_layers(4)
    with pytest.raises(ConfigError, match="balance_layer_ranges is 5, but the model has 4 layers"):
        make(balance_layer_ranges=5).check_layers(4)


def test_balancing_is_off_and_a_plug_in_may_be_named() -> None:
    assert (make().balance, make().balance_policy, make().expert_slots) == ("off", "incremental", None)
    assert make(balance_policy="my.module:Policy_2").balance_policy == "my.module:Policy_2"
    changed = from_environment(make(), {"OCTAVO_BALANCE": "on", "OCTAVO_EXPERT_SLOTS": "3"})
    assert (changed.balance, changed.expert_slots) == ("on", 3)
    assert from_environment(changed, {"OCTAVO_EXPERT_SLOTS": ""}).expert_slots is None
