"""Make a site of all pages with MkDocs Material; strict, so that a link to what is not there fails.

Pages stay where they are and link each other as files of the repository do; for the build they are copied with what
they link to.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE, SITE = ROOT / "build" / "site_source", ROOT / "build" / "site"
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")
SUFFIXES = (".md", ".png", ".py", ".toml", ".ipynb", ".json", ".txt")
LARGEST_BYTES = 1_000_000
SETTINGS = """
site_name: MiniPuzzle
site_description: Make large language models smaller
docs_dir: {source}
site_dir: {site}
use_directory_urls: false
strict: true
theme:
  name: material
  font: false
  features: [navigation.sections, navigation.top, content.code.copy, search.suggest]
  palette:
    - {{media: "(prefers-color-scheme: light)", scheme: default, primary: white}}
    - {{media: "(prefers-color-scheme: dark)", scheme: slate, primary: black}}
markdown_extensions: [tables, admonition, toc, pymdownx.superfences]
validation: {{links: {{not_found: warn, anchors: warn, absolute_links: warn, unrecognized_links: warn}}}}
nav:
  - Start: README.md
  - Step by step: docs/step_by_step.md
  - Recipes: examples/recipes/README.md
  - Cases:
      - 56B to 47B: examples/nemotron_h_56b/README.md
      - SmolLM2: examples/smollm2/README.md
      - The embedded model: examples/tiny_hybrid/README.md
  - How it works: docs/how_it_works.md
  - Limits: docs/limits.md
  - Reference:
      - Commands: docs/commands.md
      - Python: docs/python.md
      - Families: docs/families.md
      - Abilities: docs/abilities.md
      - Recovery data: docs/recovery_data.md
      - Round trips: docs/round_trips.md
  - Contributing: CONTRIBUTING.md
  - Changes: CHANGELOG.md
"""


def copy_pages() -> None:
    """All pages, and small files beside them that they may link to."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        path = ROOT / name
        is_page = name in TOP or (name.startswith(("docs/", "examples/")) and path.suffix in SUFFIXES)
        if is_page and path.is_file() and path.stat().st_size <= LARGEST_BYTES:
            (SOURCE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, SOURCE / name)


if __name__ == "__main__":
    copy_pages()
    settings = SOURCE.parent / "mkdocs.yml"
    settings.write_text(SETTINGS.format(source=SOURCE, site=SITE), encoding="utf-8")
    sys.exit(subprocess.run([sys.executable, "-m", "mkdocs", "build", "--config-file", str(settings)]).returncode)
