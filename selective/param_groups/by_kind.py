"""param_groups_for: sorts a model's parameters by kind, so that rotations and decay reach the right ones."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from selective.param_groups.joined_weights import HEAD, NamedParameter, hint, taken_apart
from selective.parameter import is_lazy

_VIEWS = ("rows:2", "rows:3", "rows:4", "conv", "experts")  # kinds with the name of their `matrix_view`
KINDS = ("matrices", *_VIEWS, "embeddings", "head", "vectors")
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
        head = ("group", "parameter", "shape", "because")
        rows = [head, *self._rows]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in rows]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def param_groups_for(
    model: nn.Module,
    *,
    weight_decay: float | None = None,
    no_decay: Collection[str] = ("vectors",),
    embeddings: Sequence[str] = (),
    head: Sequence[str] = (),
    parts: Mapping[str, int] | None = None,
) -> ParamGroups:
    """Sort the trainable parameters of `model` into named groups, for a base that `SelectiveUpdate` wraps.

    The wrapper's preconditioner rotates the groups of the first list. It leaves those of the second alone, because
    their `preconditioner` is None.

    - "matrices": 2-D weights of the model's inside; "conv": weights of convolutions; "experts": other tensors with
      three dimensions or more; "rows:2" to "rows:4": matrices and experts that are several in one, which `parts` names.
      All but "matrices" have a `matrix_view` of their kind.
    - "embeddings", "head", "vectors" (norms, biases).

    An embedding is a parameter of `nn.Embedding` or `nn.EmbeddingBag`, or a 2-D one called so (`pos_emb`, `wpe`). The
    head is a matrix called so (`lm_head`, `classifier`, ...), or the last linear layer if it has as many outputs as an
    embedding has rows, and not as many inputs. A parameter with several names (tied weights) comes once; if one of
    the names is an embedding's, it is an embedding. Groups without parameters are left out.

    Args:
        model: the model; its frozen parameters are left out.
        weight_decay: the `weight_decay` of each group, which is 0.0 for the kinds in `no_decay`. None: groups have no
            `weight_decay`, and the base's own applies to all.
        no_decay: the kinds of parameters that do not decay.
        embeddings, head: names of further parameters or modules that belong there, whatever they look like.
        parts: the number of matrices of equal shape, 2 to 4, that lie one below the other in a weight: `{"qkv": 3}`.
            Keys are names of parameters or of their modules, in full or the last part. In a stack [e, k * m, n] each
            of the e matrices is taken apart. Use it only if the weight's output is cut into so many equal parts: not
            if heads take turns (GPT-NeoX), if keys have fewer heads than queries, or if the weight is transposed
            (GPT-2's Conv1D). The table points out weights that are probably joined; none is taken apart unasked.

    Returns:
        A list of groups with `name`, `params` (pairs of name and parameter), and the options above. `print` shows why
        each parameter is where it is.

    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: a name that the model does not have, a kind that does not exist, a weight that can't be so many
            matrices, a parameter without a shape yet, or nothing to train.
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
    parameters = list(_parameters(model))
    if not parameters:
        raise ValueError("param_groups_for: the model has no parameter that requires a gradient")
    named = _named(model, parameters, embeddings, "embeddings") | _named(model, parameters, head, "head")
    last = _last_head(model)
    apart = taken_apart(parameters, {} if parts is None else parts)
    by_kind: dict[str, list[NamedParameter]] = {kind: [] for kind in KINDS}
    rows: list[tuple[str, str, str, str]] = []
    for parameter in parameters:
        kind, why = named.get(id(parameter.tensor)) or _kind(parameter, last)
        if id(parameter.tensor) in apart:
            if kind not in ("matrices", "experts"):
                raise ValueError(
                    f"param_groups_for: parts takes {parameter.name} apart, which belongs to {kind!r} ({why})"
                )
            kind, why = apart[id(parameter.tensor)]
        tied = f"; tied: {' = '.join(parameter.names)}" if len(parameter.names) > 1 else ""
        by_kind[kind].append(parameter)
        rows.append((kind, parameter.name, " x ".join(map(str, parameter.tensor.shape)) or "-", why + tied))
    groups = [_group(kind, of_kind, weight_decay, no_decay) for kind, of_kind in by_kind.items() if of_kind]
    return ParamGroups(groups, sorted(rows, key=lambda row: KINDS.index(row[0])))


def _group(
    kind: str, parameters: list[NamedParameter], weight_decay: float | None, no_decay: Collection[str]
) -> dict[str, Any]:
    group: dict[str, Any] = {"name": kind, "params": [(p.name, p.tensor) for p in parameters]}
    if weight_decay is not None:
        group["weight_decay"] = 0.0 if kind in no_decay else weight_decay
    if kind in _VIEWS:
        group["matrix_view"] = kind
    elif kind != "matrices":
        group["preconditioner"] = None
    return group


def _parameters(model: nn.Module) -> Iterator[NamedParameter]:
    """Yield each trainable parameter once, in the model's order, with all of its names and modules."""
    parameters: dict[int, NamedParameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            if p.requires_grad:
                if is_lazy(p):
                    raise ValueError(
                        f"param_groups_for: {path or 'the model'} has a parameter {name!r} without a shape yet, and "
                        f"what it is follows from that; run one batch through the model first"
                    )
                parameter = parameters.setdefault(id(p), NamedParameter(p, []))
                parameter.names.append(f"{path}.{name}" if path else name)
                parameter.modules.append(module)
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


def _kind(parameter: NamedParameter, last: Tensor | None) -> tuple[str, str]:
    """The kind of a parameter, and the reason."""
    p, modules = parameter.tensor, parameter.modules
    if any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in modules):
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
