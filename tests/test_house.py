"""Guarantee: the layout stays as promised: arrows point inward, help is fast, docs match, files stay small."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest

from minipuzzle.commands.cli import every_command, main
from minipuzzle.table import Table
from tests.support.cli import run_cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("minipuzzle", "importance", "distill")
MAX_FOLDER_FILES = 12
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 8
MAX_PACKAGE_LINES = 18_500
# What does not hold yet. Whoever mends one takes it off; nothing is added.
UPWARD: set[str] = set()
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
MANY_PARAMETERS: set[str] = set()
PRIVATE_NAMES: set[str] = set()


def source_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def table_of_arrows() -> dict[str, int]:
    """Floors by package or file, from the one table there is."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", text, flags=re.MULTILINE)
    return {name: int(floor) for floor, names in rows for name in re.findall(r"`([^`]+)`", names)}


def file_of_module(module: str) -> str | None:
    """The file of one of our modules, relative to the repository."""
    path = Path(*module.split("."))
    found = (candidate for candidate in (path.with_suffix(".py"), path / "__init__.py") if (ROOT / candidate).is_file())
    return next((candidate.as_posix() for candidate in found), None)


def imports_of(path: Path) -> set[str]:
    """Our files that a file imports anywhere: at its top, inside functions, or for types only."""
    found: set[str | None] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {file_of_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (alias.name for alias in node.names)
            found |= {file_of_module(f"{node.module}.{name}") or file_of_module(node.module) for name in names}
    return {name for name in found if name is not None}


def all_imports() -> dict[str, set[str]]:
    names = {path.relative_to(ROOT).as_posix(): path for path in source_files()}
    return {name: imports_of(path) - {name} for name, path in names.items()}


def test_arrows_point_down_the_table_only() -> None:
    floors = table_of_arrows()

    def place(file: str) -> str:
        found = [name for name in floors if file == name or file.startswith(name + "/")]
        assert found, f"{file} is on no floor of the table in CONTRIBUTING.md"
        return max(found, key=len)

    upward = [
        f"{importer} imports {imported}"
        for importer, imports in all_imports().items()
        for imported in imports
        if place(importer) != place(imported) and floors[place(importer)] <= floors[place(imported)]
    ]
    assert_only(upward, UPWARD)


def test_no_modules_import_each_other_in_a_circle() -> None:
    with pytest.raises(StopIteration):
        next(circles({"a.py": {"b.py"}, "b.py": set()}))
    assert next(circles({"a.py": {"b.py"}, "b.py": {"a.py"}})) == ("a.py", "b.py")
    assert list(circles(all_imports())) == []


def circles(imports: dict[str, set[str]]) -> Iterator[tuple[str, ...]]:
    """Files that reach themselves through their imports, after those that do not have been taken away."""
    left = {name: set(imported) for name, imported in imports.items()}
    while free := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in free:
            del left[name]
    if left:
        yield tuple(sorted(left))


def test_a_folder_holds_at_most_twelve_files() -> None:
    folders = Counter(path.parent.relative_to(ROOT).as_posix() for path in source_files())
    assert {name: number for name, number in folders.items() if number > MAX_FOLDER_FILES} == {}


def syntax_trees(*folders: str) -> dict[str, ast.Module]:
    """All files of some folders, by their names relative to the repository."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def assert_only(found: Iterable[str], known: set[str]) -> None:
    """What offends is known, and what is known still offends: such a list can only become shorter."""
    offenders = set(found)
    assert sorted(offenders - known) == [], "new"
    assert sorted(known - offenders) == [], "no longer true: take it off the list"


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for file, tree in syntax_trees(*PACKAGES).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{file}:{node.name}", node


def test_files_stay_short() -> None:
    files = {name: (ROOT / name).read_text(encoding="utf-8") for name in syntax_trees(*PACKAGES, "tests")}
    assert_only((name for name, text in files.items() if len(text.splitlines()) > MAX_FILE_LINES), LONG_FILES)


def test_functions_stay_short_counted_from_their_def() -> None:
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions()}
    assert_only((name for name, length in lengths.items() if length > MAX_FUNCTION_LINES), LONG_FUNCTIONS)


def test_functions_have_few_parameters() -> None:
    """Click hands every option to a command by its name, however many there are."""

    def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
        arguments = node.args
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        return [name for name in names if name not in ("self", "cls")]

    def is_command(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        return any(ast.unparse(decorator).startswith("click.command") for decorator in node.decorator_list)

    many = (name for name, node in functions() if not is_command(node) and len(parameters(node)) > MAX_PARAMETERS)
    assert_only(many, MANY_PARAMETERS)


@pytest.mark.xfail(strict=True, reason="on the way; this mark goes when the house is that small")
def test_the_packages_stay_small() -> None:
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in source_files()) < MAX_PACKAGE_LINES


def test_no_test_imports_another() -> None:
    """Neither do the programs that tests write, nor the names of modules to load before a fork."""
    own = re.compile(r"\btests(?:\.\w+)*\.test_\w+|^(?:from|import) (?:\.|test_)", flags=re.MULTILINE)
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in syntax_trees("tests")}
    found = {name: set(own.findall(text)) - {module_of(name)} for name, text in texts.items()}
    assert {name: names for name, names in found.items() if names} == {}


def module_of(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")


def test_tests_mirror_the_house() -> None:
    """A folder of tests for each package and each room of minipuzzle, and few others."""
    rooms = {Path(name).parts[1] for name in syntax_trees("minipuzzle") if name.count("/") > 1}
    folders = {Path(name).parts[1] for name in syntax_trees("tests") if name.count("/") > 1}
    assert_only(folders - rooms, {"importance", "distill", "damage", "engines", "examples", "golden", "support"})
    assert rooms - folders == set()


def private_names() -> set[str]:
    """Names with a leading underscore that modules and classes of the packages define."""
    found: set[str] = set()
    for tree in syntax_trees(*PACKAGES).values():
        bodies = [tree.body, *(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
        for node in (node for body in bodies for node in body):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
        found |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def names_used(tree: ast.Module) -> Iterator[str]:
    """What a file takes from our packages, reads as an attribute, or replaces by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) != "self":
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
            strings = (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
            yield from (string.rpartition(".")[2] for string in strings)


def test_tests_use_no_private_name_of_the_packages() -> None:
    private = private_names()
    trees = syntax_trees("tests")
    found = {f"{file}:{name}" for file, tree in trees.items() for name in names_used(tree) if name in private}
    assert_only(found, PRIVATE_NAMES)


def all_tables() -> dict[str, Table[Any]]:
    """Every table that a module of ours defines, by its entry-point group."""
    files = (path.relative_to(ROOT).as_posix() for path in source_files() if " = Table(" in path.read_text("utf-8"))
    modules = [import_module(module_of(file.removesuffix("/__init__.py"))) for file in files]
    tables = (value for module in modules for value in vars(module).values() if isinstance(value, Table))
    return {f"minipuzzle.{table.plural}": table for table in tables}


def lists_of_names() -> Iterator[tuple[frozenset[str], str]]:
    """Tuples, lists, sets and keys of dicts that consist of strings, with their places."""
    for file, tree in syntax_trees(*PACKAGES).items():
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Dict | ast.Tuple | ast.List | ast.Set)):
            items = node.keys if isinstance(node, ast.Dict) else node.elts
            names = [item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)]
            if names and len(names) == len(items):
                yield frozenset(names), f"{file}:{node.lineno}"


def test_no_list_of_names_exists_twice_and_each_table_is_described() -> None:
    places = defaultdict(list)
    for names, place in lists_of_names():
        places[names].append(place)
    tables = all_tables()
    assert len(tables) > 10
    copies = {group: places[frozenset(table.names())] for group, table in tables.items()}
    assert {group: found for group, found in copies.items() if len(found) > 1} == {}
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert {group for group in tables if f"`{group}`" not in text} == set()


NAMESPACE = re.compile(r"__dict__$|^vars\(")


def patches(tree: ast.Module) -> Iterator[str]:
    """Places that change what one object is or does: its forward, its namespace, a method of its own."""
    for node in ast.walk(tree):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            is_forward = isinstance(target, ast.Attribute) and target.attr in ("forward", "__class__")
            is_namespace = isinstance(target, ast.Subscript) and NAMESPACE.search(ast.unparse(target.value))
            if is_forward or is_namespace:
                yield ast.unparse(target)
        # Frozen records put their own fields in order by object.__setattr__(self, ...).
        if isinstance(node, ast.Call) and re.search(r"MethodType\(|__setattr__\((?!self)", ast.unparse(node)):
            yield ast.unparse(node)


def test_modules_are_replaced_and_not_patched() -> None:
    for bad in ("a.forward = f", "a.b.__dict__['x'] = 1", "vars(a)['x'] = 1", "MethodType(f, a)", "a.__class__ = B"):
        assert list(patches(ast.parse(bad)))
    for good in ("m.set_submodule('mixer', FastMamba2(m.mixer))", "object.__setattr__(self, 'a', 1)"):
        assert not list(patches(ast.parse(good)))
    found = {file: list(patches(tree)) for file, tree in syntax_trees(*PACKAGES).items()}
    assert {file: places for file, places in found.items() if places} == {}


KINDS_OF_DEVICES = {"cuda", "xpu", "mps", "cpu"}


def decisions_by_device(tree: ast.Module) -> Iterator[str]:
    """Comparisons with the name of a kind of device, and what belongs to one kind alone."""
    for node in ast.walk(tree):
        is_own = isinstance(node, ast.Attribute) and node.attr in {"cuda", "xpu", "mps", "is_cuda", "is_xpu", "is_mps"}
        kinds = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)} & KINDS_OF_DEVICES
        if is_own or (isinstance(node, ast.Compare) and kinds and re.search(r"device|kind|type", ast.unparse(node))):
            yield ast.unparse(node)


def test_one_module_alone_asks_which_kind_a_device_is() -> None:
    for bad in ("x.is_cuda", "device.type == 'cuda'", "torch.cuda.synchronize()", "x.device.type in ('cpu', 'mps')"):
        assert list(decisions_by_device(ast.parse(bad)))
    assert not list(decisions_by_device(ast.parse("Device.of(x).widens_products and engine.teacher_offload == 'cpu'")))
    found = {file: list(decisions_by_device(tree)) for file, tree in syntax_trees(*PACKAGES).items()}
    assert {file for file, places in found.items() if places} == {"minipuzzle/devices.py"}


def test_help_comes_without_torch() -> None:
    """Importing torch takes seconds, and numpy as long as all the rest; no module that --help needs may do it."""
    code = (
        "import sys; from click.testing import CliRunner; from minipuzzle.commands.cli import main, every_command;"
        "[CliRunner().invoke(main, [*c, '--help'], catch_exceptions=False) for c in ((), *every_command())];"
        "sys.exit(1 if {'torch', 'numpy', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_every_command_has_help_json_and_a_page_in_the_docs(words: tuple[str, ...]) -> None:
    result = run_cli(*words, "--help")
    assert result.exit_code == 0, result.output
    assert "--json" in result.output or "COMMAND" in result.output
    assert f"## minipuzzle {' '.join(words)}\n" in (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["score", "prune", "distill", "export", "evaluate", "run", "demo"])
def test_long_commands_have_a_dry_run(command: str) -> None:
    assert "--dry-run" in run_cli(command, "--help").output


@pytest.mark.parametrize("script", ["write_commands.py", "write_families.py"])
def test_the_reference_pages_are_what_the_code_says(script: str) -> None:
    result = subprocess.run([sys.executable, f"docs/{script}", "--check"], cwd=ROOT, check=False)
    assert result.returncode == 0


def tracked_files() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


def test_the_folders_of_the_readme_are_those_of_the_repository() -> None:
    """One line a folder, with one clause; folders of folders that are listed need no line of their own."""
    tree = README.split("```tree\n")[1].split("```")[0]
    listed: set[str] = set()
    parents: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, clause = line.strip().partition("  ")
        assert name.endswith("/") and clause.strip(), f"{line!r} is not a folder with a clause"
        parents = [*parents[:depth], name.rstrip("/")]
        listed.add("/".join(parents))
    folders = {parent.as_posix() for file in tracked_files() for parent in Path(file).parents} - {".", ".ci"}
    assert listed <= folders, listed - folders
    top = {folder for folder in folders if "/" not in folder or folder.startswith("minipuzzle/")}
    assert {folder for folder in top if folder.count("/") <= 1} <= listed


def commands_of_pages() -> list[str]:
    """Those of the README and of all pages of docs, each once."""
    pages = [README, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))]
    blocks = [block for page in pages for block in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)]
    lines = "".join(dict.fromkeys(blocks)).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("line", commands_of_pages())
def test_every_command_on_a_page_parses(line: str) -> None:
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
        is_ours = f'"{program} = ' in (ROOT / "setup.py").read_text(encoding="utf-8")  # and has an argument parser
        assert program in ("git", "cd", "pip") or is_ours, f"nothing checks {line!r}"


def test_every_room_is_installed_and_typed() -> None:
    """A folder that setup.py forgets is missing only where a user installs the package."""
    code = (
        "import setuptools, json; setuptools.setup = lambda **facts: print(json.dumps(facts['packages'])); import setup"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rooms = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in source_files()}
    assert set(json.loads(found)) == rooms
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)
