"""Options of a search: limits, targets, bounds and layout, with the deployment that they hold for."""

from __future__ import annotations

from functools import wraps
from typing import Any

from minipuzzle.commands.options.generate import from_options, settings_options
from minipuzzle.commands.options.shared import Function, deployment_option_list, pop_deployment, with_options
from minipuzzle.search.request import SearchTargets


def search_options(function: Function) -> Function:
    """Limits, targets and bounds of a search with the deployment they hold for; passed on as ``request`` (None where
    nothing was asked) and ``deployment``. A named deployment brings its machine's budget, unless --memory says else."""

    @wraps(function)
    def with_request(**params: Any) -> Any:
        named = pop_deployment(params)
        budget = named.memory if params.get("plan_path") is None else None
        request = from_options(SearchTargets, params).request(budget, params.get("sweep"))
        return function(request=request, deployment=named.deployment, **params)

    decorated: Function = with_options(with_request, deployment_option_list())
    return settings_options(SearchTargets)(decorated)
