"""What an operator may choose about a cluster, as one frozen value that cannot contradict itself.

The same dataclass is the `args:` of a Serve config and what the command line fills in. This is the only file
of the room that reads environment variables, and even here the mapping is an argument. What depends on the
machine (which device `auto` is, how much memory there is) is decided elsewhere.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from cluster.access_config import AccessConfig
from cluster.config_checks import check_choice, check_flag, check_gpus, check_int, check_seconds, check_text
from cluster.config_error import ConfigError as ConfigError
from cluster.prompt_lookup import PromptLookupConfig

Device = Literal["auto", "cpu", "cuda"]
Transport = Literal["auto", "shm", "grpc"]
KernelName = Literal["auto", "fp32", "fp16", "bf16", "int8", "fp8"]
Speculation = Literal["off", "prompt_lookup"]
BalanceMode = Literal["off", "dry_run", "on"]

ATTENTION_TILE = 128
"""Positions that attention reads at a time; KV blocks must tile it exactly."""

ENVIRONMENT_PREFIX = "OCTAVO_"

OWN_NODE = "node"
"""A `bind_host`: each process listens at the address by which its Ray node is known, where all others find it."""

_MIN_TOKEN_LENGTH = 16
_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_AUTH_TOKEN = re.compile(r"[\x21-\x7e]+")
_POLICY = re.compile(r"[a-z_]+|[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_HOST = re.compile(r"[A-Za-z0-9:._%-]{1,253}")

# Inclusive limits of every whole number; None for a field that may be absent is checked before.
_INT_LIMITS: Mapping[str, tuple[int, int]] = {
    "replicas": (1, 64),
    "coordinators": (1, 64),
    "ingresses": (1, 64),
    "experts_per_actor": (1, 4096),
    "kv_cache_bytes": (1, 1 << 50),
    "block_size": (1, ATTENTION_TILE),
    "max_num_seqs": (1, 4096),
    "max_num_batched_tokens": (1, 1 << 16),
    "max_model_len": (1, 1 << 24),
    "max_waiting_requests": (1, 1 << 16),
    "max_waiting_tokens": (1, 1 << 30),
    "speculation_tokens": (1, 64),
    "speculation_ngram_max": (1, 64),
    "speculation_ngram_min": (1, 64),
    "speculation_max_batch": (1, 4096),
    "expert_threads": (1, 1024),
    "coordinator_threads": (1, 1024),
    "microbatches": (1, 8),
    "balance_layer_ranges": (1, 4096),
    "balance_bytes_per_s": (1 << 16, 1 << 50),
    "expert_slots": (1, 1 << 20),
}
# Exclusive lower and inclusive upper limits, in seconds.
_SECONDS_LIMITS: Mapping[str, tuple[float, float]] = {
    "expert_deadline_s": (0.0, 86_400.0),
    "request_timeout_s": (0.0, 86_400.0),
    "drain_timeout_s": (0.0, 86_400.0),
    "max_queue_wait_s": (0.0, 86_400.0),
    "resume_s": (0.0, 86_400.0),
    "balance_interval_s": (0.0, 86_400.0),
}
_CHOICES: Mapping[str, Any] = {
    "device": Device,
    "experts_device": Device,
    "transport": Transport,
    "kernel": KernelName,
    "speculation": Speculation,
    "balance": BalanceMode,
}
_FLAGS = ("enable_return_routed_experts", "prefix_caching")
_TEXTS = (
    "model",
    "served_model_name",
    "bind_host",
    "auth_token",
    "grpc_client_token_file",
    "tls_cert",
    "tls_key",
    "tls_ca",
    "tls_server_name",
    "namespace",
    "balance_policy",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig(AccessConfig):
    """Everything that is chosen before a cluster starts; more of it is in the classes that this one is made of.

    `model` is a checkpoint's directory. Sizes are in bytes, tokens or requests as named, times in seconds.
    None means "decide at start": `max_model_len` from the model, `kv_cache_bytes` and threads from the
    machine, `microbatches` from measured times, `expert_num_gpus` from the device (1 on CUDA, 0 on CPU),
    `served_model_name` from the directory's name.

    The queue in front of the running sequences is bounded in requests, in tokens and in time: who would wait longer
    than `max_queue_wait_s` to start is refused at once (and one who would wait a tenth of it, while the queue has stood
    for that long already: a burst may fill it, a load that lasts may not).

    With `prefix_caching` a request begins behind those first tokens, in whole blocks of `block_size`, that another of
    its tenant and salt has had computed and that are still in the KV cache. It changes how soon the first token comes,
    never which.

    A step whose experts are away is given up after `expert_deadline_s` and tried again; what bounds a request is
    `request_timeout_s`.

    `speculation` guesses what running sequences will say next, `speculation_tokens` at most per step, where the
    last `speculation_ngram_min` to `speculation_ngram_max` tokens stood before, while at most
    `speculation_max_batch` sequences run. It changes how fast tokens come, never which.

    `ingresses` are replicas of the HTTP front door, each with limits of its own. A client whose stream was cut may go
    on with it for `resume_s` after the last event that it got.

    `balance` follows the experts' load with more and fewer replicas: `on` does what the policy says, `dry_run` only
    tells it. `balance_policy` is a shipped one (`cluster.policies`) or `module:function`. It is asked every
    `balance_interval_s` about experts in each of `balance_layer_ranges` ranges of layers; a node holds at most
    `expert_slots` of these (None: as its GPUs and memory allow), and copies are loaded with `balance_bytes_per_s`
    (None: as fast as they come). Every expert keeps `replicas` copies.

    With `enable_return_routed_experts` answers that are no streams say which experts each token took.

    `bind_host` may be any address, or "node": on several machines each process must listen at its own machine's.
    There is no cluster without a bearer token, since one is generated where `auth_token` is None. The token never
    appears in the repr. `grpc_client_token_file`, read by each coordinator where it runs, has tokens that open a
    coordinator's Generate and nothing else. `tls_server_name` is the name in everybody's certificate where it does
    not name the address (one certificate for all machines); without it peers are checked by address.
    """

    model: str
    served_model_name: str | None = None
    device: Device = "auto"
    experts_device: Device = "auto"
    replicas: int = 1
    coordinators: int = 1
    ingresses: int = 1
    experts_per_actor: int = 1
    expert_num_gpus: float | None = None
    transport: Transport = "auto"
    kernel: KernelName = "auto"
    kv_cache_bytes: int | None = None
    block_size: int = 32
    prefix_caching: bool = True
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_model_len: int | None = None
    max_waiting_requests: int = 256
    max_waiting_tokens: int = 262_144
    max_queue_wait_s: float = 10.0
    speculation: Speculation = "off"
    speculation_tokens: int = 4
    speculation_ngram_max: int = 4
    speculation_ngram_min: int = 2
    speculation_max_batch: int = 4
    bind_host: str = "127.0.0.1"
    auth_token: str | None = field(default=None, repr=False)
    grpc_client_token_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    tls_server_name: str | None = None
    expert_threads: int = 1
    coordinator_threads: int | None = None
    microbatches: int | None = None
    expert_deadline_s: float = 60.0
    request_timeout_s: float = 600.0
    drain_timeout_s: float = 30.0
    resume_s: float = 300.0
    enable_return_routed_experts: bool = False
    balance: BalanceMode = "off"
    balance_policy: str = "incremental"
    balance_interval_s: float = 10.0
    balance_layer_ranges: int = 1
    balance_bytes_per_s: int | None = None
    expert_slots: int | None = None
    namespace: str = "octavo"

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    """Read by pydantic's TypeAdapter: a misspelt key is refused, not ignored. Whoever shows its errors must leave the
    input out of them: the token is in it.
    """

    def __post_init__(self) -> None:
        for name, limits in _INT_LIMITS.items():
            check_int(name, getattr(self, name), limits, optional=_is_optional(name))
        for name, bounds in _SECONDS_LIMITS.items():
            check_seconds(name, getattr(self, name), bounds)
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), get_args(choices))
        for name in _FLAGS:
            check_flag(name, getattr(self, name))
        for name in _TEXTS:
            check_text(name, getattr(self, name), optional=_is_optional(name))
        check_gpus(self.expert_num_gpus)
        _check_patterns(self)
        _check_sizes(self)
        _check_speculation(self)
        _check_tls(self)
        _check_devices(self)
        self.check_access()
        self.check_scaling(coordinators=self.coordinators, ingresses=self.ingresses)

    def check_model(self, num_experts: int, max_context: int) -> None:
        """Reject what contradicts the model. `num_experts` is E, `max_context` the trained positions.

        Raises ConfigError naming the field, its value and the limit.
        """
        self.check_experts(num_experts)
        if self.max_model_len is not None and self.max_model_len > max_context:
            raise ConfigError(f"max_model_len is {self.max_model_len}, but the model's context is {max_context} tokens")

    def check_experts(self, num_experts: int) -> None:
        """Reject groups of experts that do not come out even."""
        if num_experts % self.experts_per_actor:
            raise ConfigError(
                f"experts_per_actor is {self.experts_per_actor}, but must divide the model's {num_experts} experts"
            )

    def check_layers(self, num_layers: int) -> None:
        """Reject more ranges of layers than there are layers."""
        if self.balance_layer_ranges > num_layers:
            raise ConfigError(
                f"balance_layer_ranges is {self.balance_layer_ranges}, but the model has {num_layers} layers"
            )

    @property
    def prompt_lookup(self) -> PromptLookupConfig | None:
        """How the scheduler guesses; None where it does not."""
        if self.speculation == "off":
            return None
        return PromptLookupConfig(
            tokens=self.speculation_tokens,
            ngram_max=self.speculation_ngram_max,
            ngram_min=self.speculation_ngram_min,
            max_batch=self.speculation_max_batch,
        )

    def context_limit(self, max_context: int) -> int:
        """Tokens that one sequence may have, prompt and output together."""
        return max_context if self.max_model_len is None else min(self.max_model_len, max_context)


def from_environment(base: ClusterConfig, environ: Mapping[str, str]) -> ClusterConfig:
    """`base` with every field overridden for which `OCTAVO_<FIELD>` is set; an empty value means None.

    Variables with the prefix that name no field belong to others and are left alone.
    Raises ConfigError naming the variable when its text is not of the field's type.
    """
    changes: dict[str, Any] = {}
    for name, hint in _type_hints().items():
        variable = ENVIRONMENT_PREFIX + name.upper()
        if variable in environ:
            changes[name] = _parse(variable, environ[variable], hint)
    return replace(base, **changes)


def _type_hints() -> dict[str, Any]:
    hints = get_type_hints(ClusterConfig)
    return {entry.name: hints[entry.name] for entry in fields(ClusterConfig)}


def _parse(variable: str, text: str, hint: Any) -> Any:
    alternatives = get_args(hint) if get_origin(hint) is not Literal else ()
    if not text and NoneType in alternatives:
        return None
    parsers: Mapping[Any, Callable[[str], Any]] = {bool: _flag, int: int, float: float, str: str}
    for kind in (hint, *alternatives):
        if kind in parsers:
            try:
                return parsers[kind](text)
            except (ValueError, KeyError):
                raise ConfigError(f"{variable} is {text!r}, but must be {kind.__name__}") from None
    return text  # a Literal: checked at construction


def _flag(text: str) -> bool:
    return {"1": True, "true": True, "0": False, "false": False}[text.lower()]


def _is_optional(name: str) -> bool:
    if name in _TEXTS:
        return name not in ("model", "bind_host", "namespace", "balance_policy")
    return name in (
        *("kv_cache_bytes", "max_model_len", "coordinator_threads", "microbatches"),
        *("balance_bytes_per_s", "expert_slots"),
    )


def _check_patterns(config: ClusterConfig) -> None:
    for name in ("bind_host", "tls_server_name"):
        host = getattr(config, name)
        if host is not None and not _HOST.fullmatch(host):
            raise ConfigError(f"{name} is {host!r}, but must be a host name or an IP address")
    if not _NAMESPACE.fullmatch(config.namespace):
        raise ConfigError(
            f"namespace is {config.namespace!r}, but must be at most 63 of letters, digits, '_', '.' "
            "and '-', starting with a letter or digit"
        )
    if not _POLICY.fullmatch(config.balance_policy):
        raise ConfigError(
            f"balance_policy is {config.balance_policy!r}, but must be a shipped policy's name or module:function"
        )
    token = config.auth_token
    if token is not None and (len(token) < _MIN_TOKEN_LENGTH or not _AUTH_TOKEN.fullmatch(token)):
        raise ConfigError(
            f"auth_token has {len(token)} characters, but must have at least {_MIN_TOKEN_LENGTH}, "
            "all of them printable ASCII without spaces"
        )


def _check_sizes(config: ClusterConfig) -> None:
    if ATTENTION_TILE % config.block_size:
        raise ConfigError(f"block_size is {config.block_size}, but must divide {ATTENTION_TILE}, attention's tile")
    for name in ("block_size", "max_num_seqs"):
        least = getattr(config, name)
        if config.max_num_batched_tokens < least:
            raise ConfigError(
                f"max_num_batched_tokens is {config.max_num_batched_tokens}, but must be at least {name} ({least})"
            )


def _check_speculation(config: ClusterConfig) -> None:
    least, most = config.speculation_ngram_min, config.speculation_ngram_max
    if least > most:
        raise ConfigError(f"speculation_ngram_min is {least}, but must be at most speculation_ngram_max ({most})")
    if config.speculation != "off" and config.speculation_tokens >= config.max_num_batched_tokens:
        raise ConfigError(
            f"speculation_tokens is {config.speculation_tokens}, "
            f"but must be less than max_num_batched_tokens ({config.max_num_batched_tokens})"
        )


def _check_tls(config: ClusterConfig) -> None:
    if config.tls_cert is not None and config.tls_key is None:
        raise ConfigError("tls_cert is given without tls_key; a server needs both")
    if config.tls_key is not None and config.tls_cert is None:
        raise ConfigError("tls_key is given without tls_cert; a server needs both")
    if config.tls_ca is not None and config.tls_cert is None:
        raise ConfigError("tls_ca is given without tls_cert and tls_key; there is no TLS to verify")
    if config.tls_server_name is not None and config.tls_ca is None:
        raise ConfigError("tls_server_name is given without tls_ca; a name that any authority may sign proves nothing")


def _check_devices(config: ClusterConfig) -> None:
    if config.experts_device == "cpu" and config.expert_num_gpus:
        raise ConfigError(f"expert_num_gpus is {config.expert_num_gpus}, but experts_device is cpu")
    unfit = {"fp16": "cuda", "int8": "cuda", "fp8": "cpu"}.get(config.kernel)
    places = ("device", "experts_device") if config.kernel == "fp16" else ("experts_device",)  # others are for experts
    for name in places:
        if unfit is not None and getattr(config, name) == unfit:
            raise ConfigError(f"kernel is {config.kernel}, which does not run on {name} {unfit}")
