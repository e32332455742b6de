"""What student and teacher must have in common, found out before any weight or text is read."""

from __future__ import annotations

from distill.settings import DistillSettings
from minipuzzle.cut.plan import PLAN_FILE, read_plan
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.checkpoint import Checkpoint

GIVE_TEACHER = "give the model it was cut from with ‹teacher›"


def kept_hidden_channels(student: Checkpoint, teacher: Checkpoint, settings: DistillSettings) -> tuple[int, ...] | None:
    """The teacher's hidden channels that the student has, for a hidden loss; None where all, or there is no such loss.

    Raises: MinipuzzleError if the widths differ and the student's folder does not say what was kept, or the teacher's
    hidden states would not be there.
    """
    if settings.hidden_weight == 0:
        return None
    if settings.top_k:
        raise MinipuzzleError(
            "a hidden loss needs the teacher's hidden states, and top-k targets do without",
            "drop ‹hidden_weight›, or ‹top_k› and ‹teacher_cache›",
        )
    widths = student.architecture.hidden, teacher.architecture.hidden
    if widths[0] == widths[1]:
        return None
    path = student.folder / PLAN_FILE
    kept = read_plan(path).units("hidden", None) if path.is_file() else None
    if kept is None or len(kept) != widths[0] or max(kept) >= widths[1]:
        raise MinipuzzleError(
            f"hidden sizes are {widths[0]:,} and {widths[1]:,}: {student.folder} does not say which channels it kept",
            f"drop ‹hidden_weight›, or put the {PLAN_FILE} of the cut beside the student's weights",
        )
    return kept
