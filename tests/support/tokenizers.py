"""Tokenizers for tests: a tiny byte-level one written on the fly, and Mixtral's real sentencepiece model.

The byte-level one covers every byte, so any text has ids and any random id below its vocabulary has bytes:
that makes it the tokenizer of the random checkpoints. Nothing here needs the network.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase, printable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")

CHATML_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_byte_tokenizer(dest: Path, vocab_size: int = 300, *, chat_template: str | None = CHATML_TEMPLATE) -> None:
    """Write tokenizer.json and tokenizer_config.json into `dest` (made when missing).

    Ids: 0 `<unk>`, 1 `<s>`, 2 `</s>`, 3 `<|im_start|>`, 4 `<|im_end|>`, 5..260 the bytes 0..255, then merges
    up to exactly `vocab_size` (261..9000): first some that cut UTF-8 characters in the middle, then pairs of
    ASCII characters. A plain prompt gets `<s>` in front, as in Mixtral.
    """
    num_merges = vocab_size - len(SPECIALS) - 256
    if not 0 <= num_merges <= 8739:
        raise ValueError(f"vocab_size must be in 261..9000, got {vocab_size}")
    letters = _byte_letters()
    vocab = {text: index for index, text in enumerate((*SPECIALS, *letters))}
    merges = list(islice(_merges(letters), num_merges))
    vocab |= {left + right: len(vocab) + index for index, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]
    )
    dest.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(dest / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (dest / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def mixtral_sentencepiece() -> Path:
    """Mixtral's own sentencepiece model (32,000 pieces), which mistral-common ships."""
    return Path(str(importlib.resources.files("mistral_common"))) / "data" / "tokenizer.model.v1"


def _byte_letters() -> list[str]:
    """The printable letter that byte-level BPE writes for each byte 0..255 (GPT-2's table)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    letters = {byte: chr(byte) for byte in kept} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def _merges(letters: list[str]) -> Iterator[tuple[str, str]]:
    """Distinct pairs of byte letters, the ones that split UTF-8 characters first."""
    for pair in ((0xF0, 0x9F), (0xE4, 0xB8), (0xE2, 0x80), (0xC3, 0xA9), (0x20, 0x20)):
        yield letters[pair[0]], letters[pair[1]]
    seen = {(0x20, 0x20)}
    alphabet = sorted(printable[:95], key=lambda char: (char not in ascii_lowercase + " ", char))
    for left, right in product(alphabet, repeat=2):
        if (ord(left), ord(right)) not in seen:
            yield letters[ord(left)], letters[ord(right)]
