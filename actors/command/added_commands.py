"""Commands that are built on top of these rooms: declared as entry points, looked up only when they are needed.

`actors` may not import what stands on it, so a package that has a command declares a typer app under the
entry-point group `octavo.commands`. A command of this room never reads that list; what the added ones do is theirs.
"""

from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperGroup

GROUP = "octavo.commands"


class CommandError(Exception):
    """Raised by an added command; its message is one line, written for the person at the terminal."""


def installed_commands() -> Iterable[EntryPoint]:
    """What the installed packages declare."""
    return entry_points(group=GROUP)


class CommandGroup(TyperGroup):
    """The commands of an app, and after them the added ones. A built-in name wins."""

    find: Callable[[], Iterable[EntryPoint]] = staticmethod(installed_commands)

    def list_commands(self, ctx: Any) -> list[str]:
        """Names for the help: the app's own in its order, then the added ones by name."""
        own = super().list_commands(ctx)
        return [*own, *sorted({entry.name for entry in self.find()} - set(own))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, loaded here if it is an added one; None if nobody has it."""
        own = super().get_command(ctx, cmd_name)
        return load_command(cmd_name, self.find()) if own is None else own


def load_command(name: str, declared: Iterable[EntryPoint]) -> Any:
    """The added command `name`, or None. One that cannot be loaded is listed all the same, and says why when run."""
    entry = next((entry for entry in declared if entry.name == name), None)
    if entry is None:
        return None
    try:
        app = entry.load()
    except (ImportError, AttributeError) as error:
        app = _broken(name, f"{entry.value}: {error}")
    if not isinstance(app, typer.Typer):
        app = _broken(name, f"{entry.value} is {type(app).__name__}, not a typer app")
    command = typer.main.get_command(app)
    command.name = name
    return command


def _broken(name: str, reason: str) -> typer.Typer:
    app = typer.Typer(add_completion=False)

    @app.command(
        help="Cannot be loaded here.", context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
    )
    def refuse() -> None:
        raise CommandError(f"the command {name!r} cannot be loaded: {reason}")

    return app
