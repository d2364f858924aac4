"""Which replicas compute one layer's rows: the load of this very batch, on servers of unequal speed.

A call costs its server a + b · rows (`service_time`). While a dominates (weights are read once for a batch, however
small) an expert's whole batch goes to one server, the one that would finish it first, given what this batch has already
given to it and what is in flight there. Past the ridge, where arithmetic rules, rows are split over servers if that
ends the layer sooner. Experts that only one server holds come first, then the largest batches.

A server is a replica of the live cluster, or a host of the simulator; `assignment` is the same rule on arrays. Who is
healthy, and what is in flight, the caller knows. Deterministic.
"""

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from cluster.expert_map import ExpertMap, ReplicaInfo
from cluster.ids import ExpertId, LayerId, ReplicaId
from cluster.service_time import ServiceTime

LEAST_B_S = 1e-12
"""Who has no measurable time for a row is not divided by."""

_NO_RANKS: Mapping[ReplicaId, int] = {}
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectorPolicy:
    """`message_s`: what another message is worth, so much later may an expert be done where this batch goes anyway.

    With `split`, an expert is split when its rows cost more than `split_past` times the call itself, into parts of
    which the same is true, and when the layer then ends at least `split_gain` (a share) sooner. `lean` is how much
    later (a share of its work) an expert may be done at the server that a coordinator leans to: each leans to another
    one, so that servers about equal are not chosen by all at once.
    """

    message_s: float = 1e-4
    split: bool = True
    split_past: float = 1.0
    split_gain: float = 0.05
    lean: float = 0.1

    def __post_init__(self) -> None:
        for name, most in (("message_s", 60.0), ("split_past", 1e6), ("split_gain", 1.0), ("lean", 1.0)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise ValueError(f"{name} is {value}, but it must be 0 to {most:g}")

    def divisible_rows(self, line: ServiceTime) -> float:
        """The fewest rows of a batch that two replicas with this line would share; infinite where none would."""
        return max(2 * self.split_past * line.ridge_tokens, 2.0) if self.split else math.inf

    def leaning(self, seat: int) -> float:
        """How much the coordinator of this `seat` minds the server it likes least: `lean`, or down to half of it.

        Those who like the same one mind differently, so that they do not change their minds together.
        """
        return self.lean * (1.0 - 0.5 * (seat * _GOLDEN % 1.0))


@dataclass(slots=True, eq=False)
class Server:
    """Seconds of a call and of a row, seconds of what is in flight there, and its tokens, everybody's.

    The other fields are scribbled in while a batch is assigned: when it will be done, and when it could begin.
    """

    a_s: float
    b_s: float
    ready_s: float = 0.0
    tokens: float = 0.0
    finish_s: float = field(default=0.0, init=False)
    begin_s: float = field(default=0.0, init=False)

    def take(self, num: int) -> float:
        """One more call; returns when it will be done."""
        self.finish_s = self.begin_s = finish_s = self.finish_s + (self.a_s + self.b_s * num)
        return finish_s


Parts = tuple[tuple[int, int], ...]
"""(Holder, rows) of one expert: which of its holders get how many rows, in their order; together they are all."""


class Selector:
    """One coordinator's; `seat` is its number, see SelectorPolicy.lean."""

    def __init__(self, policy: SelectorPolicy | None = None, seat: int = 0) -> None:
        self.policy = SelectorPolicy() if policy is None else policy
        self._seat = seat
        self._factors: dict[int, tuple[float, ...]] = {}
        self._factor_of_one, self._factor_of_other = self._leanings(2)

    def assign(self, rows: Sequence[int], holders: Sequence[Sequence[Server]]) -> list[Parts]:
        """The parts of each expert: `rows[i]` rows, at least 1, may go to `holders[i]`, at least one of them.

        By the model, and but for what `lean` and `message_s` allow, the layer never ends later than with
        `fewest_in_flight`.
        """
        message_s = self.policy.message_s
        for who in holders:
            for server in who:
                server.finish_s = ready_s = server.ready_s
                server.begin_s = ready_s + message_s
        given: list[Parts] = [()] * len(rows)
        choices: list[int] = []
        latest_s = 0.0
        for at, who in enumerate(holders):
            if len(who) > 1:
                choices.append(at)
            else:
                given[at] = ((0, rows[at]),)
                end_s = who[0].take(rows[at])
                if end_s > latest_s:
                    latest_s = end_s
        bound_s = latest_s  # no whole experts can end sooner
        choices.sort(key=rows.__getitem__, reverse=True)  # of equals, the first expert first
        for at in choices:
            who = holders[at]
            place = self._place_at_two if len(who) == 2 else self._place
            given[at], end_s, alone_s = place(rows[at], who, latest_s)
            if end_s > latest_s:
                latest_s = end_s
            if alone_s > bound_s:
                bound_s = alone_s
        # Greed may err where several have a choice.
        allowed_s = latest_s * (1 - self.policy.lean) - message_s
        if len(choices) > 1 and bound_s < allowed_s and _shared_evenly_s(rows, holders) < allowed_s:
            other = fewest_in_flight(rows, holders)
            if layer_end_s(other, holders) < allowed_s:
                return other
        return given

    def _place(self, num: int, who: Sequence[Server], latest_s: float) -> tuple[Parts, float, float]:
        """One expert's rows to a holder or several; when they are done, and when a holder with no others would be."""
        factors = self._factors.get(len(who)) or self._leanings(len(who))
        best, chosen, least_s, alone_s = 0, who[0], math.inf, math.inf
        for at, server in enumerate(who):
            work_s = server.a_s + server.b_s * num
            score_s = server.begin_s + work_s * factors[at]
            if score_s < least_s:
                best, chosen, least_s = at, server, score_s
            work_s += server.ready_s
            if work_s < alone_s:
                alone_s = work_s
        policy = self.policy
        if policy.split and chosen.b_s * num > policy.split_past * chosen.a_s:
            ends_s = [server.begin_s + (server.a_s + server.b_s * num) for server in who]
            if ends_s[best] > latest_s:
                parts = _split(num, who, ends_s, (1 - policy.split_gain) * ends_s[best], latest_s, policy.split_past)
                if parts:
                    return parts, max([who[at].take(part) for at, part in parts]), alone_s
        return ((best, num),), chosen.take(num), alone_s

    def _place_at_two(self, num: int, who: Sequence[Server], latest_s: float) -> tuple[Parts, float, float]:
        """`_place` for two holders, by far the commonest number, to the same bit; no lists and no loops."""
        one, other = who
        one_s, other_s = one.a_s + one.b_s * num, other.a_s + other.b_s * num
        alone_s, other_alone_s = one_s + one.ready_s, other_s + other.ready_s
        if other_alone_s < alone_s:
            alone_s = other_alone_s
        chosen, work_s, best = one, one_s, 0
        if other.begin_s + other_s * self._factor_of_other < one.begin_s + one_s * self._factor_of_one:
            chosen, work_s, best = other, other_s, 1
        policy = self.policy
        if policy.split and chosen.b_s * num > policy.split_past * chosen.a_s:
            end_s = chosen.begin_s + work_s
            if end_s > latest_s:
                swapped = other.begin_s + other_s < one.begin_s + one_s
                before_s = (1 - policy.split_gain) * end_s
                num_one = _split_at_two(num, one, other, before_s, latest_s, policy.split_past, swapped=swapped)
                if num_one:
                    end_s, other_end_s = one.take(num_one), other.take(num - num_one)
                    return ((0, num_one), (1, num - num_one)), max(end_s, other_end_s), alone_s
        chosen.finish_s = chosen.begin_s = end_s = chosen.finish_s + work_s
        return ((best, num),), end_s, alone_s

    def _leanings(self, num_holders: int) -> tuple[float, ...]:
        """By what an expert's work is multiplied at each of its holders."""
        leaning, turns = self.policy.leaning(self._seat), [(at - self._seat) % num_holders for at in range(num_holders)]
        found = self._factors[num_holders] = tuple([1.0 + leaning * (turn / num_holders) for turn in turns])
        return found


def fewest_in_flight(rows: Sequence[int], holders: Sequence[Sequence[Server]]) -> list[Parts]:
    """Each expert whole, one after another, to the holder with the fewest tokens; of equals, to the first."""
    tokens: dict[Server, float] = {}
    given: list[Parts] = []
    for num, who in zip(rows, holders, strict=True):
        has = [tokens.get(server, server.tokens) for server in who]
        at = has.index(min(has))
        tokens[who[at]] = has[at] + num
        given.append(((at, num),))
    return given


def layer_end_s(given: Sequence[Parts], holders: Sequence[Sequence[Server]]) -> float:
    """When the last of the servers that got something is done with it, by the model; messages not counted."""
    finish_s: dict[Server, float] = {}
    for parts, who in zip(given, holders, strict=True):
        for at, num in parts:
            server = who[at]
            finish_s[server] = finish_s.get(server, server.ready_s) + (server.a_s + server.b_s * num)
    return max(finish_s.values(), default=0.0)


def _shared_evenly_s(rows: Sequence[int], holders: Sequence[Sequence[Server]]) -> float:
    """When it would end if all servers shared all work evenly, each expert at its fastest: nothing ends sooner.

    A hair less, since sums are rounded.
    """
    work_s = sum(
        [min([server.a_s + server.b_s * num for server in who]) for num, who in zip(rows, holders, strict=True)]
    )
    return work_s / len(frozenset(chain.from_iterable(holders))) * (1 - 1e-9)


def _split(
    num: int, who: Sequence[Server], wholes_s: Sequence[float], before_s: float, latest_s: float, split_past: float
) -> Parts:
    """Parts that end together, of as many holders as it takes; none unless the layer then ends before `before_s`.

    `wholes_s` is when each holder would be done with all of it.
    """
    order = sorted(range(len(who)), key=wholes_s.__getitem__)
    starts_s = [who[at].begin_s + who[at].a_s for at in order]
    slopes_s = [max(who[at].b_s, LEAST_B_S) for at in order]
    least = [max(split_past * who[at].a_s / slope_s, 1.0) for at, slope_s in zip(order, slopes_s, strict=True)]
    rate, begun, several, best_s, together_s = 0.0, 0.0, 0, before_s, 0.0
    for at, (start_s, slope_s) in enumerate(zip(starts_s, slopes_s, strict=True)):
        rate += 1 / slope_s
        begun += start_s / slope_s
        end_s = (num + begun) / rate  # the first so many all end then
        ends_s = max(end_s, latest_s)
        if at and ends_s < best_s and all((end_s - starts_s[i]) / slopes_s[i] >= least[i] for i in range(at + 1)):
            several, best_s, together_s = at + 1, ends_s, end_s
    parts = [int((together_s - starts_s[at]) / slopes_s[at]) for at in range(several)]
    left = num - sum(parts)
    return tuple(sorted((order[at], part + (at < left)) for at, part in enumerate(parts)))


def _split_at_two(
    num: int, one: Server, other: Server, before_s: float, latest_s: float, split_past: float, *, swapped: bool
) -> int:
    """`_split` for two holders, to the same bit: rows of `one`, or 0 where it is better not to split.

    `swapped`: the other one would be done with all of it first.
    """
    first, last = (other, one) if swapped else (one, other)
    first_s, last_s = first.begin_s + first.a_s, last.begin_s + last.a_s
    first_slope_s = first.b_s if first.b_s > LEAST_B_S else LEAST_B_S
    last_slope_s = last.b_s if last.b_s > LEAST_B_S else LEAST_B_S
    together_s = (num + (first_s / first_slope_s + last_s / last_slope_s)) / (1 / first_slope_s + 1 / last_slope_s)
    if not (together_s < before_s and latest_s < before_s):
        return 0
    num_first, num_last = (together_s - first_s) / first_slope_s, (together_s - last_s) / last_slope_s
    if num_first < max(split_past * first.a_s / first_slope_s, 1.0) or num_last < max(
        split_past * last.a_s / last_slope_s, 1.0
    ):
        return 0
    of_last = int(num_last)
    left = num - (int(num_first) + of_last)
    of_last += left > 1  # what rounding leaves, a row each, the first one first
    return of_last if swapped else num - of_last


def candidates(
    expert_map: ExpertMap,
    layer: LayerId,
    expert: ExpertId,
    inflight: Mapping[ReplicaId, int],
    healthy: Container[ReplicaId],
    ranks: Mapping[ReplicaId, int] = _NO_RANKS,
) -> list[ReplicaInfo]:
    """Replicas to ask for an expert's rows again, best first: lowest rank, fewest tokens in flight, lowest id.

    `inflight` has tokens sent and not answered; a replica that is not in it has none. `ranks` puts those behind that
    are passed over or ejected (`cluster.replica_health`); who is not in it has rank 0. May be empty.
    """
    able = [r for r in expert_map.replicas_for(layer, expert) if r.replica_id in healthy]

    def place(replica: ReplicaInfo) -> tuple[int, int, ReplicaId]:
        replica_id = replica.replica_id
        return ranks.get(replica_id, 0), inflight.get(replica_id, 0), replica_id

    return sorted(able, key=place)
