"""Given the same gradients, every layout selects what one device selects: the same bits, step after step."""

from __future__ import annotations

from typing import Any

import torch
from sharded_runs import Make, Run, adamw, columns, compare, layouts, lion, nadam, parts, rows, sgd
from sharded_world import World

from selective import (
    MGUP,
    AlphaConsistency,
    Cautious,
    CautiousMGUP,
    Dense,
    Fixed,
    Grams,
    Magma,
    MeanPreserving,
    NormPreserving,
    Policy,
    RandomMask,
    SkipUpdate,
    TopK,
)
from selective.kernels import use_backend
from selective.kernels.gpu.sharded import plan as shard_plan
from selective.kernels.gpu.sharded import step as shards

POLICIES: dict[str, Any] = {
    "MGUP": MGUP(),
    "top 30 %": Policy(selection=TopK(fraction=0.3), strength=Fixed(selected=2.0, rest=0.5)),
    "top 20 % by momentum": Policy(selection=TopK(fraction=0.2, score="momentum"), strength=NormPreserving()),
    "top 30 % Nesterov": Policy(selection=TopK(fraction=0.3, score="nesterov"), strength=MeanPreserving()),
    "Cautious": Cautious(),
    "CautiousMGUP": CautiousMGUP(),
    "AlphaConsistency": AlphaConsistency(),
    "Grams": Grams(),
    "Magma": Magma(probability=0.8),
    "SkipUpdate": SkipUpdate(),
    "RandomMask": RandomMask(),
    "RandomMask of rows": RandomMask(unit="row"),
    "matched": RandomMask.matching(MGUP()),
    "Dense": Dense(),
}
BASES = {"AdamW": adamw, "SGD": sgd, "Lion": lion}


def _all_layouts(world: World, base: Any, options: dict[str, Any], steps: int, what: str, **how: Any) -> None:
    """A single-process run, and one for each layout; for two layouts if the case has a `number`."""
    nan, everywhere, number = how.pop("nan", False), how.pop("everywhere", False), how.pop("number", None)
    single = Run(base, options, **how).train(range(steps), nan)
    for name, (mesh, place) in layouts(world, everywhere, None if everywhere else number).items():
        ours = Run(base, options, mesh, place, **how).train(range(steps), nan)
        compare(ours, single, f"{what}, {name}")


def every_policy(world: World) -> None:
    """Every policy over AdamW, a few steps: a group of parameters for each policy."""
    _all_layouts(world, adamw, {"policy": tuple(POLICIES.values())}, 2, "a group for each of POLICIES")


def every_policy_and_base(world: World) -> None:
    """Every policy with every base, 10 steps; for the slow lane."""
    for name, policy in POLICIES.items():
        for base, make in BASES.items():
            _all_layouts(world, make, {"policy": policy}, 10, f"{name}, {base}", everywhere=True)


def everything_everywhere(world: World) -> None:
    """The cases below that go through two layouts each, in all of them; for the slow lane."""
    for case in (other_bases, delta_capture, other_dtypes, samples):
        case(world, everywhere=True)


def other_bases(world: World, everywhere: bool = False) -> None:
    """SGD and Lion fused, NAdam through scratch, and a momentum of our own."""
    for number, base in enumerate((sgd, lion, nadam)):
        _all_layouts(world, base, {"policy": MGUP()}, 2, base.__name__, number=number, everywhere=everywhere)
    own = {"policy": AlphaConsistency(), "momentum_beta": 0.9}
    _all_layouts(world, nadam, own, 2, "momentum_beta", number=3, everywhere=everywhere)


def delta_capture(world: World, everywhere: bool = False) -> None:
    """Delta capture, in float32 and with float32 copies of bfloat16 parameters."""
    options = {"policy": MGUP(), "capture": "delta"}
    for number, dtype in ((4, torch.float32), (0, torch.bfloat16)):
        _all_layouts(world, nadam, options, 2, f"delta, {dtype}", dtype=dtype, number=number, everywhere=everywhere)


def kernels_of_whole_tensors(world: World) -> None:
    """Shards that need no other rank take the fast path, and agree with one device up to its rounding.

    A coordinate that is selected differently is at least the learning rate, 1e-2, away.
    """
    names = ("CautiousMGUP", "Grams", "RandomMask", "RandomMask of rows", "SkipUpdate")
    options = {"policy": tuple(POLICIES[name] for name in names), "statistics": False}
    single = Run(adamw, options, backend="auto").train(range(3))
    for layout, (mesh, place) in layouts(world, everywhere=False).items():
        run = Run(adamw, options, mesh, place, backend="auto").train(range(3))
        for number, (mine, theirs) in enumerate(parts(run, single)):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=f"{layout}, parameter {number}")


def few_blocks() -> None:
    """Let the interpreter's programs cover 64 elements, not eight times 1,024."""
    shard_plan.SPAN = shards.BLOCK = shards.TABLE_BLOCK = 64


def triton_kernels(world: World) -> None:
    """Triton's kernels, interpreted, also step shards that need other ranks. Plans are kept from step to step."""
    _triton_kernels(world, {"MGUP": adamw, "Cautious": adamw})


def triton_kernels_everywhere(world: World) -> None:
    """All other policies: those that need other ranks use kernels over AdamW and SGD, the rest over every base."""
    _triton_kernels(world, {"AlphaConsistency": adamw, "RandomMask": nadam, "CautiousMGUP": sgd})
    _triton_kernels(world, {"RandomMask": adamw, "CautiousMGUP": nadam})
    _triton_kernels(world, {"RandomMask": sgd})
    _triton_kernels(world, {"CautiousMGUP": adamw})


def _triton_kernels(world: World, bases: dict[str, Make]) -> None:
    few_blocks()
    for name, base in bases.items():
        how: dict[str, Any] = {"backend": "gpu", "shapes": [(7, 5), (24, 6)]}
        options = {"policy": POLICIES[name], "statistics": base is not nadam}
        single = Run(base, options, **how).train(range(2))
        for place in (rows, columns):
            run = Run(base, options, world.mesh(world.size), place, **how).train(range(2))
            with use_backend("gpu"):
                said = run.optimizer.explain()
            by_torch = name == "MGUP" and place is columns and world.size > 1  # ties have no kernels there
            assert ("kernels   reference" in said) == by_torch and ("kernels   Triton" in said) != by_torch
            for mine, theirs in parts(run, single):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=f"{name}, {place.__name__}")
    run = Run(adamw, {"policy": MGUP(), "stochastic_rounding": True}, world.mesh(world.size), rows, backend="gpu",
              shapes=[(7, 5)], dtype=torch.bfloat16).train(range(2))  # fmt: skip
    with use_backend("gpu"):
        assert "kernels   reference" in run.optimizer.explain()  # which rounds by the whole's index


def what_one_rank_notes(world: World) -> None:
    """A foreign entry in one rank's state does not change the ranks' collectives or their order."""
    few_blocks()
    run = Run(adamw, {"policy": MGUP()}, world.mesh(world.size), rows, backend="gpu", shapes=[(8, 6)] * 2)
    run.train(range(1))
    if world.rank == 0:
        run.optimizer.base.state[run.params[1]]["debug"] = torch.zeros(3)
    run.train(range(1, 2))
    single = Run(adamw, {"policy": MGUP()}, shapes=[(8, 6)] * 2).train(range(2))
    for mine, theirs in parts(run, single):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def not_finite(world: World) -> None:
    """NaN is never selected, wherever it is; a strength whose norm has NaN multiplies by 1."""
    policies = tuple(POLICIES[name] for name in ("MGUP", "top 20 % by momentum", "Cautious", "Magma"))
    _all_layouts(world, sgd, {"policy": policies, "statistics": False}, 2, "not finite", nan=True)


def other_dtypes(world: World, everywhere: bool = False) -> None:
    """float64 is ranked by 64 bits; stochastic rounding of bfloat16 draws by the whole tensor's index."""
    how: dict[str, Any] = {"everywhere": everywhere, "dtype": torch.float64}
    _all_layouts(world, adamw, {"policy": MGUP()}, 2, "float64", number=1, **how)
    how["dtype"] = torch.bfloat16
    rounded = {"policy": MGUP(), "stochastic_rounding": True}
    _all_layouts(world, adamw, rounded, 2, "bfloat16", number=2, **how)
    rounded = {"policy": CautiousMGUP(), "stochastic_rounding": True}
    _all_layouts(world, sgd, rounded, 2, "bfloat16, agreement", number=3, **how)


def samples(world: World, everywhere: bool = False) -> None:
    """Sampled quantiles and strengths look at the same elements in every layout."""
    shapes = [(300, 301), (7, 3)]
    policies = (
        Policy(selection=TopK(fraction=0.3, quantile="sampled"), strength=Fixed()),
        Policy(selection=TopK(), strength=NormPreserving(estimate="sampled")),
        Cautious(estimate="sampled"),
    )
    for number, policy in enumerate(policies):
        how: dict[str, Any] = {"shapes": shapes, "number": number, "everywhere": everywhere}
        _all_layouts(world, adamw, {"policy": policy}, 2, repr(policy), **how)


def massive_ties(world: World) -> None:
    """With equal scores, or only two values, the K elements with the lowest indices are selected, over many cells."""
    for value in (0.0, 1.0):
        runs = []
        for mesh, place in [(None, None), *layouts(world).values()]:
            run = Run(sgd, {"policy": MGUP(tau=0.3)}, mesh, place, shapes=[(40, 40), (9, 200), (130,)])  # type: ignore[arg-type]
            for number, p in enumerate(run.params):
                grad = torch.full(p.shape, value)
                if grad.dim() > 1 and number:
                    grad.view(-1)[::7] = 2.0
                p.grad = run.cut(grad)
            run.optimizer.step()
            runs.append(run)
        for run in runs[1:]:
            assert all(torch.equal(mine, theirs) for mine, theirs in parts(run, runs[0]))


def local_scope_differs(world: World) -> None:
    """The failing twin: each shard by itself selects other elements, and `compare` notices."""
    mesh, single = world.mesh(world.size), Run(adamw, {"policy": MGUP()}).train(range(3))
    ours = Run(adamw, {"policy": MGUP(), "scope": "local"}, mesh).train(range(3))
    try:
        compare(ours, single, "local")
    except AssertionError:
        return
    raise AssertionError("scope='local' selected what one device selects")
