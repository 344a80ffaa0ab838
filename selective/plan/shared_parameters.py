"""Refuse to mask or rotate a parameter that is there more than once, or that shares memory with another one.

torch steps each occurrence, one after the other: the second reads what the first one wrote. Here updates are captured
of all parameters at once, and masked after that. What the first occurrence moved would be a part of the second one's
update, and be masked twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from selective.parameter import Parameter, is_lazy

_PLAIN = (Tensor, torch.nn.Parameter)


def check_sharing(parameters: Sequence[Parameter], ours: Sequence[bool]) -> None:
    """Refuse a parameter that is named twice, and two that share elements, where one of both is masked or rotated.

    `ours[i]` is True if parameter i is masked or rotated.
    """
    first: dict[int, int] = {}
    for number, parameter in enumerate(parameters):
        before = first.setdefault(id(parameter.tensor), number)
        if before != number and (ours[before] or ours[number]):
            raise ValueError(
                f"SelectiveUpdate: parameter {parameters[before].name!r} is named a second time, as "
                f"{parameter.name!r}: torch would step it twice in each step, and a mask of both updates together has "
                f"no meaning. Name it once, or give all groups that name it policy and preconditioner None"
            )
    for a, b in _sharing([parameters[number] for number in first.values()]):
        if ours[first[id(a.tensor)]] or ours[first[id(b.tensor)]]:
            raise ValueError(
                f"SelectiveUpdate: parameters {a.name!r} of shape {tuple(a.tensor.shape)} and {b.name!r} of shape "
                f"{tuple(b.tensor.shape)} share memory: each would be stepped on what the other one has moved. Use one "
                f"nn.Parameter in both places, copy one of them (p.data = p.data.clone()), or give the groups of both "
                f"policy and preconditioner None"
            )


def _sharing(parameters: Sequence[Parameter]) -> Iterator[tuple[Parameter, Parameter]]:
    """Iterate over the pairs with an element in common."""
    spans: list[tuple[torch.device, int, int, int]] = []
    for number, parameter in enumerate(parameters):
        p = parameter.tensor
        if type(p) in _PLAIN and not is_lazy(p) and p.numel() and p.data_ptr():
            spans.append((p.device, p.data_ptr(), p.data_ptr() + _extent(p), number))
    spans.sort(key=lambda span: (str(span[0]), span[1]))
    reaching: list[tuple[torch.device, int, int, int]] = []
    for span in spans:
        device, start, _, number = span
        reaching = [one for one in reaching if one[0] == device and one[2] > start]
        for one in reaching:
            if _have_one_in_common(parameters[one[3]].tensor, parameters[number].tensor):
                yield parameters[one[3]], parameters[number]
        reaching.append(span)


def _extent(tensor: Tensor) -> int:
    """Return the number of bytes from the first element to the end of the last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _have_one_in_common(a: Tensor, b: Tensor) -> bool:
    """True if two tensors whose extents overlap have a byte in common: columns of one matrix don't."""
    begin = min(a.data_ptr(), b.data_ptr())
    end = max(a.data_ptr() + _extent(a), b.data_ptr() + _extent(b))
    marks = torch.zeros(end - begin, dtype=torch.bool, device="cpu")
    _bytes_of(a, marks, begin).fill_(True)
    return bool(_bytes_of(b, marks, begin).any())


def _bytes_of(tensor: Tensor, marks: Tensor, begin: int) -> Tensor:
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    return marks.as_strided([*tensor.shape, size], [*strides, 1], tensor.data_ptr() - begin)
