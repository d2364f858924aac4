"""Where a prompt's beginning was computed before: remembered within bounds, and never across tenants."""

from cluster.prefix_affinity import MAX_HOLDERS, MAX_SPANS, SPAN, PrefixAffinity
from cluster.prefix_hash import COMMON_ROOT, root_key

PROMPT = tuple(range(5 * SPAN + 7))


def test_who_was_given_a_beginning_is_known_for_all_prompts_with_it() -> None:
    made = PrefixAffinity()
    made.note(made.beginnings(COMMON_ROOT, PROMPT), "a:1")
    assert made.known_tokens(made.beginnings(COMMON_ROOT, PROMPT), "a:1") == 5 * SPAN
    assert made.known_tokens(made.beginnings(COMMON_ROOT, PROMPT), "b:1") == 0
    other = (*PROMPT[: 3 * SPAN], 0, *PROMPT[3 * SPAN + 1 :])
    assert made.known_tokens(made.beginnings(COMMON_ROOT, other), "a:1") == 3 * SPAN
    assert made.known_tokens(made.beginnings(COMMON_ROOT, (1, *PROMPT)), "a:1") == 0
    assert made.beginnings(COMMON_ROOT, PROMPT[: SPAN - 1]) == []


def test_tenants_are_strangers() -> None:
    made = PrefixAffinity()
    made.note(made.beginnings(root_key("one", b""), PROMPT), "a:1")
    assert made.known_tokens(made.beginnings(root_key("another", b""), PROMPT), "a:1") == 0


def test_a_beginning_is_remembered_at_its_latest_holders() -> None:
    made = PrefixAffinity()
    keys = made.beginnings(COMMON_ROOT, PROMPT)
    names = [f"{number}:1" for number in range(MAX_HOLDERS + 1)]
    for name in names:
        made.note(keys, name)
    made.note(keys, names[1])
    made.note(keys, "new:1")
    known = {name for name in (*names, "new:1") if made.known_tokens(keys, name)}
    assert known == {names[1], names[3], names[4], "new:1"}


def test_it_is_bounded_and_forgets_what_was_used_longest_ago() -> None:
    made = PrefixAffinity(max_beginnings=8)
    first = made.beginnings(COMMON_ROOT, PROMPT)
    made.note(first, "a:1")
    for number in range(20):
        made.note(made.beginnings(COMMON_ROOT, [number + 1] * SPAN), "a:1")
        made.note(first, "a:1")
        assert len(made) <= 8
    assert made.known_tokens(first, "a:1") == 5 * SPAN
    assert len(made.beginnings(COMMON_ROOT, [0] * (SPAN * (MAX_SPANS + 9)))) == MAX_SPANS
