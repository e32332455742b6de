"""Guarantee: the layout stays as promised: arrows point inward, help is fast, docs match, files stay small."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from minipuzzle.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("minipuzzle", "importance", "distill")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def source_files() -> list[Path]:
    return sorted(path for package in (*PACKAGES, "docs") for path in (ROOT / package).rglob("*.py"))


def imported_packages(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        yield from (name.split(".")[0] for name in names)


def test_the_core_imports_neither_importance_nor_distill() -> None:
    for path in (ROOT / "minipuzzle").rglob("*.py"):
        if path.parent.name != "commands":
            assert not {"importance", "distill"} & set(imported_packages(path)), path


def test_importance_and_distill_do_not_import_each_other() -> None:
    for package, other in (("importance", "distill"), ("distill", "importance")):
        for path in (ROOT / package).rglob("*.py"):
            assert other not in set(imported_packages(path)), path


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            body_start = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno
            assert body_start is not None
            assert node.end_lineno - body_start < MAX_FUNCTION_LINES, f"{node.name} is too long"


def test_help_comes_without_torch() -> None:
    """Importing torch takes seconds; no module that --help needs may do it."""
    code = (
        "import sys; from click.testing import CliRunner; from minipuzzle.cli import main, COMMANDS;"
        "[CliRunner().invoke(main, [*c, '--help'], catch_exceptions=False) for c in ([], *([c] for c in COMMANDS))];"
        "sys.exit(1 if {'torch', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_json_and_a_page_in_the_docs(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0, result.output
    assert "--json" in result.output
    assert f"## minipuzzle {command}\n" in (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["score", "prune", "distill", "export", "evaluate", "demo"])
def test_long_commands_have_a_dry_run(command: str) -> None:
    assert "--dry-run" in CliRunner().invoke(main, [command, "--help"]).output


@pytest.mark.parametrize("script", ["write_commands.py", "write_families.py"])
def test_the_reference_pages_are_what_the_code_says(script: str) -> None:
    result = subprocess.run([sys.executable, f"docs/{script}", "--check"], cwd=ROOT, check=False)
    assert result.returncode == 0


def tracked_files() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


def test_the_file_tree_of_the_readme_is_the_repository() -> None:
    """One line a file, with one clause; many data files of a folder may share a line with a wildcard."""
    tree = README.split("```tree\n")[1].split("```")[0]
    listed: set[str] = set()
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, clause = line.strip().partition("  ")
        assert clause.strip(), f"{name} has no clause"
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
            continue
        path = "/".join([*folders, name])
        matched = {tracked for tracked in tracked_files() if fnmatchcase(tracked, path)}
        assert matched, f"README lists {path}, which is not in the repository"
        listed |= matched
    assert listed == tracked_files()


def readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("line", readme_commands())
def test_every_command_in_the_readme_parses(line: str) -> None:
    program, *arguments = shlex.split(line)
    if program == "torchrun":
        assert arguments[1:3] == ["-m", "minipuzzle"]
        program, arguments = "minipuzzle", arguments[3:]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in arguments)
    elif program == "minipuzzle":
        command = main.get_command(click.Context(main), arguments[0])
        assert command is not None, f"there is no command {arguments[0]!r}"
        command.make_context(arguments[0], arguments[1:]).close()
    else:
        assert program in ("git", "cd", "pip"), f"nothing checks {line!r}"
