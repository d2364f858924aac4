"""A frame of `octavo top`: it fits, whatever the terminal and the cluster, and says what matters without colour."""

from dataclasses import replace
from typing import Any

import pytest

from actors.metrics.facts import facts_of
from actors.supervision.status import BalanceStatus
from actors.window.frame import BLOCKS, frame, step_of
from actors.window.reading import History, Reading
from actors.window.snapshot import Snapshot, make_snapshot
from tests.support.window import AT_S, NODES, SeenCluster


def snapshot_of(cluster: SeenCluster, **changes: Any) -> Snapshot:
    parts = {"status": cluster.status(), "coordinators": [facts_of(cluster.reply())]}
    reading = Reading(at_s=AT_S, clock_s=0.0, **(parts | changes))
    return make_snapshot(reading, History().after(reading), "supervisor")


def lines(snapshot: Snapshot, columns: int = 80, height: int = 24, **about: Any) -> list[str]:
    text = frame(snapshot, columns, height, **about)
    found = text.plain.split("\n")
    assert len(found) <= height
    assert max(map(len, found)) <= max(40, columns)
    return found


@pytest.mark.parametrize(("tokens", "step"), [(0, 0), (1, 0), (24, 0), (50, 1), (100, 2), (141, 2), (200, 3), (900, 4)])
def test_steps_are_powers_of_two_from_an_even_share(tokens: int, step: int) -> None:
    assert step_of(tokens, 100.0) == step


def test_a_small_terminal_shows_a_whole_mixtral() -> None:
    cluster = SeenCluster(32, 8)
    found = lines(snapshot_of(cluster))
    assert found[0].startswith("octavo mixtral-tiny  ready  epoch 3  up 1 h 23 min")
    rows = [line for line in found if line[:6].strip().isdecimal()]
    assert [int(line[:6]) for line in rows] == list(range(8))
    assert [line[7 : 7 + 32].strip("".join(BLOCKS)) for line in rows] == [""] * 8, "a block for every layer"
    assert all(line.rstrip().endswith("%") and "1/1" in line for line in rows)
    assert any(line.startswith("coordinator-0 ready") for line in found)
    assert any("8 ready" in line for line in found)


def test_blocks_tell_hot_from_cold_without_colour() -> None:
    cluster = SeenCluster(2, 4)
    cluster.load = [[10, 200, 390, 1000], [0, 0, 0, 0]]
    rows = [line for line in lines(snapshot_of(cluster)) if line[:6].strip().isdecimal()]
    assert [row[7:9] for row in rows] == [BLOCKS[0] * 2, BLOCKS[1] * 2, BLOCKS[2] * 2, BLOCKS[3] * 2]
    assert [row[9:11] for row in rows] == ["  "] * 4, "a layer without tokens has no share to show"
    cluster.load = [[0, 0, 0, 400], [0, 0, 0, 400]]
    assert lines(snapshot_of(cluster))[6][7:11] == BLOCKS[4] * 4


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
@pytest.mark.parametrize("height", [10, 24, 60])
@pytest.mark.parametrize("shape", [(1, 1), (4, 8), (32, 8), (80, 64)])
def test_every_size_fits(columns: int, height: int, shape: tuple[int, int]) -> None:
    cluster = SeenCluster(*shape, num_replicas=2)
    cluster.more["events"] = [f"12:00:0{n} something that takes a whole sentence to be told" for n in range(9)]
    found = lines(snapshot_of(cluster), columns, height)
    assert sum(line[:6].strip().isdecimal() for line in found) >= 1
    assert any("balancedness" in line or "even" in line for line in found)


def test_of_too_many_experts_the_hottest_are_shown() -> None:
    cluster = SeenCluster(4, 64)
    cluster.load = [[1000 if expert in (7, 40) else 10 for expert in range(64)] for _ in range(4)]
    found = lines(snapshot_of(cluster))
    shown = [int(line[:6]) for line in found if line[:6].strip().isdecimal()]
    assert {7, 40} <= set(shown)
    assert shown == sorted(shown)
    assert any(f"{64 - len(shown)} experts with less load are not shown" in line for line in found)


def test_what_is_not_well_is_said_with_its_reason() -> None:
    cluster = SeenCluster()
    cluster.states["expert-3-r0"] = ("dead", "exit code -9")
    cluster.standings["expert-5-r0"] = ("ejected", "11 times slower than others")
    moves = [{"kind": "copy", "what": "expert 3, layers 0-3", "node_id": NODES[1], "source": "", "num_bytes": 2**30,
              "reason": "it is hot", "at": AT_S}]  # fmt: skip
    cluster.more["balance"] = BalanceStatus(mode="on", policy="incremental", moves_total=1, done=moves)
    text = "\n".join(lines(snapshot_of(cluster), 120, 30))
    assert "degraded" in text
    assert "  expert-3-r0 dead 4f2a9c10 exit code -9" in text
    assert "  expert-5-r0 ejected c3d4411f coordinator-0: ejected, 11 times slower than others" in text
    assert "  done: copy expert 3, layers 0-3 77b01e55, 1 GiB: it is hot" in text
    assert next(line for line in text.split("\n") if line.startswith("     3 ")).count("0/1") == 1


def test_it_says_how_old_it_is() -> None:
    one = snapshot_of(SeenCluster(), status_age_s=2.0)
    assert "  2 s old" in lines(one)[0]
    assert "  9 s old  away" in lines(one, age_s=7.0, note="away")[0]


def test_before_anything_is_known_there_is_a_frame_too() -> None:
    reading = Reading(at_s=AT_S, clock_s=0.0)
    text = "\n".join(lines(make_snapshot(reading, History().after(reading), "supervisor")))
    assert "unknown" in text
    assert "no coordinator has told its load yet" in text


def test_a_text_of_the_cluster_cannot_break_the_frame() -> None:
    cluster = SeenCluster()
    cluster.more["events"] = ["a\nb \x1b[2J \x07c"]
    cluster.more["replicas"] = [replace(cluster.status().replicas[0], state="dead", detail="x\n\ny\x1b]0;title\x07")]
    text = frame(snapshot_of(cluster), 80, 24).plain
    assert not [one for one in text if ord(one) < 32 and one != "\n"]
    assert len(text.split("\n")) <= 24
