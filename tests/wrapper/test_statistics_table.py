"""Statistics that a kernel hands over as one table are those that it would hand over one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from selective import MGUP, Cautious, Magma, Policy, SelectiveUpdate
from selective.capture import kernel_calls
from selective.kernels.spec import SUM_NAMES, Sums, SumsTable
from selective.statistics import NAMES, StepStatistics


def table_of(sums: list[Sums]) -> SumsTable:
    rows = [torch.stack([getattr(one, name) for name in SUM_NAMES]) for one in sums]
    return SumsTable(torch.stack(rows), [one.numel for one in sums])


def trained(policy: Policy) -> SelectiveUpdate:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((8, 3), (5,), (0,), (1,), (2, 2))]
    optimizer = SelectiveUpdate(torch.optim.AdamW(params, lr=0.1), policy=policy)
    for _ in range(3):
        for index, p in enumerate(params):
            p.grad = torch.zeros_like(p) if index == 4 else torch.randn(p.shape, generator=generator)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("policy", [MGUP(), Cautious(), Magma()], ids=repr)
def test_a_table_reads_as_the_sums_one_by_one(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    one_by_one = trained(policy).statistics()
    real = kernel_calls.selective_steps
    tables: list[SumsTable] = []

    def as_tables(calls: Any) -> list[SumsTable]:
        tables.extend(table_of(sums) for sums in real(calls))
        return tables[-len(calls) :]

    monkeypatch.setattr(kernel_calls, "selective_steps", as_tables)
    read = trained(policy).statistics()
    assert len(tables) == 3
    assert list(read) == list(one_by_one) == [f"param_groups[0][{i}]" for i in range(5)]
    assert all(tuple(entry) == NAMES for entry in read.values())
    assert all(value.dtype == torch.float32 and value.dim() == 0 for e in read.values() for value in e.values())
    torch.testing.assert_close(read, one_by_one, rtol=0, atol=0, equal_nan=True)


def test_a_table_is_not_cut_up_before_somebody_looks() -> None:
    class Untouchable(SumsTable):
        def __getitem__(self, index):
            raise AssertionError("cut up")

        __iter__ = None  # type: ignore[assignment]

    values = torch.rand(3, len(SUM_NAMES), dtype=torch.float64)
    report = StepStatistics()
    report.add_all(["a", "b", "c"], Untouchable(values, [4, 4, 0]))
    values[1, 0] = 2.0  # the replay of a graph writes the same table
    assert report.read()["b"]["share"] == 0.5


def test_an_empty_table_reads_as_nothing() -> None:
    report = StepStatistics()
    report.add_all([], SumsTable(torch.zeros(0, len(SUM_NAMES), dtype=torch.float64), []))
    assert report.read() == {}
