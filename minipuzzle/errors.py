"""User-facing errors: what is wrong, how to mend it, and the exit code that scripts can rely on."""

from __future__ import annotations

import warnings
from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes, stable across releases."""

    DONE = 0
    USER_ERROR = 1
    USAGE = 2  # click's own code for wrong options
    INFEASIBLE = 3
    INPUT_CHANGED = 4
    NOT_OK = 5  # what was verified is not what it should be
    GOT_WORSE = 6  # a training ended with a student that is worse than before
    INTERRUPTED = 130


class MinipuzzleError(Exception):
    """A mistake the user can mend. Printed as problem and hint, without a traceback.

    Both name fields of settings, marked like ‹memory›, which the command line turns into its options.

    Bugs are not MinipuzzleErrors: they hit asserts and keep their traceback.
    """

    exit_code = ExitCode.USER_ERROR

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint


class MinipuzzleWarning(Warning):
    """What a user should know and need not mend; the command line prints it as a line of its own."""


def warn(message: str) -> None:
    """Say something that a user should know."""
    warnings.warn(message, MinipuzzleWarning, stacklevel=2)


class InfeasibleBudgetError(MinipuzzleError):
    """Nothing within the bounds of a search fits the budget, or what is to be written does not."""

    exit_code = ExitCode.INFEASIBLE


class NothingToPruneError(MinipuzzleError):
    """The model meets every limit as it is."""


class InputChangedError(MinipuzzleError):
    """An interrupted run cannot resume, because one of its inputs is no longer the same."""

    exit_code = ExitCode.INPUT_CHANGED


class GotWorseError(MinipuzzleError):
    """A training ended, and what it wrote is worse than what it began with, or holds no numbers."""

    exit_code = ExitCode.GOT_WORSE
