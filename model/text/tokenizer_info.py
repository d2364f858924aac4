"""What a client needs to use a checkpoint's tokenizer from afar: its configuration as one JSON object.

As in vLLM's `/tokenizer_info` that is tokenizer_config.json, completed by what the tokenizer itself knows, and without
what names files or code.
"""

from pathlib import Path
from typing import Any

from model.text.chat_template import ChatTemplate
from model.text.tokenizer import SentencePieceTokenizer, Tokenizer
from model.text.tokenizer_files import read_json_object

_NOT_TOLD = ("auto_map", "merges_file", "name_or_path", "sp_model_kwargs", "tokenizer_file", "vocab_file")


def tokenizer_info(model_dir: Path, tokenizer: Tokenizer, template: ChatTemplate) -> dict[str, Any]:
    """The object for the checkpoint in `model_dir`. Raises TokenizerError for a file that is not JSON."""
    config = read_json_object(model_dir / "tokenizer_config.json")
    kind = "LlamaTokenizer" if isinstance(tokenizer, SentencePieceTokenizer) else "PreTrainedTokenizerFast"
    named = {"bos_token": None, "eos_token": None, **tokenizer.special_tokens_map}
    told = {"tokenizer_class": kind, **config, **named, "vocab_size": tokenizer.vocab_size}
    if template.source is not None:
        told["chat_template"] = template.source
    return {name: value for name, value in told.items() if name not in _NOT_TOLD}
