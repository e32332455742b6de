"""HumanEval (2107.03374): a model writes the body of a function, and the tests of the problem are run on it."""

from __future__ import annotations

import random

from minipuzzle.abilities.items import Item, Sampling, Task
from minipuzzle.abilities.tasks.choices import read_records
from minipuzzle.abilities.tasks.sandbox import PASSED, require_confinement, run_program
from minipuzzle.errors import MinipuzzleError

# A function's body has ended where the next thing begins at the margin.
_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```", "\n@", "\nassert ")
_FIELDS = ("prompt", "test", "entry_point")
_MAX_TOKENS = 384


def _items(sampling: Sampling) -> list[Item]:
    assert sampling.data is not None
    require_confinement()
    records = list(read_records(sampling.data))
    items = []
    for number, record in random.Random(f"{sampling.seed}").sample(records, len(records))[: sampling.num_items]:
        missing = [name for name in _FIELDS if not isinstance(record.get(name), str)]
        if missing:
            raise MinipuzzleError(f"{sampling.data}:{number} has no {missing[0]}", "give HumanEval.jsonl")
        facts = {name: record[name] for name in _FIELDS}
        name = str(record.get("task_id", number))
        items.append(Item(name=name, prompt=record["prompt"], stop=_STOPS, max_tokens=_MAX_TOKENS, facts=facts))
    return items


def whole_program(item: Item, answer: str) -> str:
    """The function with a body, its tests, and the call that runs them."""
    facts = item.facts
    return f"{facts['prompt']}{answer}\n\n{facts['test']}\n\ncheck({facts['entry_point']})\n"


def _score(item: Item, answer: str) -> float:
    return float(run_program(whole_program(item, answer)) == PASSED)


HUMANEVAL = Task(
    description="a Python function by its docstring; right if it passes its tests (pass@1)",
    items=_items,
    score=_score,
    needs_data=True,
)
