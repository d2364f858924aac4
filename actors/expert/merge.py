"""A message whose tokens were sent once for several of this replica's experts, and go back as one weighted sum each.

The sum runs over the rows in the order of the request, in fp32, and so has the bits that `model.dispatch.combine`
would have given: it begins at -0.0, to which adding anything changes no bit of it. Which tokens may be merged is
decided in `actors.dispatch.merging`.

M routed rows, U entries (the rows that travelled), D hidden size.
"""

from dataclasses import dataclass

import torch

from actors.expert.desk import Admitted, Desk, Outcome
from protos import expert_pb2 as pb
from protos.codec import CodecError


@dataclass(frozen=True, slots=True)
class Merged:
    """Routed row i is entry `entries_M[i]`, its answer counts `weights_M[i]`."""

    entries_M: torch.Tensor
    weights_M: torch.Tensor

    def compute(self, desk: Desk, work: Admitted, x_UD: torch.Tensor, out_UD: torch.Tensor) -> Outcome:
        """Fills `out_UD`. In the compute thread."""
        sums_UD = torch.full(x_UD.shape, -0.0)

        def add(at: int, y_MD: torch.Tensor) -> None:
            part = slice(at, at + len(y_MD))
            weighted_MD = y_MD.to("cpu", torch.float32) * self.weights_M[part, None]
            sums_UD.index_add_(0, self.entries_M[part], weighted_MD)

        outcome = desk.compute(work, x_UD.index_select(0, self.entries_M), add)
        out_UD.copy_(sums_UD)
        return outcome


def unpack_merge(request: pb.ForwardRequest, num_entries: int) -> Merged | None:
    """The request's merge, None where it has none. Raises CodecError unless it fits `num_entries` rows of hidden."""
    num_rows = sum(request.expert_rows)
    if not request.HasField("merge"):
        if num_rows != num_entries:
            raise CodecError(pb.STATUS_INVALID, f"{num_entries} rows of hidden for {num_rows} routed rows")
        return None
    merge = request.merge
    if len(merge.entries) != 4 * num_rows or len(merge.weights) != 4 * num_rows:
        sizes = f"{len(merge.entries)} and {len(merge.weights)} bytes"
        raise CodecError(pb.STATUS_INVALID, f"merge has {sizes} for {num_rows} routed rows of 4 bytes each")
    entries_M = torch.frombuffer(bytearray(merge.entries), dtype=torch.int32).to(torch.int64)
    if int(entries_M.min()) < 0 or int(entries_M.max()) >= num_entries:
        raise CodecError(pb.STATUS_INVALID, f"merge names an entry that is not one of {num_entries}")
    if len(set(entries_M.tolist())) != num_entries:
        raise CodecError(pb.STATUS_INVALID, f"merge leaves some of {num_entries} entries without a row")
    start = 0
    for count in request.expert_rows:
        part = entries_M[start : start + count]
        if len(set(part.tolist())) != count:
            raise CodecError(pb.STATUS_INVALID, "merge sends a token to one expert twice")
        start += count
    return Merged(entries_M, torch.frombuffer(bytearray(merge.weights), dtype=torch.float32))
