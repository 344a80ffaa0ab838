"""StepView: one parameter in one step, as a policy sees it. A policy must not write on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selective.kernels import Advanced, spec, uniform
from selective.kernels.reference.shard_indices import element_bits
from selective.kernels.sharded import kth_smallest, run_alone, sum_over_shards

TENSORS = ("update", "grad", "momentum", "previous_momentum", "param")


@dataclass(frozen=True)
class Tensors:
    """The tensors of a view. None: the base has no such tensor, or the policy does not read it.

    `param` keeps its own dtype.
    """

    param: Tensor
    update: Tensor | None = None
    grad: Tensor | None = None
    momentum: Tensor | None = None
    previous_momentum: Tensor | None = None
    lookahead: float = 0.9  # w of the Nesterov score ((1 - w) g + w m) g: the share that the base gives to momentum


class StepView:
    """One parameter in one step, as a policy sees it. Read only.

    The tensors are float32 (float64 for float64 parameters) and shaped like the parameter:

    - `update`: the amount that the base would subtract in this step, without decoupled decay.
    - `grad`: the gradient as the base sees it, after `maximize` and coupled decay.
    - `momentum`, `previous_momentum`: the base's first moment after and before this gradient was mixed in.
    - `param`: the parameter before the step.

    Reading a tensor that the policy's `reads` does not declare raises AttributeError, because the tensors that the
    base overwrites are kept only if they are declared. A tensor that the base does not have raises it too.

    The view also has `state` (this parameter's policy state), `name`, `step` (0 in the first), `shape`, `device` and
    `dtype`; `mean`, `norm` and `quantile`, which reduce over the whole tensor; and `random`.

    If the policy's `scope` says that rows or shards are enough, the tensors of a sharded parameter are this rank's
    shard. `mean`, `norm`, `quantile` and `random` still refer to the whole parameter.
    """

    def __init__(
        self,
        tensors: Tensors,
        *,
        reads: frozenset[str],
        who: str,
        name: str,
        draw: spec.Draw,
        address: int,
        state: Mapping[str, Tensor] | None = None,
        shard: spec.Shard | None = None,
    ) -> None:
        self._tensors = tensors
        self._reads = reads
        self._who = who
        self.name = name
        self.draw = draw
        self.address = address
        self.state: Mapping[str, Tensor] = {} if state is None else state
        self._shard = shard  # the part of the parameter that the tensors hold; None: all of it

    @property
    def step(self) -> int:
        """The number of steps that the wrapper has finished: 0 in the first."""
        return self.draw.step

    @property
    def shape(self) -> torch.Size:
        return self._tensors.param.shape

    @property
    def device(self) -> torch.device:
        return self._tensors.param.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the view's tensors: float64 for float64 parameters, else float32."""
        return torch.float64 if self._tensors.param.dtype == torch.float64 else torch.float32

    def _read(self, what: str) -> Tensor:
        if what not in self._reads:
            line = ", ".join(repr(x) for x in sorted(self._reads | {what}))
            raise AttributeError(
                f"{self._who}: view.{what} was read but is not declared; what the base overwrites has to be kept "
                f"before it steps. Write in the class: reads: ClassVar = frozenset({{{line}}})"
            )
        tensor = getattr(self._tensors, what)
        if tensor is None:
            raise AttributeError(f"{self._who}: there is no {what} for parameter {self.name!r} in this step")
        return tensor if tensor.dtype == self.dtype else tensor.to(self.dtype)

    @property
    def update(self) -> Tensor:
        return self._read("update")

    @property
    def grad(self) -> Tensor:
        return self._read("grad")

    @property
    def momentum(self) -> Tensor:
        return self._read("momentum")

    @property
    def previous_momentum(self) -> Tensor:
        return self._read("previous_momentum")

    @property
    def param(self) -> Tensor:
        return self._read("param")

    def kernel_inputs(self, needs: frozenset[str]) -> tuple[spec.Item, spec.Rule, Advanced]:
        """This step in the kernels' terms, with the tensors that `needs` names. For selections and strengths."""
        param = self._tensors.param
        nothing = param.new_empty(0)  # in the place of a tensor that is not read
        tensors = {what: self._read(what) for what in needs if what != "param"}
        moved = Advanced(
            tensors.get("grad", nothing),
            tensors.get("update", nothing),
            tensors.get("momentum"),
            tensors.get("previous_momentum"),
        )
        item = spec.Item(param, moved.grad, {}, self.address, dict(self.state))
        return item, spec.GivenRule(momentum_beta=self._tensors.lookahead), moved

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the whole tensor: a 0-d tensor of the view's dtype, accumulated in float64."""
        if self._shard is None:
            return x.mean(dtype=torch.float64).to(self.dtype)
        count = torch.full((), float(x.numel()), dtype=torch.float64, device=x.device)
        sums = self._ask(sum_over_shards([x.sum(dtype=torch.float64), count], self._shard))
        return (sums[0] / sums[1]).to(self.dtype)

    def norm(self, x: Tensor) -> Tensor:
        """The L2 norm over the whole tensor: a 0-d tensor of the view's dtype, accumulated in float64."""
        if self._shard is None:
            return torch.linalg.vector_norm(x, dtype=torch.float64).to(self.dtype)
        squares = x.to(torch.float64).square().sum()
        return self._ask(sum_over_shards([squares], self._shard))[0].sqrt().to(self.dtype)

    def quantile(self, x: Tensor, q: float) -> Tensor:
        """The value at place int(q * numel) in ascending order, at most the last: about a share `q` lies below it.

        A 0-d tensor of the view's dtype, without interpolation. NaN counts as larger than everything.
        """
        numel = x.numel() if self._shard is None else self._shard.numel
        index = min(max(int(q * numel), 0), numel - 1)
        if self._shard is None:
            return x.flatten().sort().values[index].to(self.dtype)
        return self._ask(kth_smallest(x.to(self.dtype), index, self._shard)).to(self.dtype)

    def _ask(self, part: Any) -> Tensor:
        """Run `part` to its end, with a small collective over the shards for each sum that it asks for."""
        assert self._shard is not None
        return run_alone(part, self._shard.group)

    def random(self, unit: str = "element") -> Tensor:
        """Uniform float32 numbers in [0, 1), by address: the same on every rank and after a resume.

        unit: "element" returns the parameter's shape, "row" the shape (n, 1, ...) for n rows (the first dimension),
        "tensor" a 0-d tensor. Another unit raises ValueError. `Bernoulli` of the same unit draws these numbers in this
        step.
        """
        shape, shard = self.shape, self._shard
        if unit not in ("element", "row", "tensor"):
            raise ValueError(f"{self._who}: view.random(unit={unit!r}); the units are 'element', 'row', 'tensor'")
        if unit == "tensor":
            return uniform(self.draw, self.address, 1, device=self.device).reshape(())
        if unit == "row" and len(shape) > 1:
            shape = torch.Size([shape[0], *[1] * (len(shape) - 1)])
            shard = None if shard is None else spec.Shard(shard.shape[:1], shard.runs[:1], shard.group)
        if shard is None:
            return uniform(self.draw, self.address, shape.numel(), device=self.device).reshape(shape)
        bits = element_bits(shard, self.draw, self.address, self.device)
        return (bits.to(torch.float32) * 2.0**-24).reshape(shape)
