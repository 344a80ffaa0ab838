"""Names of policies as people write them: in any case, with hyphens. The registered name wins."""

from __future__ import annotations

import pytest

from selective.policies import MGUP, Cautious, CautiousMGUP, Policy, TopK, policy_from


@pytest.mark.parametrize("name", ["mgup", "Mgup", " MGUP", "cautious-mgup", "cautious_mgup", "CAUTIOUS MGUP"])
def test_names_may_be_written_as_people_write_them(name: str) -> None:
    expected = CautiousMGUP(alpha=1.5) if "c" in name.lower() else MGUP(alpha=1.5)
    policy = policy_from({"kind": name, "alpha": 1.5})
    assert policy == expected
    assert policy.model_dump()["kind"] == expected.kind  # a checkpoint has the kind's own name


def test_parts_too() -> None:
    policy = policy_from({"kind": "policy", "selection": {"kind": "topk", "fraction": 0.2}, "strength": "fixed"})
    assert policy.parts()[0] == TopK(fraction=0.2)  # type: ignore[index]


def test_names_that_differ_in_case_only_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Policy, "_registry", {**Policy._registry, "mGUP": Cautious})
    assert policy_from("MGUP") == MGUP()
    with pytest.raises(ValueError, match=r"kind 'mgup' can be 'MGUP' or 'mGUP'; write it as there"):
        policy_from("mgup")
