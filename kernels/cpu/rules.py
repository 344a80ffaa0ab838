"""Step 5 over one chunk: torch's own fused CPU kernels where they fit, the reference's rules elsewhere.

The result is `minus_update`, -u, because a fused optimizer kernel leaves that in a parameter of zeros. So one pass
over gradient and moments does all of the base's arithmetic, and the rest happens in the cache.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..reference.rules import Advanced, Numbers, as_seen, begin, compute_dtype, move, number, rate_of
from ..spec import AdamRule, GivenRule, Item, Rule, SGDRule
from .chunks import Flat, buffer, chunk, spans

# Private functions of torch, so looked up and not taken for granted (see `_trusted`).
_FUSED_ADAM: Any = getattr(torch, "_fused_adam_", None)
_FUSED_SGD: Any = getattr(torch, "_fused_sgd_", None)

# (mover, a chunk of the state that the rule moves, gradient, zeros that become -u)
Run = Callable[["Mover", Mapping[str, Tensor], Tensor, Tensor], None]


@dataclass
class Slice:
    """One chunk after the rule, as selections and strengths read it. Its tensors must not be written to."""

    minus_update: Tensor  # -u
    grad: Tensor
    momentum: Tensor | None
    previous: Tensor | None


def move_by_adam(
    rule: AdamRule,
    outs: list[Tensor],
    grads: list[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    steps: list[Tensor],
) -> None:
    """Let torch's kernel move the moments of these tensors, and turn the zeros in `outs` into -u."""
    largest = [state["max_exp_avg_sq"] for state in states] if rule.amsgrad else []
    _FUSED_ADAM(  # weight decay stays with us: the zeros have nothing to decay
        outs, grads, [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], largest, steps,
        lr=float(number(rule.lr)), beta1=float(number(rule.beta1)), beta2=float(number(rule.beta2)), weight_decay=0.0,
        eps=rule.eps, amsgrad=rule.amsgrad, maximize=False,
    )  # fmt: skip


def move_by_sgd(
    rule: SGDRule, outs: list[Tensor], grads: list[Tensor], states: Sequence[Mapping[str, Tensor]], *, first: bool
) -> None:
    """The same of SGD with momentum. `first` is True if the momentum was made in this step."""
    _FUSED_SGD(
        outs, grads, [state["momentum_buffer"] for state in states], weight_decay=0.0, momentum=rule.momentum,
        lr=float(number(rule.lr)), dampening=rule.dampening, nesterov=rule.nesterov, maximize=False,
        is_first_step=first,
    )  # fmt: skip


def _run_adam(mover: Mover, state: Mapping[str, Tensor], grad: Tensor, out: Tensor) -> None:
    assert isinstance(mover.rule, AdamRule)
    move_by_adam(mover.rule, [out], [grad], [state], [mover.step])


def _run_sgd(mover: Mover, state: Mapping[str, Tensor], grad: Tensor, out: Tensor) -> None:
    assert isinstance(mover.rule, SGDRule)
    move_by_sgd(mover.rule, [out], [grad], [state], first=mover.numbers.first)


def _example(rule: Rule) -> Item:
    x = torch.linspace(-1.0, 1.0, 83, dtype=torch.float32, device="cpu")
    state = {"momentum_buffer": x.flip(0).clone()}
    if isinstance(rule, AdamRule):
        state = {
            "step": torch.tensor(3.0, dtype=torch.float32, device="cpu"),
            "exp_avg": x.flip(0) * 0.1,
            "exp_avg_sq": x * x * 0.01 + 1e-6,
        }
        state["max_exp_avg_sq"] = state["exp_avg_sq"] * (1 + 0.5 * x)
    return Item(torch.zeros_like(x), x.roll(7), state, 0)


@functools.cache
def _trusted(rule: Rule) -> bool:
    """True if torch has the fused CPU kernel and it agrees with our rule. Tried once for each kind of rule.

    It is tried on 83 elements, and must agree to 4 eps (the identity test).
    """
    theirs, ours = _example(rule), _example(rule)
    run = _run_adam if isinstance(rule, AdamRule) else _run_sgd
    if (_FUSED_ADAM if isinstance(rule, AdamRule) else _FUSED_SGD) is None:
        return False
    mover = Mover(theirs, rule, begin(theirs, rule), Flat(theirs, True), run)
    try:
        minus_update = mover(0, 83, torch.empty_like(theirs.param)).minus_update
    except (RuntimeError, TypeError):  # no CPU kernel in this build, or another signature
        return False
    moved = move(rule, begin(ours, rule), ours.param, ours.grad, ours.state, False)
    eps = torch.finfo(torch.float32).eps

    def close(a: Tensor, b: Tensor, size: Tensor) -> bool:
        return bool(((a - b).abs() <= 4 * eps * size).all())

    terms = 1.0 + ours.grad.abs()  # the moments are sums of terms of this size or less
    return close(-minus_update, moved.update, moved.update.abs() + eps) and all(
        close(theirs.state[k], ours.state[k], terms) for k in ours.state
    )


# The rules on which torch's kernels are tried, with amsgrad or nesterov and without.
_TRIED_ADAM = {amsgrad: AdamRule(1e-2, 0.9, 0.99, 1e-8, amsgrad=amsgrad) for amsgrad in (False, True)}
_TRIED_SGD = {nesterov: SGDRule(0.1, 0.9, 0.0 if nesterov else 0.3, nesterov) for nesterov in (False, True)}


def fused_kernel(rule: Rule) -> Run | None:
    """torch's fused kernel for float32 tensors; None if it has none for this rule, or was not seen to agree."""
    if isinstance(rule, AdamRule):
        return _run_adam if _trusted(_TRIED_ADAM[bool(rule.amsgrad)]) else None
    if isinstance(rule, SGDRule) and rule.momentum != 0:
        return _run_sgd if _trusted(_TRIED_SGD[bool(rule.nesterov)]) else None
    return None


def _fused(item: Item, rule: Rule, flat: Flat, numbers: Numbers) -> Run | None:
    """torch's fused kernel for this tensor; None unless all is float32 and the kernel has been seen to agree."""
    run = fused_kernel(rule)
    if run is None:
        return None
    tensors = [flat.param, flat.grad, *(flat.state[name] for name in rule.state_names)]
    if any(t.dtype != torch.float32 for t in tensors) or isinstance(numbers.rate, Tensor):
        return None
    return run


class Mover:
    """Moves the moments of one tensor, chunk by chunk. Each chunk is to be moved once.

    Its results are as selections read them: `as_seen` of the reference.
    """

    def __init__(self, item: Item, rule: Rule, numbers: Numbers, flat: Flat, run: Run | None = None) -> None:
        self.rule, self.flat, self.numbers = rule, flat, numbers
        self.dtype, self.climbs = compute_dtype(flat.param), float(rate_of(rule)) < 0
        self.run = run or _fused(item, rule, flat, numbers)
        if self.run is not None:
            assert rule.first_moment is not None
            count = item.state["step"] if rule.counts_steps else torch.zeros((), device="cpu")
            self.step = count.to(torch.float32)
            self.first_moment = rule.first_moment
            self.moved_state = {name: flat.state[name] for name in rule.state_names}

    @property
    def grad_is_plain(self) -> bool:
        """True if the base sees the gradient as it is."""
        return self.flat.grad.dtype == self.dtype and self.rule.coupled_decay == 0 and not self.rule.maximize

    def gradient(self, start: int, end: int) -> Tensor:
        """The gradient as the base sees it; the same bits before and after the moments have moved."""
        grad = self.flat.grad[start:end]
        if self.grad_is_plain:
            return grad
        decay, negate = self.rule.coupled_decay, self.rule.maximize
        out = buffer("grad", end - start, self.dtype)
        out.copy_(grad)
        if negate:
            out.neg_()
        if decay != 0:
            param = self.flat.param[start:end]
            out.add_(param if param.dtype == self.dtype else param.to(self.dtype), alpha=decay)
        return out

    def seen_gradient(self, start: int, end: int) -> Tensor:
        """`gradient`, negated if the base climbs by a negative learning rate."""
        grad = self.gradient(start, end)
        return -grad if self.climbs else grad

    def __call__(self, start: int, end: int, out: Tensor, keep_previous: bool = False) -> Slice:
        """Move the moments of `[start, end)`. d is written to `out`; the momentum may be a view of the state."""
        piece = self._moved(start, end, out, keep_previous)
        if not self.climbs:
            return piece
        momentum, previous = (None if x is None else -x for x in (piece.momentum, piece.previous))
        return Slice(piece.minus_update, -piece.grad, momentum, previous)

    def _moved(self, start: int, end: int, out: Tensor, keep_previous: bool) -> Slice:
        grad = self.gradient(start, end)
        if self.run is None:
            return self._plain(start, end, out, grad, keep_previous)
        state = {name: value[start:end] for name, value in self.moved_state.items()}
        previous = None
        if keep_previous:
            previous = buffer("previous", end - start, self.dtype)
            previous.copy_(state[self.first_moment])
        out.zero_()
        self.run(self, state, grad, out)
        return Slice(out, grad, state[self.first_moment], previous)

    def chunks(self, out: Tensor, keep_previous: bool, wide: int = 1) -> Iterator[tuple[int, int, Slice]]:
        """Move all chunks, `wide` of them at a time, d to `out`. Yields start, end and what a call returns."""
        length, end = wide * chunk(), 0
        if self.run is None or self.climbs or keep_previous or not self.grad_is_plain or out.numel() == 0:
            for start, end in spans(out.numel(), length):
                yield start, end, self(start, end, out[start:end], keep_previous)
            return
        # All views of the tensors are made at once, because a slice takes 8 us where it comes between other operations.
        names = list(self.moved_state)
        states = zip(*(value.unsafe_split(length) for value in self.moved_state.values()), strict=True)
        pieces = zip(out.unsafe_split(length), self.flat.grad.unsafe_split(length), states, strict=True)
        for minus_update, grad, views in pieces:
            start, end = end, end + grad.numel()
            state = dict(zip(names, views, strict=True))
            self.run(self, state, grad, minus_update.zero_())
            yield start, end, Slice(minus_update, grad, state[self.first_moment], None)

    def _plain(self, start: int, end: int, out: Tensor, grad: Tensor, keep: bool) -> Slice:
        state = {name: value[start:end] for name, value in self.flat.state.items()}
        moved = self._bare(self.flat.param[start:end], grad, state, keep)
        rule = self.rule
        if isinstance(rule, GivenRule) and rule.negated and state["update"].dtype == self.dtype:
            minus_update = state["update"]
        else:
            minus_update = torch.neg(moved.update, out=out)
        return Slice(minus_update, moved.grad, moved.momentum, moved.previous_momentum)

    def _bare(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], keep: bool) -> Advanced:
        """The reference's rule on a gradient that `maximize` and coupled decay have already been through."""
        rule = self.rule
        if not isinstance(rule, GivenRule):
            rule = replace(rule, maximize=False, weight_decay=0.0 if rule.decay_is_coupled else rule.weight_decay)
        return move(rule, self.numbers, param, grad, state, keep)

    def peek(self, positions: Tensor) -> Advanced:
        """The rule's results at these flat positions, computed before the moments move. Nothing is written."""

        def gather(t: Tensor) -> Tensor:
            return t.index_select(0, positions)  # a third of the time of t[positions]

        state = {name: gather(value) for name, value in self.flat.state.items()}
        moved = move(self.rule, self.numbers, gather(self.flat.param), gather(self.flat.grad), state, True)
        return as_seen(self.rule, moved)

    def peek_runs(self, runs: Tensor, length: int) -> Slice:
        """The same at whole aligned runs of `length` neighbours, by the kernel that will move the moments.

        Runs are gathered ten times faster than elements.
        """

        count = runs.numel() * length

        def gather(name: str, t: Tensor) -> Tensor:
            out = buffer(f"sampled {name}", count, t.dtype)
            torch.index_select(t[: t.numel() // length * length].view(-1, length), 0, runs, out=out.view(-1, length))
            return out

        state = {name: gather(name, value) for name, value in self.flat.state.items()}
        sampled = copy.copy(self)
        grad = gather("grad", self.flat.grad)
        reads_param = self.run is None or self.rule.coupled_decay != 0  # else anything of its shape will do
        param = gather("param", self.flat.param) if reads_param else grad
        sampled.flat = Flat(Item(param, grad, state, 0), writes_state=False)
        if self.run is not None:
            sampled.moved_state = {name: state[name] for name in self.moved_state}
        return sampled(0, count, buffer("sampled update", count, self.dtype))
