from protos import expert_pb2 as _expert_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GrammarKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GRAMMAR_KIND_UNSPECIFIED: _ClassVar[GrammarKind]
    GRAMMAR_KIND_JSON_SCHEMA: _ClassVar[GrammarKind]
    GRAMMAR_KIND_REGEX: _ClassVar[GrammarKind]
    GRAMMAR_KIND_CHOICE: _ClassVar[GrammarKind]
    GRAMMAR_KIND_LARK: _ClassVar[GrammarKind]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]
GRAMMAR_KIND_UNSPECIFIED: GrammarKind
GRAMMAR_KIND_JSON_SCHEMA: GrammarKind
GRAMMAR_KIND_REGEX: GrammarKind
GRAMMAR_KIND_CHOICE: GrammarKind
GRAMMAR_KIND_LARK: GrammarKind
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CANCELLED: FinishReason
FINISH_REASON_ERROR: FinishReason

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias_ids", "logit_bias_values", "allowed_token_ids", "bad_words")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_VALUES_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias_ids: _containers.RepeatedScalarFieldContainer[int]
    logit_bias_values: _containers.RepeatedScalarFieldContainer[float]
    allowed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    bad_words: _containers.RepeatedCompositeFieldContainer[TokenIds]
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias_ids: _Optional[_Iterable[int]] = ..., logit_bias_values: _Optional[_Iterable[float]] = ..., allowed_token_ids: _Optional[_Iterable[int]] = ..., bad_words: _Optional[_Iterable[_Union[TokenIds, _Mapping]]] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("kind", "text")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    kind: GrammarKind
    text: str
    def __init__(self, kind: _Optional[_Union[GrammarKind, str]] = ..., text: _Optional[str] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "max_tokens", "stop_token_ids", "ignore_eos", "sampling", "logprobs", "prompt_logprobs", "deadline_unix_us", "min_tokens", "generated_token_ids", "return_routed_experts", "grammar", "priority", "cache_salt", "tenant", "traceparent")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_US_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    RETURN_ROUTED_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    sampling: Sampling
    logprobs: int
    prompt_logprobs: int
    deadline_unix_us: int
    min_tokens: int
    generated_token_ids: _containers.RepeatedScalarFieldContainer[int]
    return_routed_experts: bool
    grammar: Grammar
    priority: int
    cache_salt: bytes
    tenant: str
    traceparent: str
    def __init__(self, request_id: _Optional[int] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ..., deadline_unix_us: _Optional[int] = ..., min_tokens: _Optional[int] = ..., generated_token_ids: _Optional[_Iterable[int]] = ..., return_routed_experts: _Optional[bool] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ..., priority: _Optional[int] = ..., cache_salt: _Optional[bytes] = ..., tenant: _Optional[str] = ..., traceparent: _Optional[str] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    def __init__(self, request_id: _Optional[int] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("submit", "cancel")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    cancel: Cancel
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("token_id", "logprob", "rank")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    rank: int
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., rank: _Optional[int] = ...) -> None: ...

class PositionLogprobs(_message.Message):
    __slots__ = ("chosen", "top")
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    chosen: TokenLogprob
    top: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, chosen: _Optional[_Union[TokenLogprob, _Mapping]] = ..., top: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class SequenceOutput(_message.Message):
    __slots__ = ("request_id", "token_ids", "logprobs", "prompt_logprobs", "finish_reason", "status", "error", "retry_after_ms", "num_prompt_tokens", "routed_experts", "num_cached_tokens", "error_field")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROUTED_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    finish_reason: FinishReason
    status: _expert_pb2.Status
    error: str
    retry_after_ms: int
    num_prompt_tokens: int
    routed_experts: _containers.RepeatedScalarFieldContainer[bytes]
    num_cached_tokens: int
    error_field: str
    def __init__(self, request_id: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., status: _Optional[_Union[_expert_pb2.Status, str]] = ..., error: _Optional[str] = ..., retry_after_ms: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., routed_experts: _Optional[_Iterable[bytes]] = ..., num_cached_tokens: _Optional[int] = ..., error_field: _Optional[str] = ...) -> None: ...

class GenerateReply(_message.Message):
    __slots__ = ("outputs",)
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[SequenceOutput]
    def __init__(self, outputs: _Optional[_Iterable[_Union[SequenceOutput, _Mapping]]] = ...) -> None: ...

class RoomQuestion(_message.Message):
    __slots__ = ("tenant", "num_tokens", "most")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MOST_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    num_tokens: int
    most: int
    def __init__(self, tenant: _Optional[str] = ..., num_tokens: _Optional[int] = ..., most: _Optional[int] = ...) -> None: ...

class RoomRequest(_message.Message):
    __slots__ = ("questions",)
    QUESTIONS_FIELD_NUMBER: _ClassVar[int]
    questions: _containers.RepeatedCompositeFieldContainer[RoomQuestion]
    def __init__(self, questions: _Optional[_Iterable[_Union[RoomQuestion, _Mapping]]] = ...) -> None: ...

class Room(_message.Message):
    __slots__ = ("num_requests", "retry_after_ms")
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    num_requests: int
    retry_after_ms: int
    def __init__(self, num_requests: _Optional[int] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class RoomReply(_message.Message):
    __slots__ = ("rooms",)
    ROOMS_FIELD_NUMBER: _ClassVar[int]
    rooms: _containers.RepeatedCompositeFieldContainer[Room]
    def __init__(self, rooms: _Optional[_Iterable[_Union[Room, _Mapping]]] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("replica_id", "expert_ids", "first_layer", "num_layers", "address", "node_id", "numerics_domain")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    expert_ids: _containers.RepeatedScalarFieldContainer[int]
    first_layer: int
    num_layers: int
    address: str
    node_id: str
    numerics_domain: str
    def __init__(self, replica_id: _Optional[str] = ..., expert_ids: _Optional[_Iterable[int]] = ..., first_layer: _Optional[int] = ..., num_layers: _Optional[int] = ..., address: _Optional[str] = ..., node_id: _Optional[str] = ..., numerics_domain: _Optional[str] = ...) -> None: ...

class PublishMapRequest(_message.Message):
    __slots__ = ("map_epoch", "num_layers", "num_experts", "replicas")
    MAP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    map_epoch: int
    num_layers: int
    num_experts: int
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    def __init__(self, map_epoch: _Optional[int] = ..., num_layers: _Optional[int] = ..., num_experts: _Optional[int] = ..., replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ...) -> None: ...

class PublishMapReply(_message.Message):
    __slots__ = ("map_epoch", "status", "detail")
    MAP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    map_epoch: int
    status: _expert_pb2.Status
    detail: str
    def __init__(self, map_epoch: _Optional[int] = ..., status: _Optional[_Union[_expert_pb2.Status, str]] = ..., detail: _Optional[str] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LayerLoad(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class SnapshotReply(_message.Message):
    __slots__ = ("coordinator_id", "pid", "node_id", "address", "state", "map_epoch", "num_running", "num_waiting", "kv_blocks_total", "kv_blocks_free", "kv_block_size", "steps_total", "prompt_tokens_total", "generated_tokens_total", "preemptions_total", "expert_retries_total", "load", "window_load", "kernel", "numerics_domain", "detail", "weight_bytes", "max_model_len", "weights_id", "step_s_total", "prepare_s_total", "attention_s_total", "router_s_total", "dispatch_s_total", "combine_s_total", "head_s_total", "expert_wait_s_total", "sampling_s_total", "expert_compute_us_total", "expert_queue_us_total", "wire_messages_total", "wire_bytes_sent_total", "wire_bytes_received_total", "draft_tokens_total", "accepted_draft_tokens_total", "replica_health", "hedges_total", "hedges_won_total", "expert_calls_total", "replica_times", "queue_s", "window_s", "divisible_load", "batches_total", "trace_listeners", "trace_tokens_total", "trace_dropped_tokens_total", "prefix_queries_tokens_total", "prefix_hits_tokens_total", "kv_blocks_cached", "num_waiting_tenants", "displaced_total", "grammars_compiled_total", "grammars_refused_total", "grammar_hits_total", "grammar_mask_s_total", "grammar_masks_total")
    COORDINATOR_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MAP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    STEPS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    EXPERT_RETRIES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    WINDOW_LOAD_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_S_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREPARE_S_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_S_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ROUTER_S_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_S_TOTAL_FIELD_NUMBER: _ClassVar[int]
    COMBINE_S_TOTAL_FIELD_NUMBER: _ClassVar[int]
    HEAD_S_TOTAL_FIELD_NUMBER: _ClassVar[int]
    EXPERT_WAIT_S_TOTAL_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_S_TOTAL_FIELD_NUMBER: _ClassVar[int]
    EXPERT_COMPUTE_US_TOTAL_FIELD_NUMBER: _ClassVar[int]
    EXPERT_QUEUE_US_TOTAL_FIELD_NUMBER: _ClassVar[int]
    WIRE_MESSAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    WIRE_BYTES_SENT_TOTAL_FIELD_NUMBER: _ClassVar[int]
    WIRE_BYTES_RECEIVED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_DRAFT_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    REPLICA_HEALTH_FIELD_NUMBER: _ClassVar[int]
    HEDGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    HEDGES_WON_TOTAL_FIELD_NUMBER: _ClassVar[int]
    EXPERT_CALLS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    REPLICA_TIMES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    DIVISIBLE_LOAD_FIELD_NUMBER: _ClassVar[int]
    BATCHES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    TRACE_LISTENERS_FIELD_NUMBER: _ClassVar[int]
    TRACE_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    TRACE_DROPPED_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERIES_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HITS_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_TENANTS_FIELD_NUMBER: _ClassVar[int]
    DISPLACED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    GRAMMARS_COMPILED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    GRAMMARS_REFUSED_TOTAL_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_HITS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_MASK_S_TOTAL_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_MASKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    coordinator_id: str
    pid: int
    node_id: str
    address: str
    state: str
    map_epoch: int
    num_running: int
    num_waiting: int
    kv_blocks_total: int
    kv_blocks_free: int
    kv_block_size: int
    steps_total: int
    prompt_tokens_total: int
    generated_tokens_total: int
    preemptions_total: int
    expert_retries_total: int
    load: _containers.RepeatedCompositeFieldContainer[LayerLoad]
    window_load: _containers.RepeatedCompositeFieldContainer[LayerLoad]
    kernel: str
    numerics_domain: str
    detail: str
    weight_bytes: int
    max_model_len: int
    weights_id: str
    step_s_total: float
    prepare_s_total: float
    attention_s_total: float
    router_s_total: float
    dispatch_s_total: float
    combine_s_total: float
    head_s_total: float
    expert_wait_s_total: float
    sampling_s_total: float
    expert_compute_us_total: int
    expert_queue_us_total: int
    wire_messages_total: int
    wire_bytes_sent_total: int
    wire_bytes_received_total: int
    draft_tokens_total: int
    accepted_draft_tokens_total: int
    replica_health: _containers.RepeatedCompositeFieldContainer[ReplicaHealth]
    hedges_total: int
    hedges_won_total: int
    expert_calls_total: int
    replica_times: _containers.RepeatedCompositeFieldContainer[ReplicaTimes]
    queue_s: float
    window_s: float
    divisible_load: _containers.RepeatedCompositeFieldContainer[LayerLoad]
    batches_total: int
    trace_listeners: int
    trace_tokens_total: int
    trace_dropped_tokens_total: int
    prefix_queries_tokens_total: int
    prefix_hits_tokens_total: int
    kv_blocks_cached: int
    num_waiting_tenants: int
    displaced_total: int
    grammars_compiled_total: int
    grammars_refused_total: int
    grammar_hits_total: int
    grammar_mask_s_total: float
    grammar_masks_total: int
    def __init__(self, coordinator_id: _Optional[str] = ..., pid: _Optional[int] = ..., node_id: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[str] = ..., map_epoch: _Optional[int] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., kv_blocks_free: _Optional[int] = ..., kv_block_size: _Optional[int] = ..., steps_total: _Optional[int] = ..., prompt_tokens_total: _Optional[int] = ..., generated_tokens_total: _Optional[int] = ..., preemptions_total: _Optional[int] = ..., expert_retries_total: _Optional[int] = ..., load: _Optional[_Iterable[_Union[LayerLoad, _Mapping]]] = ..., window_load: _Optional[_Iterable[_Union[LayerLoad, _Mapping]]] = ..., kernel: _Optional[str] = ..., numerics_domain: _Optional[str] = ..., detail: _Optional[str] = ..., weight_bytes: _Optional[int] = ..., max_model_len: _Optional[int] = ..., weights_id: _Optional[str] = ..., step_s_total: _Optional[float] = ..., prepare_s_total: _Optional[float] = ..., attention_s_total: _Optional[float] = ..., router_s_total: _Optional[float] = ..., dispatch_s_total: _Optional[float] = ..., combine_s_total: _Optional[float] = ..., head_s_total: _Optional[float] = ..., expert_wait_s_total: _Optional[float] = ..., sampling_s_total: _Optional[float] = ..., expert_compute_us_total: _Optional[int] = ..., expert_queue_us_total: _Optional[int] = ..., wire_messages_total: _Optional[int] = ..., wire_bytes_sent_total: _Optional[int] = ..., wire_bytes_received_total: _Optional[int] = ..., draft_tokens_total: _Optional[int] = ..., accepted_draft_tokens_total: _Optional[int] = ..., replica_health: _Optional[_Iterable[_Union[ReplicaHealth, _Mapping]]] = ..., hedges_total: _Optional[int] = ..., hedges_won_total: _Optional[int] = ..., expert_calls_total: _Optional[int] = ..., replica_times: _Optional[_Iterable[_Union[ReplicaTimes, _Mapping]]] = ..., queue_s: _Optional[float] = ..., window_s: _Optional[float] = ..., divisible_load: _Optional[_Iterable[_Union[LayerLoad, _Mapping]]] = ..., batches_total: _Optional[int] = ..., trace_listeners: _Optional[int] = ..., trace_tokens_total: _Optional[int] = ..., trace_dropped_tokens_total: _Optional[int] = ..., prefix_queries_tokens_total: _Optional[int] = ..., prefix_hits_tokens_total: _Optional[int] = ..., kv_blocks_cached: _Optional[int] = ..., num_waiting_tenants: _Optional[int] = ..., displaced_total: _Optional[int] = ..., grammars_compiled_total: _Optional[int] = ..., grammars_refused_total: _Optional[int] = ..., grammar_hits_total: _Optional[int] = ..., grammar_mask_s_total: _Optional[float] = ..., grammar_masks_total: _Optional[int] = ...) -> None: ...

class ReplicaTimes(_message.Message):
    __slots__ = ("replica_id", "calls_total", "tokens_total", "compute_us_total", "a_us", "b_us", "busy_share")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    CALLS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_TOTAL_FIELD_NUMBER: _ClassVar[int]
    A_US_FIELD_NUMBER: _ClassVar[int]
    B_US_FIELD_NUMBER: _ClassVar[int]
    BUSY_SHARE_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    calls_total: int
    tokens_total: int
    compute_us_total: int
    a_us: float
    b_us: float
    busy_share: float
    def __init__(self, replica_id: _Optional[str] = ..., calls_total: _Optional[int] = ..., tokens_total: _Optional[int] = ..., compute_us_total: _Optional[int] = ..., a_us: _Optional[float] = ..., b_us: _Optional[float] = ..., busy_share: _Optional[float] = ...) -> None: ...

class ReplicaHealth(_message.Message):
    __slots__ = ("replica_id", "state", "detail", "ejections_total")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    EJECTIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    state: str
    detail: str
    ejections_total: int
    def __init__(self, replica_id: _Optional[str] = ..., state: _Optional[str] = ..., detail: _Optional[str] = ..., ejections_total: _Optional[int] = ...) -> None: ...

class TraceRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TraceArrival(_message.Message):
    __slots__ = ("sequence", "time_unix_us", "prompt_tokens")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIME_UNIX_US_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    time_unix_us: int
    prompt_tokens: int
    def __init__(self, sequence: _Optional[int] = ..., time_unix_us: _Optional[int] = ..., prompt_tokens: _Optional[int] = ...) -> None: ...

class TraceStep(_message.Message):
    __slots__ = ("time_unix_us", "sequences", "positions", "experts")
    TIME_UNIX_US_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    time_unix_us: int
    sequences: bytes
    positions: bytes
    experts: bytes
    def __init__(self, time_unix_us: _Optional[int] = ..., sequences: _Optional[bytes] = ..., positions: _Optional[bytes] = ..., experts: _Optional[bytes] = ...) -> None: ...

class TraceEnd(_message.Message):
    __slots__ = ("sequence", "output_tokens")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    output_tokens: int
    def __init__(self, sequence: _Optional[int] = ..., output_tokens: _Optional[int] = ...) -> None: ...

class TraceChunk(_message.Message):
    __slots__ = ("coordinator_id", "num_layers", "num_experts", "top_k", "arrivals", "steps", "ends", "dropped_tokens")
    COORDINATOR_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    ARRIVALS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    ENDS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    coordinator_id: str
    num_layers: int
    num_experts: int
    top_k: int
    arrivals: _containers.RepeatedCompositeFieldContainer[TraceArrival]
    steps: _containers.RepeatedCompositeFieldContainer[TraceStep]
    ends: _containers.RepeatedCompositeFieldContainer[TraceEnd]
    dropped_tokens: int
    def __init__(self, coordinator_id: _Optional[str] = ..., num_layers: _Optional[int] = ..., num_experts: _Optional[int] = ..., top_k: _Optional[int] = ..., arrivals: _Optional[_Iterable[_Union[TraceArrival, _Mapping]]] = ..., steps: _Optional[_Iterable[_Union[TraceStep, _Mapping]]] = ..., ends: _Optional[_Iterable[_Union[TraceEnd, _Mapping]]] = ..., dropped_tokens: _Optional[int] = ...) -> None: ...
