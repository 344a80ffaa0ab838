"""The error for a checkpoint that is not of this optimizer."""

from __future__ import annotations


class CheckpointMismatch(ValueError):
    """A checkpoint that is not of this optimizer, or is broken. When it is raised, nothing was loaded.

    Args:
        found: a clause that says what is wrong ("the checkpoint has no 'state'").
        advice: a sentence that says what to do about it.
        long: `found` is a sentence of its own, and `advice` is the clause that goes on after "Nothing was loaded".
    """

    def __init__(self, found: str, advice: str = "", long: bool = False) -> None:
        super().__init__(found, advice, long)  # as they came: copies of an exception are made from its arguments
        self.found, self.advice, self.long = found, advice, long

    def __str__(self) -> str:
        if self.long:
            return f"SelectiveUpdate: {self.found}. Nothing was loaded; {self.advice}"
        return f"SelectiveUpdate: {self.found}; nothing was loaded" + (f". {self.advice}" if self.advice else "")
