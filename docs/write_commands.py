"""Write docs/commands.md from the commands' own --help; with --check, fail if the file is out of date."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from click.testing import CliRunner

from minipuzzle.commands.cli import every_command, main

PAGE = Path(__file__).parent / "commands.md"
HELP_COLUMNS = 100
COMPLETION = """## Completion in a shell

Options, commands and choices complete with the tabulator key once this line is in the shell's start file:

```
eval "$(_MINIPUZZLE_COMPLETE=bash_source minipuzzle)"                # ~/.bashrc
eval "$(_MINIPUZZLE_COMPLETE=zsh_source minipuzzle)"                 # ~/.zshrc
_MINIPUZZLE_COMPLETE=fish_source minipuzzle | source                 # ~/.config/fish/config.fish
```
"""


def render() -> str:
    """The page: one section a command, its help as printed."""
    runner = CliRunner()
    sections = ["# Commands", "", "Written by `make docs` from the commands' own `--help`.", ""]
    for arguments in ((), *every_command()):
        title = " ".join(["minipuzzle", *arguments])
        result = runner.invoke(
            main, [*arguments, "--help"], prog_name="minipuzzle", catch_exceptions=False, terminal_width=HELP_COLUMNS
        )
        sections += [f"## {title}", "", "```", result.output.rstrip(), "```", ""]
    return "\n".join([*sections, COMPLETION])


if __name__ == "__main__":
    page = render()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        click.echo("docs/commands.md is out of date: run `make docs`", err=True)
        sys.exit(1)
