from __future__ import annotations

import sys
from typing import Annotated

import pytest
import typer

from uharmony_model.errors import ConfigError, DataError, NetworkError, StoreError, UHarmonyError
from uharmony_service.command_line import one_line, run


def app_that(action):
    app = typer.Typer(add_completion=False)

    @app.command()
    def command(number: Annotated[int, typer.Option()] = 0) -> None:
        action()

    return app


def raises(error):
    def action():
        raise error

    return action


@pytest.fixture
def outcome(monkeypatch, capsys):
    def of(action, *arguments):
        monkeypatch.setattr(sys, "argv", ["tool", *arguments])
        with pytest.raises(SystemExit) as ended:
            run(app_that(action))
        return ended.value.code, capsys.readouterr().err

    return of


@pytest.mark.parametrize("error", [UHarmonyError, ConfigError, DataError, StoreError, NetworkError])
def test_our_errors_are_one_line_and_their_exit_code(outcome, error):
    code, text = outcome(raises(error("a\nb \x1b[31mc")))
    assert code == error.exit_code
    assert text == "error: a b ?[31mc\n"


def test_success_is_zero(outcome):
    assert outcome(lambda: None) == (0, "")


def test_an_exit_code_of_a_command_is_kept(outcome):
    assert outcome(raises(typer.Exit(5))) == (5, "")


def test_interruption_is_130(outcome):
    assert outcome(raises(KeyboardInterrupt())) == (130, "error: interrupted\n")
    assert outcome(raises(typer.Abort())) == (130, "error: interrupted\n")


def test_wrong_usage_is_two_on_one_line(outcome):
    code, text = outcome(lambda: None, "--surprise")
    assert code == 2
    assert text.count("\n") == 1
    assert "--surprise" in text
    code, text = outcome(lambda: None, "--number", "three")
    assert code == 2
    assert text.count("\n") == 1


def test_out_of_memory_is_one_line(outcome):
    assert outcome(raises(MemoryError())) == (
        1,
        "error: out of memory; use a smaller volume, patch or batch\n",
    )


def test_other_errors_are_not_hidden(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tool"])
    with pytest.raises(ZeroDivisionError):
        run(app_that(raises(ZeroDivisionError())))


def test_one_line_is_bounded():
    assert one_line("x" * 5000, 10) == "x" * 10
    assert one_line("right\u202eleft") == "right?left"
