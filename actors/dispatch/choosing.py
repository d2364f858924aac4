"""Gives one layer's rows to the links that lead to replicas: what `cluster.selector` decides, asked of those who are
there.

Only whom the expert's best standing allows is asked about: nobody that is passed over while another one is not, and
nobody ejected while anybody else is left. A layer whose experts have one replica each asks nothing at all.
"""

from collections.abc import Mapping, Sequence

from actors.dispatch.replica_link import ReplicaLink
from actors.dispatch.transport import ExpertRows
from cluster.selector import Selector

Chosen = dict[ReplicaLink | None, list[ExpertRows]]
"""What goes to whom, each in order of the rows; None: nobody can be asked."""


def choose(
    named: Mapping[tuple[int, int], Sequence[ReplicaLink]],
    layer: int,
    parts: Sequence[ExpertRows],
    selector: Selector,
    now_s: float,
) -> Chosen:
    """All rows of `parts`, which are whole experts in ascending order, to links of `named`, who holds what."""
    chosen: Chosen = {}
    holders: list[Sequence[ReplicaLink]] = []
    several = False
    for asked in parts:
        links = named.get((layer, asked.expert_id), ())
        if len(links) != 1:
            links = links if len(links) == 2 and _stand_alike(*links) else best_standing(links)
            several = several or len(links) > 1
        elif not links[0].usable:
            links = ()
        holders.append(links)
    if not several:
        for asked, links in zip(parts, holders, strict=True):
            chosen.setdefault(links[0] if links else None, []).append(asked)
        return chosen
    if not all(holders):
        chosen[None] = [asked for asked, links in zip(parts, holders, strict=True) if not links]
        parts = [asked for asked, links in zip(parts, holders, strict=True) if links]
        holders = [links for links in holders if links]
    servers = [[link.times.server(now_s) for link in links] for links in holders]
    given = selector.assign([asked.num_rows for asked in parts], servers)
    for asked, links, shares in zip(parts, holders, given, strict=True):
        if len(shares) == 1:
            chosen.setdefault(links[shares[0][0]], []).append(asked)
            continue
        start = asked.rows.start
        for at, num in shares:
            chosen.setdefault(links[at], []).append(ExpertRows(asked.expert_id, slice(start, start + num)))
            start += num
    return chosen


def _stand_alike(one: ReplicaLink, other: ReplicaLink) -> bool:
    """Both can be asked, and neither is to be preferred: the commonest case of `best_standing`."""
    return one.usable and other.usable and one.record.rank == other.record.rank


def best_standing(links: Sequence[ReplicaLink]) -> list[ReplicaLink]:
    """Those of the lowest rank that can be asked, in their order."""
    best: list[ReplicaLink] = []
    least = 0
    for link in links:
        if link.usable:
            rank = link.record.rank
            if not best or rank < least:
                best, least = [link], rank
            elif rank == least:
                best.append(link)
    return best
