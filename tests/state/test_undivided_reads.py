"""Entries of `opt.state[p]` that have no rows are read as torch's own tensors are."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from selective import Cautious, SelectiveUpdate, Soap
from selective.state.undivided import Undivided

ENTRIES = {
    "float": torch.tensor(2.5), "count": torch.tensor(3), "flag": torch.tensor(True),
    "bfloat16": torch.tensor(2.5, dtype=torch.bfloat16), "one": torch.tensor([1.5]), "basis": torch.eye(2),
    "bytes": torch.zeros(4, dtype=torch.uint8), "nothing": torch.zeros(0),
}  # fmt: skip
READS: dict[str, Callable[[Any], Any]] = {
    "format .2e": lambda x: f"{x:.2e}", "format": lambda x: f"{x}", "format d": lambda x: f"{x:d}",
    "str.format": "{:>8}".format,
    "int": int, "float": float, "bool": bool, "complex": complex, "index": operator.index, "repr": repr, "str": str,
    "item in json": lambda x: json.dumps(x.item()), "list in json": lambda x: json.dumps(x.tolist()),
    "asarray": np.asarray, "array of another dtype": lambda x: np.asarray(x, dtype=np.float32),
    "numpy": lambda x: x.numpy(), "dlpack": torch.from_dlpack, "iterate": list, "len": len,
    "compare": lambda x: bool((x == x).all()), "power": lambda x: 0.9**x, "shape": lambda x: (x.shape, x.dtype),
    "larger of two": lambda x: max(x, x * 0),
}  # fmt: skip


for _old_format in ("%s", "%d", "%.3f"):
    READS[_old_format] = partial(operator.mod, _old_format)


def read(how: Callable[[Any], Any], entry: Tensor) -> Any:
    """The result, or the kind of error, as plain data of one type."""
    try:
        result = how(entry)
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error)
    if isinstance(result, list):
        return [torch.as_tensor(x).tolist() for x in result]
    if isinstance(result, (Tensor, np.ndarray)):
        return str(result.dtype), result.tolist()
    return type(result), result


@pytest.mark.parametrize("how", READS.values(), ids=READS)
def test_an_entry_is_read_as_a_tensor_is(how: Callable[[Any], Any]) -> None:
    for name, plain in ENTRIES.items():
        assert read(how, Undivided.of(plain)) == read(how, plain), name


def test_an_entry_of_a_real_state_is_formatted_as_a_number() -> None:
    p = torch.nn.Parameter(torch.ones(4, 4))
    opt = SelectiveUpdate(torch.optim.AdamW([p]), policy=Cautious(), preconditioner=Soap())
    p.grad = torch.eye(4)
    for _ in range(2):  # the first makes the basis
        opt.step()
    shown = {key: f"{value:.2e}" for key, value in opt.state[p].items() if value.dim() == 0}
    assert shown["step"] == "1.00e+00"
    assert any(isinstance(opt.state[p][key], Undivided) for key in shown)  # the failing twin: torch's own refuses
    with pytest.raises(TypeError, match="unsupported format string"):
        Tensor.__format__(Undivided.of(torch.tensor(2.5)), ".2e")


def test_a_placeholder_says_so_and_is_no_number() -> None:
    row: Any = Undivided.of(torch.eye(2))[0]
    assert row.cut_up and repr(row) == "Undivided([1., 0.])"
    with pytest.raises(RuntimeError, match="ambiguous"):
        bool(row)
    assert float(row[0]) == 1.0 and f"{row[0]:.1f}" == "1.0"
