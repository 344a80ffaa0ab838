"""The parameters of one group as the last step saw them, and what follows from them while they are the same."""

from __future__ import annotations

from operator import is_
from typing import Any

import torch
from torch import Tensor

from selective.capture.choose import ParamKinds
from selective.kernels.layouts import PLAIN, Layouts, layouts_of
from selective.parameter import Parameter, is_lazy
from selective.plan.flattened import are_joined, shapes_of

_STRIDED = {torch.strided}


class GroupParams:
    """One group's parameters with address and name. Replaced by a new object when the parameter list changes.

    Changes are detected by identity and in plain lists, without tensor operations, because every step compares every
    parameter.
    """

    def __init__(self, group: dict[str, Any], number: int, address: int, before: GroupParams | None = None) -> None:
        self.tensors = list(group["params"])
        self.joined = before is not None and are_joined(before.shapes, self.tensors)  # into one flat vector
        # a stack that joins tensors may also empty them, so their shapes are those that they had when they came
        self.shapes = before.shapes if before is not None and self.joined else shapes_of(self.tensors)
        self.address = address
        self._names = list(group.get("param_names") or ())
        names = self._names or [f"param_groups[{number}][{i}]" for i in range(len(self.tensors))]
        self.parameters = [Parameter(p, address + i, names[i], number) for i, p in enumerate(self.tensors)]
        self._ids = {id(p) for p in self.tensors}
        # those that have come into the group since its state was checked
        self.arrived: set[Tensor] = set()
        if before is not None:
            self.arrived = {p for p in self.tensors if p in before.arrived or not before.has(p)}
        self._looked: tuple[list[Any], ...] = ()
        self._layouts: Layouts | None = None  # those that `_looked` has; None if a tensor is none of torch's own
        self._pointers: list[int] = []
        self._lazy, self._plain = True, [p for p in self.tensors if type(p) in PLAIN]
        self.old_shapes: dict[Tensor, torch.Size] = {}  # shapes that have changed since the state was checked
        self.kinds: ParamKinds = frozenset()
        self.devices: frozenset[torch.device] = frozenset()
        self._cuda_devices: frozenset[torch.device] = frozenset()
        self.device: torch.device | None = None  # the one that they are all on; None where there are several
        self.has_complex = False
        self.has_sparse = False  # among the gradients
        self.has_unfit = False  # among the gradients: True if one has another shape than its parameter
        self._grad_layouts: Layouts | None = None  # if all were there, strided and of the right shape, the last time
        self._flags: list[bool] = []  # which had a gradient, the last time that some had none ...
        self._present: list[Parameter] = []  # ... and those that had
        self.with_entries: list[Parameter] | None = None  # those whose entries in our state were made last
        self.dtypes_checked = False  # True if the base's state has the dtypes in which it steps: Note [whose precision]
        self.state_checked = False  # True if all state of these parameters fits them: state/check_before_step.py
        self.memory_changed = True  # True if their memory has changed since the check of shared memory

    def are_of(self, group: dict[str, Any], address: int) -> bool:
        """True if the group still has these parameters, under these names and addresses."""
        params = group["params"]
        return (
            address == self.address
            and len(params) == len(self.tensors)
            and all(map(is_, params, self.tensors))
            and list(group.get("param_names") or ()) == self._names
        )

    def has(self, param: object) -> bool:
        """True if it is one of them."""
        return id(param) in self._ids

    def detect_changes(self) -> None:
        """Detect dtypes, devices, layouts and memory that changed under the same parameters (`model.half()`).

        `parameters` is another list afterwards, unless only addresses have changed.
        """
        pointers = [*map(Tensor.data_ptr, self._plain)]
        same_memory = pointers == self._pointers
        if not same_memory:
            self._pointers, self.memory_changed = pointers, True
        if self._layouts is None or not self._layouts.are_of(self.tensors):
            self._look_closer(same_memory)
            self._layouts = layouts_of(self.tensors)

    def _look_closer(self, same_memory: bool) -> None:
        """Detect changes attribute by attribute. `same_memory`: no address has changed."""
        tensors, pointers = self.tensors, self._pointers
        shapes = [None if is_lazy(p) else p.shape for p in tensors] if self._lazy else [p.shape for p in tensors]
        if self._looked and same_memory and len(pointers) == len(tensors) and 0 not in pointers:
            devices = self._looked[1]  # an address belongs to one device, except for that of an empty tensor
        else:
            devices = [p.device for p in tensors]
        looked = [p.dtype for p in tensors], devices, shapes, [*map(Tensor.stride, self._plain)]
        if looked == self._looked:
            return
        if self._looked:
            changed = zip(tensors, self._looked[2], shapes, strict=True)
            self.old_shapes.update((p, was) for p, was, now in changed if was is not None and was != now)
        self._looked = looked
        self.dtypes_checked, self.state_checked, self.memory_changed = False, False, True
        self._lazy = None in shapes
        self._plain = [p for p in tensors if type(p) in PLAIN]
        dtypes, devices = looked[:2]
        rows = zip(dtypes, devices, shapes, tensors, strict=True)
        self.kinds = frozenset((dt, on.type, len(s), type(p) in PLAIN) for dt, on, s, p in rows if s is not None)
        self.devices = frozenset(devices)
        self.device = next(iter(self.devices)) if len(self.devices) == 1 else None
        self._cuda_devices = frozenset(device for device in self.devices if device.type == "cuda")
        self.has_complex = any(dtype.is_complex for dtype in dtypes)
        self.parameters = list(self.parameters)  # another list: items made of the old one are made anew
        self._flags, self._grad_layouts = [], None

    def with_gradient(self) -> list[Parameter]:
        """Those that have a gradient now: the same list as long as they are the same."""
        grads = [p.grad for p in self.tensors]
        if self._grad_layouts is not None and self._grad_layouts.are_of(grads):  # as in most steps
            return self.parameters
        layouts = [None if grad is None else grad.layout for grad in grads]
        kinds = set(layouts)
        self.has_sparse = kinds != _STRIDED and bool(kinds - {None, torch.strided})
        self.has_unfit = any(
            grad is not None and grad.shape != p.shape for grad, p in zip(grads, self.tensors, strict=True)
        )
        self._grad_layouts = None
        if None not in kinds:
            self._grad_layouts = None if self.has_sparse or self.has_unfit else layouts_of(grads)
            return self.parameters
        flags = [layout is not None for layout in layouts]
        if flags != self._flags:
            self._flags = flags
            self._present = [p for p, flag in zip(self.parameters, flags, strict=True) if flag]
        return self._present

    @property
    def cuda_devices(self) -> frozenset[torch.device]:
        """The GPUs that they are on."""
        return self._cuda_devices
