"""The tokenizer from afar: vLLM's forms, transformers' tokens, and what lm-eval's remote tokenizer needs."""

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import jinja2
import pytest
import transformers

from actors import __version__
from actors.front.prompts import MAX_TOKENIZE_BYTES
from actors.front.tokenize_schema import MAX_DETOKENIZE_TOKENS
from model.text.chat_template import ChatTemplate
from model.text.tokenizer import load_tokenizer
from model.text.tokenizer_info import tokenizer_info
from tests.support.front import CONTEXT, MODEL, VOCAB, ask, make_front, post
from tests.support.scripted_coordinator import ScriptedCoordinator, saying
from tests.support.tokenizers import BOS_ID, EOS_ID, mixtral_sentencepiece, write_byte_tokenizer

HELLO = [{"role": "user", "content": "hi"}]
TEXTS = ["hello", "", " a  b\n", "naïve 世界 😀", "<s> </s> <|im_end|>", "x" * 300]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(path, VOCAB)
    return path


def answer(model_dir: Path, path: str, **body: Any) -> dict[str, Any]:
    response = post(make_front(model_dir, ScriptedCoordinator(saying([7]))), path, **body)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def refusal(model_dir: Path, path: str, **body: Any) -> tuple[int, str | None, str]:
    response = post(make_front(model_dir, ScriptedCoordinator(saying([7]))), path, **body)
    error = response.json()["error"]
    return response.status_code, error["param"], error["message"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [True, False])
def test_tokens_are_those_of_transformers_and_back(model_dir: Path, text: str, special: bool) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(model_dir)
    body = answer(model_dir, "/tokenize", prompt=text, add_special_tokens=special, return_token_strs=True)
    expected = theirs.encode(text, add_special_tokens=special)
    assert body == {
        "count": len(expected),
        "max_model_len": CONTEXT,
        "tokens": expected,
        "token_strs": theirs.convert_ids_to_tokens(expected),
    }
    assert answer(model_dir, "/detokenize", tokens=expected) == {"prompt": theirs.decode(expected)}


def test_a_prompt_has_special_tokens_unless_told_otherwise_and_no_strings(model_dir: Path) -> None:
    body = answer(model_dir, "/tokenize", prompt="a")
    assert body["tokens"][0] == BOS_ID
    assert body["token_strs"] is None


def test_a_conversation_is_what_a_chat_would_read(model_dir: Path) -> None:
    coordinator = ScriptedCoordinator(saying([7]))
    front = make_front(model_dir, coordinator)
    messages = [*HELLO, {"role": "assistant", "content": "Sure"}]
    for more in ({}, {"continue_final_message": True}, {"add_generation_prompt": False}, {"add_special_tokens": True}):
        tokens = post(front, "/tokenize", messages=messages, **more).json()["tokens"]
        post(front, "/v1/chat/completions", messages=messages, max_tokens=1, **more)
        assert list(coordinator.submits[-1].prompt_token_ids) == tokens


def test_the_model_may_be_left_out_but_not_wrong(model_dir: Path) -> None:
    front = make_front(model_dir, ScriptedCoordinator(saying([7])))
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [7]})):
        assert ask(front, lambda client, path=path, body=body: client.post(path, json=body)).status_code == 200
        assert post(front, path, **body, model="other").status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "param", "reason"),
    [
        ("/tokenize", {}, "prompt", "either it or 'messages' must be given"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt", "not both"),
        ("/tokenize", {"prompt": ["a"]}, "prompt", "expected a string, but got an array"),
        ("/tokenize", {"messages": []}, "messages", "at least 1 item"),
        ("/tokenize", {"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template", "the checkpoint's own is used"),
        (
            "/tokenize",
            {"messages": HELLO, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "cannot be used with 'add_generation_prompt'",
        ),
        ("/tokenize", {"prompt": "x" * (MAX_TOKENIZE_BYTES + 1)}, "prompt", f"at most {MAX_TOKENIZE_BYTES} bytes"),
        ("/detokenize", {}, "tokens", "Missing required parameter"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", "greater than or equal to 0"),
        ("/detokenize", {"tokens": [7, VOCAB]}, "tokens[1]", f"token ids must be below {VOCAB}"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]", "expected an integer"),
        ("/detokenize", {"tokens": [7] * (MAX_DETOKENIZE_TOKENS + 1)}, "tokens", f"at most {MAX_DETOKENIZE_TOKENS}"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_named(model_dir: Path, path: str, body: dict[str, Any], param: str, reason: str) -> None:
    status, named, message = refusal(model_dir, path, **body)
    assert (status, named) == (400, param)
    assert reason in message


def test_a_text_longer_than_the_context_can_be_tokenized(model_dir: Path) -> None:
    assert answer(model_dir, "/tokenize", prompt="é" * 20_000)["count"] > CONTEXT
    assert answer(model_dir, "/detokenize", tokens=[70] * 2000)["prompt"] == "A" * 2000


class RemoteTokenizer:
    """The requests of lm-eval's class of that name, as its source has them in 2026."""

    def __init__(self, client: httpx2.AsyncClient) -> None:
        self._client = client
        self.info: dict[str, Any] = {}

    async def load(self) -> "RemoteTokenizer":
        self.info = (await self._client.get("/tokenizer_info")).json()
        assert "eos_token" in self.info
        return self

    async def encode(self, text: str) -> list[int]:
        body = {"prompt": text, "add_special_tokens": False}
        tokens: list[int] = (await self._client.post("/tokenize", json=body)).json()["tokens"]
        return tokens

    async def decode(self, tokens: Sequence[int]) -> str:
        text: str = (await self._client.post("/detokenize", json={"tokens": tokens})).json()["prompt"]
        return text

    def apply_chat_template(self, messages: list[dict[str, str]]) -> str:
        template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(self.info["chat_template"])
        return template.render(messages=messages, add_generation_prompt=True, bos_token=self.info["bos_token"])


def test_lm_evals_remote_tokenizer_works(model_dir: Path) -> None:
    async def use(client: httpx2.AsyncClient) -> None:
        remote = await RemoteTokenizer(client).load()
        theirs = transformers.AutoTokenizer.from_pretrained(model_dir)
        assert (await remote.encode(remote.info["eos_token"]))[0] == EOS_ID
        assert (await remote.encode(remote.info["bos_token"]))[0] == BOS_ID
        ids = await remote.encode("Question: 1+1?\nAnswer: é")
        assert ids == theirs.encode("Question: 1+1?\nAnswer: é", add_special_tokens=False)
        assert await remote.decode(ids) == "Question: 1+1?\nAnswer: é"
        rendered = theirs.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
        assert remote.apply_chat_template(HELLO) == rendered

    ask(make_front(model_dir, ScriptedCoordinator(saying([7]))), use)


def test_mixtrals_own_tokenizer_tells_its_special_ids_too(tmp_path: Path) -> None:
    """A user's text never becomes a control token; who asks for the id of one gets it all the same."""
    own = tmp_path / "mixtral"
    own.mkdir()
    shutil.copy(mixtral_sentencepiece(), own / "tokenizer.model")
    tokenizer = load_tokenizer(own)
    front = make_front(
        tmp_path,
        ScriptedCoordinator(saying([7])),
        tokenizer=tokenizer,
        tokenizer_info=tokenizer_info(own, tokenizer, ChatTemplate.load(own, tokenizer)),
        vocab_size=32_000,
    )

    async def use(client: httpx2.AsyncClient) -> None:
        remote = await RemoteTokenizer(client).load()
        assert remote.info["tokenizer_class"] == "LlamaTokenizer"
        assert "chat_template" not in remote.info
        assert await remote.encode(remote.info["eos_token"]) == [2]
        assert await remote.encode(remote.info["bos_token"]) == [1]
        assert 2 not in await remote.encode("the end </s>")
        strings = {"prompt": "Hello", "return_token_strs": True}
        assert (await client.post("/tokenize", json=strings)).json()["token_strs"] == ["<s>", "▁Hello"]
        assert await remote.decode([1, *await remote.encode("Hello there")]) == "<s> Hello there"

    ask(front, use)


def test_the_configuration_names_no_file_and_no_code(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, VOCAB)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(
        path.read_text().replace('"bos_token"', '"name_or_path": "/home/me", "auto_map": {}, "bos_token"', 1)
    )
    info = ask(
        make_front(tmp_path, ScriptedCoordinator(saying([7]))), lambda client: client.get("/tokenizer_info")
    ).json()
    assert "/home/me" not in str(info)
    assert "auto_map" not in info
    assert (info["tokenizer_class"], info["bos_token"], info["eos_token"]) == ("PreTrainedTokenizerFast", "<s>", "</s>")


def test_version_load_and_ping(model_dir: Path) -> None:
    coordinator = ScriptedCoordinator(saying([7, 8]), hold_after=1)
    front = make_front(model_dir, coordinator)

    async def use(client: httpx2.AsyncClient) -> None:
        assert (await client.get("/version")).json() == {"version": __version__}
        assert (await client.get("/load")).json() == {"server_load": 0}
        held = asyncio.create_task(client.post("/v1/completions", json={"model": MODEL, "prompt": "p"}))
        await coordinator.held.wait()
        assert (await client.get("/load")).json() == {"server_load": 1}
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
        for method in ("GET", "POST"):
            assert (await client.request(method, "/ping")).status_code == 200
        coordinator.reply.state = "loading"

    ask(front, use)
    sick = make_front(model_dir, coordinator)
    assert ask(sick, lambda client: client.get("/ping")).status_code == 503
