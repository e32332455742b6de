"""Runs the whole corpus and prints what went wrong: ``python -m tests.damage [PART OF A NAME ...]``."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.damage.cases import all_cases
from tests.damage.material import write_material
from tests.damage.runner import Case, Outcome, run_case


def load_everything() -> None:
    """Import what commands import, so that children need not."""
    import torch
    import transformers  # noqa: F401

    from minipuzzle.commands.cli import COMMANDS, main

    torch.set_num_threads(1)
    for name in COMMANDS:
        main.get_command(None, name)  # type: ignore[arg-type]


def run_all(cases: list[Case], folder: Path, num_workers: int) -> list[Outcome]:
    """All outcomes in order; each case has its own folder, which is removed after it."""

    def run(number_and_case: tuple[int, Case]) -> Outcome:
        number, case = number_and_case
        place = folder / f"case-{number}"
        outcome = run_case(case, place)
        shutil.rmtree(place, ignore_errors=True)
        return outcome

    with ThreadPoolExecutor(num_workers) as pool:
        return list(pool.map(run, enumerate(cases)))


def main(arguments: list[str]) -> int:
    """Print each fault and the totals; 1 if there are any."""
    load_everything()
    folder = Path(tempfile.mkdtemp(prefix="damage-"))
    try:
        material = write_material(folder / "material")
        cases = [case for case in all_cases(material) if not arguments or any(part in case.name for part in arguments)]
        outcomes = run_all(cases, folder, num_workers=int(os.environ.get("DAMAGE_WORKERS", "1")))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for outcome in outcomes:
        if not outcome.is_right:
            last = outcome.output.strip().splitlines()[-1:] or [""]
            print(f"{outcome.verdict:<17} {outcome.case:<60} {last[0][:160]}")
    report = Path(os.environ.get("DAMAGE_REPORT", os.devnull))
    report.write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=1), encoding="utf-8")
    print(json.dumps(Counter(outcome.verdict for outcome in outcomes), sort_keys=True))
    num_wrong = sum(not outcome.is_right for outcome in outcomes)
    print(f"{len(outcomes)} cases, {num_wrong} faults, {max(o.seconds for o in outcomes):.1f} s the longest")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
