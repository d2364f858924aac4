"""`octavo chat`: a conversation in the terminal with any OpenAI-compatible server, ours by default."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import openai
from rich.console import Console


class ChatError(RuntimeError):
    """The server could not be reached or refused; the message is one line for people."""


@dataclass
class Conversation:
    """Messages so far and where to send them. `model` None means the first one the server lists."""

    client: openai.OpenAI
    model: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def reply(self, text: str) -> Iterator[str]:
        """Sends `text` and yields the answer as it comes; the answer joins the messages. Raises ChatError."""
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            if self.model is None:
                self.model = self.client.models.list().data[0].id
            stream: Any = self.client.chat.completions.create(
                model=self.model,
                messages=self.messages,  # type: ignore[arg-type]
                stream=True,
                **self.sampling,
            )
            for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    pieces.append(chunk.choices[0].delta.content)
                    yield pieces[-1]
        except openai.APIConnectionError:
            raise ChatError(f"no server at {self.client.base_url}: start one with `octavo serve`") from None
        except openai.APIError as error:
            raise ChatError(error.message) from None
        finally:
            if pieces:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.messages.pop()


def chat(conversation: Conversation, console: Console, ask: Callable[[], str]) -> None:
    """Reads lines with `ask` until end of input (Ctrl-D) and prints the answers; Ctrl-C stops one answer."""
    while True:
        try:
            text = ask().strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not text:
            continue
        try:
            for piece in conversation.reply(text):
                console.out(piece, end="", highlight=False)
        except KeyboardInterrupt:
            console.print(" [dim](stopped)[/dim]", end="")
        console.print("\n")
