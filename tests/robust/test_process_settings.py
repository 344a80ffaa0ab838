"""Settings of the whole process: default device and dtype, inference mode, autocast, deterministic algorithms.

Each step is as without, or as the bare base's under the same setting: in every capture, with own momentum and rotated.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import selective
from selective import AdaDiag, CautiousMGUP, Eigenbasis, Magma, RandomMask, SelectiveUpdate, Soap
from selective.base import clone as clone_module
from selective.base.base_facts import base_facts
from selective.base.fused_rules import FusedAdam
from selective.kernels import lasting as kernels_lasting
from selective.kernels.cpu import chunks

t = torch.optim
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: t.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: t.SGD(p, lr=1e-2, momentum=0.9),
    "adagrad": lambda p: t.Adagrad(p, lr=1e-2, weight_decay=0.1),
    "nadam": lambda p: t.NAdam(p, lr=1e-2, weight_decay=0.1),
    "adafactor": lambda p: t.Adafactor(p, lr=1e-2, weight_decay=0.1),
}
WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    "delta": {"capture": "delta", "stochastic_rounding": True},
    "own momentum": {"momentum_beta": 0.9, "on_nonfinite": "skip"},
    "eigenbasis": {"preconditioner": Eigenbasis(refresh_every=2)},
    "soap, delta": {"preconditioner": Soap(refresh_every=2), "capture": "delta"},
    "adadiag, original": {"preconditioner": AdaDiag(refresh_every=2), "mask_space": "original", "momentum_beta": 0.9},
}
POLICIES = {"random": RandomMask(), "magma": Magma(), "ones": CautiousMGUP(alpha=1.0, gamma=1.0)}
Setting = Callable[[], AbstractContextManager[Any]]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS: dict[str, Setting] = {
    "default device": lambda: torch.device(
        "meta"
    ),  # stands for "cuda": a tensor made there is in the way of all others
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
}
# Where the bare base itself minds. With a default device of "meta" it makes a count there, and asks for its value. With
# float64 its count goes into its update in that. Under autocast it forms a product of matrices. It is compared below.
OTHERWISE = {"default device": ("nadam", "adafactor"), "float64": ("nadam",), "autocast": ("adafactor",)}
EVERY_WAY = ("default device", "autocast")  # what reaches products and tables; of the others half are enough
SAME = [
    (base, setting, way)
    for base in BASES
    for setting in SETTINGS
    for way in (WAYS if setting in EVERY_WAY else list(WAYS)[1::2])
    if base not in OTHERWISE.get(setting, ())
]


def make(base: str, policy: Any, options: dict[str, Any] | None) -> Any:
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
        for seed, shape in enumerate([(6, 4), (5,)])
    ]
    optimizer = BASES[base](params)
    return optimizer if options is None else SelectiveUpdate(optimizer, policy=policy, **options)


def params_of(optimizer: Any) -> list[torch.Tensor]:
    return optimizer.param_groups[0]["params"]


def steps(optimizer: Any, numbers: range, setting: Setting) -> Any:
    for number in numbers:
        for seed, p in enumerate(params_of(optimizer)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * number + seed))
        with setting():
            optimizer.step()
    return optimizer


def life(base: str, policy: Any, options: dict[str, Any], setting: Setting) -> Any:
    """Wrapped, stepped, read, saved, loaded, copied, and stepped again, all under `setting`."""
    bare = make(base, policy, None)
    with setting():
        optimizer = SelectiveUpdate(bare, policy=policy, **options)
        optimizer.init_state()
    steps(optimizer, range(3), setting)
    with setting():
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert optimizer.explain()
        assert optimizer.statistics()
        copied = copy.deepcopy(optimizer)
    for other in (optimizer, copied):
        steps(other, range(3, 6), setting)
    assert all(torch.equal(p, q) for p, q in zip(params_of(optimizer), params_of(copied), strict=True))
    return optimizer


def assert_same(one: Any, other: Any) -> None:
    for p, q in zip(params_of(one), params_of(other), strict=True):
        assert torch.equal(p, q)
        mine, theirs = dict(one.state[p]), dict(other.state[q])
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            if isinstance(value, torch.Tensor):
                assert value.device == theirs[key].device, key
                assert torch.equal(value.double(), theirs[key].double()), key


POLICY_OF = {"adamw": "random", "sgd": "ones", "adagrad": "ones", "nadam": "magma", "adafactor": "random"}


@functools.cache
def undisturbed(base: str, way: str) -> Any:
    return life(base, POLICIES[POLICY_OF[base]], WAYS[way], nullcontext)


@pytest.mark.parametrize(("base", "setting", "way"), SAME)
def test_the_same_bits_as_without(base: str, setting: str, way: str) -> None:
    """A whole life under a setting."""
    policy = POLICIES[POLICY_OF[base]]
    assert_same(undisturbed(base, way), life(base, policy, WAYS[way], SETTINGS[setting]))


@pytest.mark.parametrize("way", ["auto", "delta", "own momentum"])
@pytest.mark.parametrize(
    ("base", "setting"), [("nadam", "float64"), ("adafactor", "bfloat16"), ("adafactor", "autocast")]
)
def test_as_the_bare_base(base: str, setting: str, way: str) -> None:
    """A mask of ones, under the same setting: weights, and dtypes and devices of the base's state."""
    bare = steps(make(base, None, None), range(4), SETTINGS[setting])
    wrapped = steps(make(base, POLICIES["ones"], WAYS[way]), range(4), SETTINGS[setting])
    for p, q in zip(params_of(bare), params_of(wrapped), strict=True):
        # four steps of below 0.02, each of a few roundings of weights below 4
        assert (p - q).abs().max() <= 4 * 4 * torch.finfo(torch.float32).eps
        for key, value in bare.state[p].items():
            if isinstance(value, torch.Tensor):
                assert (wrapped.state[q][key].dtype, wrapped.state[q][key].device) == (value.dtype, value.device)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", ["sgd-plain", "adagrad"])
def test_steps_in_inference_mode_spoil_nothing(base: str, way: str, policy: str, monkeypatch: Any) -> None:
    """Bases that step on outside of it: what we keep was made there, and is written to here."""
    if policy == "magma" and "momentum_beta" not in WAYS[way]:
        policy = "ones"
    monkeypatch.setitem(BASES, "sgd-plain", lambda p: t.SGD(p, lr=1e-2))
    monkeypatch.setattr(chunks, "_buffers", chunks._Buffers())  # as in a new process
    inside = make(base, POLICIES[policy], WAYS[way])
    steps(inside, range(3), torch.inference_mode)
    steps(inside, range(3, 6), nullcontext)
    outside = steps(make(base, POLICIES[policy], WAYS[way]), range(6), nullcontext)
    assert_same(inside, outside)


def test_buffers_of_inference_mode_would_spoil_the_process(monkeypatch: Any) -> None:
    """The fault as it was: another optimizer, which never saw that mode, could not step any more."""
    monkeypatch.setattr(chunks, "_buffers", chunks._Buffers())
    monkeypatch.setattr(chunks, "lasting", nullcontext)
    steps(make("adamw", POLICIES["random"], {}), range(1), torch.inference_mode)
    with pytest.raises(RuntimeError, match="outside InferenceMode"):
        steps(make("adamw", POLICIES["random"], {}), range(1), nullcontext)


def test_a_count_without_a_device_would_be_elsewhere(monkeypatch: Any) -> None:
    """The fault as it was: the step count was made on the default device."""

    def unhosted(self: Any, group: Any, p: torch.Tensor, state: dict[str, Any]) -> None:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)

    monkeypatch.setattr(FusedAdam, "init_state", unhosted)
    with pytest.raises(RuntimeError, match="meta"):
        steps(make("adamw", POLICIES["ones"], {}), range(1), SETTINGS["default device"])


# --- every tensor that we make names its device, and its dtype ---

OURS = tuple(str(Path(selective.__file__).parent / name) for name in ("", "kernels"))
OURS += (str(Path(kernels_lasting.__file__).parent),)


class Audit(TorchFunctionMode):
    """Remembers the calls from our own files that leave it to the process where, or of what dtype, a tensor is."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _device_constructors() and (
            kwargs.get("device") is None or _is_undecided(function, args, kwargs)
        ):
            frame: Any = sys._getframe(1)
            while f"{Path('torch')}/" in frame.f_code.co_filename:  # torch's own layers between us and this mode
                frame = frame.f_back
            if frame.f_code.co_filename.startswith(OURS) and not frame.f_code.co_name.startswith("run_step"):
                self.found.add(f"{frame.f_code.co_filename}:{frame.f_lineno}: {function.__name__}")
        return function(*args, **kwargs)


def _is_undecided(function: Any, args: Any, kwargs: Any) -> bool:
    """True if the dtype is the default one: integers are int64 whatever that is."""
    integers = function is torch.arange or (function is torch.tensor and isinstance(args[0], int))
    return kwargs.get("dtype") is None and not integers


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", ["adamw", "adafactor"])
def test_nothing_is_left_to_the_process(base: str, way: str) -> None:
    audit = Audit()
    life(base, POLICIES["random"], WAYS[way], lambda: audit)
    assert audit.found == set()


@pytest.mark.parametrize(
    "line", ["torch.zeros(2, dtype=torch.float32)", "torch.ones(2, device='cpu')", "torch.tensor(1.0)"]
)
def test_the_audit_sees_what_is_left(line: str) -> None:
    audit = Audit()
    with audit:
        exec(compile(line, OURS[0] + "/somewhere.py", "exec"), {"torch": torch})
    assert len(audit.found) == 1


# --- what is measured on a twin is remembered, and holds outside of the setting, too ---


class Plain(t.Optimizer):
    """Nobody's table has it. Its count is made where the process makes tensors."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2, "weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["count"], state["moment"] = torch.zeros(1), torch.zeros_like(p)
                state["count"] += 1
                state["moment"].lerp_(p.grad, 0.1)
                mixed = torch.eye(2).to(p) @ state["moment"].reshape(2, -1)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * mixed.reshape(p.shape) / (1 - 0.9 ** state["count"].item()))


@pytest.mark.parametrize("setting", ["default device", "inference mode", "autocast", "float64"])
def test_facts_are_measured_under_torchs_own_settings(setting: str, monkeypatch: Any) -> None:
    p = torch.nn.Parameter(torch.ones(4, 6))
    usual = base_facts(Plain([p]), {"params": [p], "lr": 1e-2, "weight_decay": 0.1}, measure=True)
    assert usual.decay == "decoupled"
    assert usual.momentum_key == "moment"
    monkeypatch.setattr("selective.base.base_facts._cache", {})
    with SETTINGS[setting]():
        found = base_facts(Plain([p]), {"params": [p], "lr": 1e-2, "weight_decay": 0.1}, measure=True)
    assert found == usual
    if setting == "default device":  # the fault as it was
        monkeypatch.setattr("selective.base.base_facts._cache", {})
        monkeypatch.setattr(clone_module, "settings_of_torch", nullcontext)
        with SETTINGS[setting]():
            assert base_facts(Plain([p]), {"params": [p], "lr": 1e-2, "weight_decay": 0.1}, measure=True) != usual
