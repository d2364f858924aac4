"""Rebuilds a GGUF file's vocabulary as the tokenizer files that a Hugging Face checkpoint has.

A "gpt2" vocabulary (byte-level BPE) becomes tokenizer.json; a "llama" one (sentencepiece) tokenizer.model.
What a pre-tokenizer's name means is llama.cpp's definition (src/llama-vocab.cpp); a name that is not listed
here is refused, because a guess would give other ids without a word. Reading the files back is
`model.text.tokenizer`'s work.
"""

import json
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from model.upcycling.gguf_metadata import GgufMetadata, eos_token_ids


class TokenType(IntEnum):
    """What `tokenizer.ggml.token_type` says of each token; the same numbers as sentencepiece's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut before byte-level BPE: by `pattern` (None: GPT-2's), digits first if told to.

    `ignore_merges` takes a piece that is a token as it is; `add_bos` is the family's default.
    """

    pattern: str | None = None
    individual_digits: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self) -> Any:
        """The tokenizers object that cuts so and writes bytes as letters."""
        steps: list[Any] = []
        if self.individual_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.pattern is not None:
            steps.append(pre_tokenizers.Split(Regex(self.pattern), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pattern is None))
        return pre_tokenizers.Sequence(steps)


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(individual_digits=True),
    "llama-bpe": PreTokenizer(LLAMA3_PATTERN, ignore_merges=True, add_bos=True),
    "tekken": PreTokenizer(TEKKEN_PATTERN, ignore_merges=True, add_bos=True),
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a file with the type of each."""

    tokens: list[str]
    types: list[int]

    @classmethod
    def read(cls, metadata: GgufMetadata) -> "Vocabulary":
        """Read both lists; raises GgufError when they disagree or a token occurs twice."""
        tokens = metadata.texts("tokenizer.ggml.tokens")
        types = metadata.integers("tokenizer.ggml.token_type")
        if len(types) != len(tokens):
            raise metadata.error("tokenizer.ggml.token_type", f"has {len(types)} items, not {len(tokens)}")
        if len(set(tokens)) != len(tokens):
            twice = next(token for index, token in enumerate(tokens) if token in tokens[:index])
            raise metadata.error("tokenizer.ggml.tokens", f"holds {twice!r} twice")
        return cls(tokens, types)

    def of_type(self, kind: TokenType) -> list[str]:
        """Every token of one type."""
        return [token for token, type_ in zip(self.tokens, self.types, strict=True) if type_ == kind]


def write_tokenizer(metadata: GgufMetadata, dest: Path) -> None:
    """Write tokenizer.json or .model, tokenizer_config.json and generation_config.json into `dest`."""
    kind = metadata.text("tokenizer.ggml.model")
    vocabulary = Vocabulary.read(metadata)
    if kind == "gpt2":
        byte_level_bpe(metadata, vocabulary).save(str(dest / "tokenizer.json"))
        add_bos, tokenizer_class = adds_bos(metadata), "PreTrainedTokenizerFast"
    elif kind == "llama":
        (dest / "tokenizer.model").write_bytes(sentencepiece_model(metadata, vocabulary))
        add_bos, tokenizer_class = metadata.flag("tokenizer.ggml.add_bos_token", True), "LlamaTokenizer"
    else:
        raise metadata.error("tokenizer.ggml.model", f"is {kind!r}; supported: gpt2, llama")
    config: dict[str, object] = {
        "tokenizer_class": tokenizer_class,
        "add_bos_token": add_bos,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.integer("llama.context_length"),
    }
    config |= _special_tokens(metadata, vocabulary)
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata.text("tokenizer.chat_template")
    _write_json(dest / "tokenizer_config.json", config)
    _write_json(dest / "generation_config.json", _generation_config(metadata))


def byte_level_bpe(metadata: GgufMetadata, vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer of a "gpt2" vocabulary: tokens and merges in GPT-2's byte alphabet."""
    name = metadata.text("tokenizer.ggml.pre")
    if name not in PRE_TOKENIZERS:
        raise metadata.error("tokenizer.ggml.pre", f"is {name!r}; supported: {', '.join(PRE_TOKENIZERS)}")
    pre_tokenizer = PRE_TOKENIZERS[name]
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    merges = _merges(metadata, ids)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=pre_tokenizer.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer.build()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in vocabulary.of_type(TokenType.CONTROL)]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in vocabulary.of_type(TokenType.USER_DEFINED)])
    if adds_bos(metadata):
        bos_id = metadata.integer("tokenizer.ggml.bos_token_id")
        bos = _token(metadata, vocabulary, "tokenizer.ggml.bos_token_id", bos_id)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def _merges(metadata: GgufMetadata, ids: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs that BPE joins, best first; raises GgufError for a pair that makes no token."""
    merges = []
    for merge in metadata.texts("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise metadata.error("tokenizer.ggml.merges", f"holds {merge!r}, which makes no token")
        merges.append((left, right))
    return merges


def adds_bos(metadata: GgufMetadata) -> bool:
    """Whether a byte-level BPE puts the first token in front of a plain text."""
    default = PRE_TOKENIZERS.get(metadata.text("tokenizer.ggml.pre"), PreTokenizer()).add_bos
    return metadata.flag("tokenizer.ggml.add_bos_token", default)


def sentencepiece_model(metadata: GgufMetadata, vocabulary: Vocabulary) -> bytes:
    """The tokenizer.model of a "llama" vocabulary: BPE by scores, byte fallback, no normalisation."""
    scores, types = metadata.numbers("tokenizer.ggml.scores"), vocabulary.types
    if len(scores) != len(types):
        raise metadata.error("tokenizer.ggml.scores", f"has {len(scores)} items, not {len(types)}")
    if TokenType.UNKNOWN not in types:
        raise metadata.error("tokenizer.ggml.token_type", "marks no token as the unknown one")
    model = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(vocabulary.tokens, scores, types, strict=True):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    trainer.vocab_size = len(vocabulary.tokens)
    trainer.byte_fallback = TokenType.BYTE in types
    trainer.unk_id = types.index(TokenType.UNKNOWN)
    for which, default in (("bos", 1), ("eos", 2)):
        token_id = metadata.integer(f"tokenizer.ggml.{which}_token_id", default)
        setattr(trainer, f"{which}_id", token_id)
        setattr(trainer, f"{which}_piece", _token(metadata, vocabulary, f"tokenizer.ggml.{which}_token_id", token_id))
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = True
    return bytes(model.SerializeToString())


def _special_tokens(metadata: GgufMetadata, vocabulary: Vocabulary) -> dict[str, object]:
    """bos_token, eos_token, … by text, and every other control token."""
    named = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    special: dict[str, object] = {}
    for which, name in named.items():
        key = f"tokenizer.ggml.{which}_token_id"
        if key in metadata:
            special[name] = _token(metadata, vocabulary, key, metadata.integer(key))
    others = [token for token in vocabulary.of_type(TokenType.CONTROL) if token not in special.values()]
    return special | {"additional_special_tokens": others}


def _generation_config(metadata: GgufMetadata) -> dict[str, object]:
    config: dict[str, object] = {}
    for which, name in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        if f"tokenizer.ggml.{which}_token_id" in metadata:
            config[name] = metadata.integer(f"tokenizer.ggml.{which}_token_id")
    eos = eos_token_ids(metadata)
    return config if not eos else config | {"eos_token_id": eos[0] if len(eos) == 1 else list(eos)}


def _token(metadata: GgufMetadata, vocabulary: Vocabulary, key: str, token_id: int) -> str:
    if not 0 <= token_id < len(vocabulary.tokens):
        raise metadata.error(key, f"is {token_id}, outside the vocabulary of {len(vocabulary.tokens)}")
    return vocabulary.tokens[token_id]


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
