"""SmolLM2-135M cut to 80 % of its memory, distilled for 20 CPU minutes, exported and evaluated, by the real commands.

Each step's output is a folder or file that appears whole; a step whose output is there is not done again, and the
commands themselves continue where they were stopped. The table goes to results.md beside this script.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from material import ROOT, model_folder
from page import write_page
from texts import DOMAINS, write_texts

from minipuzzle.files.json_files import read_json, write_json
from minipuzzle.files.outputs import output_file

THREADS = "OMP_NUM_THREADS"  # one unless the user says else: waiting threads would count as CPU time
MEMORY = "80%"
SAMPLING = "--samples 64 --sequence-length 128"
SCORING = "--samples 8 --channel-samples 64 --sequence-length 128"
# results.md is of a cut whose weights are the source's; what the refit gains is in ../benchmarks/compensation.md.
CHOOSING = "--metric kl --candidates 3 --sequence-length 256 --no-compensate"
EVALUATING = "--max-tokens 4000 --sequence-length 512"
DISTILLING = (
    "--tokens 51200 --sequence-length 256 --batch 1 --learning-rate 3e-4 --warmup-fraction 0.05 --save-every 12"
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command and what it leaves; ``prints``: on standard output."""

    name: str
    output: Path
    command: tuple[str, ...]
    prints: bool = False


def steps(model: Path, texts: Path, work: Path) -> list[Step]:
    """The whole path, in order."""
    calibration, training, validation = (
        str(texts / f"{name}.jsonl") for name in ("calibration", "training", "validation")
    )
    scores, pruned, distilled = work / "scores.safetensors", work / "pruned", work / "distilled"
    commands = {
        scores: ["score", str(model), "--data", calibration, *SCORING.split()],
        pruned: [
            "prune",
            str(model),
            "--memory",
            MEMORY,
            "--scores",
            str(scores),
            "--validation",
            validation,
            *CHOOSING.split(),
        ],
        distilled: ["distill", str(pruned), "--data", training, *DISTILLING.split()],
        work / "bf16": ["export", str(distilled), "--bf16"],
        work / "fp8": ["export", str(distilled), "--fp8", "--data", calibration, *SAMPLING.split()],
    }
    found = [Step(name=out.stem, output=out, command=(*words, "-o", str(out))) for out, words in commands.items()]
    held_out = [word for domain in DOMAINS for word in ("--data", str(texts / f"heldout_{domain}.jsonl"))]
    for name, folder in {"original": model, "pruned": pruned, "distilled": distilled, "fp8": work / "fp8"}.items():
        against = [] if folder == model else ["--against", str(model)]
        command = ("evaluate", str(folder), *held_out, *EVALUATING.split(), *against, "--json")
        found.append(Step(name=f"evaluate {name}", output=work / f"text_{name}.json", command=command, prints=True))
        out, script = work / f"tasks_{name}.json", str(Path(__file__).with_name("ask.py"))
        found.append(Step(name=f"ask {name}", output=out, command=(script, str(folder), str(out))))
    return found


def run_step(step: Step, times: Path) -> None:
    """Run a step and add what it took to the file of times, also if it is interrupted."""
    start_seconds, start_cpu_seconds = time.monotonic(), children_cpu_seconds()
    is_script = step.command[0].endswith(".py")
    command = [sys.executable, *(() if is_script else ("-m", "minipuzzle")), *step.command]
    try:
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE if step.prints else None)
        if step.prints:
            with output_file(step.output) as path:
                path.write_bytes(found.stdout)
    finally:
        known = read_times(times)
        spent = known.get(step.name, {"seconds": 0.0, "cpu_seconds": 0.0})
        spent["threads"] = float(os.environ[THREADS])
        spent["seconds"] += time.monotonic() - start_seconds
        spent["cpu_seconds"] += children_cpu_seconds() - start_cpu_seconds
        write_json(times, {**known, step.name: spent})


def children_cpu_seconds() -> float:
    """CPU time of all finished child processes, user and system."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def read_times(path: Path) -> dict[str, dict[str, float]]:
    """Seconds, CPU seconds and threads by step."""
    return read_json(path) if path.is_file() else {}


def main() -> None:
    """Do what is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "smollm2_output")
    parser.add_argument("--until", help="stop after this step")
    arguments = parser.parse_args()
    os.environ.setdefault(THREADS, "1")
    work: Path = arguments.folder
    work.mkdir(parents=True, exist_ok=True)
    model, texts = model_folder(), write_texts(work / "text")
    for step in steps(model, texts, work):
        if not step.output.exists():
            print(f"» {step.name}", file=sys.stderr, flush=True)
            run_step(step, work / "times.json")
        if step.name == arguments.until:
            break
    write_page(work, model, Path(__file__).with_name("results.md"), read_times(work / "times.json"))


if __name__ == "__main__":
    main()
