"""Checkpoints that an earlier version wrote load, and go on as they did there."""

import copy
from typing import Any

import pytest
import torch
from state_cases import values
from stored_checkpoints import CASES, FILE, SAVED, fingerprint, go_on, put, train

EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8}


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    return torch.load(FILE, weights_only=True)


def test_the_file_holds_every_case(stored):
    assert stored["cases"].keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_stored_checkpoint_goes_on(name, stored):
    case, opt = stored["cases"][name], CASES[name]()
    put(opt, case["parameters"])
    opt.load_state_dict(copy.deepcopy(case["state_dict"]))
    assert_same_form(opt.state_dict(), case["state_dict"])
    go_on(name, opt)
    here = torch.equal(fingerprint(), stored["fingerprint"]) and name != "rotated, delta"  # from another processor
    for mine, theirs in zip(values(opt), case["end"], strict=True):
        # Bit for bit where this machine and this torch round as those did that wrote the file. Elsewhere four steps of
        # a few roundings of numbers below 8, and what a product of 8 terms adds.
        atol = 0 if here else 8 * 64 * EPS[theirs.dtype]
        torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("name", CASES)
def test_this_version_writes_the_same_form(name, stored):
    opt = CASES[name]()
    train(opt, 0, SAVED)
    assert_same_form(opt.state_dict(), stored["cases"][name]["state_dict"], bits=False)


def assert_same_form(ours: Any, theirs: Any, bits: bool = True) -> None:
    """The same keys in the same order, kinds, shapes and dtypes; and, if `bits`, the same values.

    Numbers of parameters may come in another order: it is that in which their state was made.
    """
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        by_number = all(isinstance(key, int) for key in theirs)
        assert (sorted if by_number else list)(ours) == (sorted if by_number else list)(theirs)
        for key in ours:
            assert_same_form(ours[key], theirs[key], bits)
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same_form(a, b, bits)
    elif isinstance(ours, torch.Tensor):
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
        assert not bits or torch.equal(ours, theirs)
    else:
        assert ours == theirs
