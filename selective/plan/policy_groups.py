"""Policies, preconditioners, decays and norms of parameter groups: a table of ours, beside the base's groups."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, MutableMapping
from typing import Any

from selective.configured import Configured
from selective.norms import Norm, norm_from
from selective.policies import Decay, Policy, decay_from, policy_from
from selective.preconditioner import MatrixView, Preconditioner, check_matrix_view, preconditioner_from

KEYS = ("policy", "preconditioner", "matrix_view", "decay", "norm")
"""Keys of a base group that belong to the wrapper, which moves them into a table of its own."""


_NEVER: Any = object()
_ATTRIBUTES = {*KEYS, "planned", "preconditioning", "decaying", "norming"}


class ModelGroup(MutableMapping[str, Any]):
    """A mapping of a policy's or a preconditioner's hyper-parameters by name. The set of names is fixed.

    Setting one replaces the frozen model by a changed copy.
    """

    def _model(self) -> Configured | None:
        raise NotImplementedError

    def _replace(self, model: Any) -> None:
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in _ATTRIBUTES:
            raise AttributeError(
                f"{type(self).__name__}: .{name} can't be assigned; hyper-parameters are entries: "
                f"[{name!r}] = {value!r}"
            )
        super().__setattr__(name, value)

    def _dump(self) -> dict[str, Any]:
        model = self._model()
        return {} if model is None else model.model_dump()

    def __getitem__(self, name: str) -> Any:
        value: Any = self._dump()
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value or part == "kind":
                raise KeyError(self._no_such(name))
            value = value[part]
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        if name not in self:
            raise KeyError(self._no_such(name))
        data = self._dump()
        *path, last = name.split(".")
        inner = data
        for part in path:
            inner = inner[part]
        inner[last] = value
        model = type(self._model()).model_validate(data)  # type: ignore[union-attr]  # None has no names
        model.as_if_written()
        self._replace(model)

    def __delitem__(self, name: str) -> None:
        what = type(self._model())
        family = getattr(what, "_family", "model")
        raise TypeError(f"{what.__name__}: the hyper-parameters of a {family} can be set, not removed")

    def __iter__(self) -> Iterator[str]:
        return iter(_leaves(self._dump(), ""))

    def __len__(self) -> int:
        return len(_leaves(self._dump(), ""))

    def _no_such(self, name: str) -> str:
        found = ", ".join(self) or "none"
        return f"{type(self._model()).__name__} has no hyper-parameter {name!r}; it has {found}"


class PreconditionerGroup(ModelGroup):
    """The preconditioner of one parameter group, with its hyper-parameters by name; empty where there is none.

    `opt.preconditioner_groups[0]["refresh_every"] = 20` is used from the next step on. What decides over the basis
    itself (which sides, which parameters) can't change under a run; the next step says so.
    """

    def __init__(self, preconditioner: Preconditioner | None, matrix_view: MatrixView = "matrices") -> None:
        self._preconditioner = preconditioner
        self._matrix_view: MatrixView = matrix_view
        self.planned: Any = _NEVER  # the rotation that was planned for it, None where there was no preconditioner

    @property
    def preconditioner(self) -> Preconditioner | None:
        """Settable, in the same forms as `SelectiveUpdate(preconditioner=...)`.

        The next step raises if the basis would change.
        """
        return self._preconditioner

    @preconditioner.setter
    def preconditioner(self, value: Any) -> None:
        self._preconditioner = preconditioner_from(value)

    @property
    def matrix_view(self) -> MatrixView:
        """Settable, in the same forms as `SelectiveUpdate(matrix_view=...)`."""
        return self._matrix_view

    @matrix_view.setter
    def matrix_view(self, value: Any) -> None:
        self._matrix_view = check_matrix_view(value, "")

    @property
    def was_planned(self) -> bool:
        """True if a step was already planned with it, so that a change is one in training."""
        return self.planned is not _NEVER

    def load(self, preconditioner: Preconditioner) -> None:
        """Replace the preconditioner by a loaded one with the same basis, and forget the plan."""
        self.preconditioner, self.planned = preconditioner, _NEVER

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "planned"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, planned=_NEVER)

    def _model(self) -> Preconditioner | None:
        return self.preconditioner

    def _replace(self, model: Preconditioner) -> None:
        self.preconditioner = model

    def __repr__(self) -> str:
        return f"PreconditionerGroup({self.preconditioner!r}, {self.matrix_view!r})"


class DecayGroup(ModelGroup):
    """The selective decay of one parameter group, with its hyper-parameters by name; empty where there is none.

    `opt.decay_groups[0]["weight_decay"] = 0.05` is used from the next step on.
    """

    def __init__(self, decay: Decay | None) -> None:
        self._decay = decay

    @property
    def decay(self) -> Decay | None:
        """Settable, in the same forms as `SelectiveUpdate(decay=...)`, and used from the next step on."""
        return self._decay

    @decay.setter
    def decay(self, value: Any) -> None:
        self._decay = decay_from(value)

    def _model(self) -> Decay | None:
        return self._decay

    def _replace(self, model: Decay) -> None:
        self._decay = model

    def __repr__(self) -> str:
        return f"DecayGroup({self._decay!r})"


class NormGroup(ModelGroup):
    """The rule about norms of one parameter group, with its hyper-parameters by name; empty where there is none.

    `opt.norm_groups[0]["scale"] = 12` is used from the next step on.
    """

    def __init__(self, norm: Norm | None) -> None:
        self._norm = norm

    @property
    def norm(self) -> Norm | None:
        """Settable, in the same forms as `SelectiveUpdate(norm=...)`, and used from the next step on."""
        return self._norm

    @norm.setter
    def norm(self, value: Any) -> None:
        self._norm = norm_from(value)

    def _model(self) -> Norm | None:
        return self._norm

    def _replace(self, model: Norm) -> None:
        self._norm = model

    def __repr__(self) -> str:
        return f"NormGroup({self._norm!r})"


class PolicyGroup(ModelGroup):
    """The policy of one parameter group, with its hyper-parameters by name.

    `opt.policy_groups[0]["alpha"] = 1.5` is validated at once and used from the next step on, so that a scheduler can
    move it as it moves `lr`. Nested ones have dotted names (`"selection.fraction"`). The set of names is fixed.
    """

    def __init__(
        self,
        policy: Policy,
        preconditioning: PreconditionerGroup | None = None,
        decaying: DecayGroup | None = None,
        norming: NormGroup | None = None,
    ) -> None:
        self._policy = policy
        self.norming = NormGroup(None) if norming is None else norming
        self.decaying = DecayGroup(None) if decaying is None else decaying
        self.preconditioning = PreconditionerGroup(None) if preconditioning is None else preconditioning
        self._listener: Callable[[Policy], None] | None = None

    @property
    def policy(self) -> Policy:
        """The policy that is used from the next step on. To switch it, set it.

        Settable, in the same forms as `SelectiveUpdate(policy=...)`. An object that is none raises TypeError.
        """
        return self._policy

    @policy.setter
    def policy(self, value: Any) -> None:
        self._policy = policy = _assigned(value)
        if self._listener is not None:
            self._listener(policy)

    def settings(self) -> tuple[Policy, Decay | None, Preconditioner | None, MatrixView, object]:
        """The current policy, decay, preconditioner, view of matrices, and the rotation that was planned by these."""
        own = self.preconditioning
        return self._policy, self.decaying._decay, own._preconditioner, own._matrix_view, own.planned

    def listen(self, listener: Callable[[Policy], None] | None) -> None:
        """Have `listener` called with each policy that is set, at once: the replays of a CUDA graph run no step."""
        self.__dict__["_listener"] = listener  # past `__setattr__`, because every step comes here

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_listener": None}  # who listens is not copied or pickled along

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"norming": NormGroup(None)} | state)  # pickles of older versions have no `norming`

    def _model(self) -> Policy:
        return self._policy

    def _replace(self, model: Policy) -> None:
        self.policy = model

    def __repr__(self) -> str:
        return f"PolicyGroup({self.policy!r})"


def _assigned(value: Any) -> Policy:
    try:
        return policy_from(value)
    except ValueError as error:
        if isinstance(value, (str, dict)):
            raise
        raise TypeError(str(error)) from None


def _leaves(data: dict[str, Any], prefix: str) -> list[str]:
    names: list[str] = []
    for key, value in data.items():
        if key == "kind":
            continue
        names += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return names


def take_keys(group: dict[str, Any], default: PolicyGroup, known: Collection[str]) -> PolicyGroup:
    """Move all of `KEYS` out of a group. If one of them is refused, the group keeps them all.

    `default` is for keys that the group does not have, `known` are the base's own options.
    """
    rest = dict(group)
    policy = take_policy(rest, default.policy, known)
    preconditioning = take_preconditioner(rest, default.preconditioning, known)
    decaying = take_decay(rest, default.decaying.decay, known)
    taken = PolicyGroup(policy, preconditioning, decaying, take_norm(rest, default.norming.norm, known))
    for key in [key for key in group if key not in rest]:
        del group[key]
    return taken


def take_policy(group: dict[str, Any], default: Policy, known: Collection[str]) -> Policy:
    """Move a group's `policy` out of it: the default where it names none, `Dense()` where it says None.

    `known` are the base's own options. A hyper-parameter of the policy beside it would be silently without effect.
    """
    if "policy" not in group:
        return default
    policy = policy_from(group["policy"])
    fields = [name for name in type(policy).model_fields if name not in KEYS]  # those are the group's own keys
    stray = [name for name in fields if name in group and name not in known]
    if stray:
        raise ValueError(
            f"SelectiveUpdate: a parameter group has {stray[0]!r} beside its policy {policy!r}; hyper-parameters of a "
            f"policy go into it: 'policy': {{'kind': {policy.kind!r}, {stray[0]!r}: ...}}"
        )
    del group["policy"]
    return policy


def take_preconditioner(
    group: dict[str, Any], default: PreconditionerGroup, known: Collection[str]
) -> PreconditionerGroup:
    """Move a group's `preconditioner` and `matrix_view` out of it: the default's where it names none.

    `preconditioner` None there: none. What the base itself knows by such a name stays the base's.
    """
    given = {key: group[key] for key in ("preconditioner", "matrix_view") if key in group and key not in known}
    view = check_matrix_view(given.get("matrix_view", default.matrix_view), "a parameter group's ")
    found = preconditioner_from(given["preconditioner"]) if "preconditioner" in given else default.preconditioner
    if found is not None and "preconditioner" in given:
        stray = [name for name in type(found).model_fields if name in group and name not in known]
        if stray:
            raise ValueError(
                f"SelectiveUpdate: a parameter group has {stray[0]!r} beside its preconditioner {found!r}; "
                f"hyper-parameters of a preconditioner go into it: 'preconditioner': {{'kind': {found.kind!r}, "
                f"{stray[0]!r}: ...}}"
            )
    for key in given:
        del group[key]
    return PreconditionerGroup(found, view)


def take_decay(group: dict[str, Any], default: Decay | None, known: Collection[str]) -> DecayGroup:
    """Move a group's `decay` out of it: the default where it names none; None there: decay of every coordinate.

    A `decay` that the base itself knows stays the base's.
    """
    if "decay" not in group or "decay" in known:
        return DecayGroup(default)
    decay = decay_from(group["decay"])
    stray = [name for name in ("of", "strict") if decay is not None and name in group and name not in known]
    if stray:
        raise ValueError(
            f"SelectiveUpdate: a parameter group has {stray[0]!r} beside its decay {decay!r}; hyper-parameters of a "
            f"decay go into it: 'decay': {{'kind': {type(decay).__name__!r}, {stray[0]!r}: ...}}"
        )
    del group["decay"]
    return DecayGroup(decay)


def take_norm(group: dict[str, Any], default: Norm | None, known: Collection[str]) -> NormGroup:
    """Move a group's `norm` out of it: the default where it names none; None there: the base moves the norms.

    A `norm` that the base itself knows stays the base's.
    """
    if "norm" not in group or "norm" in known:
        return NormGroup(default)
    norm = norm_from(group["norm"])
    del group["norm"]
    return NormGroup(norm)
