"""Direct launches: a compiled kernel is launched again only where Triton itself would take the same one.

Kernel and compiled kernel are stand-ins, so that no GPU is needed. On a GPU, the last tests compare with Triton's own
dispatcher.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton import JITFunction, knobs

from selective import MGUP, Cautious, SelectiveUpdate
from selective.kernels.gpu import direct, launch
from selective.kernels.gpu.device.config import Config
from selective.kernels.gpu.direct import DirectLaunches

FLOATS = torch.zeros(64)


class CompiledKernel:
    """Remembers its launches: the grid and the arguments."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launches.append((grid, arguments))


class Unknown:
    """An object as some other version of Triton may return."""


def body(x_ptr, y_ptr, n, width, FLAG: constexpr, BLOCK: constexpr):  # type: ignore[name-defined]  # noqa: F821
    pass


class Kernel(JITFunction):
    """A kernel whose every ordinary launch compiles it anew."""

    def __init__(self, returns: type = CompiledKernel) -> None:
        super().__init__(body)
        self.returns, self.compiled = returns, []

    def run(self, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        self.compiled.append(self.returns())
        return self.compiled[-1]


def launches() -> DirectLaunches:
    found = DirectLaunches(True)
    found._device = lambda: 0  # type: ignore[method-assign]
    return found


START: dict[str, Any] = {
    "x": FLOATS, "y": FLOATS, "n": 48, "width": 3.75, "warps": 4, "programs": 7, "FLAG": True, "BLOCK": 128,
}  # fmt: skip


def run(direct_launches: DirectLaunches, kernel: Any, **changes: Any) -> None:
    given = START | changes
    constants = {
        "BLOCK": given["BLOCK"],
        "FLAG": given["FLAG"],
        "launch_cooperative_grid": given.get("together", False),
    }
    options = {"num_warps": given["warps"]} | ({"maxnreg": given["registers"]} if "registers" in given else {})
    arguments = [given[name] for name in ("x", "y", "n", "width")]
    direct_launches.look_at_settings()
    direct_launches.launch(kernel, given["programs"], arguments, options, constants)


def config(**changes: Any) -> Config:
    return Config("adam", None, None, None, None, None, None, 128, **changes)


def _other(*arguments: Any) -> None: ...


SAME = [{}, {"programs": 9}, {"x": torch.ones(3)}, {"n": 64}, {"n": 1 << 20}, {"width": 2.5}, {"y": FLOATS[4:]}]
OTHERS: list[dict[str, Any]] = [
    {"x": FLOATS[1:]}, {"y": FLOATS[3:]}, {"x": FLOATS.double()}, {"x": FLOATS.to(torch.bfloat16)}, {"n": 1}, {"n": 17},
    {"n": 1 << 31}, {"n": -(1 << 31) - 16}, {"n": 1 << 63}, {"n": 48.0}, {"n": FLOATS}, {"width": 4}, {"FLAG": False},
    {"BLOCK": 256}, {"warps": 8}, {"registers": 72}, {"together": True}, {"FLAG": config()}, {"FLAG": _other},
]  # fmt: skip


def test_the_second_launch_is_direct_with_its_own_arguments() -> None:
    kernel, found = Kernel(), launches()
    for changes in SAME:
        run(found, kernel, **changes)
    (compiled,) = kernel.compiled
    assert len(compiled.launches) == len(SAME) - 1
    for changes, (grid, arguments) in zip(SAME[1:], compiled.launches, strict=True):
        given = START | changes
        assert grid == (given["programs"], 1, 1)
        wanted = [given[name] for name in ("x", "y", "n", "width", "FLAG", "BLOCK")]  # in the kernel's order
        assert all(a is b or a == b for a, b in zip(arguments, wanted, strict=True))


@pytest.mark.parametrize("changes", OTHERS, ids=[str(i) for i in range(len(OTHERS))])
def test_what_triton_compiles_anew_is_not_launched_with_the_old_code(changes: dict[str, Any]) -> None:
    kernel, found = Kernel(), launches()
    run(found, kernel)
    run(found, kernel, **changes)
    assert len(kernel.compiled) == 2
    run(found, kernel)
    run(found, kernel, **changes)
    assert len(kernel.compiled) == 2
    assert [len(compiled.launches) for compiled in kernel.compiled] == [1, 1]


def test_a_key_without_alignment_would_reuse_the_wrong_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: with a key that does not look, an unaligned tensor would take vector loads."""
    kernel, found = Kernel(), launches()
    monkeypatch.setattr(Tensor, "data_ptr", lambda self: 0)
    run(found, kernel)
    run(found, kernel, x=FLOATS[1:])
    assert len(kernel.compiled) == 1


def test_equal_configs_share_and_kernels_do_not() -> None:
    kernel, other, found = Kernel(), Kernel(), launches()
    run(found, kernel, FLAG=config(strict=False))
    run(found, kernel, FLAG=config(strict=False))
    assert len(kernel.compiled) == 1
    run(found, kernel, FLAG=config())
    run(found, other, FLAG=config(strict=False))
    assert (len(kernel.compiled), len(other.compiled)) == (2, 1)


def test_another_device_has_compiled_kernels_of_its_own() -> None:
    kernel, found = Kernel(), launches()
    run(found, kernel)
    found._device = lambda: 1  # type: ignore[method-assign]
    run(found, kernel)
    assert len(kernel.compiled) == 2


@pytest.mark.parametrize(
    ("where", "name", "value"), [("runtime", "debug", True), ("compilation", "instrumentation_mode", "x")]
)
def test_settings_that_change_the_code_are_seen(where: str, name: str, value: Any, monkeypatch) -> None:
    kernel, found = Kernel(), launches()
    run(found, kernel)
    monkeypatch.setattr(getattr(knobs, where), name, value)
    run(found, kernel)
    assert len(kernel.compiled) == 2


def test_hooks_of_the_dispatcher_are_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, found = Kernel(), launches()
    run(found, kernel)
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", lambda: ("key", "hash"))
    run(found, kernel)
    monkeypatch.undo()
    kernel.add_pre_run_hook(lambda *arguments, **options: None)
    run(found, kernel)
    assert len(kernel.compiled) == 3
    assert not any(compiled.launches for compiled in kernel.compiled)


@pytest.mark.parametrize("returns", [Unknown, type(None)])
def test_what_is_unknown_goes_through_triton(returns: type) -> None:
    kernel, found = Kernel(returns), launches()
    for _ in range(3):
        run(found, kernel)
    assert len(kernel.compiled) == 3


def test_they_can_be_switched_off_and_only_known_versions_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    for _ in range(3):
        run(DirectLaunches(False), kernel)
    assert len(kernel.compiled) == 3
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = []
    for version, switch in [("3.6.0", "1"), ("3.9.1+git", "1"), ("3.5.1", "1"), ("3.10.0", "1"), ("3.9.0", "0")]:
        monkeypatch.setattr(direct.triton, "__version__", version)
        monkeypatch.setenv(direct.SWITCH, switch)
        found.append(direct.are_possible())
    assert found == [True, True, False, False, False]


def trained(policy: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator).cuda()) for n in (40_000, 300, 7)]
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0}]
    optimizer = SelectiveUpdate(torch.optim.AdamW(groups, lr=1e-2, fused=True), policy=policy)
    for number in range(4):
        for p in params:
            grad = torch.randn(p.numel() + number, generator=generator).cuda()
            p.grad = grad[number:]  # aligned in the first step only
        optimizer.step()
    return [p.detach().cpu() for p in params]


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [MGUP(), Cautious()], ids=repr)
def test_on_a_gpu_they_step_as_tritons_own(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.DIRECT.enabled
    directly = trained(policy)
    assert launch.DIRECT._compiled
    monkeypatch.setattr(launch, "DIRECT", DirectLaunches(False))
    assert all(torch.equal(a, b) for a, b in zip(directly, trained(policy), strict=True))


@pytest.mark.gpu
def test_on_a_gpu_launch_hooks_are_called() -> None:
    seen: list[Any] = []

    def hook(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    trained(Cautious())
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        trained(Cautious())
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert "selective_step_kernel" in seen
