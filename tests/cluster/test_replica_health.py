"""Slow and silent replicas go, recovered ones come back, the last one stays, and a slow machine is nobody's fault."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from cluster.ids import ReplicaId
from cluster.replica_health import MAX_RECORDS, HealthBook, late_together
from cluster.replica_record import HealthPolicy, ReplicaRecord, State

SIZE = 3
POLICY = HealthPolicy()


@dataclass
class World:
    """`replicas` copies of each of `experts` experts, asked in rounds as a coordinator does; time is told."""

    experts: int = 4
    replicas: int = 2
    policy: HealthPolicy = field(default_factory=HealthPolicy)
    now_s: float = 100.0
    away: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.book = HealthBook(self.siblings, self.policy)
        for expert in range(self.experts):
            for copy in range(self.replicas):
                self.book.connected(self[expert, copy], "first", self.now_s)
        self.seconds: Callable[[str], float] = lambda _: 0.01
        self.work: Callable[[str], float] = lambda _: 0.0
        self.asked: list[str] = []

    def __getitem__(self, place: tuple[int, int]) -> ReplicaRecord:
        return self.book.record(ReplicaId(f"e{place[0]}-r{place[1]}"))

    def group(self, expert: int) -> list[ReplicaRecord]:
        every = [self[expert, copy] for copy in range(self.replicas)]
        return [one for one in every if one.replica_id not in self.away and not one.quarantined]

    def siblings(self, replica_id: ReplicaId) -> Sequence[ReplicaRecord] | None:
        others = [one for one in self.group(int(replica_id[1])) if one.replica_id != replica_id and one.rank == 0]
        return others or None

    def round(self) -> None:
        """One message to the best replica of every expert; a late one is noted and then asked elsewhere."""
        if self.book.watching:
            for record in self.book.review(self.now_s):
                self.probe(record)
        timeout_s = self.book.times.timeout_s(SIZE)
        asked = [min(self.group(e), key=lambda one: (one.rank, one.replica_id)) for e in range(self.experts)]
        seconds = {one.replica_id: self.seconds(one.replica_id) for one in asked}
        late = sum(one > timeout_s for one in seconds.values())
        if late_together(late, len(asked)):
            timeout_s *= 4
        took = 0.0
        for record in asked:
            took = max(took, self.tell(record, seconds[record.replica_id], timeout_s))
        self.now_s += took + 0.002

    def tell(self, record: ReplicaRecord, seconds: float, timeout_s: float) -> float:
        """What the book hears of one message; returns how long it was waited for."""
        self.asked.append(record.replica_id)
        if seconds <= timeout_s or not self.siblings(record.replica_id):
            self.book.answered(record, SIZE, seconds, self.now_s + seconds, self.work(record.replica_id))
            return seconds
        self.book.overdue(record, timeout_s, self.now_s + timeout_s)
        if seconds < 10:
            self.book.spoke(record)
        siblings = self.siblings(record.replica_id)
        assert siblings, "who is passed over has somebody in its place"
        hedge = min(siblings, key=lambda one: one.replica_id)
        hedge_s = self.seconds(hedge.replica_id)
        first, took = (record, seconds) if seconds <= timeout_s + hedge_s else (hedge, hedge_s)
        self.book.answered(first, SIZE, took, self.now_s + took, self.work(first.replica_id))
        return min(seconds, timeout_s + hedge_s)

    def probe(self, record: ReplicaRecord) -> None:
        siblings = self.siblings(record.replica_id)
        assert siblings, "an ejected replica always has somebody in its place"
        good_s, seconds = self.book.good_probe_s(SIZE, siblings), self.seconds(record.replica_id)
        self.book.probe_sent(record, self.now_s + good_s)
        if seconds < 10:
            self.book.probe_ended(record, seconds <= good_s, self.now_s + seconds)

    def rounds(self, count: int) -> "World":
        for _ in range(count):
            self.round()
        return self

    def out(self) -> list[str]:
        every = (self[expert, copy] for expert in range(self.experts) for copy in range(self.replicas))
        return [one.replica_id for one in every if one.state is not State.HEALTHY]

    def ejections(self) -> int:
        return sum(
            self[expert, copy].ejections_total for expert in range(self.experts) for copy in range(self.replicas)
        )


def noisy(rng: random.Random, slow: dict[str, float], base_s: float = 0.01) -> Callable[[str], float]:
    return lambda replica_id: base_s * rng.uniform(0.7, 1.4) * slow.get(replica_id, 1.0)


@pytest.fixture(params=range(5))
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.param)


# ---- slow ------------------------------------------------------------------------------------------------


def test_a_replica_ten_times_slower_is_ejected_soon_and_the_others_stay(rng: random.Random) -> None:
    world = World()
    world.seconds = noisy(rng, {})
    world.rounds(100)
    assert world.out() == []
    world.seconds = noisy(rng, {"e2-r0": 10.0})
    world.rounds(80)
    assert world.out() == ["e2-r0"]
    assert world[2, 0].detail
    world.asked.clear()
    world.rounds(50)
    assert "e2-r0" not in world.asked


def test_who_has_more_rows_than_others_is_not_compared_for_that(rng: random.Random) -> None:
    """Comparing takes turns: the rows of a hot expert would not be split among its replicas meanwhile."""
    hot = {"e2-r0": 10.0, "e2-r1": 10.0}
    asked = []
    for work in (lambda _: 0.0, lambda replica_id: 0.009 * hot.get(replica_id, 1.0)):
        world = World()
        world.work, world.seconds = work, noisy(rng, hot)
        world.rounds(500)
        assert world.out() == []
        asked.append(world.asked.count("e2-r1"))
    assert asked[0] > 20, "by the round alone it is"
    assert asked[1] == 0
    world.seconds = noisy(rng, hot | {"e2-r0": 100.0})
    world.rounds(200)
    assert world.out() == ["e2-r0"], "though it is found where it is slow beside that"


def test_a_hiccup_is_not_compared_and_two_soon_or_one_after_silence_are() -> None:
    """Nobody is thought slow for what the machine does now and then: comparing costs the rows that are not split."""
    world = World(experts=1)
    world.seconds = lambda _: 0.002
    world.rounds(100)

    def slow_answers(num: int, then: int = 99) -> int:
        """Of e0-r0, below its deadline, and quick ones after them; returns how often the other one was asked then."""
        world.seconds = lambda replica_id: 0.008 if replica_id == "e0-r0" else 0.002
        world.rounds(num)
        world.seconds = lambda _: 0.002
        world.asked.clear()
        world.rounds(then)
        return world.asked.count("e0-r1")

    assert world.book.times.timeout_s(SIZE) > 0.008
    assert [slow_answers(1) for _ in range(5)] == [0] * 5
    assert slow_answers(2) >= POLICY.sample
    world.now_s += POLICY.most_compare_s
    world.rounds(1)
    assert slow_answers(1, then=3) == 0
    assert slow_answers(1) >= POLICY.sample, "the second of five"
    world.now_s += POLICY.most_compare_s
    assert slow_answers(1) >= POLICY.sample, "who is hardly asked has no second one soon"
    assert world.ejections() == 0


@pytest.mark.parametrize(("slower", "out"), [(1.0, False), (1.5, False), (4.0, True)])
def test_siblings_that_share_the_rows_are_not_quicker_for_that(slower: float, out: bool) -> None:
    """Rows of a hot expert are split among its three replicas, but whoever is compared has them alone in its turns."""
    records: list[ReplicaRecord] = []
    book = HealthBook(lambda of: [one for one in records if one.replica_id != of and one.rank == 0] or None)
    records += [book.record(ReplicaId(f"r{i}")) for i in range(3)]
    others = [book.record(ReplicaId(f"other{i}")) for i in range(4)]
    rng, now_s, compared = random.Random(0), 100.0, 0
    for record in (*records, *others):
        book.connected(record, "first", now_s)
    for turn in range(3000):
        if book.watching:
            for probed in book.review(now_s):
                book.probe_sent(probed, now_s + 1.0)
        least = min(one.rank for one in records)
        asked = [one for one in records if one.rank == least]
        compared += any(one.comparison is not None for one in records)
        for record in others:
            book.answered(record, SIZE, rng.uniform(0.018, 0.021), now_s, 0.018)
        hiccup = turn % 500 in (300, 301)
        for record in asked:
            is_slow = record is records[2]
            work_s = 0.018 / len(asked)
            took_s = work_s * rng.uniform(1.0, 1.2) * (slower if is_slow else 1.0) + (
                0.06 if hiccup and is_slow else 0.0
            )
            book.answered(record, SIZE, took_s, now_s + took_s, work_s)
        now_s += 0.02
    assert compared > POLICY.sample
    assert [one.ejections_total > 0 for one in records] == [False, False, out]


def test_a_slow_one_below_every_deadline_is_found_by_comparison() -> None:
    world = World()
    world.seconds = lambda _: 0.002
    world.rounds(100)
    world.seconds = lambda replica_id: 0.02 if replica_id == "e0-r0" else 0.002
    world.rounds(100)
    assert world.out() == ["e0-r0"]
    assert "times slower than its siblings" in world[0, 0].detail


def stuttering(rng: random.Random, victim: str) -> Callable[[str], float]:
    """1 ms with some noise; the victim takes 3.6 ms more in every other answer, as one that gets a tenth of a core."""
    even = noisy(rng, {}, base_s=0.001)
    return lambda replica_id: even(replica_id) + (0.0036 if replica_id == victim and rng.random() < 0.5 else 0.0)


def test_one_that_is_slow_in_every_other_answer_is_found_and_does_not_come_back_by_luck(rng: random.Random) -> None:
    world = World()
    world.seconds = stuttering(rng, "nobody")
    world.rounds(200)
    world.seconds = stuttering(rng, "e1-r0")
    world.rounds(300)
    world.asked.clear()
    world.rounds(5000)
    assert world.asked.count("e1-r0") < 0.2 * 5000
    assert {one.split("-")[0] for one in world.out()} <= {"e1"}


def test_noise_with_a_long_tail_ejects_hardly_ever(rng: random.Random) -> None:
    world = World(experts=8)
    world.seconds = lambda _: 0.003 * rng.lognormvariate(0.0, 0.5)
    world.rounds(10_000)
    assert world.ejections() <= 4, "of 80,000 answers"


def test_a_recovered_one_is_probed_and_taken_back(rng: random.Random) -> None:
    world = World()
    world.seconds = noisy(rng, {})
    world.rounds(100)
    world.seconds = noisy(rng, {"e2-r0": 10.0})
    world.rounds(100)
    world.seconds = noisy(rng, {})
    for _ in range(2000):
        world.round()
        if not world.out():
            break
    assert world.out() == []
    world.asked.clear()
    world.rounds(2)
    assert world.asked.count("e2-r0") == 2


def test_one_that_stays_slow_is_probed_less_and_less(rng: random.Random) -> None:
    world = World()
    world.seconds = noisy(rng, {})
    world.rounds(100)
    world.seconds = noisy(rng, {"e2-r0": 10.0})
    world.rounds(4000)
    assert world.out() == ["e2-r0"]
    assert world[2, 0].level >= 4, "each pause is twice the last one"


def test_everybody_slower_by_the_same_factor_ejects_nobody(rng: random.Random) -> None:
    world = World()
    for factor in (1, 3, 10, 3, 1, 10, 1):
        world.seconds = noisy(rng, {}, base_s=0.005 * factor)
        world.rounds(150)
        assert world.ejections() == 0, factor


def test_an_expert_whose_copies_are_all_slow_keeps_them() -> None:
    world = World()
    world.seconds = lambda replica_id: 0.02 if replica_id.startswith("e1") else 0.002
    world.rounds(3000)
    assert world.ejections() == 0
    assert world.asked.count("e1-r0") > 0.9 * 3000, "comparing is rare, and the usual one stays the usual one"


def test_a_slow_one_is_found_also_where_all_go_to_one_replica() -> None:
    world = World(experts=1)
    world.seconds = lambda _: 0.002
    world.rounds(100)
    world.now_s += POLICY.compare_s
    world.seconds = lambda replica_id: 0.02 if replica_id == "e0-r0" else 0.002
    world.rounds(60)
    assert world.out() == ["e0-r0"]


@pytest.mark.parametrize(("late", "asked", "together"), [(1, 1, False), (1, 2, False), (2, 2, True), (4, 8, False)])
def test_when_more_than_half_are_late_it_is_rather_the_machine(late: int, asked: int, together: bool) -> None:
    assert late_together(late, asked) is together


# ---- silent ----------------------------------------------------------------------------------------------


def test_a_silent_one_is_passed_over_at_once_and_ejected_if_it_stays_silent() -> None:
    world = World().rounds(50)
    record = world[1, 0]
    world.seconds = lambda replica_id: 99.0 if replica_id == "e1-r0" else 0.01
    world.round()
    assert (record.state, record.rank) == (State.HEALTHY, 1)
    world.asked.clear()
    world.rounds(100)
    assert "e1-r0" not in world.asked
    assert (record.state, record.ejections_total) == (State.EJECTED, 1)
    assert record.detail.startswith("silent; no answer within")


def test_one_that_answers_late_is_asked_again_and_ejected_the_third_time() -> None:
    world = World()
    record = world[1, 0]
    for times in range(1, POLICY.strikes + 1):
        assert record.rank == 0
        world.book.overdue(record, 0.05, world.now_s)
        world.book.overdue(record, 0.05, world.now_s)  # another message of the same silence
        assert record.strikes == times
        world.book.spoke(record)
    assert record.state is State.EJECTED
    assert record.detail == "3 times no answer within 0.05 s"


def test_strikes_are_forgotten_after_many_timely_answers() -> None:
    world = World()
    record = world[1, 0]
    for _ in range(10):
        world.book.overdue(record, 0.05, world.now_s)
        world.book.spoke(record)
        for _ in range(POLICY.forget_after):
            world.book.answered(record, SIZE, 0.01, world.now_s)
    assert record.ejections_total == 0


def test_a_probe_that_is_not_answered_keeps_it_out_for_longer() -> None:
    world = World().rounds(50)
    record = world[1, 0]
    world.seconds = lambda replica_id: 99.0 if replica_id == "e1-r0" else 0.01
    world.rounds(200)
    pauses = []
    for _ in range(3):
        while record.probe_until_s is None:
            world.round()
        assert record.state is State.PROBING
        while record.state is State.PROBING:
            world.round()
        pauses.append(record.until_s - world.now_s)
    assert pauses[0] < pauses[1] < pauses[2]


def test_a_probe_whose_connection_breaks_says_nothing() -> None:
    world = World()
    record = world[1, 0]
    world.book.overdue(record, 0.05, world.now_s)
    world.book.review(world.now_s + 1)
    world.now_s = record.until_s
    assert world.book.review(world.now_s) == [record]
    world.book.probe_sent(record, world.now_s + 1)
    world.book.probe_ended(record, None, world.now_s)
    assert (record.probes_good, record.probes_bad, record.state) == (0, 0, State.PROBING)


# ---- the last one ----------------------------------------------------------------------------------------


def test_a_single_replica_is_never_passed_over() -> None:
    world = World(replicas=1)
    record = world[0, 0]
    for _ in range(20):
        world.book.overdue(record, 0.05, world.now_s)
        world.book.answered(record, SIZE, 9.0, world.now_s)
    assert (record.rank, record.state, record.ejections_total, world.book.watching) == (0, State.HEALTHY, 0, False)


def test_an_ejected_one_is_taken_back_when_its_last_sibling_leaves() -> None:
    world = World()
    first, second = world[0, 0], world[0, 1]
    world.book.overdue(first, 0.05, world.now_s)
    world.book.review(world.now_s + 2)
    assert first.state is State.EJECTED
    world.book.overdue(second, 0.05, world.now_s)
    assert (second.rank, second.strikes) == (0, 0)
    world.away.add(second.replica_id)
    world.book.reinstate()
    assert (first.state, first.rank) == (State.HEALTHY, 0)
    assert "last one" in first.detail


@pytest.mark.parametrize("seed", range(10))
def test_whatever_happens_somebody_in_good_standing_is_left_for_every_expert(seed: int) -> None:
    rng = random.Random(seed)
    world = World(experts=3, replicas=rng.choice([1, 2, 3]))
    for _ in range(200):
        slow = {
            f"e{rng.randrange(3)}-r{rng.randrange(3)}": rng.choice([5.0, 20.0, 1e6]) for _ in range(rng.randrange(6))
        }
        world.seconds = noisy(rng, slow, base_s=rng.choice([0.001, 0.01, 0.1]))
        if rng.random() < 0.2:
            world.away = {f"e{rng.randrange(3)}-r{rng.randrange(1, 3)}"}
            world.book.reinstate()
        for _ in range(10):
            world.round()
            for expert in range(3):
                standing = [one for one in world.group(expert) if one.rank < 2]
                assert standing, f"nobody is left of {[(r.replica_id, r.state) for r in world.group(expert)]}"
    world.away, world.seconds = set(), noisy(rng, {})
    world.rounds(5000)
    assert world.out() == [], "and when all is well again, all are back"


# ---- processes -------------------------------------------------------------------------------------------


def test_a_quarantined_process_stays_out_until_it_is_another() -> None:
    world = World()
    record = world[0, 0]
    world.book.quarantine(record, "it gave an answer that is not finite")
    for _ in range(3):
        world.book.connected(record, "first", world.now_s)
        world.rounds(100)
        assert (record.state, record.quarantined) == (State.QUARANTINED, True)
    assert "e0-r0" not in world.asked
    world.book.connected(record, "second", world.now_s)
    assert (record.state, record.detail, record.rank) == (State.HEALTHY, "", 0)


def test_a_quarantine_outlives_a_map_without_the_replica_and_memory_is_bounded() -> None:
    world = World()
    world.book.quarantine(world[0, 0], "wrong")
    world.book.keep([ReplicaId("e1-r0")])
    assert world[0, 0].quarantined
    assert not world[1, 1].answers
    for number in range(MAX_RECORDS + 50):
        world.book.quarantine(world.book.record(ReplicaId(f"x{number}")), "wrong")
    world.book.keep([ReplicaId("e1-r0")])
    assert len(world.book._records) == MAX_RECORDS


def test_the_same_process_connected_again_after_an_ejection_is_probed_first() -> None:
    world = World()
    record = world[0, 0]
    world.book.overdue(record, 0.05, world.now_s)
    world.book.review(world.now_s + 2)
    world.now_s += 2
    world.book.connected(record, "first", world.now_s)
    assert record.state is State.EJECTED
    assert world.book.review(world.now_s) == [record]
    world.book.connected(record, "second", world.now_s)
    assert record.state is State.HEALTHY


@pytest.mark.parametrize(
    "bad", [{"strikes": 0}, {"probes": 0}, {"worse": 0.5}, {"outlier": 1.2}, {"verdict": 0}, {"eject_s": 0.0}]
)
def test_a_policy_that_contradicts_itself_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be|expected"):
        HealthPolicy(**bad)  # type: ignore[arg-type]
