"""Guarantee: a table knows its names without importing what they name, and others can add to it but replace nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from minipuzzle.errors import MinipuzzleError
from minipuzzle.table import Table, UnknownNameError
from tests.support.packages import install_package, run_python


@pytest.fixture
def colours() -> Table[int]:
    return Table("colour", "colours", entries={"red": 1, "green": 2}, lazy={"blue": "sys:maxsize"})


PRELUDE = """
import sys
from minipuzzle.errors import MinipuzzleError
from minipuzzle.table import Table
colours = Table("colour", "colours", entries={"red": 1}, lazy={"blue": "sys:maxsize"})
"""


def test_entries_are_found_by_their_names_and_listed_in_order(colours: Table[int]) -> None:
    assert (colours["red"], colours["green"], colours["blue"]) == (1, 2, sys.maxsize)
    assert set(colours.names()) == set(colours) == {"red", "green", "blue"}
    assert len(colours) == 3 and "blue" in colours and "grey" not in colours
    assert dict(colours) == {"red": 1, "green": 2, "blue": sys.maxsize}


def test_an_unknown_name_is_answered_with_the_nearest_ones(colours: Table[int]) -> None:
    with pytest.raises(UnknownNameError, match="unknown colour 'gren'") as caught:
        colours["gren"]
    assert "did you mean green?" in str(caught.value.hint)
    with pytest.raises(UnknownNameError) as caught:
        colours.check("xyz")
    assert "did you mean" not in str(caught.value.hint)
    assert all(name in str(caught.value.hint) for name in ("red", "green", "blue"))
    colours.check("red")
    assert colours.get("xyz") is None


def test_an_entry_can_be_added_but_none_replaced(colours: Table[int]) -> None:
    colours.register("yellow")(3)
    assert colours["yellow"] == 3 and colours.names()[-1] == "yellow"
    for taken in ("yellow", "red", "blue"):
        with pytest.raises(MinipuzzleError, match=f"there is a colour '{taken}' already"):
            colours.register(taken)(4)
    assert (colours["yellow"], colours["red"], colours["blue"]) == (3, 1, sys.maxsize)


def test_another_package_adds_entries_and_cannot_replace_any(tmp_path: Path) -> None:
    code = """
assert colours.names() == ("blue", "red", "amber", "pink"), colours.names()
assert "pink" in colours and "other_package" not in sys.modules
assert (colours["pink"], colours["amber"], colours["red"]) == (7, 9, 1)
assert colours.names() == ("blue", "red", "amber", "pink")
try:
    colours.register("pink")(4)
except MinipuzzleError as error:
    assert "already" in str(error)
else:
    raise AssertionError("pink was taken")
"""
    source = "PINK = 7\nRED = 8\nAMBER = 9\n"
    environment = install_package(tmp_path, source, colours={"pink": "PINK", "red": "RED", "amber": "AMBER"})
    run_python(environment, "-c", PRELUDE + code)


def test_names_are_told_without_importing_anything() -> None:
    code = (
        "import sys; from minipuzzle.table import Table;"
        "table = Table('oven', 'ovens', lazy={'hot': 'xmlrpc.client:ServerProxy'});"
        "assert table.names() == ('hot',) and 'hot' in table and 'xmlrpc' not in sys.modules;"
        "assert table['hot'].__name__ == 'ServerProxy' and 'xmlrpc.client' in sys.modules;"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
