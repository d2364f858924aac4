"""Commands from outside: found by entry point, loaded only when typed, and never in the way of the built-in ones."""

import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import actors.cli
from actors.command.added_commands import GROUP, CommandError, CommandGroup, installed_commands, load_command
from actors.command.failures import one_line

PYPROJECT = Path(__file__).resolve().parent.parent.parent / "pyproject.toml"


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name=name, value=value, group=GROUP)


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EntryPoint:
    """A command `more` with a sub-command `hello`, in a module that nobody has imported."""
    (tmp_path / "more_commands_for_test.py").write_text(
        "import typer\n"
        "app = typer.Typer(help='More of it.')\n"
        "@app.callback()\n"
        "def group() -> None:\n    'More of it.'\n"
        "@app.command()\n"
        "def hello(name: str) -> None:\n    print('hello', name)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "more_commands_for_test", raising=False)
    return entry("more", "more_commands_for_test:app")


def app_with(declared: Iterable[EntryPoint]) -> typer.Typer:
    """An app with a built-in command `own`, and the declared ones."""
    found = tuple(declared)

    class Group(CommandGroup):
        find = staticmethod(lambda: found)

    app = typer.Typer(cls=Group, add_completion=False)

    @app.callback()
    def group() -> None:
        pass

    @app.command()
    def own() -> None:
        print("mine")

    return app


def test_an_added_command_runs(added: EntryPoint) -> None:
    done = CliRunner().invoke(app_with([added]), ["more", "hello", "you"])
    assert (done.exit_code, done.stdout) == (0, "hello you\n"), done.output


def test_a_built_in_command_does_not_look_for_others() -> None:
    class Group(CommandGroup):
        @staticmethod
        def find() -> Iterable[EntryPoint]:
            raise AssertionError("looked")

    app = typer.Typer(cls=Group, add_completion=False)

    @app.callback()
    def group() -> None:
        pass

    @app.command()
    def own() -> None:
        print("mine")

    assert CliRunner().invoke(app, ["own"]).stdout == "mine\n"
    assert isinstance(CliRunner().invoke(app, ["other"]).exception, AssertionError)


def test_only_the_typed_command_is_loaded(added: EntryPoint) -> None:
    app = app_with([entry("broken", "no_such_module_for_test:app"), added])
    assert CliRunner().invoke(app, ["own"]).stdout == "mine\n"
    assert "more_commands_for_test" not in sys.modules
    assert CliRunner().invoke(app, ["more", "hello", "you"]).exit_code == 0
    assert "more_commands_for_test" in sys.modules


def test_the_help_lists_them_after_the_built_in_ones(added: EntryPoint) -> None:
    done = CliRunner().invoke(app_with([added, entry("broken", "no_such_module_for_test:app")]), ["--help"])
    assert done.exit_code == 0
    places = [done.stdout.index(text) for text in ("own", "broken", "more", "More of it.")]
    assert places == sorted(places)
    assert "Cannot be loaded here." in done.stdout


def test_a_built_in_name_wins(added: EntryPoint) -> None:
    app = app_with([entry("own", added.value)])
    assert CliRunner().invoke(app, ["own"]).stdout == "mine\n"
    assert CliRunner().invoke(app, ["--help"]).stdout.count("own") == 1


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no_such_module_for_test:app", "No module named 'no_such_module_for_test'"),
        ("json:no_such_name", "no_such_name"),
        ("json:dumps", "json:dumps is function, not a typer app"),
    ],
)
def test_a_command_that_cannot_be_loaded_says_why_when_it_is_run(value: str, reason: str) -> None:
    done = CliRunner().invoke(app_with([entry("broken", value)]), ["broken", "serve", "--port", "5"])
    assert isinstance(done.exception, CommandError)
    line = one_line(done.exception)
    assert line.startswith("the command 'broken' cannot be loaded: ")
    assert reason in line


def test_an_unknown_command_stays_unknown(added: EntryPoint) -> None:
    assert load_command("other", [added]) is None
    done = CliRunner().invoke(app_with([added]), ["other"])
    assert done.exit_code == 2
    assert "No such command" in done.output


def test_the_octavo_command_takes_added_ones_from_the_installed_packages() -> None:
    command = typer.main.get_command(actors.cli.app)
    assert isinstance(command, CommandGroup)
    assert command.find is installed_commands
    assert all(found.group == GROUP for found in installed_commands())


def test_the_project_declares_its_experiments() -> None:
    declared = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"][GROUP]
    assert declared == {
        "bench": "experiments.bench_cli:app",
        "experiment": "experiments.experiment_cli:app",
        "simulate": "experiments.simulate_cli:app",
        "trace": "experiments.trace_cli:app",
    }
    command = load_command("bench", [entry(name, value) for name, value in declared.items()])
    assert command.name == "bench"
    assert "serve" in command.commands
