"""Parameters that hold several matrices: those that are taken apart, and hints about further ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

# Names of weights in which parts of equal size lie one below the other, and the number of parts. "query_key_value" is
# not among them: there the parts take turns by heads.
_JOINED = {"qkv": 3, "qkv_proj": 3, "in_proj_weight": 3, "gate_up_proj": 2, "w12": 2}
GATES: dict[type, int] = {nn.GRU: 3, nn.LSTM: 4}  # the gates lie one below the other
HEAD = ("lm_head", "head", "heads", "classifier", "score", "embed_out", "output_projection", "unembed")
JOINED_VIEWS = ("rows:2", "rows:3", "rows:4", "columns:2", "columns:3", "columns:4")


@dataclass
class NamedParameter:
    """A parameter with all of its names, and the module of each name."""

    tensor: Tensor
    names: list[str]
    modules: list[nn.Module] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.names[0]


def taken_apart(parameters: list[NamedParameter], parts: Mapping[str, int | str]) -> dict[int, tuple[str, str]]:
    """The parameters that the caller's `parts` takes apart: by id, their kind ("rows:3", "columns:2") and the reason.

    Raises ValueError if `parts` names nothing, or something that can't be so many matrices.
    """
    chosen: dict[int, tuple[str, str]] = {}
    if not isinstance(parts, Mapping):
        raise ValueError(
            f"param_groups_for: parts is {parts!r}; write a mapping from names to counts, {{'qkv': 3}}, or 'auto'"
        )
    for wanted, count in parts.items():
        if count not in JOINED_VIEWS and (type(count) is not int or count not in (2, 3, 4)):
            raise ValueError(
                f"param_groups_for: parts has {wanted!r}: {count!r}; it can be 2, 3 or 4 matrices, or one of "
                f"{', '.join(JOINED_VIEWS)}"
            )
        matching = [p for p in parameters if p.tensor.dim() in (2, 3) and any(_is_called(n, wanted) for n in p.names)]
        if not matching:
            matrices = ", ".join(p.name for p in parameters if p.tensor.dim() in (2, 3))
            raise ValueError(f"param_groups_for: parts names {wanted!r}, and no matrix is called so: {matrices}")
        for parameter in matching:
            view = count if isinstance(count, str) else f"{'columns' if is_transposed(parameter) else 'rows'}:{count}"
            if chosen.get(id(parameter.tensor), (view,))[0] != view:
                raise ValueError(f"param_groups_for: parts has two counts for {parameter.name}")
            _check_size(parameter, wanted, view)
            chosen[id(parameter.tensor)] = (view, f"named by you: {view.partition(':')[2]} matrices in one")
    return chosen


def _check_size(parameter: NamedParameter, wanted: str, view: str) -> None:
    side, _, count = view.partition(":")
    length = parameter.tensor.shape[-2 if side == "rows" else -1]
    if length % int(count) or (side == "columns" and length == int(count)):
        raise ValueError(
            f"param_groups_for: parts has {wanted!r}: {view!r}, and {parameter.name} has {length} {side}; each matrix "
            "needs as many, and side by side at least 2"
        )


def _is_called(name: str, wanted: str) -> bool:
    """True if `wanted` is the parameter's name or its module's, in full or the last part."""
    module, _, attribute = name.rpartition(".")
    return wanted in (name, module, attribute, module.rpartition(".")[2])


def is_transposed(parameter: NamedParameter) -> bool:
    """True for the layers of GPT-2 in transformers, whose weights are [in, out]: parts lie side by side."""
    return any(type(m).__name__ == "Conv1D" for m in parameter.modules)


def may_be_joined(p: Tensor, count: int) -> bool:
    """True if `p` can hold `count` equal parts. Three must be square: with fewer key heads the parts differ in size."""
    rows, columns = p.shape[-2:]
    return rows % count == 0 and (count != 3 or rows == 3 * columns)


def hint(parameter: NamedParameter, paths: list[list[str]]) -> str:
    """A remark for the table on what the parameter may be instead, and how to say so; empty if there is none."""
    p = parameter.tensor
    likely = [(paths[0][-1], GATES[type(m)]) for m in parameter.modules if type(m) in GATES]
    called = [part for path in paths for part in path if part in _JOINED]
    likely += [(part, _JOINED[part]) for part in called if may_be_joined(p, _JOINED[part])]
    if not likely and is_transposed(parameter) and p.shape[1] == 3 * p.shape[0]:
        likely = [(paths[0][-2] if len(paths[0]) > 1 else paths[0][-1], 3)]
    if likely:
        joined, count = likely[0]
        return f"; several in one? parts={{{joined!r}: {count}}}"
    for path in paths:  # only before a numbered layer, because the heads of an attention are inside of one
        before = path[: next((i for i, part in enumerate(path) if part.isdecimal()), 0)]
        if any(part in HEAD for part in before):
            return f"; of the head? head={[parameter.name]!r}"
    return ""
