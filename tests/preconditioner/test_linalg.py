"""Precision is what was asked for, flags are left as found, and a bad basis is noticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matrices import orthogonal, orthogonality
from torch.utils._python_dispatch import TorchDispatchMode

from selective import AdaDiag, Dense, Eigenbasis, SelectiveUpdate
from selective.preconditioner import Carry, linalg
from selective.preconditioner.linalg import LOOSE, align, batches, float32_products, in_precision, settle, stack
from selective.rotation.carry import MomentCarrier, first_moment_map, rewrite

EPS = torch.finfo(torch.float32).eps
MATMULS = ("mm", "bmm", "baddbmm", "matmul", "linalg_", "_linalg_", "cholesky", "triangular")


def flags() -> tuple[str, ...]:
    mkldnn: Any = torch.backends.mkldnn
    return (torch.backends.fp32_precision, torch.backends.cuda.matmul.fp32_precision, mkldnn.matmul.fp32_precision)


@pytest.fixture
def _flags_put_back() -> Iterator[None]:
    before = flags()
    yield
    mkldnn: Any = torch.backends.mkldnn
    torch.backends.fp32_precision = before[0]
    torch.backends.cuda.matmul.fp32_precision, mkldnn.matmul.fp32_precision = before[1:]


def legacy() -> None:
    torch.set_float32_matmul_precision("high")


def legacy_lowest() -> None:
    torch.set_float32_matmul_precision("medium")  # bfloat16 on CPUs


def one_for_all() -> None:
    torch.backends.fp32_precision = "tf32"


def for_products() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


SETTINGS = [legacy, legacy_lowest, one_for_all, for_products]


class Watch(TorchDispatchMode):
    """Records the precision that products and factorisations ran in: the flags at each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[tuple[str, str]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(MATMULS):
            self.seen.setdefault(name, set()).add(flags()[1:])
        return func(*args, **(kwargs or {}))

    def precisions(self) -> set[tuple[str, str]]:
        return set().union(*self.seen.values())


@pytest.mark.usefixtures("_flags_put_back")
@pytest.mark.parametrize("setting", SETTINGS)
def test_flags_are_left_as_found_also_after_an_error(setting: Callable[[], None]) -> None:
    setting()
    before = flags()
    with float32_products():
        assert flags()[1:] == ("ieee", "ieee")
        with float32_products("tf32"):
            assert flags()[1:] == ("tf32", "tf32")
        assert flags()[1:] == ("ieee", "ieee")
    assert flags() == before
    with pytest.raises(ZeroDivisionError), float32_products():
        _ = 1 / 0
    assert flags() == before


@pytest.mark.usefixtures("_flags_put_back")
def test_what_follows_torchs_own_flag_goes_on_to_follow_it() -> None:
    for inherited in ("tf32", "none"):
        torch.backends.fp32_precision = inherited
        with float32_products():
            pass
        assert flags() == (inherited,) * 3


@pytest.mark.usefixtures("_flags_put_back")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("solver", ["eigh", "svd", "qr", "cholesky"])
@pytest.mark.parametrize("statistic", ["gradient", "ema"])
def test_statistics_and_factorisations_never_run_below_float32(
    setting: Callable[[], None], solver: str, statistic: str
) -> None:
    setting()
    basis = Eigenbasis(solver=solver, statistic=statistic, precision="tf32")
    grads = [torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(0))]
    states = [basis.init_state(grads[0])]
    before = flags()
    with Watch() as watch:
        for _ in range(3):  # the second and third go on from a basis
            basis.observe(states, grads)
            basis.refresh(states, grads)
    assert watch.precisions() == {("ieee", "ieee")}
    factorisation = {"eigh": "_linalg_eigh", "svd": "_linalg_svd", "qr": "linalg_qr", "cholesky": "linalg_cholesky_ex"}
    assert factorisation[solver] in watch.seen  # so that what was watched is what is meant
    with Watch() as watch:
        basis.project_out(states, basis.project_in(states, grads))
    assert watch.precisions() == {("tf32", "tf32")}
    assert flags() == before
    with Watch() as watch:
        Eigenbasis(solver=solver, statistic=statistic, precision="float32").project_in(states, grads)
    assert watch.precisions() == {("ieee", "ieee")}


@pytest.mark.usefixtures("_flags_put_back")
@pytest.mark.parametrize("precision, carried", [("float32", "ieee"), ("tf32", "tf32"), ("bfloat16", "tf32")])
def test_moments_are_carried_in_float32_or_tf32(precision: Any, carried: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[tuple[str, str]]] = []

    def watched(*arguments: Any, **named: Any) -> None:
        with Watch() as watch:
            carry(*arguments, **named)
        seen.append(watch.precisions())

    carry = MomentCarrier.carry_entries
    monkeypatch.setattr(MomentCarrier, "carry_entries", watched)
    legacy()
    before = flags()
    param = torch.nn.Parameter(torch.randn(6, 9))
    space = Eigenbasis(sides="one", refresh_every=2, stagger=False, precision=precision)
    opt = SelectiveUpdate(torch.optim.AdamW([param]), policy=Dense(), preconditioner=space)
    for _ in range(6):
        param.grad = torch.randn(6, 9)
        opt.step()
    assert len(seen) >= 2
    assert set().union(*seen) == {(carried, carried)}
    assert flags() == before


@pytest.mark.parametrize("precision, kept", [("tf32", True), ("float32", False)])
def test_what_stays_in_its_basis_is_not_rounded_to_tf32(precision: Any, kept: bool) -> None:
    """Told by an infinity, which a product with the identity turns into NaN; in float32 nothing else would change."""
    moment = torch.randn(3, 4, 5)
    moment[1, 2, 3] = torch.inf
    left, right = (torch.stack([orthogonal(n, seed).float() for seed in range(3)]) for n in (4, 5))
    left[1], right[1] = torch.eye(4), torch.eye(5)
    right[2] = torch.eye(5)  # one side stays: the other one moves it
    before = moment.clone()
    change = first_moment_map(Carry(left=left, right=right), precision)
    rewrite(moment, (3, 4, 5), change, precision=precision)
    assert torch.equal(moment[1], before[1]) == kept
    wanted = left[::2] @ before[::2] @ right[::2]
    torch.testing.assert_close(moment[::2], wanted, rtol=2e-3, atol=2e-3)  # a CPU may do TF32


@pytest.mark.usefixtures("_flags_put_back")
def test_an_unguarded_product_is_noticed() -> None:
    legacy()
    with Watch() as watch:
        _ = torch.ones(1, 2, 2) @ torch.ones(1, 2, 2)
    assert watch.precisions() == {("tf32", "tf32")}


def test_precision_of_products() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 64, 64, generator=generator) for _ in range(2))
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    # A dot product of 64: at most 64 roundings of eps/2 of the sum of magnitudes.
    with in_precision("float32"):
        assert ((stack([a]) @ stack([b]) - exact).abs() <= 64 * EPS / 2 * size).all()
    low = stack([a], "bfloat16") @ stack([b], "bfloat16")
    assert low.dtype == torch.bfloat16
    error = (low - exact).abs()
    # Both factors, and the result: half of bfloat16's eps, 2^-8, each.
    assert (error <= 2**-9 * (2 * size + exact.abs()) * 1.01).all()
    assert (error > 64 * EPS / 2 * size).any()  # the twin: it is lower


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 3])
def test_stacks_are_one_after_the_other(count: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    some = [torch.randn(2, 5, 3, generator=generator).to(dtype).mT for _ in range(count)]
    assert torch.equal(stack(some), torch.cat(some)) and stack(some).dtype == dtype
    narrow = stack(some, "bfloat16")
    assert torch.equal(narrow, torch.cat(some).bfloat16()) and narrow.dtype == torch.bfloat16


def test_what_lies_one_after_the_other_is_not_copied() -> None:
    buffer = torch.randn(3, 2, 5, 4)
    whole = stack(list(buffer.unbind()))
    assert torch.equal(whole, buffer.flatten(0, 1)) and whole.data_ptr() == buffer.data_ptr()
    one, two, three = buffer.unbind()
    others = ([one, three], [two, one], [two, three, one], [one, two.clone()], [one.mT.contiguous().mT, two.mT.mT])
    for some in others:
        assert torch.equal(stack(some), torch.cat(some))
    assert stack([one, three]).data_ptr() != buffer.data_ptr()
    assert torch.equal(stack([two, three]), buffer[1:].flatten(0, 1))
    assert stack([torch.empty(0, 4, 4)] * 2).shape == (0, 4, 4)
    odd = torch.randn(3, 3, 5, 4)  # single matrices, contiguous whatever their first stride is
    some = [odd[:1, number] for number in range(3)]
    assert all(x.is_contiguous() for x in some) and torch.equal(stack(some), torch.cat(some))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_as_many_bases_are_stacked_as_the_limits_say(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of matrices with a long side the basis is what is large."""
    sizes = []

    def watched(tensors: list[torch.Tensor], precision: Any = "float32") -> torch.Tensor:
        sizes.append(sum(x.numel() for x in tensors))
        return stack(tensors, precision)

    monkeypatch.setattr("selective.preconditioner.eigenbasis.stack", watched)
    monkeypatch.setattr(linalg, "STACKED", 3000)
    monkeypatch.setattr(linalg, "REFRESHED", 3000)
    basis = Eigenbasis(sides="two", precision=precision)
    states = [basis.init_state(torch.empty(1, 2, 32)) for _ in range(12)]
    basis.project_in(states, [torch.randn(1, 2, 32) for _ in states])
    assert 2 * 32**2 <= max(sizes) <= 3000


def test_settling_squares_the_error_and_says_what_is_too_far_off() -> None:
    q = orthogonal(16, seed=0).float()[None]
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 16, 16, generator=generator)
    for size, trusted in ((0.0, True), (1e-5, True), (1e-4, True), (1e-2, False), (1.0, False)):
        settled, good = settle(q + size * noise)
        assert good.tolist() == [trusted], size
        if trusted:
            assert orthogonality(settled) <= 0.75 * LOOSE**2 + 16 * EPS <= 1e-5
    assert orthogonality(q + 1e-4 * noise) > 1e-4  # the twin: without settling
    for bad in (torch.full_like(q, torch.nan), torch.full_like(q, torch.inf), torch.zeros_like(q)):
        assert settle(bad)[1].tolist() == [False]
    both = torch.cat((q, torch.full_like(q, torch.nan)))
    assert settle(both)[1].tolist() == [True, False]


@pytest.mark.parametrize("solver", ["eigh", "svd", "qr", "cholesky"])
def test_large_matrices_are_as_orthogonal_in_the_spectral_norm(solver: Any) -> None:
    """... though not in Frobenius's, in which the rounding of n² elements adds up: 4e-5 for the svd of ones."""
    n = 512
    basis = Eigenbasis(solver=solver, sides="rows")
    for gram in (torch.ones(n, n), torch.randn(n, 3, generator=torch.Generator().manual_seed(0))):
        states = [basis.init_state(torch.empty(1, n, n))]
        states[0]["rows_gram"].copy_(gram if gram.shape[1] == n else gram @ gram.mT)
        for _ in range(2):
            basis.refresh(states, [torch.zeros(1, n, n)])
        q = states[0]["rows_basis"][0].double()
        assert torch.linalg.matrix_norm(q.mT @ q - torch.eye(n, dtype=torch.float64), 2) <= 1e-5
        assert int(states[0]["kept"]) == 0 and int(states[0]["refreshes"]) == 2


def test_settling_leaves_the_identity_as_it_is() -> None:
    settled, good = settle(torch.eye(5)[None])
    assert torch.equal(settled[0], torch.eye(5)) and good.all()


def test_signs_follow_the_old_basis() -> None:
    old = orthogonal(8, seed=0).float()[None]
    signs = torch.tensor([1.0, -1, 1, -1, -1, 1, 1, -1])
    assert torch.equal(align(old * signs, old), old)


@pytest.mark.parametrize("count,numel,limit", [(0, 5, 10), (1, 100, 10), (7, 5, 10), (4, 0, 10), (6, 3, 9)])
def test_batches_are_all_of_it_in_order_and_within_the_limit(count: int, numel: int, limit: int) -> None:
    parts = [list(range(count))[part] for part in batches(count, numel, limit)]
    assert [i for part in parts for i in part] == list(range(count))
    assert all(len(part) == 1 or len(part) * numel <= limit for part in parts)


@pytest.mark.parametrize("solver", ["eigh", "svd", "qr", "cholesky"])
def test_one_by_one_is_what_it_is_together(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To rounding: a batched product may add up in another order."""
    results = []
    for limit in (1, 10**9):
        monkeypatch.setattr("selective.preconditioner.linalg.STACKED", limit)
        monkeypatch.setattr("selective.preconditioner.refresh.REFRESHED", limit)
        monkeypatch.setattr("selective.preconditioner.gram.REFRESHED", limit)
        generator = torch.Generator().manual_seed(0)
        basis = Eigenbasis(solver=solver)
        states = [basis.init_state(torch.empty(2, 5, 6)) for _ in range(3)]
        for _ in range(4):
            grads = [torch.randn(2, 5, 6, generator=generator) for _ in states]
            basis.refresh(states, grads)
            basis.observe(states, grads)
        results.append(basis.project_out(states, basis.project_in(states, grads)))
        results[-1] += [state[name] for state in states for name in ("rows_gram", "columns_gram")]
    for alone, together in zip(*results, strict=True):
        assert (alone - together).abs().max() <= 64 * EPS * alone.abs().max()


def test_nothing_waits_for_numbers_in_a_step_without_a_refresh() -> None:
    """On the meta device there are no numbers: whatever asks for one raises."""
    for basis in (Eigenbasis(), AdaDiag(sides="two")):
        states = [basis.init_state(torch.empty(1, 4, 6, device="meta")) for _ in range(2)]
        grads = [torch.empty(1, 4, 6, device="meta") for _ in states]
        basis.project_out(states, basis.project_in(states, grads))
        basis.observe(states, grads)
        with pytest.raises((RuntimeError, NotImplementedError)):  # the twin: a refresh has to look
            basis.refresh(states, grads)


def test_the_limits_are_what_their_docstrings_say() -> None:
    assert linalg.STACKED * 4 == 16 * 2**20
    assert linalg.REFRESHED * 4 == 512 * 2**20


@pytest.mark.parametrize(("gib", "mib"), [(24, 512), (63, 512), (64, 1024), (140, 1024)])
def test_more_is_refreshed_together_on_a_large_gpu(gib: int, mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(total_memory=gib << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    assert linalg.refreshed_at_once(torch.device("cuda", 0)) * 4 == mib * 2**20
    assert linalg.refreshed_at_once(torch.device("cpu")) == linalg.REFRESHED
