"""`SelectiveUpdate.for_model`: sorts a model's parameters, makes the base, and wraps it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from selective.for_model.decided import decided
from selective.for_model.make_base import BaseOptimizer, check_options, make_base, maker
from selective.for_model.recipes import with_recipe
from selective.for_model.two_bases import taken_by_matrices, with_rates_of_rest
from selective.norms import Norm, NormControl
from selective.param_groups.by_kind import ParamGroups, param_groups_for
from selective.param_groups.settings import NO_DECAY
from selective.plan.policy_groups import KEYS
from selective.policies import Policy
from selective.policies.view import StepView
from selective.preconditioner import Preconditioner

# Those of the wrapper's arguments that have a meaning of their own here.
_OWN = ("self", "base", "policy", "preconditioner", "norm")


def for_model(
    cls: Any,
    model: nn.Module,
    base: BaseOptimizer = "adamw",
    *,
    recipe: str | None = None,
    lr: float | Mapping[str, float] | None = None,
    weight_decay: float | None = None,
    policy: Policy | Callable[[StepView], Any] | str | Mapping[str, Any] | None = None,
    preconditioner: Preconditioner | str | Mapping[str, Any] | None = None,
    norm: Norm | str | Mapping[str, Any] | None = None,
    matrices: BaseOptimizer | None = None,
    rest: BaseOptimizer | None = None,
    parts: Mapping[str, int | str] | Literal["auto"] | None = "auto",
    embeddings: Sequence[str] = (),
    head: Sequence[str] = (),
    no_decay: Collection[str] = NO_DECAY,
    verbose: bool = False,
    **options: Any,
) -> Any:
    """An optimizer for the whole model: parameters sorted by kind, the base made and wrapped.

        opt = SelectiveUpdate.for_model(model, "adamw", lr=1e-3, weight_decay=0.1, policy="cautious")

    `param_groups_for` sorts the trainable parameters, and asks the model for its head, its embeddings, and for what
    does not decay. Policy, preconditioner and norm are for the matrices: embeddings, head, routers and vectors are
    stepped as the base does it. In a mapping by kind, such as `lr={"matrices": 1.5e-3, "rest": 0.012}`, you say it
    yourself.

        opt = SelectiveUpdate.for_model(model, matrices="muon", rest="adamw", lr={"matrices": 0.02, "rest": 3e-4})

    makes two optimizers and chains them. The first gets the matrices with two dimensions. Everything else goes to
    the second: embeddings, head, routers, vectors, convolutions, and stacks of experts. A joined weight is one matrix
    to Muon: `parts` is for rotations.

        opt = SelectiveUpdate.for_model(model, recipe="soap-cautious")

    takes the settings of a run that was measured (`selective.RECIPES`). What you give besides stands in their place.

    Args:
        model: the model. Its frozen parameters are left out, so a LoRA model has its adapters in the optimizer only.
        base: the base optimizer: a class's name in torch.optim or an installed package, in any case; `module:Class`; a
            class; or a function that takes parameter groups and returns an optimizer. If it has a parameter `lr`, it
            gets the rate of the first group, too; each group has its own.
        recipe: a name in `selective.RECIPES`. It names the optimizers, so `base`, `matrices` and `rest` are left out.
        lr: the learning rate, or one for each kind. None: the recipe's, or the base's own.
        weight_decay: of all parameters but those in `no_decay`, and those that the model's `no_weight_decay()` names.
            None: the recipe's, or the base's own.
        policy: what selects, as in `SelectiveUpdate`; or a mapping from kinds to policies. "dense" makes the groups
            only.
        preconditioner: what rotates, as in `SelectiveUpdate`; or a mapping from kinds to preconditioners.
        norm: the rule about norms, as in `SelectiveUpdate`; or a mapping from kinds to such rules. The rate of the
            matrices is relative to their norm then: give them one of their own.
        matrices, rest: a base for the matrices with two dimensions, and one for everything else. One that is not given
            is `base`.
        parts: weights that are several matrices in one, as in `param_groups_for`. "auto" recognises the queries, keys
            and values of most models, GPT-2's among them, and the gates and values of SwiGLUs.
        embeddings, head: names of further parameters or modules that belong there.
        no_decay: the kinds that do not decay. Embeddings do, unless you name them.
        verbose: print what was decided: the groups, the reason for each parameter, and `explain()`.
        options: keyword arguments of `SelectiveUpdate` (`seed`, `mask_space`, ...) and of the base (`betas`, ...). With
            two bases, an option goes to each that takes it; `functools.partial(torch.optim.Muon, momentum=0.9)` as a
            base has options of its own.

    Returns:
        A `SelectiveUpdate`; with two bases a `ChainedOptimizer` of two. Of these, one without policy, preconditioner
        and options of the wrapper is not wrapped. A group that you add later is dense unless it names a policy.

    Raises:
        TypeError: `model` is no `nn.Module`, the base is an optimizer that exists already, or nobody takes an option.
        ValueError: the recipe or the base is not found, the base refuses its parameters, a kind does not exist or has
            no learning rate, or there is nothing to train.
    """
    if recipe is not None:
        given = {
            "base": base, "lr": lr, "weight_decay": weight_decay, "policy": policy, "preconditioner": preconditioner,
            "norm": norm, "matrices": matrices, "rest": rest,
        }  # fmt: skip
        return for_model(
            cls, model, parts=parts, embeddings=embeddings, head=head, no_decay=no_decay, verbose=verbose,
            **with_recipe(recipe, given, options),
        )  # fmt: skip
    ours = [name for name in inspect.signature(cls.__init__).parameters if name not in _OWN]
    of_wrapper = {name: value for name, value in options.items() if name in ours}
    of_bases = {name: value for name, value in options.items() if name not in ours}
    if matrices is not None and rest is not None and base != "adamw":
        raise ValueError(
            f"for_model: base is {base!r}, and matrices and rest name all optimizers already; leave it out"
        )
    makers = [maker(base if each is None else each) for each in (matrices, rest)]
    check_options(list(dict.fromkeys(makers)), of_bases, ours)
    groups = _sorted(
        model, lr=lr, weight_decay=weight_decay, policy=policy, preconditioner=preconditioner, norm=norm,
        parts=parts, embeddings=embeddings, head=head, no_decay=no_decay,
    )  # fmt: skip
    members = {"matrices": [], "rest": list(groups)}
    if makers[0] is not makers[1]:
        members["matrices"], members["rest"] = taken_by_matrices(groups)
        with_rates_of_rest(members["rest"], lr)
    alone = not all(members.values())
    if alone and policy is preconditioner is norm is None and not {"decay", "capture"} & of_wrapper.keys():
        warnings.warn(
            "for_model: neither a policy nor a preconditioner is given, so that every step is the base's own. Pass "
            "policy='cautious' or preconditioner='soap', for instance; policy='dense' if this is what you want",
            stacklevel=2,
        )
    if norm is not None and lr is None:
        warnings.warn(
            "for_model: norm makes the rate of the matrices relative to their norms, and lr is left out: the base's "
            "own is for updates. Begin with lr={'matrices': 0.018, 'rest': 0.012}",
            stacklevel=2,
        )
    elif not isinstance(lr, Mapping) and _takes_lr_as_it_is(norm):
        warnings.warn(
            f"for_model: norm makes the rate of the matrices relative to their norms, and lr is {lr!r} for everything. "
            f"Begin with lr={{'matrices': 0.018, 'rest': 0.012}}, or with norm=NormControl(scale=6), which turns "
            f"matrices by 6 times lr",
            stacklevel=2,
        )
    built: dict[str, Optimizer] = {}
    for (name, of_member), make in zip(members.items(), makers, strict=True):
        if of_member:
            wraps = alone or bool(of_wrapper) or _asks_for_wrapper(of_member)
            made = make_base(make, of_member if wraps else _without_our_keys(of_member), of_bases)
            built[name] = cls(made, policy="dense", **of_wrapper) if wraps else made
    optimizer = next(iter(built.values())) if alone else _chained(built)
    if verbose:
        print(decided(groups, members, optimizer))
    return optimizer


def _sorted(model: nn.Module, *, no_decay: Collection[str], **settings: Any) -> ParamGroups:
    """The groups of the model. Errors name `for_model`, which is what the user has called."""
    try:
        groups = param_groups_for(model, no_decay=no_decay, ask=True, **settings)
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):  # pydantic's have a form of their own
            raise
        raise type(error)(str(error).replace("param_groups_for", "for_model", 1)) from error
    for group in groups:
        if group["name"] in no_decay:  # also where the others have the base's own decay
            group["weight_decay"] = 0.0
    return groups


def _takes_lr_as_it_is(norm: object) -> bool:
    """True if a rule about norms turns matrices by `lr` itself, for the matrices or for a kind that is named."""
    rules = norm.values() if isinstance(norm, Mapping) else [norm]
    return any(isinstance(rule, str) or (isinstance(rule, NormControl) and rule.scale == 1) for rule in rules)


def _asks_for_wrapper(groups: list[dict[str, Any]]) -> bool:
    """True if a group has a policy, a preconditioner or a rule about norms."""
    return any(group.get(key) is not None for group in groups for key in ("policy", "preconditioner", "norm"))


def _without_our_keys(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups as a base without a wrapper gets them."""
    return [{key: value for key, value in group.items() if key not in KEYS} for group in groups]


def _chained(members: dict[str, Optimizer]) -> Optimizer:
    from selective.chained.optimizer import ChainedOptimizer

    return ChainedOptimizer(members)
