"""What waits for what: actions on one unit or one node keep their order, whatever asks for hosts stands alone."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.ids import NodeId
from cluster.policy import Action, AddHosts, Copy, Drop, waits_for

NODES = [NodeId(f"node-{n}") for n in range(3)]
COPIES = st.builds(
    Copy,
    unit=st.integers(0, 9),
    node_id=st.sampled_from(NODES),
    source=st.none(),
    num_bytes=st.just(1),
    reason=st.just("a test wants it"),
)
DROPS = st.builds(Drop, unit=st.integers(0, 9), node_id=st.sampled_from(NODES), reason=st.just("a test wants it"))
HOSTS = st.builds(AddHosts, num=st.just(1), reason=st.just("more is more"))
ACTIONS = st.lists(st.one_of(COPIES, DROPS, HOSTS), max_size=20)


def must_follow(later: Action, earlier: Action) -> bool:
    """By themselves, whatever is between them."""
    if isinstance(later, AddHosts) or isinstance(earlier, AddHosts):
        return True
    assert isinstance(later, Copy | Drop)
    assert isinstance(earlier, Copy | Drop)
    return later.unit == earlier.unit or later.node_id == earlier.node_id


@given(ACTIONS)
def test_what_waits_for_what_is_what_must_and_nothing_else(actions: list[Action]) -> None:
    follows: list[set[int]] = []
    waits: list[set[int]] = []
    for place, before in enumerate(waits_for(actions)):
        assert all(0 <= one < place for one in before)
        must = {one for one in range(place) if must_follow(actions[place], actions[one])}
        follows.append(must.union(*(follows[one] for one in must)))
        waits.append(set(before).union(*(waits[one] for one in before)))
    assert waits == follows
    assert len(waits) == len(actions)


def test_copies_to_different_nodes_do_not_wait_for_a_drop_between_them() -> None:
    here, there, elsewhere = NODES
    plan: list[Action] = [
        Copy(unit=4, node_id=there, source=None, num_bytes=1, reason=""),
        Drop(unit=4, node_id=here, reason=""),
        Copy(unit=1, node_id=elsewhere, source=None, num_bytes=1, reason=""),
        Copy(unit=6, node_id=here, source=None, num_bytes=1, reason=""),
    ]
    assert waits_for(plan) == (frozenset(), frozenset({0}), frozenset(), frozenset({1}))
    assert waits_for([]) == ()
