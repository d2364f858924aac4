"""What the small JSON files beside a checkpoint say about special tokens, as one frozen value.

Reads tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json and
config.json. Vocabulary files are read by the tokenizers themselves; chat templates by
`model.text.chat_template`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 * 2**20
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class TokenizerError(ValueError):
    """A tokenizer that is missing, damaged, or of a kind this project does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedTokenEntry:
    """A token that a checkpoint adds to its vocabulary file."""

    content: str
    special: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """`named`: bos_token and the like, as templates see them. `extra`: more special strings. `added`: by id.

    `eos_ids`: the ids that end a generation by generation_config.json, else config.json. `legacy`: whether
    sentencepiece text after a special token begins with its dummy space, as it does in the original library.
    """

    named: Mapping[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    added: Mapping[int, AddedTokenEntry] = field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()
    legacy: bool = True


def read_special_tokens(model_dir: Path) -> SpecialTokens:
    """Read what is there; a missing file says nothing. Raises TokenizerError naming file and field."""
    config = read_json_object(model_dir / "tokenizer_config.json")
    older = read_json_object(model_dir / "special_tokens_map.json")
    named: dict[str, str] = {}
    for source, name in ((older, "special_tokens_map.json"), (config, "tokenizer_config.json")):
        for key in NAMED_TOKENS:
            if source.get(key) is not None:
                named[key] = _content(source[key], f"{name}: {key}")
    extra: list[str] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = config.get(key) or older.get(key) or []
        if isinstance(value, dict):
            named |= {str(name): _content(token, f"{key}.{name}") for name, token in value.items()}
        elif isinstance(value, list):
            extra += [_content(token, key) for token in value]
        else:
            raise TokenizerError(f"tokenizer_config.json: {key} must be a list or an object")
    return SpecialTokens(
        named=named,
        extra=tuple(dict.fromkeys(extra)),
        added=_added_tokens(config, read_json_object(model_dir / "added_tokens.json")),
        eos_ids=_eos_ids(model_dir),
        legacy=config.get("legacy") is not False,
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in `path`, or {} when there is no such file."""
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_JSON_BYTES:
        raise TokenizerError(f"{path.name}: larger than {MAX_JSON_BYTES} bytes")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path.name}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path.name}: must hold a JSON object")
    return value


def _content(value: object, where: str) -> str:
    """A token's string, written plainly or as {"content": ...}."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content or _LONE_SURROGATE.search(content):
        raise TokenizerError(f"{where}: must be a token's text, got {value!r:.200}")
    return content


def _added_tokens(config: dict[str, Any], older: dict[str, Any]) -> dict[int, AddedTokenEntry]:
    """added_tokens.json gives text -> id, tokenizer_config.json's added_tokens_decoder id -> details."""
    added: dict[int, AddedTokenEntry] = {}
    for content, token_id in older.items():
        where = f"added_tokens.json: {content!r:.200}"
        added[_token_id(token_id, where)] = AddedTokenEntry(content=_content(content, where), special=False)
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise TokenizerError("tokenizer_config.json: added_tokens_decoder must be an object")
    for key, value in decoder.items():
        where = f"tokenizer_config.json: added_tokens_decoder[{key!r}]"
        token_id = _token_id(int(key) if key.isdecimal() else key, where)
        special = isinstance(value, dict) and value.get("special") is True
        added[token_id] = AddedTokenEntry(content=_content(value, where), special=special)
    return dict(sorted(added.items()))


def _eos_ids(model_dir: Path) -> tuple[int, ...]:
    """generation_config.json is what generation obeys; config.json speaks where it is silent."""
    for name in ("generation_config.json", "config.json"):
        value = read_json_object(model_dir / name).get("eos_token_id")
        if value is not None:
            values = value if isinstance(value, list) else [value]
            return tuple(_token_id(item, f"{name}: eos_token_id") for item in values)
    return ()


def _token_id(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TokenizerError(f"{where}: must be a token id of 0 or more, got {value!r}")
    return value
