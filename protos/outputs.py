"""What both ends of a Generate stream ask of its messages."""

from protos.coordinator_pb2 import FINISH_REASON_UNSPECIFIED, SequenceOutput


def is_last(output: SequenceOutput) -> bool:
    """True when nothing more comes for this request."""
    return output.finish_reason != FINISH_REASON_UNSPECIFIED
