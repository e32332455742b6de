"""Metadata and dependencies of MiniPuzzle; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "minipuzzle/version.py").read_text(encoding="utf-8"))
assert VERSION is not None

# Plain transformers reads our second layout with it; it imports psutil without asking for it.
COMPRESSED_TENSORS = ["compressed-tensors>=0.17", "psutil"]
TENSORBOARD = ["tensorboard>=2.16"]
DATA = ["httpx2>=2", "datatrove>=0.10", "datasketch>=1.6", "scikit-learn>=1.5"]

setup(
    name="minipuzzle",
    version=VERSION[1],
    description="Make large language models smaller: measure, search, cut, distil, export",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["minipuzzle*", "importance*", "distill*"]),
    package_data={
        **{package: ["py.typed"] for package in ("minipuzzle", "importance", "distill")},
        "minipuzzle.show.page": ["page.html", "page.css"],
        "minipuzzle.abilities.play": ["*.toml"],
        "minipuzzle.data.writing": ["prompts/*.toml"],
    },
    install_requires=[
        "torch>=2.9",
        "transformers>=5.18",
        "nvidia-modelopt>=0.47",
        "safetensors>=0.6",
        "huggingface_hub>=1.0",
        "numpy>=1.26",
        "click>=8.1",
        "rich>=13",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "pyarrow>=15",
        "scipy>=1.11",
        'tomli>=2; python_version < "3.11"',
    ],
    # requests: modelopt, an oracle of the tests, imports it without asking for it.
    # torchao: FP8 matrix products on GPUs; `distill --fp8` says so where it is missing.
    extras_require={
        "fp8": ["torchao>=0.15"],
        "tensorboard": TENSORBOARD,
        "eval": ["lm-eval>=0.4.9"],
        "data": DATA,
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "coverage>=7.10",
            "nbclient>=0.10",
            "ipykernel>=6",
            "ruff>=0.15",
            "mypy>=2",
            "types-setuptools",
            "requests",
            *TENSORBOARD,
            *DATA,
            *COMPRESSED_TENSORS,
        ],
    },
    entry_points={
        "console_scripts": [
            "minipuzzle = minipuzzle.commands.cli:main",
            "minipuzzle-lm-eval = minipuzzle.workflows.abilities.harness:main",
        ]
    },
)
