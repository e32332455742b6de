"""Our loader as a model of lm-eval (EleutherAI's harness, 0.4.9 or later), whose tasks then run on any folder of ours.

lm-eval looks for models of other packages nowhere, so ``minipuzzle-lm-eval`` is its command line with ours registered:
``minipuzzle-lm-eval run --model minipuzzle --model_args pretrained=FOLDER --tasks piqa``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minipuzzle.abilities.local import LocalModel, encode_pair
from minipuzzle.data.windows import document_tokens
from minipuzzle.devices import Device, checked_device
from minipuzzle.errors import MinipuzzleError
from minipuzzle.export.reader import load_any_model
from minipuzzle.files.checkpoint import Checkpoint
from minipuzzle.runtime.compute import Compute
from minipuzzle.runtime.models import load_tokenizer

NAME = "minipuzzle"  # as lm-eval calls it
_MAX_TOKENS = 256  # of an answer, where a task does not say
_CONTEXT_TOKENS = 2048  # where config.json does not say


def require_lm_eval() -> None:
    """Refuse what needs lm-eval where there is none.

    Raises: MinipuzzleError naming the extra.
    """
    if find_spec("lm_eval") is None:
        raise MinipuzzleError("lm-eval is not installed", "pip install 'minipuzzle[eval]'")


def open_local(folder: Path | Checkpoint, compute: Compute) -> LocalModel:
    """A folder of any kind, loaded to be asked.

    Raises: MinipuzzleError if it cannot be read.
    """
    checkpoint = folder if isinstance(folder, Checkpoint) else Checkpoint.open(folder)
    tokenizer = load_tokenizer(checkpoint.folder)
    return LocalModel(load_any_model(checkpoint, compute), tokenizer, checkpoint.family, compute)


class Harnessed:
    """``pretrained``: a folder. ``dtype``, ``device``: as of `minipuzzle evaluate`; batches are made by length."""

    def __init__(self, pretrained: str, dtype: str = "", device: str | None = None, **_batching: Any) -> None:
        super().__init__()  # lm-eval's own
        name = checked_device(device)
        compute = Compute(device=name, dtype=dtype or Device(name).best_dtype)
        checkpoint = Checkpoint.open(Path(pretrained))
        self._model = open_local(checkpoint, compute)
        self._context = int(checkpoint.config.get("max_position_embeddings") or _CONTEXT_TOKENS)

    @property
    def tokenizer_name(self) -> str:
        """What request caches are kept under."""
        return str(self._model.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's own template spells it."""
        return str(
            self._model.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template, which lm-eval writes into its results."""
        return str(self._model.tokenizer.chat_template or "")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each continuation after its context, and whether greedy decoding gives it."""
        return self._model.score_tokens([encode_pair(self._model.tokenizer, *request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of whole texts, window by window where they are longer than the context."""
        return [sum(one for one, _ in self._model.score_tokens(self._windows(*r.args))) for r in requests]

    def _windows(self, text: str) -> list[tuple[list[int], int]]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        tokenizer = self._model.tokenizer
        tokens, opening = document_tokens(tokenizer, text), document_tokens(tokenizer, "")
        prefix = opening[0] if opening else tokenizer.eos_token_id
        windows = get_rolling_token_windows(tokens[len(opening) :], prefix, self._context, 1)
        return [(given + new, len(given)) for given, new in map(make_disjoint_window, windows)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers up to what ends them."""
        answers = []
        for prompt, how in (request.args for request in requests):
            until = how.get("until") or ()
            answers += self._model.complete(
                [prompt],
                max_tokens=int(how.get("max_gen_toks", _MAX_TOKENS)),
                stop=(until,) if isinstance(until, str) else tuple(until),
                temperature=float(how.get("temperature", 0.0)) if how.get("do_sample") else 0.0,
            )
        return answers


@cache
def harness_model() -> type[Any]:
    """The class that lm-eval makes its model of, registered there as ``minipuzzle``.

    Raises: MinipuzzleError where lm-eval is not installed.
    """
    require_lm_eval()
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model

    made: type[Any] = register_model(NAME)(type("MinipuzzleLM", (Harnessed, LM), {}))
    return made


def run_harness(
    model: str, tasks: Sequence[str], *, limit: int | None = None, folder: Path | None = None, compute: Compute
) -> Mapping[str, Mapping[str, Any]]:
    """What lm-eval measures of a folder: by task, its figures by name. ``folder``: of task files of the user's.

    Raises: MinipuzzleError where lm-eval is not installed, or does not know a task.
    """
    made = harness_model()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise MinipuzzleError(f"lm-eval has no task {unknown[0]!r}", "`minipuzzle-lm-eval ls tasks` lists them")
    found = simple_evaluate(
        model=made(model, dtype=compute.dtype, device=compute.device),
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
    )
    results: dict[str, dict[str, Any]] = json.loads(json.dumps(found["results"], default=str))
    return results


def main() -> None:
    """lm-eval's command line, with ours among its models."""
    try:
        harness_model()
    except MinipuzzleError as error:
        sys.exit(f"error: {error.problem}\nhint:  {error.hint}")
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
