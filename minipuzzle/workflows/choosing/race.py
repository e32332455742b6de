"""The race of finalists: each is cut, mended and distilled for a while; the winner keeps its trained weights."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from distill.race import finalist_table, run_race
from minipuzzle.cut.plan import PLAN_FILE, read_plan
from minipuzzle.data.windows import EvaluationWindows
from minipuzzle.files.digests import checked_record, unchanged_record
from minipuzzle.files.json_files import read_json, write_json
from minipuzzle.files.outputs import PROVENANCE_FILE, output_file
from minipuzzle.workflows.choosing.compare import Choice, ChoosingSettings, Problem, compare
from minipuzzle.workflows.compensation import COMPENSATION_FILE, CutWriter

CANDIDATES_FILE = "candidates.json"
FINALISTS_FOLDER = "finalists"


def race_finalists(
    problem: Problem,
    choosing: ChoosingSettings,
    training_data: Sequence[Path],
    windows: EvaluationWindows,
    folder: Path,
    writer: CutWriter,
) -> Choice:
    """Compare, cut the finalists, race them and put the winner's trained weights into ``folder``.

    What is finished lies in ``folder/finalists/``: the table once all finalists are cut, then the race's own work.
    """
    work = folder / FINALISTS_FOLDER
    table_file = work / CANDIDATES_FILE
    if not table_file.is_file():
        found = compare(problem, windows, choosing, writer.compute, writer.measure_on(windows))
        for number, item in enumerate(found.finalists):
            shutil.rmtree(work / str(number), ignore_errors=True)
            (work / str(number)).mkdir(parents=True)
            writer.write(item.plan, work / str(number))
        finalists = [{**item.figures.to_json(), "before": item.measured()} for item in found.finalists]
        with output_file(table_file) as path:
            write_json(path, checked_record({**found.to_json(), "finalists": finalists}))
    table = unchanged_record(read_json(table_file), str(table_file))
    folders = [work / str(number) for number in range(len(table["finalists"]))]
    assert choosing.race is not None
    result = run_race(
        folders,
        teacher=problem.checkpoint,
        data=training_data,
        validation=windows,
        settings=choosing.race,
        folder=work / "race",
        compute=writer.compute,
    )
    for path in result.winner_folder.iterdir():
        if path.is_file() and path.name != PROVENANCE_FILE:
            shutil.copyfile(path, folder / path.name)
    for name in (PLAN_FILE, *((COMPENSATION_FILE,) if writer.token_ids is not None else ())):
        shutil.copyfile(folders[result.winner] / name, folder / name)
    table["finalists"] = finalist_table(table["finalists"], result)
    compensation = read_json(folder / COMPENSATION_FILE) if writer.token_ids is not None else {}
    return Choice(plan=read_plan(folder / PLAN_FILE), table=table, is_trained=True, compensation=compensation)
