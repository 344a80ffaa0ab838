"""param_groups_for: sorts a model's parameters by kind, so that rotations and decay reach the right ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from selective.norms import Norm, norm_from
from selective.param_groups.by_model import Answers, ask_model
from selective.param_groups.joined_auto import known_to_be_joined
from selective.param_groups.joined_weights import HEAD, NamedParameter, hint, taken_apart
from selective.param_groups.settings import KINDS, MISSING, NO_DECAY, VIEWS, checked_number, for_each_kind
from selective.parameter import is_lazy
from selective.policies import Policy, policy_from
from selective.policies.view import StepView
from selective.preconditioner import Preconditioner, preconditioner_from

_HEADS_INSIDE = (["classifier"], ["lm_head"], ["score"])  # heads of several layers; no name of an attention's heads
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_EMBEDDING = re.compile(r"(^|_)(emb|embed|embedding|embeddings|wte|wpe)(_|$)")


class ParamGroups(list[dict[str, Any]]):
    """A list of parameter groups for a torch optimizer. `table()` and `print` show why each parameter is there."""

    def __init__(self, groups: list[dict[str, Any]], rows: list[tuple[str, str, str, str]]) -> None:
        super().__init__(groups)
        self._rows = rows

    def table(self) -> str:
        """A table with a line for each parameter: its group, its name, its shape, and why it is in that group."""
        return aligned([("group", "parameter", "shape", "because"), *self._rows])

    def __str__(self) -> str:
        return self.table()


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of equal length as lines whose columns are as wide as what is in them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def param_groups_for(
    model: nn.Module,
    *,
    weight_decay: float | None = None,
    no_decay: Collection[str] = NO_DECAY,
    embeddings: Sequence[str] = (),
    head: Sequence[str] = (),
    parts: Mapping[str, int | str] | Literal["auto"] | None = None,
    lr: float | Mapping[str, float] | None = None,
    policy: Policy | Callable[[StepView], Any] | str | Mapping[str, Any] | None = None,
    preconditioner: Preconditioner | str | Mapping[str, Any] | None = None,
    norm: Norm | str | Mapping[str, Any] | None = None,
    ask: bool = False,
) -> ParamGroups:
    """Sort the trainable parameters of `model` into named groups, for a base that `SelectiveUpdate` wraps.

    The wrapper's preconditioner rotates the groups of the first list. It leaves those of the second alone, because
    their `preconditioner` is None.

    - "matrices": 2-D weights of the model's inside; "conv": weights of convolutions; "experts": other tensors with
      three dimensions or more; "rows:2" to "rows:4" and "columns:2" to "columns:4": matrices and experts that are
      several in one, which `parts` names. All but "matrices" have a `matrix_view` of their kind.
    - "embeddings", "head", "routers" (only with `ask`), "vectors" (norms, biases).

    An embedding is a parameter of `nn.Embedding` or `nn.EmbeddingBag`, or a 2-D one called so (`pos_emb`, `wpe`). The
    head is a matrix called so (`lm_head`, `classifier`, ...), or the last linear layer if it has as many outputs as an
    embedding has rows, and not as many inputs. A parameter with several names (tied weights) comes once; if one of
    the names is an embedding's, it is an embedding. Groups without parameters are left out.

        groups = param_groups_for(model, lr={"matrices": 1.5e-3, "rest": 0.012}, policy="cautious", parts="auto")

    `lr`, `policy`, `preconditioner` and `norm` are one value, or a mapping from kinds to values. In a mapping
    "matrices" stands for all kinds of the first list that it does not name, and "rest" for everything else that it does
    not name. One learning rate is for all groups. One policy, preconditioner or norm is for the first list, and None
    for the second.

    Args:
        model: the model; its frozen parameters are left out.
        weight_decay: the `weight_decay` of each group, which is 0.0 for the kinds in `no_decay`. None: groups have no
            `weight_decay`, and the base's own applies to all.
        no_decay: the kinds of parameters that do not decay.
        embeddings, head: names of further parameters or modules that belong there, whatever they look like.
        parts: the number of matrices of equal shape, 2 to 4, that are joined in a weight: `{"qkv": 3}`. They lie one
            below the other, or side by side in a transposed weight (GPT-2's Conv1D); `"columns:2"` or `"rows:2"`
            instead of the number says which. Keys are names of parameters or of their modules, in full or the last
            part. In a stack [e, k * m, n] each of the e matrices is taken apart. Use it only if the weight's output is
            cut into so many equal parts: not if heads take turns (GPT-NeoX) or if keys have fewer heads than queries.
            "auto" takes apart what is known to be joined: by names such as `qkv`, `c_attn` and `gate_up_proj`, where
            the shape fits. None takes none apart, and the table points out weights that are probably joined.
        lr: the groups' `lr`. None: groups have none, and the base's own applies.
        policy: the groups' `policy`. None: groups have none, and the wrapper's applies.
        preconditioner: the groups' `preconditioner`, instead of the wrapper's.
        norm: the groups' `norm`. None: groups have none, and the wrapper's applies.
        ask: also ask the model: heads and embeddings are what `get_classifier()`, `get_output_embeddings()` and
            `get_input_embeddings()` return, and a last layer called `fc`; what `no_weight_decay()` names has a
            `weight_decay` of 0.0; LoRA adapters are matrices; and the routers of a mixture of experts are a kind of
            their own, which is not rotated.

    Returns:
        A list of groups with `name`, `params` (pairs of name and parameter), and the options above. `print` shows why
        each parameter is where it is.

    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: a name that the model does not have, a kind that does not exist or that has no learning rate, a
            weight that can't be so many matrices, a parameter without a shape yet, or nothing to train.
    """
    if isinstance(no_decay, str):
        raise ValueError(f"param_groups_for: no_decay is the string {no_decay!r}; write a list: [{no_decay!r}]")
    unknown = set(no_decay) - set(KINDS)
    if unknown:
        raise ValueError(f"param_groups_for: no_decay has {sorted(unknown)}; the kinds are {', '.join(KINDS)}")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups_for: got an object of type {type(model).__name__}, and what a parameter is follows from its "
            f"modules: pass the model itself, not its parameters"
        )
    if weight_decay is not None:
        checked_number("param_groups_for", "weight_decay", weight_decay)
    settings = {
        "lr": for_each_kind(
            "param_groups_for", "lr", lr, of_matrices=False, read=partial(checked_number, "param_groups_for", "lr")
        ),
        "policy": for_each_kind("param_groups_for", "policy", policy, of_matrices=True, read=policy_from),
        "preconditioner": for_each_kind(
            "param_groups_for", "preconditioner", preconditioner, of_matrices=True, read=preconditioner_from
        ),
        "norm": for_each_kind("param_groups_for", "norm", norm, of_matrices=True, read=norm_from),
    }
    parameters = list(_parameters(model))
    if not parameters:
        raise ValueError(
            "param_groups_for: the model has no parameter that requires a gradient; call requires_grad_() on what is "
            "to be trained"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    answers = ask_model(model, parameters, modules) if ask else Answers()
    kinds = _kinds(model, parameters, answers, embeddings, head)
    if parts == "auto":
        joined = known_to_be_joined(parameters, modules)
        kinds.update((key, view) for key, view in joined.items() if kinds[key][0] in ("matrices", "experts"))
    elif parts is not None:
        kinds.update(_taken_apart(parameters, parts, kinds))
    rows = [_row(parameter, *kinds[id(parameter.tensor)], answers) for parameter in parameters]
    groups = _groups(parameters, kinds, answers, weight_decay, no_decay, settings)
    return ParamGroups(groups, sorted(rows, key=lambda row: KINDS.index(row[0])))


def _groups(
    parameters: list[NamedParameter],
    kinds: Mapping[int, tuple[str, str]],
    answers: Answers,
    weight_decay: float | None,
    no_decay: Collection[str],
    settings: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """The groups in the order of `KINDS`. What the model says does not decay is a group apart."""
    by_group: dict[tuple[str, bool], list[NamedParameter]] = {}
    for parameter in parameters:
        kind = kinds[id(parameter.tensor)][0]
        may_decay = id(parameter.tensor) not in answers.no_decay or kind in no_decay
        by_group.setdefault((kind, may_decay), []).append(parameter)
    groups = []
    for kind, may_decay in sorted(by_group, key=lambda key: (KINDS.index(key[0]), not key[1])):
        decay = 0.0 if not may_decay or (weight_decay is not None and kind in no_decay) else weight_decay
        name = kind if may_decay else f"{kind}, no decay"
        groups.append(_group(name, kind, by_group[kind, may_decay], decay, settings))
    return groups


def _kinds(
    model: nn.Module,
    parameters: list[NamedParameter],
    answers: Answers,
    embeddings: Sequence[str],
    head: Sequence[str],
) -> dict[int, tuple[str, str]]:
    """The kind of each parameter by id, and the reason. What the caller names comes first, then the model's answers."""
    named = _named(model, parameters, embeddings, "embeddings") | _named(model, parameters, head, "head")
    last = _last_head(model)
    kinds: dict[int, tuple[str, str]] = {}
    for parameter in parameters:
        key = id(parameter.tensor)
        kinds[key] = named.get(key) or _kind(parameter, last)
        # A head that is tied to an embedding is an embedding.
        asks = key not in named and kinds[key][0] != "vectors" and not _is_of_embedding(parameter)
        if asks and key in answers.kinds:
            kinds[key] = answers.kinds[key]
    return kinds


def _taken_apart(
    parameters: list[NamedParameter], parts: Mapping[str, int | str], kinds: Mapping[int, tuple[str, str]]
) -> dict[int, tuple[str, str]]:
    """The kinds of the parameters that the caller's `parts` takes apart. Raises if one of them is no matrix."""
    apart = taken_apart(parameters, parts)
    for parameter in parameters:
        kind, why = kinds[id(parameter.tensor)]
        if id(parameter.tensor) in apart and kind not in ("matrices", "experts"):
            raise ValueError(f"param_groups_for: parts takes {parameter.name} apart, which belongs to {kind!r} ({why})")
    return apart


def _row(parameter: NamedParameter, kind: str, why: str, answers: Answers) -> tuple[str, str, str, str]:
    """The table's line on a parameter."""
    tied = f"; tied: {' = '.join(parameter.names)}" if len(parameter.names) > 1 else ""
    no_decay = answers.no_decay.get(id(parameter.tensor))
    why += tied + (f"; {no_decay}" if no_decay else "")
    return kind, parameter.name, " x ".join(map(str, parameter.tensor.shape)) or "-", why


def _group(
    name: str, kind: str, parameters: list[NamedParameter], decay: float | None, settings: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    group: dict[str, Any] = {"name": name, "params": [(p.name, p.tensor) for p in parameters]}
    if decay is not None:
        group["weight_decay"] = decay
    if kind in VIEWS:
        group["matrix_view"] = kind
    elif kind != "matrices":
        group["preconditioner"] = None
    for setting, of_kind in settings.items():
        if of_kind:
            group[setting] = of_kind[kind]
        if group.get(setting) is MISSING:
            raise ValueError(
                f"param_groups_for: {setting} has no value for {kind!r} ({parameters[0].name}); add {kind!r}, or 'rest'"
            )
    return group


def _parameters(model: nn.Module) -> Iterator[NamedParameter]:
    """Yield each trainable parameter once, in the model's order, with all of its names and modules."""
    parameters: dict[int, NamedParameter] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        if isinstance(module, ParametrizationList):  # of a weight norm, for instance: what counts is whose weight it is
            owner = modules[path.rpartition(".parametrizations.")[0]]
        else:
            owner = module
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            if p.requires_grad:
                if is_lazy(p):
                    raise ValueError(
                        f"param_groups_for: {path or 'the model'} has a parameter {name!r} without a shape yet, and "
                        f"what it is follows from that; run one batch through the model first"
                    )
                parameter = parameters.setdefault(id(p), NamedParameter(p, []))
                parameter.names.append(f"{path}.{name}" if path else name)
                parameter.modules.append(owner)
    yield from parameters.values()


def _named(
    model: nn.Module, parameters: list[NamedParameter], names: Sequence[str], kind: str
) -> dict[int, tuple[str, str]]:
    """The parameters that the caller names, directly or by their module: by id, their kind and the reason."""
    if isinstance(names, str):
        raise ValueError(f"param_groups_for: {kind} is the string {names!r}; write a list: [{names!r}]")
    chosen: dict[int, tuple[str, str]] = {}
    for wanted in names:
        matching = [p for p in parameters if any(n == wanted or n.startswith(f"{wanted}.") for n in p.names)]
        if not matching:
            known = ", ".join(p.name for p in parameters)
            raise ValueError(f"param_groups_for: {kind} names {wanted!r}, which trains nothing; there is {known}")
        chosen.update((id(p.tensor), (kind, "named by you")) for p in matching)
    return chosen


def _last_head(model: nn.Module) -> Tensor | None:
    """The weight of the last linear layer if it has as many outputs as an embedding has rows, else None.

    Also None if that is its number of inputs, too: then the numbers prove nothing.
    """
    rows = {m.num_embeddings for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    last = next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)
    return last.weight if last is not None and last.out_features in rows - {last.in_features} else None


def _is_of_embedding(parameter: NamedParameter) -> bool:
    return any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in parameter.modules)


def _kind(parameter: NamedParameter, last: Tensor | None) -> tuple[str, str]:
    """The kind of a parameter, and the reason."""
    p, modules = parameter.tensor, parameter.modules
    if _is_of_embedding(parameter):
        return "embeddings", "the weight of an embedding"
    if p.dim() < 2:
        return "vectors", f"{p.dim()}-D"
    if any(isinstance(m, _NORMS) for m in modules):
        return "vectors", "of a norm"
    if p.numel() == max(p.shape):
        return "vectors", "all sides but one are 1"
    if any(isinstance(m, _ConvNd) for m in modules):
        return "conv", "the weight of a convolution"
    parts = [name.split(".") for name in parameter.names]
    if p.dim() == 2 and any(any(part in HEAD for part in path[-2:]) or path[-3:-2] in _HEADS_INSIDE for path in parts):
        return "head", "called so"
    if p.dim() == 2 and p is last:
        return "head", "the last linear layer, with as many outputs as an embedding has rows"
    if any(_EMBEDDING.search(path[-1].lower()) for path in parts):
        return "embeddings", "called so"
    if p.dim() > 2:
        return "experts", f"{p.dim()}-D, read as a stack of matrices{hint(parameter, parts)}"
    return "matrices", f"2-D{hint(parameter, parts)}"
