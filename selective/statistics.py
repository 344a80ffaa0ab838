"""Statistics of a step for each parameter: share selected, strengths, cosine, norms. They stay on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from selective.kernels import spec

NAMES = ("share", "strength_selected", "strength_rest", "cosine", "norm_before", "norm_after")


class StepStatistics:
    """Collects the sums of one step, and computes the statistics when `read` is called."""

    def __init__(self) -> None:
        self._sums: list[tuple[Sequence[str], Sequence[spec.Sums]]] = []
        self._bases: list[tuple[Sequence[str], Callable[[], list[dict[str, Tensor]]]]] = []

    def add(self, name: str, sums: spec.Sums) -> None:
        self._sums.append(([name], [sums]))

    def add_all(self, names: Sequence[str], sums: Sequence[spec.Sums]) -> None:
        """Add many tensors' sums, in the order of their names. They are kept as they are, to save time in the step."""
        self._sums.append((names, sums))

    def add_masked(self, name: str, mask: Tensor, update: Tensor, grad: Tensor | None) -> None:
        """Add the sums of a mask that a policy returned. Its largest multiplier counts as that of the selected."""
        self.add(name, sums_of_mask(mask, update, grad))

    def add_bases(self, names: Sequence[str], report: Callable[[], list[dict[str, Tensor]]]) -> None:
        """Add rotated parameters. `read` calls their `report`, which describes the bases as they are then."""
        self._bases.append((names, report))

    def read(self) -> dict[str, dict[str, Tensor]]:
        """The statistics of each parameter by name, as 0-d float32 tensors on its device:

        - `share`: the share of its coordinates that was selected (0 to 1);
        - `strength_selected`, `strength_rest`: the two multipliers;
        - `cosine`: of update and gradient (0 where either is zero; NaN where the policy does not read the gradient);
        - `norm_before`, `norm_after`: the L2 norms of the update before and after the mask.

        They refer to the space in which the mask was made. Rotated parameters also have the numbers that their
        preconditioner reports, and `basis_skipped`: the number of gradients since training began that were not finite
        and were kept out of the basis.
        """
        by_name: dict[str, dict[str, Tensor]] = {}
        for names, sums in self._sums:
            rows = (
                _statistics_of_table(sums)
                if isinstance(sums, spec.SumsTable)
                else [_statistics_of(tensor_sums, tensor_sums.numel) for tensor_sums in sums]
            )
            by_name.update(zip(names, rows, strict=True))
        for names, report in self._bases:
            for name, reported in zip(names, report(), strict=True):
                by_name.setdefault(name, {}).update(reported)
        return by_name


def _statistics_of_table(table: spec.SumsTable) -> list[dict[str, Tensor]]:
    """The statistics of all tensors of a table, computed in a few operations on whole columns."""
    numels = torch.tensor([max(numel, 1) for numel in table.numels], dtype=torch.float64, device="cpu")
    values = table.values
    if values.is_cuda:  # from pinned memory, so that the host does not wait for the copy
        numels = numels.pin_memory().to(values.device, non_blocking=True)
    columns = _statistics_of(spec.Sums(1, *values.unbind(1)), numels)
    rows = torch.stack(list(columns.values()), dim=1)
    return [dict(zip(columns, row.unbind(), strict=True)) for row in rows]


def _statistics_of(sums: spec.Sums, numel: int | Tensor) -> dict[str, Tensor]:
    """The statistics of these sums, which are 0-d tensors or columns of a table."""
    product = (sums.update_sq * sums.grad_sq).sqrt()
    cosine = torch.where(product > 0, sums.update_grad / torch.where(product > 0, product, 1.0), product)
    values = (
        sums.selected / (numel if isinstance(numel, Tensor) else max(numel, 1)),
        sums.strength_selected,
        sums.strength_rest,
        cosine,
        sums.update_sq.sqrt(),
        sums.masked_sq.sqrt(),
    )
    return {name: value.to(torch.float32) for name, value in zip(NAMES, values, strict=True)}


def sums_of_mask(mask: Tensor, update: Tensor, grad: Tensor | None) -> spec.Sums:
    """The sums of an arbitrary mask, in the form that a fused kernel reports. Never waits for a GPU.

    The coordinates with the largest multiplier count as selected; if every multiplier is 0, none does.
    """
    numel = update.numel()
    multiplier = mask.to(update.dtype).expand(update.shape)
    double = torch.float64
    zero = torch.zeros((), dtype=double, device=update.device)
    nan = torch.full((), float("nan"), dtype=double, device=update.device)
    if numel == 0:
        return spec.Sums(0, zero, zero + 1, zero + 1, zero, zero, zero, zero)
    largest = multiplier.max()
    selected = (multiplier == largest) & multiplier.any()
    count = selected.sum(dtype=double)
    rest = (multiplier.sum(dtype=double) - largest * count) / (numel - count).clamp(min=1)
    return spec.Sums(
        numel=numel,
        selected=count,
        strength_selected=largest.to(double),
        strength_rest=torch.where(count < numel, rest, largest.to(double)),
        update_sq=update.square().sum(dtype=double),
        grad_sq=nan if grad is None else grad.square().sum(dtype=double),
        update_grad=nan if grad is None else (update * grad).sum(dtype=double),
        masked_sq=(multiplier * update).square().sum(dtype=double),
    )
