"""`SelectiveUpdate.bind`: a class with the policy filled in, for code that wants a class and keyword arguments."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from selective.messages.construction import NOT_GIVEN


def bind(cls: Any, base_class: type[Optimizer], policy: Any = NOT_GIVEN, **options: Any) -> type:
    """A class that builds `base_class` and wraps it: `Bound(params, lr=...)`.

        trainer = Trainer(..., optimizer_cls_and_kwargs=(SelectiveUpdate.bind(AdamW, policy=MGUP()), {"lr": 3e-4}))

    `options` are `SelectiveUpdate`'s keyword arguments, all others go to `base_class`. A copy or a pickle of an
    instance is a plain `SelectiveUpdate`.
    """
    if not (isinstance(base_class, type) and issubclass(base_class, Optimizer)):
        raise TypeError(f"bind: {base_class!r} is not an optimizer class; pass the class, not an instance")

    def init(self: Any, params: Any, **arguments: Any) -> None:
        cls.__init__(self, base_class(params, **arguments), policy, **options)

    def reduce(self: Any, protocol: Any) -> Any:
        return _rebuild, (cls, self.__getstate__())

    name = f"{cls.__name__}{base_class.__name__}"
    doc = f"{cls.__name__} over {base_class.__module__}.{base_class.__qualname__}, policy {policy!r}."
    return type(name, (cls,), {"__init__": init, "__reduce_ex__": reduce, "__doc__": doc})


def _rebuild(cls: type, state: dict[str, Any]) -> Any:
    instance: Any = object.__new__(cls)
    instance.__setstate__(state)
    return instance
