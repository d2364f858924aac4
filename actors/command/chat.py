"""`octavo chat`: a conversation in the terminal with any OpenAI-compatible server, ours by default."""

from collections.abc import Callable, Generator
from contextlib import closing
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

    def reply(self, text: str) -> Generator[str]:
        """Sends `text` and yields the answer as it comes; the answer joins the messages. Raises ChatError."""
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            self.model = self.model or self._first_model()
            stream: Any = self.client.chat.completions.create(
                model=self.model,
                messages=self.messages,  # type: ignore[arg-type]
                stream=True,
                **self.sampling,
            )
            with stream:  # left early, it tells the server to stop
                for chunk in stream:
                    if chunk.choices and chunk.choices[0].delta.content:
                        pieces.append(chunk.choices[0].delta.content)
                        yield pieces[-1]
        except openai.APIConnectionError:
            if pieces:
                raise ChatError(f"the server at {self.client.base_url} broke off its answer") from None
            raise ChatError(f"no server at {self.client.base_url}: start one with `octavo serve`") from None
        except openai.APIError as error:
            raise ChatError(error.message) from None
        finally:
            if pieces:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.messages.pop()

    def _first_model(self) -> str:
        models = self.client.models.list().data
        if not models:
            raise ChatError(f"{self.client.base_url} lists no model")
        return models[0].id


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
            with closing(conversation.reply(text)) as pieces:
                for piece in pieces:
                    console.out(piece, end="", highlight=False)
        except KeyboardInterrupt:
            console.print(" [dim](stopped)[/dim]", end="")
        console.print("\n")
