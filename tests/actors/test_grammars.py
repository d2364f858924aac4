"""Compiling beside the loop: where it is tried it may die, what was found is kept, and who waits is bounded."""

import asyncio
import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.coordinator import grammar_workshop
from actors.coordinator.engine_io import Failure
from actors.coordinator.grammar_workshop import Workshop, WorkshopBusy
from actors.coordinator.grammars import INLINE_TOKENS, Grammars, GrammarsBusy
from model.grammar.spec import GrammarError, GrammarKind, GrammarSpec, choice, json_schema
from protos.coordinator_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_ERROR,
    FINISH_REASON_STOP,
    GRAMMAR_KIND_CHOICE,
    GRAMMAR_KIND_JSON_SCHEMA,
    GRAMMAR_KIND_LARK,
    GRAMMAR_KIND_REGEX,
    Cancel,
    Grammar,
)
from protos.expert_pb2 import STATUS_DRAINING, STATUS_INVALID, STATUS_OVERLOADED
from tests.support.checkpoints import write_mixtral
from tests.support.engines import TinyModel
from tests.support.grammars import byte_tokenizer, byte_vocabulary, text_of
from tests.support.served import RawStream, raw_stream, served, submit
from tests.support.tokenizers import EOS_ID

pytestmark = pytest.mark.anyio

AB = choice(["ab"])
CLOSED_LATER = Failure(STATUS_DRAINING, "draining")


def regex(pattern: str) -> GrammarSpec:
    return GrammarSpec(GrammarKind.REGEX, pattern)


def lark(text: str) -> GrammarSpec:
    return GrammarSpec(GrammarKind.LARK, text)


DEEP = lark("start: r0\n" + "\n".join(f'r{i}: r{i + 1} "a"' for i in range(5000)) + '\nr5000: "x"')
"""Not deep in brackets: each rule is one level of the compiler's recursion, which ends the process that tries it."""
SLOW = lark("start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(40)) + '\nT40: "x"')
CROSS = {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(10)]} for i in range(8)]}
HOSTILE = [
    DEEP,
    SLOW,
    json_schema(CROSS),
    lark("start: start"),
    regex("((a{1,1000}){1,1000}){1,1000}"),
    regex("(.*a.{12}){9}"),
    lark("start: A\nA: " + " & ".join(f"/(.*[a-c].{{{size}}}x.*)/" for size in range(3, 15))),
]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is waited for; what a grammar may take is told by the processor's clock."""
    monkeypatch.setattr(grammar_workshop, "PATIENCE_S", 200.0)


@pytest.fixture(scope="module")
def workshop() -> Iterator[Workshop]:
    shop = Workshop(byte_vocabulary())
    yield shop
    shop.close()


# --- the workshop ---


def test_a_good_grammar_is_tried_in_a_process_that_is_kept(workshop: Workshop) -> None:
    first = workshop.compile(AB).matcher().next()
    process = workshop._process
    assert process is not None
    assert process.pid != os.getpid()
    assert text_of(first.ids.tolist()[:1]) == "a"
    workshop.compile(lark('root ::= "x" [0-9]\n'))
    assert workshop._process is process
    with pytest.raises(GrammarError, match="unclosed"):
        workshop.compile(regex("(a"))
    assert workshop._process is process, "a wrong grammar is no reason to die"


def test_one_that_kills_the_process_is_refused_and_the_next_one_is_compiled(workshop: Workshop) -> None:
    killed = workshop.killed_total
    with pytest.raises(GrammarError, match="512 MiB to compile, or is nested too deeply"):
        workshop.compile(DEEP)
    assert workshop.killed_total == killed + 1
    workshop.compile(AB)


def test_memory_is_limited() -> None:
    shop = Workshop(byte_vocabulary(), memory_bytes=8 << 20)
    wide = json_schema({"enum": [f"{number:05d}" * 4 for number in range(4000)]})
    try:
        with pytest.raises(GrammarError, match="8 MiB"):
            shop.compile(wide)
    finally:
        shop.close()


def test_time_is_limited_by_the_processors_clock() -> None:
    """The kernel ends it at its limit, as for any grammar: here the process is told that its time was up."""
    shop = Workshop(byte_vocabulary())
    try:
        shop.compile(AB)
        process = shop._process
        assert process is not None
        os.kill(process.pid, signal.SIGXCPU)
        process.wait()
        with pytest.raises(GrammarError, match="more than 2 s"):
            shop.compile(AB)
        shop.compile(AB)
    finally:
        shop.close()


def test_a_process_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Workshop(byte_vocabulary())
    try:
        shop.compile(AB)
        process = shop._process
        assert process is not None
        monkeypatch.setattr(grammar_workshop, "PATIENCE_S", 0.05)
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(WorkshopBusy, match="within"):
            shop.compile(AB)
        assert process.poll() is not None
        monkeypatch.undo()
        shop.compile(AB)
    finally:
        shop.close()


def test_it_ends_when_its_owner_does() -> None:
    shop = Workshop(byte_vocabulary())
    shop.compile(AB)
    process = shop._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    shop.close()


@pytest.mark.parametrize("spec", HOSTILE, ids=lambda spec: spec.text[:30])
def test_hostile_grammars_are_answered_and_the_next_one_too(workshop: Workshop, spec: GrammarSpec) -> None:
    with contextlib.suppress(GrammarError):
        workshop.compile(spec)
    workshop.compile(AB)


# --- what is kept, and who waits ---


class Counted:
    """A workshop whose work can be held up."""

    def __init__(self, real: Workshop) -> None:
        self.real = real
        self.specs: list[GrammarSpec] = []
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()

    def compile(self, spec: GrammarSpec) -> Any:
        self.specs.append(spec)
        self.begun.set()
        assert self.gate.wait(200)
        return self.real.compile(spec)

    def close(self) -> None:
        self.real.close()


def grammars(**limits: int) -> tuple[Grammars, Counted]:
    made = Grammars(byte_vocabulary(), **limits)
    counted = Counted(made.workshop)
    made.workshop = counted  # type: ignore[assignment]
    return made, counted


async def test_a_grammar_is_compiled_once_for_all_who_ask() -> None:
    made, shop = grammars()
    shop.gate.clear()
    asking = [asyncio.ensure_future(made.followed(AB)) for _ in range(5)]
    await asyncio.sleep(0)
    shop.gate.set()
    found = await asyncio.gather(*asking)
    assert shop.specs == [AB]
    assert len({id(one.matcher) for one in found}) == 5
    await made.followed(choice(["ab"]))
    assert shop.specs == [AB], "equal, not the same"
    assert (made.counters.compiled, made.counters.hits, made.counters.refused) == (1, 5, 0)
    made.close()


async def test_a_refusal_is_kept_too() -> None:
    made, shop = grammars()
    for _ in range(3):
        with pytest.raises(GrammarError, match="unclosed"):
            await made.followed(regex("(a"))
    assert len(shop.specs) == 1
    assert (made.counters.refused, made.counters.hits) == (1, 2)
    made.close()


async def test_the_least_used_is_forgotten() -> None:
    made, shop = grammars(max_kept=2)
    one, two, three = (choice([text]) for text in ("one", "two", "three"))
    for spec in (one, two, one, three, one, two):
        await made.followed(spec)
    assert shop.specs == [one, two, three, two]
    made.close()


async def test_who_waits_is_bounded_and_may_leave() -> None:
    made, shop = grammars(max_waiting=2)
    shop.gate.clear()
    first = asyncio.ensure_future(made.followed(choice(["one"])))
    second = asyncio.ensure_future(made.followed(choice(["two"])))
    await asyncio.sleep(0)
    with pytest.raises(GrammarsBusy, match="2 grammars"):
        await made.followed(choice(["three"]))
    first.cancel()
    shop.gate.set()
    await second
    await made.followed(choice(["one"]))
    assert [spec.text for spec in shop.specs] == ['["one"]', '["two"]'], "work that was begun is kept"
    made.close()


async def test_no_time_is_nobodys_fault_and_not_kept() -> None:
    made, shop = grammars()
    real = shop.compile

    def busy(spec: GrammarSpec) -> Any:
        shop.compile = real  # type: ignore[method-assign]
        raise WorkshopBusy("no time")

    shop.compile = busy  # type: ignore[method-assign]
    with pytest.raises(GrammarsBusy, match="no time"):
        await made.followed(AB)
    await made.followed(AB)
    made.close()


@pytest.mark.parametrize("count", [3, INLINE_TOKENS + 1])
async def test_an_answer_goes_on_where_it_was(count: int) -> None:
    made, _ = grammars()
    (letter,) = byte_tokenizer().encode("a", add_bos=False)
    spec = regex(f"a{{{count}}}b")
    found = await made.followed(spec, [letter] * count)
    assert text_of(found.matcher.next().ids.tolist()) == "b"
    with pytest.raises(GrammarError, match=rf"generated_token_ids\[{count}\]"):
        await made.followed(spec, [letter] * (count + 1))
    made.close()


# --- the service ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path: Path = tmp_path_factory.mktemp("grammars")
    write_mixtral(path)
    return TinyModel.load(path)


def wire(kind: Any, text: str) -> dict[str, Any]:
    return {"grammar": Grammar(kind=kind, text=text), "ignore_eos": False}


async def test_requests_with_grammars_are_answered_each_for_itself(model: TinyModel) -> None:
    made, _ = grammars()
    async with served(model, grammars=made, eos_token_ids=[EOS_ID]) as server, raw_stream(server.address) as stream:
        await stream.send(
            submit(1, [5, 6], 30, **wire(GRAMMAR_KIND_CHOICE, '["yes"]')),
            submit(2, [5, 6], 30, **wire(GRAMMAR_KIND_REGEX, "(a")),
            submit(3, [5, 6], 30, **wire(0, "a")),
            submit(4, [5, 6], 30, **wire(GRAMMAR_KIND_JSON_SCHEMA, "x" * (1 << 20))),
            submit(5, [5, 6], 30, **wire(GRAMMAR_KIND_LARK, 'root ::= "n" "o"\n')),
            submit(6, [5, 6], 5),
            submit(7, [5, 6], 30, **wire(GRAMMAR_KIND_CHOICE, '["yes"]'), generated_token_ids=[5 + ord("n")]),
            submit(8, [5, 6], 30, **wire(GRAMMAR_KIND_CHOICE, '["yes"]'), generated_token_ids=[5 + ord("y")]),
        )
        await stream.read_until_done(*range(1, 9))
        assert text_of(stream.tokens(1)[:-1]) == "yes"
        assert text_of(stream.tokens(5)[:-1]) == "no"
        assert text_of(stream.tokens(8)[:-1]) == "es"
        assert len(stream.tokens(6)) == 5
        for number, word in ((2, "grammar: "), (3, "grammar.kind"), (4, "131072"), (7, "generated_token_ids[0]")):
            assert refusal(stream, number) == STATUS_INVALID
            assert word in error(stream, number)
    made.close()


async def test_one_whose_grammar_is_not_ready_can_be_cancelled_and_its_id_used_again(model: TinyModel) -> None:
    made, shop = grammars()
    shop.gate.clear()
    async with served(model, grammars=made, eos_token_ids=[EOS_ID]) as server, raw_stream(server.address) as stream:
        slow = submit(1, [5, 6], 30, **wire(GRAMMAR_KIND_CHOICE, '["slow"]'))
        await stream.send(slow, slow, Cancel(request_id=1), submit(2, [5], 3))
        await stream.read_until_done(1, 2)
        outputs = stream.told[1]
        assert [one.status for one in outputs if one.finish_reason == FINISH_REASON_ERROR] == [STATUS_INVALID]
        assert "in use" in outputs[0].error
        assert outputs[-1].finish_reason == FINISH_REASON_CANCELLED
        assert len(stream.tokens(2)) == 3, "nobody else waits for it"
        del stream.told[1]
        await stream.send(submit(1, [5, 6], 30, **wire(GRAMMAR_KIND_CHOICE, '["fast"]')))
        shop.gate.set()
        await stream.read_until_done(1)
        assert text_of(stream.tokens(1)[:-1]) == "fast"
    made.close()


async def test_too_many_that_wait_are_told_to_come_later(model: TinyModel) -> None:
    made, shop = grammars(max_waiting=1)
    shop.gate.clear()
    async with served(model, grammars=made, eos_token_ids=[EOS_ID]) as server, raw_stream(server.address) as stream:
        await stream.send(
            submit(1, [5], 30, **wire(GRAMMAR_KIND_CHOICE, '["one"]')),
            submit(2, [5], 30, **wire(GRAMMAR_KIND_CHOICE, '["two"]')),
        )
        await stream.read_until_done(2)
        assert refusal(stream, 2) == STATUS_OVERLOADED
        assert stream.told[2][0].retry_after_ms > 0
        shop.gate.set()
        await stream.read_until_done(1)
    made.close()


async def test_one_that_waits_when_the_doors_close_goes_elsewhere(model: TinyModel) -> None:
    made, shop = grammars()
    shop.gate.clear()
    async with served(model, grammars=made, eos_token_ids=[EOS_ID]) as server, raw_stream(server.address) as stream:
        await stream.send(submit(1, [5], 30, **wire(GRAMMAR_KIND_CHOICE, '["one"]')), submit(2, [5], 1))
        await stream.read_until_done(2)
        server.service.close(CLOSED_LATER)
        shop.gate.set()
        await stream.read_until_done(1)
        assert refusal(stream, 1) == CLOSED_LATER.status
    made.close()


async def test_a_coordinator_without_a_vocabulary_refuses_grammars(model: TinyModel) -> None:
    async with served(model) as server, raw_stream(server.address) as stream:
        await stream.send(submit(1, [5], 3, **wire(GRAMMAR_KIND_REGEX, "a")))
        await stream.read_until_done(1)
        assert refusal(stream, 1) == STATUS_INVALID


async def test_hostile_grammars_leave_a_golden_stream_as_it_is(model: TinyModel) -> None:
    """Some end the process, some are too large, some take long: the stream beside them says what it always does."""
    made, _ = grammars()
    async with served(model, grammars=made, eos_token_ids=[EOS_ID]) as server, raw_stream(server.address) as stream:
        await stream.send(submit(1, [5, 6, 7], 200))
        await stream.read_until_done(1)
        golden = stream.tokens(1)
        bad = [
            wire(GRAMMAR_KIND_LARK, DEEP.text),
            wire(GRAMMAR_KIND_LARK, SLOW.text),
            wire(GRAMMAR_KIND_REGEX, "(" * 5000),
            wire(GRAMMAR_KIND_JSON_SCHEMA, '{"a":' * 5000),
            wire(GRAMMAR_KIND_JSON_SCHEMA, json.dumps({"description": "x" * (1 << 20)})),
            wire(GRAMMAR_KIND_LARK, "start: A\nA: /[a-z]+/ & /[0-9]+/"),
        ]
        await stream.send(submit(2, [5, 6, 7], 200))
        await stream.send(*(submit(10 + place, [5], 20, **one) for place, one in enumerate(bad)))
        await stream.read_until_done(2, *(10 + place for place in range(len(bad))))
        assert stream.tokens(2) == golden
        for place in range(len(bad)):
            assert refusal(stream, 10 + place) == STATUS_INVALID, place
        await stream.send(submit(30, [5], 20, **wire(GRAMMAR_KIND_CHOICE, '["well"]')))
        await stream.read_until_done(30)
        last = stream.last(30)
        assert last is not None
        assert last.finish_reason == FINISH_REASON_STOP
    made.close()


def refusal(stream: RawStream, request_id: int) -> int:
    last = stream.last(request_id)
    assert last is not None
    assert last.finish_reason == FINISH_REASON_ERROR, last
    return last.status


def error(stream: RawStream, request_id: int) -> str:
    last = stream.last(request_id)
    return "" if last is None else last.error
