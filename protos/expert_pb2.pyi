from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]

class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATUS_UNSPECIFIED: _ClassVar[Status]
    STATUS_OK: _ClassVar[Status]
    STATUS_INVALID: _ClassVar[Status]
    STATUS_NOT_HELD: _ClassVar[Status]
    STATUS_STALE_EPOCH: _ClassVar[Status]
    STATUS_DEADLINE_EXCEEDED: _ClassVar[Status]
    STATUS_DRAINING: _ClassVar[Status]
    STATUS_OVERLOADED: _ClassVar[Status]
    STATUS_CORRUPT: _ClassVar[Status]
    STATUS_INTERNAL: _ClassVar[Status]
    STATUS_CANCELLED: _ClassVar[Status]

class ReplicaState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_STATE_UNSPECIFIED: _ClassVar[ReplicaState]
    REPLICA_STATE_LOADING: _ClassVar[ReplicaState]
    REPLICA_STATE_READY: _ClassVar[ReplicaState]
    REPLICA_STATE_DRAINING: _ClassVar[ReplicaState]
    REPLICA_STATE_FAILED: _ClassVar[ReplicaState]

class WeightPart(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WEIGHT_PART_UNSPECIFIED: _ClassVar[WeightPart]
    WEIGHT_PART_W1: _ClassVar[WeightPart]
    WEIGHT_PART_W2: _ClassVar[WeightPart]
    WEIGHT_PART_W3: _ClassVar[WeightPart]
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT32: DType
DTYPE_BFLOAT16: DType
DTYPE_FLOAT16: DType
STATUS_UNSPECIFIED: Status
STATUS_OK: Status
STATUS_INVALID: Status
STATUS_NOT_HELD: Status
STATUS_STALE_EPOCH: Status
STATUS_DEADLINE_EXCEEDED: Status
STATUS_DRAINING: Status
STATUS_OVERLOADED: Status
STATUS_CORRUPT: Status
STATUS_INTERNAL: Status
STATUS_CANCELLED: Status
REPLICA_STATE_UNSPECIFIED: ReplicaState
REPLICA_STATE_LOADING: ReplicaState
REPLICA_STATE_READY: ReplicaState
REPLICA_STATE_DRAINING: ReplicaState
REPLICA_STATE_FAILED: ReplicaState
WEIGHT_PART_UNSPECIFIED: WeightPart
WEIGHT_PART_W1: WeightPart
WEIGHT_PART_W2: WeightPart
WEIGHT_PART_W3: WeightPart

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "payload", "crc32")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    payload: bytes
    crc32: int
    def __init__(self, dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., payload: _Optional[bytes] = ..., crc32: _Optional[int] = ...) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("sequence", "layer_id", "expert_ids", "expert_rows", "map_epoch", "deadline_unix_us", "merge", "hidden")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_US_FIELD_NUMBER: _ClassVar[int]
    MERGE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    layer_id: int
    expert_ids: _containers.RepeatedScalarFieldContainer[int]
    expert_rows: _containers.RepeatedScalarFieldContainer[int]
    map_epoch: int
    deadline_unix_us: int
    merge: Merge
    hidden: Tensor
    def __init__(self, sequence: _Optional[int] = ..., layer_id: _Optional[int] = ..., expert_ids: _Optional[_Iterable[int]] = ..., expert_rows: _Optional[_Iterable[int]] = ..., map_epoch: _Optional[int] = ..., deadline_unix_us: _Optional[int] = ..., merge: _Optional[_Union[Merge, _Mapping]] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Merge(_message.Message):
    __slots__ = ("entries", "weights")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    entries: bytes
    weights: bytes
    def __init__(self, entries: _Optional[bytes] = ..., weights: _Optional[bytes] = ...) -> None: ...

class ForwardReply(_message.Message):
    __slots__ = ("sequence", "status", "detail", "compute_us", "queue_us", "header_crc32", "inflight_tokens", "output")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    QUEUE_US_FIELD_NUMBER: _ClassVar[int]
    HEADER_CRC32_FIELD_NUMBER: _ClassVar[int]
    INFLIGHT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    status: Status
    detail: str
    compute_us: int
    queue_us: int
    header_crc32: int
    inflight_tokens: int
    output: Tensor
    def __init__(self, sequence: _Optional[int] = ..., status: _Optional[_Union[Status, str]] = ..., detail: _Optional[str] = ..., compute_us: _Optional[int] = ..., queue_us: _Optional[int] = ..., header_crc32: _Optional[int] = ..., inflight_tokens: _Optional[int] = ..., output: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InfoReply(_message.Message):
    __slots__ = ("replica_id", "expert_ids", "first_layer", "num_layers", "pid", "node_id", "address", "state", "inflight_tokens", "kernel", "numerics_domain", "machine_id", "weight_bytes", "map_epoch", "hidden_size", "tokens_total", "detail", "ready_layers")
    REPLICA_ID_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    INFLIGHT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KERNEL_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    MACHINE_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    READY_LAYERS_FIELD_NUMBER: _ClassVar[int]
    replica_id: str
    expert_ids: _containers.RepeatedScalarFieldContainer[int]
    first_layer: int
    num_layers: int
    pid: int
    node_id: str
    address: str
    state: ReplicaState
    inflight_tokens: int
    kernel: str
    numerics_domain: str
    machine_id: str
    weight_bytes: int
    map_epoch: int
    hidden_size: int
    tokens_total: int
    detail: str
    ready_layers: int
    def __init__(self, replica_id: _Optional[str] = ..., expert_ids: _Optional[_Iterable[int]] = ..., first_layer: _Optional[int] = ..., num_layers: _Optional[int] = ..., pid: _Optional[int] = ..., node_id: _Optional[str] = ..., address: _Optional[str] = ..., state: _Optional[_Union[ReplicaState, str]] = ..., inflight_tokens: _Optional[int] = ..., kernel: _Optional[str] = ..., numerics_domain: _Optional[str] = ..., machine_id: _Optional[str] = ..., weight_bytes: _Optional[int] = ..., map_epoch: _Optional[int] = ..., hidden_size: _Optional[int] = ..., tokens_total: _Optional[int] = ..., detail: _Optional[str] = ..., ready_layers: _Optional[int] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("machine_id", "lanes")
    MACHINE_ID_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    machine_id: str
    lanes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, machine_id: _Optional[str] = ..., lanes: _Optional[_Iterable[str]] = ...) -> None: ...

class AttachReply(_message.Message):
    __slots__ = ("lane", "endpoint", "ticket")
    LANE_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    lane: str
    endpoint: str
    ticket: bytes
    def __init__(self, lane: _Optional[str] = ..., endpoint: _Optional[str] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class LoadColumnRequest(_message.Message):
    __slots__ = ("expert_id", "first_layer", "num_layers")
    EXPERT_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    expert_id: int
    first_layer: int
    num_layers: int
    def __init__(self, expert_id: _Optional[int] = ..., first_layer: _Optional[int] = ..., num_layers: _Optional[int] = ...) -> None: ...

class LoadColumnReply(_message.Message):
    __slots__ = ("status", "detail", "weight_bytes")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    status: Status
    detail: str
    weight_bytes: int
    def __init__(self, status: _Optional[_Union[Status, str]] = ..., detail: _Optional[str] = ..., weight_bytes: _Optional[int] = ...) -> None: ...

class FetchColumnRequest(_message.Message):
    __slots__ = ("expert_id", "first_layer", "num_layers")
    EXPERT_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    expert_id: int
    first_layer: int
    num_layers: int
    def __init__(self, expert_id: _Optional[int] = ..., first_layer: _Optional[int] = ..., num_layers: _Optional[int] = ...) -> None: ...

class ColumnPiece(_message.Message):
    __slots__ = ("status", "detail", "layer_id", "expert_id", "part", "offset", "weight_crc32", "piece")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    LAYER_ID_FIELD_NUMBER: _ClassVar[int]
    EXPERT_ID_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_CRC32_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    status: Status
    detail: str
    layer_id: int
    expert_id: int
    part: WeightPart
    offset: int
    weight_crc32: int
    piece: Tensor
    def __init__(self, status: _Optional[_Union[Status, str]] = ..., detail: _Optional[str] = ..., layer_id: _Optional[int] = ..., expert_id: _Optional[int] = ..., part: _Optional[_Union[WeightPart, str]] = ..., offset: _Optional[int] = ..., weight_crc32: _Optional[int] = ..., piece: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_ms",)
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    timeout_ms: int
    def __init__(self, timeout_ms: _Optional[int] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("inflight_tokens",)
    INFLIGHT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    inflight_tokens: int
    def __init__(self, inflight_tokens: _Optional[int] = ...) -> None: ...
