"""torch's Muon as a known rule: its momentum bit for bit, its update no further from float64, all matrices together."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import Muon
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selective import MGUP, CautiousDecay, CautiousMGUP, Dense, Policy, SelectiveUpdate, Soap, base_part
from selective import foreach as lists
from selective.base import muon as muon_numbers
from selective.capture import generic, muon_stacks
from selective.kernels import use_backend
from selective.kernels.reference import newton_schulz_ as exactly

SHAPES = ((12, 8), (8, 12), (12, 8), (33, 7), (6, 6), (1, 9), (9, 1), (8, 12))
RATE, DECAY = 0.02, 0.1
Params = list[torch.nn.Parameter]


class MuonOnes(Policy):
    """Everything, by the kernels."""

    def parts(self):
        return Dense().parts()


class MuonOnesInPython(Policy):
    """Everything, by code of its own."""

    def mask(self, view):
        return torch.ones_like(view.update)


def make_params(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> Params:
    make = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=make).to(dtype)) for shape in shapes]


def give_grads(params: Params, step: int) -> None:
    for index, p in enumerate(params):
        make = torch.Generator().manual_seed(100 * (step + 1) + index)
        p.grad = torch.randn(p.shape, generator=make).to(p.dtype)


def bare(params: Params, **options: Any) -> Muon:
    return Muon(params, **{"lr": RATE, "weight_decay": DECAY, **options})


def wrapped(params: Params, policy: Any = None, wrap: Any = None, **options: Any) -> SelectiveUpdate:
    return SelectiveUpdate(bare(params, **options), policy=MuonOnes() if policy is None else policy, **(wrap or {}))


def way_of(optimizer: SelectiveUpdate) -> str:
    return optimizer.groups.plans[0].capture.way


def reason_of(optimizer: SelectiveUpdate) -> str:
    return optimizer.groups.plans[0].capture.reason


def momenta(optimizer: Any) -> list[torch.Tensor]:
    states = optimizer.base.state if isinstance(optimizer, SelectiveUpdate) else optimizer.state
    return [states[p]["momentum_buffer"] for group in optimizer.param_groups for p in group["params"]]


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(list(a), list(b), rtol=0, atol=0)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no nesterov": {"nesterov": False},
    "rms": {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.8},
    "three steps": {"ns_steps": 3, "ns_coefficients": (1.875, -1.25, 0.375), "eps": 1e-3},
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CASES = [(name, torch.float32) for name in OPTIONS] + [("default", dtype) for dtype in DTYPES[1:]]


def wanted_update(optimizer: Muon, p: torch.nn.Parameter) -> torch.Tensor:
    """The rule in float64, from the state before the step: the update times the matrix's learning rate."""
    assert p.grad is not None
    group, state, grad = optimizer.param_groups[0], optimizer.state.get(p, {}), p.grad.double()
    momentum = state["momentum_buffer"].double() if state else torch.zeros_like(grad)
    momentum = momentum.lerp(grad, 1 - group["momentum"])
    direction = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
    rows, columns = p.shape
    ratio = 0.2 * max(rows, columns) ** 0.5 if group["adjust_lr_fn"] else max(1.0, rows / columns) ** 0.5
    numbers = {"steps": group["ns_steps"], "coefficients": group["ns_coefficients"], "eps": group["eps"]}
    exactly([direction[None]], [group["lr"] * ratio], **numbers)
    return direction


@pytest.mark.parametrize("name,dtype", CASES, ids=str)
def test_the_momentum_is_torchs_bit_for_bit_and_the_step_no_further_off(name: str, dtype: torch.dtype) -> None:
    """Over 9 steps, each from torch's weights. Checkpoints are exchanged after every third step, both ways."""
    theirs, ours = make_params(dtype), make_params(dtype)
    torchs, optimizer = bare(theirs, **OPTIONS[name]), wrapped(ours, **OPTIONS[name])
    assert way_of(optimizer) == "fused"
    off = {"torch": 0.0, "ours": 0.0}
    for step in range(9):
        before = [p.detach().double() for p in theirs]
        give_grads(theirs, step)
        give_grads(ours, step)
        with torch.no_grad():
            for p, q in zip(ours, theirs, strict=True):
                p.copy_(q)
        updates = [wanted_update(torchs, p) for p in theirs]
        torchs.step()
        optimizer.step()
        same(momenta(torchs), momenta(optimizer))
        assert [m.dtype for m in momenta(optimizer)] == [dtype] * len(ours)
        for start, update, p, q in zip(before, updates, theirs, ours, strict=True):
            wanted = start * (1 - RATE * DECAY) - update
            off["torch"] += float((p.detach().double() - wanted).square().sum())
            off["ours"] += float((q.detach().double() - wanted).square().sum())
        if step % 3 == 2:
            from_torch, from_ours = copy.deepcopy(torchs.state_dict()), copy.deepcopy(optimizer.state_dict())
            torchs.load_state_dict(base_part(from_ours))
            optimizer.load_state_dict(from_torch)
    # Two sums of some 6,000 squares of roundings, which differ by some 2 %.
    assert off["ours"] ** 0.5 <= 1.05 * off["torch"] ** 0.5


WRAPS: dict[str, dict[str, Any]] = {
    "ones": {"policy": MuonOnes()},
    "own code": {"policy": MuonOnesInPython()},
    "dense, asked for": {"policy": Dense(), "wrap": {"capture": "fused"}},
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_ones_in_every_form_take_the_same_step(wrap: str) -> None:
    """The own code of a policy rounds as the kernels do; and a run that is resumed in the middle has the same bits."""
    first, other, again = make_params(), make_params(), make_params()
    plain, optimizer = wrapped(first), wrapped(other, **WRAPS[wrap])
    assert way_of(optimizer) == "fused"
    for step in range(4):
        for params, one in ((first, plain), (other, optimizer)):
            give_grads(params, step)
            one.step()
        if step == 1:
            state, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in other]
    for p, q in zip(first, other, strict=True):
        # multiply-adds may be fused in one and not in the other: two roundings of weights below 4 in a step
        torch.testing.assert_close(p, q, rtol=0, atol=4 * 2 * 4 * 2.0**-24)
    resumed = wrapped(again, **WRAPS[wrap])
    with torch.no_grad():
        for p, value in zip(again, weights, strict=True):
            p.copy_(value)
    resumed.load_state_dict(state)
    for step in (2, 3):
        give_grads(again, step)
        resumed.step()
    same(other, again)
    same(momenta(optimizer), momenta(resumed))


@pytest.mark.parametrize("options", [{}, {"capture": "scratch"}, {"capture": "delta"}], ids=str)
def test_dense_is_the_bases_own_step(options: dict[str, Any]) -> None:
    theirs, ours = make_params(), make_params()
    torchs, optimizer = bare(theirs), wrapped(ours, Dense(), wrap=options)
    for step in range(3):
        give_grads(theirs, step)
        give_grads(ours, step)
        torchs.step()
        optimizer.step()
    same(theirs, ours)
    assert way_of(optimizer) == "dense"
    assert "the step is handed to the base" in optimizer.explain()


@pytest.mark.parametrize("capture", ["scratch", "delta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpoints_go_to_other_captures_and_back(capture: str, dtype: torch.dtype) -> None:
    """Delta capture of low precision keeps a float32 momentum, which ours goes on with."""
    params = make_params(dtype)
    one, other = wrapped(params), wrapped(params, wrap={"capture": capture})
    for step, (now, then) in enumerate([(one, other), (other, one), (one, other)]):
        give_grads(params, step)
        now.step()
        then.load_state_dict(copy.deepcopy(now.state_dict()))
        same([m.float() for m in momenta(now)], [m.float() for m in momenta(then)])
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("policy", [None, MGUP()], ids=str)
def test_a_checkpoint_of_a_dense_run_by_our_rule_goes_everywhere(policy: Any) -> None:
    """To and from a dense run by the base, and into a masked one; and it says in explain() what it is."""
    params = make_params()
    ours = SelectiveUpdate(bare(params), policy=None, capture="fused")
    other = SelectiveUpdate(bare(params), policy=policy)
    assert "fused: asked for: the rule of Muon runs on the base's own state, with Newton-Schulz" in ours.explain()
    give_grads(params, 0)
    ours.step()
    saved = copy.deepcopy(ours.state_dict())
    other.load_state_dict(saved if policy is None else base_part(saved))
    same(momenta(ours), momenta(other))
    give_grads(params, 1)
    other.step()
    if policy is None:
        ours.load_state_dict(copy.deepcopy(other.state_dict()))
        same(momenta(ours), momenta(other))


def test_copies_and_pickles_step_as_the_original() -> None:
    params = make_params()
    optimizer = wrapped(params, "MGUP")
    give_grads(params, 0)
    optimizer.step()
    others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for one in (optimizer, *others):
        members = one.param_groups[0]["params"]
        give_grads(members, 1)
        one.step()
        assert way_of(one) == "fused"
        same(params, members)
        same(momenta(optimizer), momenta(one))


def test_masks_change_from_step_to_step_and_a_switch_to_dense_goes_on_as_torch() -> None:
    params = make_params()
    optimizer = wrapped(params, "MGUP")
    for step in range(2):
        give_grads(params, step)
        optimizer.step()
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in params]
    torchs = bare(theirs)
    torchs.load_state_dict(base_part(copy.deepcopy(optimizer.state_dict())))
    optimizer.policy_groups[0].policy = Dense()
    for step in range(2, 4):
        for some, one in ((params, optimizer), (theirs, torchs)):
            give_grads(some, step)
            one.step()
    assert way_of(optimizer) == "dense"
    same(params, theirs)


# --- what is left to the base ---


class Subclass(Muon):
    """A class that might have another step."""


def not_plain(p: torch.Tensor) -> torch.nn.Parameter:
    class Marked(torch.nn.Parameter):
        pass

    return Marked(p.detach())


LEFT: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "a subclass": (lambda: Subclass(make_params()), {}, "no fused rule for Subclass"),
    "own momentum": (lambda: bare(make_params()), {"momentum_beta": 0.9}, "momentum_beta is given"),
    "bfloat16 without nesterov": (
        lambda: bare(make_params(torch.bfloat16), nesterov=False), {}, "torch normalises the momentum itself"
    ),
    "a tensor for momentum": (
        lambda: bare(make_params(), momentum=torch.tensor(0.9)), {}, "does not cover a momentum that is a tensor"
    ),
    "a subclass of Parameter": (
        lambda: bare([not_plain(p) for p in make_params()]), {}, "does not cover a parameter that is a Marked"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_covered_is_the_bases_own_step(name: str) -> None:
    make, options, reason = LEFT[name]
    optimizer = SelectiveUpdate(make(), policy=MGUP(), **options)
    assert way_of(optimizer) == "scratch"
    assert reason in reason_of(optimizer)
    with pytest.raises(ValueError, match="capture='fused' is not possible for"):
        SelectiveUpdate(make(), policy=MGUP(), capture="fused", **options)


@pytest.mark.parametrize("nesterov", [True, False])
def test_torch_normalises_its_own_momentum_in_bfloat16_without_nesterov(nesterov: bool) -> None:
    """The reason for which such groups are left to it. If a newer torch does not do it, ours can take them."""
    p = make_params(torch.bfloat16)[0]
    give_grads([p], 0)
    assert p.grad is not None
    torchs = bare([p], nesterov=nesterov)
    torchs.step()
    usual = float((0.05 * p.grad).norm())
    norm = float(momenta(torchs)[0].norm())
    assert abs(norm - (usual if nesterov else 1.0)) < 0.01
    assert abs(usual - 1.0) > 0.1


@pytest.mark.filterwarnings("ignore:.*rotates or orthogonalises:UserWarning")
@pytest.mark.parametrize("policy", [None, "MGUP"])
def test_under_a_preconditioner_the_base_steps(policy: Any) -> None:
    params = make_params()
    optimizer = SelectiveUpdate(bare(params), policy=policy, preconditioner=Soap(refresh_every=2))
    for step in range(3):
        give_grads(params, step)
        optimizer.step()
    assert way_of(optimizer) == ("scratch" if policy else "dense")
    rotation = optimizer.groups.plans[0].rotation
    assert rotation is not None
    assert rotation.capture.way == "scratch"
    assert "takes no rotated gradients" in rotation.capture.reason


def test_sharded_matrices_are_stepped_by_the_base() -> None:
    """Also if a matrix is replaced by a sharded one in mid-run."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = make_params()[:2]
        optimizer = wrapped(plain, MGUP())
        assert way_of(optimizer) == "fused"
        sharded = [torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in plain]
        optimizer.param_groups[0]["params"] = sharded
        for p in sharded:
            p.grad = distribute_tensor(torch.ones(p.shape), mesh, [Shard(0)])
        optimizer.step()
        assert way_of(optimizer) == "scratch"
        assert "DTensors: Newton-Schulz needs whole matrices" in reason_of(optimizer)
        optimizer = wrapped(sharded, Dense(), wrap={"capture": "fused"})
        assert way_of(optimizer) == "dense"
    finally:
        dist.destroy_process_group()


def test_options_of_a_newer_torch_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon_numbers, "_OPTIONS", muon_numbers._OPTIONS | {"maximize", "foreach"})
    params = make_params()
    optimizer = wrapped(params)
    optimizer.base.param_groups[0]["foreach"] = True  # the way, and not the result
    assert optimizer.explain() and way_of(optimizer) == "fused"
    optimizer.base.param_groups[0]["maximize"] = True
    give_grads(params, 0)
    optimizer.step()
    assert way_of(optimizer) == "scratch"
    assert "maximize=True" in reason_of(optimizer)


def test_a_step_that_was_replaced_is_run() -> None:
    params, calls = make_params(), []
    base = bare(params)
    own = base.step
    base.step = lambda closure=None: calls.append(1) or own(closure)
    optimizer = SelectiveUpdate(base, policy=MuonOnes())
    give_grads(params, 0)
    optimizer.step()
    assert way_of(optimizer) == "scratch"
    assert calls


@pytest.mark.parametrize("option,value", [("ns_steps", 100), ("ns_coefficients", (1.0, 2.0))])
def test_numbers_that_torch_refuses_are_refused_before_anything_moves(option: str, value: Any) -> None:
    params = make_params()
    optimizer = wrapped(params)
    optimizer.param_groups[0][option] = value
    before = [p.detach().clone() for p in params]
    give_grads(params, 0)
    with pytest.raises(ValueError, match=option):
        optimizer.step()
    same(params, before)
    assert not optimizer.base.state


# --- the step of a user ---


def test_missing_gradients_added_parameters_and_rates() -> None:
    """Against a run in which each matrix has an optimizer of its own."""
    together, alone = make_params(torch.float64), make_params(torch.float64)
    optimizer = wrapped(together[:5], lr=torch.tensor(RATE))
    singles = [wrapped([p], lr=torch.tensor(RATE)) for p in alone]
    for step in range(6):
        if step == 3:
            optimizer.add_param_group({"params": together[5:], "lr": -RATE})
            for single in singles[5:]:
                single.param_groups[0]["lr"] = -RATE
        optimizer.param_groups[0]["lr"].fill_(RATE / (step + 1))
        for single in singles[:5]:
            single.param_groups[0]["lr"].fill_(RATE / (step + 1))
        give_grads(together, step)
        give_grads(alone, step)
        for params in (together, alone):
            params[4].grad = torch.zeros_like(params[4])
            params[step % 5].grad = None
        optimizer.step()
        for index, single in enumerate(singles):
            if index < 5 or step >= 3:
                single.step()
    # the products of a stack may be summed in another order: 2^-4 of a rate is what Newton-Schulz may be off by
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=6 * RATE * 3.0 * 2.0**-4)
    same([m.float() for m in momenta(optimizer)], [m.float() for s in singles for m in momenta(s)])


def test_zeros_stay_and_odd_layouts_step() -> None:
    generator = torch.Generator().manual_seed(0)
    zero = torch.nn.Parameter(torch.ones(4, 6))
    turned = torch.nn.Parameter(torch.randn(6, 4, generator=generator).t())
    cut = torch.nn.Parameter(torch.randn(4, 12, generator=generator)[:, ::2])
    empty = torch.nn.Parameter(torch.empty(0, 5))
    flat = [torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in (turned, cut)]
    optimizer, plain = wrapped([zero, turned, cut, empty]), wrapped(flat)
    for step in range(3):
        give_grads([zero, turned, cut, empty], step)
        zero.grad = torch.zeros_like(zero)
        for p, q in zip((turned, cut), flat, strict=True):
            assert p.grad is not None
            q.grad = p.grad.contiguous()
        optimizer.step()
        plain.step()
    torch.testing.assert_close(zero.detach(), torch.full((4, 6), (1 - RATE * DECAY) ** 3), rtol=3 * 2.0**-23, atol=0)
    for p, q in zip((turned, cut), flat, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=3 * RATE * 2.0**-4)
    assert turned.stride() == (1, 4)


def test_what_the_policy_raises_leaves_the_weights() -> None:
    class MuonRaises(MuonOnesInPython):
        def mask(self, view):
            if view.name.endswith("[4]"):
                raise RuntimeError("not this one")
            return super().mask(view)

    params = make_params()
    optimizer = wrapped(params, MuonRaises())
    before = [p.detach().clone() for p in params]
    give_grads(params, 0)
    with pytest.raises(RuntimeError, match="not this one"):
        optimizer.step()
    same(params, before)


@pytest.mark.parametrize("of", ["update", "masked"])
def test_selective_decay_and_statistics(of: Any) -> None:
    """Decay where the update has the sign of the parameter; here the update is known from a run without decay."""
    params, without = make_params(torch.float64), make_params(torch.float64)
    optimizer = wrapped(params, MGUP(), wrap={"decay": CautiousDecay(of=of)})
    other = wrapped(without, MGUP(), weight_decay=0.0)
    for some, one in ((params, optimizer), (without, other)):
        give_grads(some, 0)
        one.step()
    assert way_of(optimizer) == "fused"
    for start, p, q in zip(make_params(torch.float64), params, without, strict=True):
        moved = start - q
        decays = (moved * start > 0).double()
        torch.testing.assert_close(p.detach(), start * (1 - RATE * DECAY * decays) - moved, rtol=0, atol=1e-15)
    for index, p in enumerate(params):
        share = optimizer.statistics()[f"param_groups[0][{index}]"]["share"]
        assert abs(float(share) - int(0.5 * p.numel()) / p.numel()) < 1e-7  # a float32 number


def test_in_triton() -> None:
    """Interpreted where there is no GPU: updates that lie in one stack, masked by the kernels."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = []
    for backend in ("gpu", "reference"):
        params = [torch.nn.Parameter(p.detach().to(device)) for p in make_params(shapes=SHAPES[:3])]
        optimizer = wrapped(params, CautiousMGUP())
        for step in range(2):
            for index, p in enumerate(params):
                generator = torch.Generator().manual_seed(10 * step + index)
                p.grad = torch.randn(p.shape, generator=generator).to(device)
            with use_backend(backend):
                optimizer.step()
        runs.append((params, momenta(optimizer)))
    for p, q in zip(runs[0][0], runs[1][0], strict=True):
        # the factor, the difference and the mask are rounded otherwise, twice, of weights below 4
        torch.testing.assert_close(p, q, rtol=0, atol=2 * 3 * 4 * 2.0**-24)
    same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("setting", [torch.inference_mode, lambda: torch.autocast("cpu", torch.float16)])
def test_settings_of_the_process_change_nothing(setting: Any) -> None:
    inside, outside = make_params(), make_params()
    one, other = wrapped(inside, "MGUP"), wrapped(outside, "MGUP")
    for step in range(2):
        give_grads(inside, step)
        give_grads(outside, step)
        with setting():
            one.step()
        other.step()
    same(inside, outside)


# --- together ---


class Operations(TorchDispatchMode):
    """Counts what would run on a device; making memory and looking at it does not."""

    FREE = ("empty", "new_empty", "empty_like", "detach", "view", "as_strided", "alias", "_unsafe_view", "unbind",
            "transpose", "split", "split_with_sizes", "slice", "reshape", "t")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in self.FREE:
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(count: int, policy: Policy, shapes: Any = ((12, 8), (8, 12), (6, 6)), **options: Any) -> int:
    params = make_params(shapes=[shapes[i % len(shapes)] for i in range(count)])
    optimizer = wrapped(params, policy, wrap={"statistics": False}, **options)
    for step in range(2):
        give_grads(params, step)
        with Operations() as seen:
            optimizer.step()
    return sum(seen.found.values())


@pytest.mark.parametrize("policy", [MGUP(score="nesterov"), MuonOnes()], ids=repr)
def test_operations_do_not_grow_with_the_matrices(monkeypatch: pytest.MonkeyPatch, policy: Policy) -> None:
    """Of two stacks; what the kernel does is its own matter."""
    monkeypatch.setattr(generic, "selective_step", lambda items, **options: None)
    # moving: 3; a stack: 2 norms, limits, quotients, scales and products at most, and three products an iteration
    assert operations(6, policy) == operations(60, policy) <= 3 + 2 * (5 * 2 + 3 * 5)


class Made(TorchDispatchMode):
    """Counts the bytes of all memory that is made, be it freed soon or not."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **kwargs)
        made = {t.untyped_storage() for t in tree_leaves(result) if isinstance(t, torch.Tensor)}
        self.bytes += sum(storage.nbytes() for storage in made if storage.data_ptr() not in before)
        return result


@pytest.mark.parametrize("dtype,bytes_each", [(torch.float32, 12), (torch.bfloat16, 16)], ids=str)
def test_memory_of_a_step(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bytes_each: int) -> None:
    """What docs/capture.md says, of square matrices, which take most. In low precision, not all is there at once."""
    monkeypatch.setattr(generic, "selective_step", lambda items, **options: None)
    params = make_params(dtype, shapes=[(64, 64)] * 4)
    optimizer = wrapped(params, wrap={"statistics": False})
    for step in range(2):
        give_grads(params, step)
        with Made() as made:
            optimizer.step()
    elements = sum(p.numel() for p in params)
    assert bytes_each * elements <= made.bytes <= (bytes_each + 0.1) * elements  # and a few numbers of each matrix


@pytest.mark.parametrize("limit", [200, 300])
def test_parts_and_stacks_are_bounded_and_complete(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """With the second limit, tall and wide matrices share a stack that is not the only one of their shape."""
    params = make_params(shapes=[*SHAPES, (64, 64), *SHAPES, (2, 2)])
    monkeypatch.setattr(lists, "PART", 600)
    monkeypatch.setattr(muon_stacks, "STACK", limit)
    parts = list(muon_stacks.parts_in_stacks(params))
    assert sorted(i for part in parts for stack in part for i in stack.indices) == list(range(len(params)))
    for part in parts:
        sizes = [sum(params[i].numel() for i in stack.indices) for stack in part]
        assert sum(sizes) <= 600 or len(part) == 1
        assert all(size <= limit or len(stack.indices) == 1 for size, stack in zip(sizes, part, strict=True))
        for stack in part:
            assert len({tuple(sorted(params[i].shape)) for i in stack.indices}) == 1
            assert all(params[i].shape[0] > params[i].shape[1] for i in stack.tall)
            assert all(params[i].shape[0] <= params[i].shape[1] for i in stack.wide)
    mixed = [params[stack.tall[0]].shape for part in parts for stack in part if stack.wide and stack.tall]
    assert ((12, 8) in mixed) == (limit == 300)


def test_many_parts_take_the_step_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    one, many = make_params(torch.float64), make_params(torch.float64)
    first = wrapped(one, MGUP(score="nesterov"))
    give_grads(one, 0)
    first.step()
    monkeypatch.setattr(lists, "PART", 200)
    monkeypatch.setattr(muon_stacks, "STACK", 100)
    second = wrapped(many, MGUP(score="nesterov"))
    give_grads(many, 0)
    second.step()
    for p, q in zip(one, many, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2.5 * 3 * RATE * 2.0**-4)
    same(momenta(first), momenta(second))
