"""Options that are made from the fields of settings: defaults, help and values are those of the settings."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass, field
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from tardis_llm.cli.fold import fold
from tardis_llm.cli.options import attribute_docs, from_settings, numbers
from tardis_llm.config import FoldConfig
from tardis_llm.errors import InvalidInputError
from tardis_llm.evaluation.shapes import RandomFold
from tardis_llm.evaluation.speed import Timing


@dataclass(frozen=True)
class Settings:
    """Settings of a command.

    Attributes:
        steps: how many steps
            are taken.
        layers: numbers of the blocks; default: all.
        fold_bits: precision of the fold.
        hidden: no option.
    """

    steps: int = field(default=8, metadata={"min": 1})
    layers: tuple[int, ...] | None = None
    fold_bits: int | None = None
    hidden: float = field(default=0.5, metadata={"option": False})


def run(*arguments: str) -> tuple[int, list[Settings], str]:
    """Exit code, the settings that the command got, and what was printed."""
    app, given = typer.Typer(), []

    @app.command()
    @from_settings
    def command(name: Annotated[str, typer.Argument()], *, settings: Settings, loud: bool = False) -> None:
        given.append(settings)

    result = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"})
    return result.exit_code, given, result.output


def test_options_make_the_settings():
    assert run("x")[1] == [Settings()]
    arguments = ("x", "--steps", "3", "--layers", "0,2", "--fold-dtype", "int4", "--loud")
    assert run(*arguments)[1] == [Settings(3, (0, 2), 4)]


def test_help_defaults_and_limits_are_those_of_the_fields():
    code, _, text = run("--help")
    assert code == 0
    assert "How many steps are taken. [default: 8]" in " ".join(text.replace("│", "").split())
    assert "hidden" not in text
    assert run("x", "--steps", "0")[0] == 2


@pytest.mark.parametrize("kind", [FoldConfig, RandomFold, Timing])
def test_every_setting_is_described(kind: type):
    assert list(attribute_docs(kind)) == [each.name for each in dataclasses.fields(kind)]


def test_fold_has_an_option_for_every_setting_but_those_of_python_alone():
    parameters = inspect.signature(fold).parameters
    missing = {each.name for each in dataclasses.fields(FoldConfig)} - set(parameters)
    assert missing == {"damping", "sequential", "target", "weigh", "heldout"}
    for each in dataclasses.fields(FoldConfig):
        if each.name in parameters:
            assert parameters[each.name].default == each.default


def test_numbers_that_are_none_are_refused():
    assert numbers("--layers", "0,1", int, "0,1,5") == (0, 1)
    with pytest.raises(InvalidInputError, match=r"--layers is '0,x'; give numbers such as 0,1,5\."):
        numbers("--layers", "0,x", int, "0,1,5")
