"""Other packages that add entries to our tables, installed for processes of their own: each looks them up once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def install_package(root: Path, source: str, **groups: dict[str, str]) -> dict[str, str]:
    """Lay out a package ``other_package`` with this source, and entry points (group -> name -> attribute).

    Returns the environment in which Python finds it.
    """
    (root / "other_package.py").write_text(source, encoding="utf-8")
    metadata = root / "other_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.0\n", encoding="utf-8")
    lines = []
    for group, points in groups.items():
        lines += [f"[minipuzzle.{group}]", *(f"{name} = other_package:{place}" for name, place in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    paths = os.pathsep.join([str(root), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    return {**os.environ, "PYTHONPATH": paths}


def run_python(environment: dict[str, str], *arguments: object) -> str:
    """What Python prints when it succeeds."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
