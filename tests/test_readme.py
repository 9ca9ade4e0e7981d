"""The README's Python runs as it stands, and its commands exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.splitlines()[1])
def test_python_examples_run(code):
    exec(compile(code, "README.md", "exec"), {})


def test_the_examples_are_found():
    assert len(BLOCKS) == 4


def test_commands_and_options_exist():
    from typer.main import get_command

    from dit_kernels.cli import app

    commands = get_command(app).commands
    lines = re.findall(r"^dit-kernels ([\w-]+)(.*)$", README, flags=re.M)
    assert {name for name, _ in lines} >= {"generate", "train", "train-codec", "evaluate"}
    for name, rest in lines:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= known, name


def test_make_targets_exist():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_linked_files_exist():
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        assert (Path(__file__).parent.parent / target).is_file(), target


def test_the_table_of_the_evaluation_is_that_of_its_figures():
    """`make evaluate` writes both."""
    from dit_kernels.video.evaluation import TABLE, table_of

    file = Path(__file__).parent.parent / "docs" / "evaluation.json"
    figures = json.loads(file.read_text()) if file.is_file() else {}
    begin, end = TABLE
    shown = README.split(begin + "\n")[1].split("\n" + end)[0]
    assert shown == table_of(figures)
    for model in figures.values():
        for score in model["rows"].values():
            assert score["total"] >= 300
