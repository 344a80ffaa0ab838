"""Attributes that a user may try to set on a chain, and that belong to its members."""

from __future__ import annotations

import pytest
from chains import muon_and_adamw, net

from selective import Cautious


@pytest.mark.parametrize("name", ["policy", "preconditioner", "on_nonfinite", "seed"])
def test_what_belongs_to_the_members_is_not_assigned_to_the_chain(name: str) -> None:
    opt = muon_and_adamw(net())
    with pytest.raises(AttributeError, match=f"ChainedOptimizer: opt.{name} can't be assigned; each"):
        setattr(opt, name, Cautious())
    assert not hasattr(opt, name)
