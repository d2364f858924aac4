"""Text of a growing sequence of ids, for streaming. The bytes of an id are the tokenizer's knowledge."""

from collections.abc import Iterable, Sequence

from model.text.pieces import PieceDecoder
from model.text.tokenizer import Tokenizer

_CONTEXT_IDS = 16


class IncrementalDetokenizer:
    """Turns ids into text as they come; the pushes and the flush together are `tokenizer.decode` of all ids.

    Half a character is held back until it is whole (at most 3 bytes), so no push returns U+FFFD for
    something that a later id would have completed. Work per id is constant.

    With `prompt_ids` the text continues the prompt's: a sentencepiece word keeps the space in front of it,
    and a character begun in the prompt is finished. Without, it is a text of its own: that space is
    dropped, unless the text is `verbatim` that of its tokens. Give the prompt for a completion, leave it out for a
    chat's answer.

    >>> continued = IncrementalDetokenizer(tokenizer, prompt_ids=tokenizer.encode("Once upon", add_bos=True))
    >>> continued.push(tokenizer.encode("a time", add_bos=False)) + continued.flush()
    ' a time'
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special: bool = True,
        verbatim: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        at_start = not verbatim and all(self._is_hidden(token_id) for token_id in prompt_ids)
        self._decoder = PieceDecoder(tokenizer.decode_rule, at_start=at_start)
        self.push(prompt_ids[-_CONTEXT_IDS:])

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete; often "" within a character or for special tokens."""
        texts: list[str] = []
        for token_id in ids:
            piece = self._tokenizer.piece(token_id)
            hidden = self._skip_special and piece.is_special
            texts.append(self._decoder.skip_special() if hidden else self._decoder.push(piece))
        return "".join(texts)

    def flush(self) -> str:
        """The end of the text: U+FFFD for a character that never became whole, else ""."""
        return self._decoder.flush()

    def _is_hidden(self, token_id: int) -> bool:
        return self._skip_special and self._tokenizer.is_special(token_id)
