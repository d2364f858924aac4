"""Decoders of what clients send: request bodies, `Last-Event-ID`, chats for templates; and the encoder of events."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from actors.client_tokens import ClientTokenError, ClientTokens
from actors.front.event_ids import EventId
from actors.front.openai_errors import ApiError, from_validation
from actors.front.openai_schema import ChatCompletionRequest, CompletionRequest, GenerationRequest
from actors.front.streaming import frame
from model.text.chat_messages import ChatTemplateError, plain_messages
from model.text.jinja_template import JinjaTemplate
from tests.fuzz.target import MIB, Target
from tests.support.tokenizers import CHATML_TEMPLATE

_FULL: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 5,
    "min_tokens": 1,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": -1,
    "n": 2,
    "stop": ["a", "b"],
    "stop_token_ids": [5, 6],
    "ignore_eos": True,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "stream": True,
    "stream_options": {"include_usage": True},
    "user": "me",
    "unknown": {"a": [1]},
}
COMPLETION: dict[str, Any] = {**_FULL, "prompt": ["hello", [5, 6]], "echo": True, "logprobs": 3}
CHAT: dict[str, Any] = {
    **_FULL,
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "x"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "é"},
    ],
    "logprobs": True,
    "top_logprobs": 2,
    "response_format": {"type": "text"},
}


def _body(name: str, model: type[GenerationRequest], good: dict[str, Any]) -> Target:
    def decode(data: bytes) -> object:
        try:
            value = from_json(data, allow_inf_nan=False)
        except ValueError:
            raise ApiError(400, "no JSON") from None
        try:
            return model.model_validate(value)
        except ValidationError as error:
            found = from_validation(error)
            json.dumps(found.body())
            assert found.status == 400
            raise found from None

    small = {key: good[key] for key in ("model", "prompt", "messages") if key in good}
    return Target(
        name=name,
        decode=decode,
        errors=(ApiError,),
        seeds=(json.dumps(good).encode(), json.dumps(small).encode()),
        words=(b"null", b"true", b"[", b"]", b"{", b"}", b'"', b"\\ud800", b"1e999", b"-", b"NaN"),
        is_json=True,
        per_byte=256,
        quick=1500,
        share=2,
    )


def completion_body(_: Path) -> Target:
    """POST /v1/completions."""
    return _body("completion_body", CompletionRequest, COMPLETION)


def chat_body(_: Path) -> Target:
    """POST /v1/chat/completions."""
    return _body("chat_body", ChatCompletionRequest, CHAT)


def last_event_id(_: Path) -> Target:
    """Where a cut stream goes on."""
    head = f"1-{'a' * 16}-{'b' * 8}-{'c' * 16}-65f0c0de-{'d' * 24}-1f"

    def decode(data: bytes) -> object:
        event = EventId.parse(data.decode("latin-1"))
        assert 0 <= event.key.seed < 2**64
        assert all(0 <= place.num_tokens < 10**8 for place in event.positions)
        return event

    return Target(
        name="last_event_id",
        decode=decode,
        errors=(ValueError,),
        seeds=(f"{head}-3o.0n.12e-u".encode(), f"{head}-7s".encode()),
        words=(b"-", b".", b"99999999", b"n", b"o", b"s", b"e", b"-u", "٣".encode()),
        quick=3000,
        share=3,
    )


def sse_encoder(_: Path) -> Target:
    """Whatever is said is one event, which says the same to a reader."""

    def decode(data: bytes) -> object:
        said = {"text": data.decode("utf-8", "surrogatepass" if len(data) % 2 else "replace"), "n": len(data)}
        text = frame(said, f"1-{len(data)}-3o")
        encoded = text.encode("ascii")
        lines = encoded.split(b"\n")
        assert [line.split(b":")[0] for line in lines] == [b"id", b"data", b"", b""]
        assert b"\r" not in encoded
        assert json.loads(lines[1].removeprefix(b"data: ")) == said
        return text

    return Target(
        name="sse_encoder",
        decode=decode,
        errors=(UnicodeDecodeError,),
        seeds=("é\n\n data: [DONE]\r\n\u2028".encode(), b"plain", b'"\\', b"id: 1\ndata: x"),
        words=(b"\n\n", b"\r", b"data: [DONE]", b"id:", b"\xe2\x80\xa8", b"\x85", b"\0"),
        quick=3000,
        share=2,
    )


_TEMPLATES = (
    CHATML_TEMPLATE,
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ m | tojson }}{% endfor %}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{% for m in messages %}{{ f(m.content[:3] * 2) }}{% endfor %}{{ 'a' ~ 'b' }}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ '%s' % 1 }}{{ '{}'.format(2) }}{{ 'x'.replace('x', 'y') }}",
)
_MESSAGES = [{"role": "user", "content": "hello <b>"}, {"role": "assistant", "content": "x" * 40}]


def chat_template(_: Path) -> Target:
    """A checkpoint's template is a program of a stranger's: it computes within its bounds or is refused."""

    def decode(data: bytes) -> object:
        template = JinjaTemplate(data.decode("utf-8", "replace"), lambda: datetime(2026, 1, 2), MIB)
        text = template.render({"messages": plain_messages(_MESSAGES, "\n"), "bos_token": "<s>"})
        assert len(text) <= MIB
        return text

    words = (
        *("{{", "}}", "{%", "%}", "{% endfor %}", "{% for i in range(99999) %}", "| join(messages)", "~", "* 999999"),
        *("** 99", ".__class__", "['__init__']", "namespace(a=1)", "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}"),
        *("{{ f() }}", "| center(99999999)", "'%9999999d' % 1", "'{:9999999}'.format(1)", "| indent(9999999)"),
        *("| batch(9) | list", "cycler(1)", "| groupby('role')", "| sort", "| tojson(indent=999999)", "loop.cycle"),
        *(".replace('', 'xxxxxxxxxxxxxxxx')", "{% set ns.x = ns.x ~ ns.x %}", "| wordwrap(1)", ".ljust(99999999)"),
        *("| replace('l', 'llllllll')", "| urlize", "| xmlattr", "| format(1)", "[1] * 99999", "+ messages"),
    )
    return Target(
        name="chat_template",
        decode=decode,
        errors=(ChatTemplateError,),
        seeds=tuple(text.encode() for text in _TEMPLATES),
        words=tuple(word.encode() for word in words),
        base_bytes=96 * MIB,
        per_byte=2048,
        quick=250,
        share=0.3,
    )


def client_tokens(scratch: Path) -> Target:
    """The operator's file of gRPC clients."""
    path = scratch / "clients"

    def decode(data: bytes) -> object:
        path.write_bytes(data)
        return ClientTokens.load(path)

    return Target(
        name="client_tokens",
        decode=decode,
        errors=(ClientTokenError,),
        seeds=(f"# c\nalpha {'t' * 16}\nbeta sha256:{'0' * 64}\n".encode(),),
        words=(b"\n", b" ", b"sha256:", b"#", b"\r", b"\x85"),
        per_byte=128,
        quick=1000,
    )
