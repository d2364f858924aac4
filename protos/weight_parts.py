"""The names of an expert's weights, and what the wire calls them."""

from collections.abc import Mapping

from protos.expert_pb2 import WEIGHT_PART_W1, WEIGHT_PART_W2, WEIGHT_PART_W3, WeightPart

PARTS: Mapping[str, WeightPart] = {"w1": WEIGHT_PART_W1, "w3": WEIGHT_PART_W3, "w2": WEIGHT_PART_W2}
"""An expert's weights in one layer by name, in the order in which they are sent."""
