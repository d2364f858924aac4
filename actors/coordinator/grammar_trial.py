"""Compiles grammars where that can be killed: a process of its own, with limits on its time and memory.

    python -m actors.coordinator.grammar_trial MEMORY_BYTES

It reads frames from its standard input, first the vocabulary, then one grammar after another, and answers each with
the grammar as the library takes it, or with why it cannot be used. A grammar that takes too much ends the process;
that, and waiting for it, is `actors.coordinator.grammar_workshop`'s business.
"""

import json
import resource
import struct
import sys
import threading
from typing import IO, Any

from model.grammar.compiled import Compiled, library_text
from model.grammar.spec import GrammarError, GrammarKind, GrammarSpec
from model.grammar.vocabulary import Vocabulary

STACK_BYTES = 4 << 20
"""Less than those have on whose stacks the grammar is then used: what runs here runs there."""
_LENGTH = struct.Struct("<I")


def write_frame(stream: IO[bytes], data: bytes) -> None:
    """One frame: its length and `data`. Raises OSError."""
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> bytes | None:
    """The next frame; None at the end. Raises OSError."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    return stream.read(_LENGTH.unpack(head)[0])


def main() -> None:
    """Serves until its input ends, or a grammar ends it."""
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    facts, blob = read_frame(source), read_frame(source)
    if facts is None or blob is None:
        return
    vocabulary = Vocabulary.from_parts(json.loads(facts), blob)
    assert vocabulary.ll_tokenizer.vocab_size == vocabulary.size
    _limit_memory(int(sys.argv[1]))
    threading.stack_size(STACK_BYTES)
    write_frame(answers, b"{}")
    while (job := read_frame(source)) is not None:
        asked = json.loads(job)
        _limit_time(asked["cpu_s"])
        write_frame(answers, json.dumps(_aside(vocabulary, asked)).encode())


def _aside(vocabulary: Vocabulary, asked: dict[str, Any]) -> dict[str, str]:
    """The answer, found on a stack of known size."""
    found: list[dict[str, str]] = []
    thread = threading.Thread(target=lambda: found.append(_answer(vocabulary, asked)))
    thread.start()
    thread.join()
    return found[0] if found else {"error": "it needs too much memory to compile"}


def _answer(vocabulary: Vocabulary, asked: dict[str, Any]) -> dict[str, str]:
    try:
        text = library_text(GrammarSpec(GrammarKind(asked["kind"]), asked["text"]))
        Compiled(vocabulary, text)
    except GrammarError as error:
        return {"error": str(error)}
    return {"text": text}


def _limit_memory(more_bytes: int) -> None:
    """So much more than now, in address space."""
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more_bytes, now + more_bytes))


def _limit_time(cpu_s: int) -> None:
    """So much more processor time than was used so far; the kernel counts whole seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + cpu_s + 1, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
