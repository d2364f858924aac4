from protos import expert_pb2 as _expert_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_CANCELLED: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_CANCELLED: FinishReason
FINISH_REASON_ERROR: FinishReason

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "max_tokens", "stop_token_ids", "ignore_eos", "sampling", "logprobs", "prompt_logprobs", "deadline_unix_us", "min_tokens")
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
    def __init__(self, request_id: _Optional[int] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ..., deadline_unix_us: _Optional[int] = ..., min_tokens: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("request_id", "token_ids", "logprobs", "prompt_logprobs", "finish_reason", "status", "error", "retry_after_ms", "num_prompt_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[PositionLogprobs]
    finish_reason: FinishReason
    status: _expert_pb2.Status
    error: str
    retry_after_ms: int
    num_prompt_tokens: int
    def __init__(self, request_id: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[PositionLogprobs, _Mapping]]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., status: _Optional[_Union[_expert_pb2.Status, str]] = ..., error: _Optional[str] = ..., retry_after_ms: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ...) -> None: ...

class GenerateReply(_message.Message):
    __slots__ = ("outputs",)
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[SequenceOutput]
    def __init__(self, outputs: _Optional[_Iterable[_Union[SequenceOutput, _Mapping]]] = ...) -> None: ...

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
    __slots__ = ("coordinator_id", "pid", "node_id", "address", "state", "map_epoch", "num_running", "num_waiting", "kv_blocks_total", "kv_blocks_free", "kv_block_size", "steps_total", "prompt_tokens_total", "generated_tokens_total", "preemptions_total", "expert_retries_total", "load", "window_load", "kernel", "numerics_domain", "detail", "weight_bytes", "max_model_len", "weights_id", "step_s_total", "prepare_s_total", "attention_s_total", "router_s_total", "dispatch_s_total", "combine_s_total", "head_s_total", "expert_wait_s_total", "sampling_s_total", "expert_compute_us_total", "expert_queue_us_total", "wire_messages_total", "wire_bytes_sent_total", "wire_bytes_received_total", "draft_tokens_total", "accepted_draft_tokens_total")
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
    def __init__(self, coordinator_id: _Optional[str] = ..., pid: _Optional[int] = ..., node_id: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[str] = ..., map_epoch: _Optional[int] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., kv_blocks_free: _Optional[int] = ..., kv_block_size: _Optional[int] = ..., steps_total: _Optional[int] = ..., prompt_tokens_total: _Optional[int] = ..., generated_tokens_total: _Optional[int] = ..., preemptions_total: _Optional[int] = ..., expert_retries_total: _Optional[int] = ..., load: _Optional[_Iterable[_Union[LayerLoad, _Mapping]]] = ..., window_load: _Optional[_Iterable[_Union[LayerLoad, _Mapping]]] = ..., kernel: _Optional[str] = ..., numerics_domain: _Optional[str] = ..., detail: _Optional[str] = ..., weight_bytes: _Optional[int] = ..., max_model_len: _Optional[int] = ..., weights_id: _Optional[str] = ..., step_s_total: _Optional[float] = ..., prepare_s_total: _Optional[float] = ..., attention_s_total: _Optional[float] = ..., router_s_total: _Optional[float] = ..., dispatch_s_total: _Optional[float] = ..., combine_s_total: _Optional[float] = ..., head_s_total: _Optional[float] = ..., expert_wait_s_total: _Optional[float] = ..., sampling_s_total: _Optional[float] = ..., expert_compute_us_total: _Optional[int] = ..., expert_queue_us_total: _Optional[int] = ..., wire_messages_total: _Optional[int] = ..., wire_bytes_sent_total: _Optional[int] = ..., wire_bytes_received_total: _Optional[int] = ..., draft_tokens_total: _Optional[int] = ..., accepted_draft_tokens_total: _Optional[int] = ...) -> None: ...
