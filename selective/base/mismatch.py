"""The error for a checkpoint that is not of this optimizer."""

from __future__ import annotations

from typing import Any


class CheckpointMismatch(ValueError):
    """A checkpoint that is not of this optimizer, or is broken. When it is raised, nothing was loaded.

    Args:
        found: a clause that says what is wrong ("the checkpoint has no 'state'").
        advice: a sentence that says what to do about it.
        long: `found` is a sentence of its own, and `advice` is the clause that goes on after "Nothing was loaded".
    """

    def __init__(self, found: str, advice: str = "", long: bool = False) -> None:
        self.said: tuple[str, str, bool] = found, advice, long
        text = f"SelectiveUpdate: {found}; nothing was loaded" + (f". {advice}" if advice else "")
        super().__init__(f"SelectiveUpdate: {found}. Nothing was loaded; {advice}" if long else text)

    def __reduce__(self) -> Any:
        return type(self), self.said
