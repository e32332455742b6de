"""What a cut was made for: it travels in the folder's minipuzzle.json, so that later steps keep to its budget."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minipuzzle.architecture.memory import Deployment
from minipuzzle.architecture.quantities import format_gib
from minipuzzle.cut.plan import Plan
from minipuzzle.errors import InfeasibleBudgetError, MinipuzzleError
from minipuzzle.files.json_files import read_json, record_of
from minipuzzle.files.outputs import PROVENANCE_FILE

MADE_FOR = "made_for"  # in minipuzzle.json


@dataclass(frozen=True, kw_only=True)
class ServingBudget:
    """How a model will be served, and in how many bytes of weights, caches and states; None where nobody said."""

    deployment: Deployment
    budget_bytes: int | None = None

    def require(self, needed_bytes: int, what: str, hint: str) -> None:
        """Refuse what takes more than the budget.

        Raises: InfeasibleBudgetError with both numbers.
        """
        if self.budget_bytes is not None and needed_bytes > self.budget_bytes:
            raise InfeasibleBudgetError(
                f"{what} would take {format_gib(needed_bytes)} at context {self.deployment.context_tokens:,} and batch "
                f"{self.deployment.batch}, but the model was cut for {format_gib(self.budget_bytes)} with "
                f"weights in {self.deployment.weights} and the KV cache in {self.deployment.kv_cache}",
                f"{hint}, or pass ‹over_budget›",
            )


def budget_of_plan(plan: Plan) -> ServingBudget | None:
    """What a plan was searched for; None for a plan that says nothing of it."""
    if plan.figures is None:
        return None
    limit = plan.figures.limits.get("memory_bytes")
    return ServingBudget(deployment=plan.figures.deployment, budget_bytes=None if limit is None else int(limit))


def read_serving_budget(folder: Path) -> ServingBudget | None:
    """What the model in a folder was cut for; None where its minipuzzle.json, if any, says nothing of it.

    Raises: MinipuzzleError for a damaged record.
    """
    path = folder / PROVENANCE_FILE
    made_for = read_json(path).get(MADE_FOR) if path.is_file() else None
    if made_for is None:
        return None
    try:
        return record_of(ServingBudget, made_for, MADE_FOR)
    except (ValueError, MinipuzzleError) as error:
        raise MinipuzzleError(f"{path} is damaged: {error}", f"remove {MADE_FOR} from it, or cut again") from None


def inherited(folder: Path) -> dict[str, Any]:
    """What a step's own minipuzzle.json says of the budget of the model it began with.

    Raises: MinipuzzleError for a damaged record.
    """
    made_for = read_serving_budget(folder)
    return {} if made_for is None else {MADE_FOR: asdict(made_for)}
