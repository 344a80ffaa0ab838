"""The tensor class in which `opt.state[p]` shows entries that have no rows of the parameter: counts, bytes, bases.

Code that prunes or splits a parameter indexes, joins or blanks every entry of its state but `step`. Moments have the
parameter's rows, and are cut. A step count has none. Such code would raise, or leave half of a basis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

# By name, so that a method and the function of that name count as one.
_COPIES = frozenset(
    "clone detach detach_ cpu cuda to type type_as contiguous float double half bfloat16 int long requires_grad_ "
    "pin_memory alias __get__".split()
)
_CUTS = frozenset(  # what takes rows, joins them, gives them another shape, or makes others
    "__getitem__ cat concat concatenate stack hstack vstack dstack row_stack column_stack index_select masked_select "
    "select narrow take take_along_dim gather split chunk tensor_split unbind repeat repeat_interleave tile expand "
    "expand_as roll flip pad index_fill index_copy index_add masked_fill masked_scatter scatter where zeros_like "
    "ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full new_tensor reshape view "
    "reshape_as view_as permute transpose t flatten unflatten squeeze unsqueeze".split()
)
_ARITHMETIC = frozenset("add sub mul div true_divide neg lerp addcmul addcdiv rsub".split())
_NUMBERS = frozenset("__bool__ __int__ __float__ __complex__ __index__".split())  # Python wants numbers of its own
_NO_ROWS = (IndexError, RuntimeError, ValueError)  # what torch raises where a tensor does not have the rows


class Undivided(Tensor):
    """A copy of such an entry, as `opt.state[p]` shows it. It reads like any tensor, and a copy of it is one too.

    An operation that indexes, joins, reshapes, zeroes or scales one returns a placeholder (`cut_up=True`), and so does
    all that is made of a placeholder. Rows that it lacks raise nothing. Writing a placeholder back changes nothing.
    Sums and products of a single number are numbers like any other. `copy_` writes through to the state. Every other
    operation returns a plain tensor.
    """

    cut_up: bool = False
    write: Callable[[Tensor], None] | None = None

    @classmethod
    def of(cls, value: Tensor, write: Callable[[Tensor], None] | None = None) -> Undivided:
        """Return a copy of `value`; `write` is called with what is copied into it."""
        made = value.detach().clone().as_subclass(cls)
        made.write = write
        return made

    def plain(self) -> Tensor:
        """The same numbers as a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        call = _Call(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return call()

    def __format__(self, format_spec: str) -> str:
        return self.plain().__format__(format_spec)  # torch formats the number of an exact `Tensor` only

    def __repr__(self, **kwargs: Any) -> str:
        """As torch writes a tensor. A placeholder has the name of this class, because it is no entry of the state."""
        shown = self.plain().__repr__(**kwargs)
        return shown.replace("tensor(", f"{type(self).__name__}(", 1) if self.cut_up else shown

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made = self.plain().clone()
        return _marked(made) if self.cut_up else made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)


class _Call:
    """A function of torch, called with one of these or more."""

    def __init__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        name = getattr(func, "__name__", "")
        self.copies = name in _COPIES
        self.writes = not self.copies and (name == "__setitem__" or (name[-1:] == "_" and name[-2:] != "__"))
        self.ours = list(_among(args[:1] if self.writes else (args, kwargs)))  # those written, those read
        self.name = name.rstrip("_") if name[:2] != "__" else name

    def __call__(self) -> Any:
        if not self.ours or self.name in _NUMBERS:  # another tensor is written, or a number is read
            return self.func(*self.args, **self.kwargs)
        if self.writes and (self.name == "copy" or self._sets_everything()):
            return self._written_whole()
        if self.name == "_foreach_copy":
            for target, source in zip(self.args[0], self.args[1], strict=True):
                _Call(Tensor.copy_, (target, source), {})()
            return None
        if self.writes and self.name.startswith("_foreach_"):
            return self._written_beside_others()
        cut = any(one.cut_up for one in self.ours)
        if cut or self.writes or self.name in _CUTS or self.name in _ARITHMETIC:
            return self._cut(cut)
        found = self.func(*self.args, **self.kwargs)
        return _copy_of(found, self.ours[0]) if self.copies and isinstance(found, Tensor) else found

    def _sets_everything(self) -> bool:
        """True if it is `x[...] = y` or `x[:] = y`."""
        key = self.args[1] if self.name == "__setitem__" else None
        return key is Ellipsis or (isinstance(key, slice) and key == slice(None))

    def _written_whole(self) -> Any:
        """Replace all numbers: the target is a placeholder if the source is one."""
        found, one = self.func(*self.args, **self.kwargs), self.ours[0]
        one.cut_up = any(source.cut_up for source in _among((self.args[1:], self.kwargs)))
        if one.write is not None and not one.cut_up:
            one.write(one.as_subclass(Tensor).clone())
        return found

    def _written_beside_others(self) -> None:
        """Write a list of tensors without those of this class, which become placeholders."""
        for one in self.ours:
            one.cut_up = True
        among = self.args[0]
        others = [place for place, value in enumerate(among) if not isinstance(value, Undivided)]
        lists = ([a[k] for k in others] if type(a) is type(among) and len(a) == len(among) else a for a in self.args)
        if others:
            self.func(*lists, **self.kwargs)

    def _cut(self, cut: bool) -> Any:
        first = self.ours[0]
        try:
            found = self.func(*self.args, **self.kwargs)
        except _NO_ROWS:
            found = first
        else:
            of_numbers = not cut and self.name in _ARITHMETIC and first.dim() == 0 and isinstance(found, Tensor)
            if of_numbers and found.dim() == 0 and found.dtype == first.dtype:
                return found
            if not cut and not self.writes and _is_whole(found, first):
                return _copy_of(found, first)
        if self.writes:
            for one in self.ours:
                one.cut_up = True
        return _marked(found)


def _copy_of(found: Tensor, first: Undivided) -> Undivided:
    """Return `found` as this class. If it is all of the memory of `first`, writes into it go to the state, too."""
    made = found.as_subclass(Undivided)
    if _is_whole(found, first):
        made.write = first.write
    return made


def _is_whole(found: Any, first: Tensor) -> bool:
    """True if it is all of `first` in the same memory and order: `x[:]`, `x.view(x.shape)`."""
    if not isinstance(found, Tensor) or found.shape != first.shape or found.dtype != first.dtype:
        return False
    return found.data_ptr() == first.data_ptr() and found.stride() == first.stride()


def _among(values: Any) -> Iterator[Undivided]:
    """Iterate over those among the arguments of a function, in lists and tuples too."""
    if isinstance(values, Undivided):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _among(value)
    elif isinstance(values, dict):
        yield from _among(list(values.values()))


def _marked(found: Any) -> Any:
    """Return tensors as placeholders; anything else stays what it is."""
    if type(found) in (list, tuple):
        return type(found)(map(_marked, found))
    if not isinstance(found, Tensor):
        return found
    made = found if isinstance(found, Undivided) and found.cut_up else found.as_subclass(Undivided)
    made.cut_up = True
    return made
