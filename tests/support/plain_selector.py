"""The selector without its shortcuts, as the oracle: every expert by the general rule, the simple rule always tried."""

import math
from collections.abc import Sequence

from cluster.selector import LEAST_B_S, Parts, SelectorPolicy, Server, fewest_in_flight, layer_end_s


class PlainSelector:
    """`Selector` with neither: its answers are what the quick one's must be, row for row."""

    def __init__(self, policy: SelectorPolicy | None = None, seat: int = 0) -> None:
        self.policy = SelectorPolicy() if policy is None else policy
        self._seat = seat
        self._factors: dict[int, tuple[float, ...]] = {}

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
                latest_s = max(latest_s, who[0].take(rows[at]))
        bound_s = latest_s  # no whole experts can end sooner
        choices.sort(key=rows.__getitem__, reverse=True)  # of equals, the first expert first
        for at in choices:
            given[at], end_s, alone_s = self._place(rows[at], holders[at], latest_s)
            latest_s = max(latest_s, end_s)
            bound_s = max(bound_s, alone_s)
        # Greed may err where several have a choice.
        allowed_s = latest_s * (1 - self.policy.lean) - message_s
        if len(choices) > 1 and bound_s < allowed_s:
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

    def _leanings(self, num_holders: int) -> tuple[float, ...]:
        """By what an expert's work is multiplied at each of its holders."""
        leaning, turns = self.policy.leaning(self._seat), [(at - self._seat) % num_holders for at in range(num_holders)]
        found = self._factors[num_holders] = tuple([1.0 + leaning * (turn / num_holders) for turn in turns])
        return found


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
