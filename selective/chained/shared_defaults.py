"""SharedDefaults: `defaults` of a chain, from which torch's schedulers read whether there is a momentum to cycle."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


class SharedDefaults(dict[str, Any]):
    """The options that all members have, with the first member's values.

    torch's `OneCycleLR` and `CyclicLR` ask once for all groups: `"betas" in optimizer.defaults`. If the members have
    neither in common, torch's own error does not say what to do. So it is said here, to them only. A copy is a plain
    dictionary.
    """

    def __init__(self, *defaults: Mapping[str, Any]) -> None:
        first, *others = defaults
        super().__init__({key: value for key, value in first.items() if all(key in other for other in others)})

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        if key == "betas" and not super().__contains__("momentum") and _is_asked_by_a_scheduler():
            raise ValueError(
                "ChainedOptimizer: the momentum can't be cycled: for that all members must have 'betas', or all must "
                "have 'momentum'; pass cycle_momentum=False"
            )
        return False

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)


def _is_asked_by_a_scheduler() -> bool:
    asking = sys._getframe(2).f_globals.get("__name__")  # the caller of `__contains__`
    return asking == "torch.optim.lr_scheduler"
