"""How a failure is said to a person: one line, from the errors that the rooms name themselves."""

from actors.channels import ChannelError
from actors.command.added_commands import CommandError
from actors.command.chat import ChatError
from actors.command.demo_model import DemoModelError
from actors.command.wheel_fetch import FetchError
from actors.front.api_keys import KeysError
from actors.ray_runtime import RuntimeFailure
from cluster.budget import BudgetError
from cluster.config import ConfigError
from cluster.desired_set import MoveRefused
from model.config import ModelConfigError
from model.kernels import KernelError
from model.storage.checkpoint import CheckpointError
from model.text.tokenizer import TokenizerError
from model.upcycling.gguf_metadata import GgufError
from model.upcycling.upcycle import UpcycleError


def one_line(error: BaseException) -> str:
    """The first line of a known error's message; an unknown error is called internal and says how to see more."""
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    if isinstance(error, known_errors()):
        return first
    return f"internal error: {type(error).__name__}: {first} (OCTAVO_TRACEBACK=1 shows where)"


def known_errors() -> tuple[type[BaseException], ...]:
    """Errors whose message was written for the person at the terminal."""
    return (
        BudgetError,
        ChannelError,
        ChatError,
        CheckpointError,
        CommandError,
        ConfigError,
        DemoModelError,
        FetchError,
        GgufError,
        KernelError,
        KeysError,
        ModelConfigError,
        MoveRefused,
        OSError,
        RuntimeFailure,
        TokenizerError,
        UpcycleError,
    )
