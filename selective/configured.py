"""Configured: the base class of policies, selections, strengths and preconditioners, a frozen model with a `kind`.

Instances are validated at construction, print as they were written, and go to JSON and back. The `kind` tags the JSON
form. A subclass registers itself under its class name, so a user's own policy is saved and loaded like ours. Whoever
writes a kind may use any case, and spaces, hyphens or underscores: "mgup", "cautious-mgup".

Note [annotations as text]: `from __future__ import annotations` turns `reads: ClassVar = ...` into the text "ClassVar".
Python 3.10 refuses to evaluate that on behalf of pydantic ("Unable to evaluate type annotation"). So `ConfiguredMeta`
replaces the text as soon as the class body has written it, before pydantic reads it. Later versions of Python would
evaluate it; they get the same, up to 3.13.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, MutableMapping
from difflib import get_close_matches
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, model_serializer, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler  # pydantic 2.7 has it there only
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError

from selective.messages.class_bodies import checked_body, refuse_field, unbuilt
from selective.messages.families import FUNCTION, missing_function, no_member, of_another_family
from selective.messages.short import short
from selective.messages.wrong_values import frozen, in_plain_words, unknown_key

C = TypeVar("C", bound="Configured")

# Python 3.14 keeps annotations that are not postponed elsewhere, and evaluates the text without brackets.
_TEXT_IS_EVALUATED = sys.version_info >= (3, 14)
_DOTTED_NAME = re.compile(r"\s*[^\W\d]\w*(\s*\.\s*[^\W\d]\w*)*\s*")


class _Annotations(dict[str, Any]):
    """The annotations of a class body. A text that means the bare `ClassVar` becomes `ClassVar[Any]`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def __setitem__(self, name: str, annotation: Any) -> None:
        meant = _named(annotation, sys._getframe(1)) if isinstance(annotation, str) else annotation
        refuse_field(self._kind, name, annotation, meant)
        bare = isinstance(annotation, str) and _is_class_var(annotation, meant)
        super().__setitem__(name, ClassVar[Any] if bare else annotation)


_UNKNOWN = object()


def _named(text: str, body: FrameType) -> Any:
    """Return what a dotted name stands for in the class body; `_UNKNOWN` for other text, and where it is not there."""
    if _DOTTED_NAME.fullmatch(text) is None:
        return _UNKNOWN
    first, *attributes = (part.strip() for part in text.split("."))
    around = body.f_back.f_locals if body.f_back is not None else {}
    known = next((names for names in (body.f_locals, around, body.f_globals) if first in names), None)
    if known is None:
        return _UNKNOWN
    value = known[first]
    for attribute in attributes:
        value = getattr(value, attribute, None)
    return value


def _is_class_var(text: str, meant: Any) -> bool:
    """True if `text`, which stands for `meant`, names `typing.ClassVar`: imported, renamed, dotted, for type checkers.

    What is imported for type checkers alone is not there. Then the name decides.
    """
    if meant is _UNKNOWN and _DOTTED_NAME.fullmatch(text) is not None:
        return text.rpartition(".")[2].strip() == "ClassVar"
    return meant is ClassVar


if TYPE_CHECKING:
    ConfiguredMeta = type(BaseModel)
else:

    class ConfiguredMeta(type(BaseModel)):
        """pydantic's metaclass, with a namespace for class bodies that reads each annotation as it is written.

        Only `__prepare__` is ours. A `__new__` of ours would hide the frame that called it, in which pydantic looks up
        names.
        """

        @classmethod
        def __prepare__(cls, name: str, bases: tuple[type, ...], **kwargs: Any) -> MutableMapping[str, Any]:
            namespace = super().__prepare__(name, bases, **kwargs)
            if not _TEXT_IS_EVALUATED:
                namespace = checked_body(type(namespace))(namespace)
                namespace.bases = bases
                namespace["__annotations__"] = _Annotations(name)
            return namespace


class Configured(BaseModel, metaclass=ConfiguredMeta):
    """A frozen model with keyword arguments only and a `kind`, which is its class name unless it says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: ClassVar[str] = ""
    _short_names: ClassVar[dict[str, dict[str, Any]]] = {}  # in lower case: the data that each stands for
    _family: ClassVar[str] = ""
    _registry: ClassVar[dict[str, type[Configured]]] = {}
    _saved_without: ClassVar[dict[str, Any]] = {}
    """The values of fields at which a checkpoint leaves these fields out. Checkpoints that are older than a field go on
    with this value, so that a new field can't change a run."""
    _heads: ClassVar[list[type[Configured]]] = []  # the base class of each family
    _replaces: ClassVar[bool] = False  # True: takes the place of another class of its kind
    _state_is_kept: ClassVar[str] = "it is the same in every step"

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if "_registry" in cls.__dict__:  # the head of a family (Policy, Selection, Strength), which has no kind
            Configured._heads.append(cls)
            return
        if "kind" not in cls.__dict__:
            cls.kind = cls.__name__
        other = cls._registry.get(cls.kind)
        same_place = other is None or (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)
        if other is not None and not same_place and not cls._replaces:
            raise TypeError(
                f"{cls._family} kind {cls.kind!r} is taken by {other.__module__}.{other.__qualname__}; checkpoints "
                f"and JSON find a {cls._family} by its kind: rename the class, or set `kind: ClassVar[str] = ...`"
            )
        cls._registry[cls.kind] = cls  # a class that is defined again (a notebook cell) replaces itself

    def __init__(self, /, *args: Any, **data: Any) -> None:
        if args:
            names = ", ".join(f"{name}=..." for name in type(self).model_fields)
            raise TypeError(f"{self.kind} takes keyword arguments only: {self.kind}({names})")
        with in_plain_words():
            super().__init__(**data)

    # pydantic calls an `__init__` that is not marked so for nested data, too, whose errors would lose their path.
    __init__.__pydantic_base_init__ = True

    if not TYPE_CHECKING:  # a type checker refuses assignments already

        def __setattr__(self, name: str, value: Any) -> None:
            try:
                super().__setattr__(name, value)
            except ValidationError:
                cls = type(self)
                own_init = cls.__init__ is not Configured.__init__ and name not in cls.model_fields
                in_init, state = own_init or not self._is_built(), cls._state_is_kept.format(name=name)
                text = frozen(cls.__name__, cls._family, name, value, in_init, state)
                raise AttributeError(text) from None

    def _is_built(self) -> bool:
        return hasattr(self, "__pydantic_fields_set__")

    @classmethod
    def model_validate(cls: type[C], obj: Any, **options: Any) -> C:
        """As pydantic's, but the error is a `ValueError` of one line."""
        with in_plain_words():
            return super().model_validate(obj, **options)

    @model_validator(mode="wrap")
    @classmethod
    def _check_kind(cls: type[C], data: Any, handler: ModelWrapValidatorHandler[C]) -> C:
        if isinstance(data, dict) and "kind" in data:
            data = dict(data)
            kind = data.pop("kind")
            if kind != cls.kind:
                raise PydanticCustomError(
                    "kind_mismatch",
                    "kind is {found}, but {expected} was expected here",
                    {"found": repr(kind), "expected": repr(cls.kind)},
                )
        if isinstance(data, dict):
            unknown = [key for key in data if key not in cls.model_fields]
            if unknown:
                lines = [
                    InitErrorDetails(
                        type=PydanticCustomError(
                            "unknown_key", "{text}", {"text": unknown_key(cls.kind, key, list(cls.model_fields))}
                        ),
                        loc=(key,),
                        input=data[key],
                    )
                    for key in unknown
                ]
                raise ValidationError.from_exception_data(cls.kind, lines)
        return handler(data)

    @model_serializer(mode="wrap")
    def _with_kind(self, handler: Any) -> dict[str, Any]:
        return {"kind": self.kind, **handler(self)}

    def as_if_written(self) -> None:
        """Print only what differs from the defaults from now on. For an instance whose fields all came from data."""
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Configured):
                value.as_if_written()
            if value == field.get_default(call_default_factory=True):
                self.model_fields_set.discard(name)

    def __repr_args__(self) -> Any:  # print as it was written
        return [(name, getattr(self, name)) for name in type(self).model_fields if name in self.model_fields_set]

    def __str__(self) -> str:
        return repr(self)

    @classmethod
    def from_data(cls: type[C], data: Any) -> C:
        """Build a member of this family from a kind's name, a dict with a `kind`, or JSON text of such a dict.

        An instance of the family is returned as it is. Raises `ValueError` for a wrong value or key, with its path, and
        for an unknown kind, with the kinds that exist.
        """
        with in_plain_words():
            return cls.part_from_data(data)

    @classmethod
    def part_from_data(cls: type[C], data: Any) -> C:
        """As `from_data`, inside of another pydantic model, which adds the path to pydantic's own errors."""
        if isinstance(data, str) and data.lstrip().startswith("{"):
            try:
                data = json.loads(data)
            except (ValueError, RecursionError) as error:  # a number of too many digits is a plain ValueError
                raise ValueError(f"{cls._family}: not JSON ({error})") from error
        if isinstance(data, cls):
            if not data._is_built():
                raise TypeError(unbuilt(type(data).__name__, cls._family, cls.model_fields))
            return data
        return _build(cls, data)

    def to_saved(self) -> str:
        """Return the JSON text that a checkpoint has."""
        left_out = {name for name, value in self._saved_without.items() if getattr(self, name) == value}
        return self.model_dump_json(exclude=left_out)

    @classmethod
    def from_saved(cls: type[C], text: str) -> C:
        """Build a member of this family from a checkpoint's JSON text, of this version or of an earlier one.

        Raises as `from_data` does.
        """
        model = cls.from_data(text)
        absent = {name: value for name, value in model._saved_without.items() if name not in model.model_fields_set}
        return model.model_copy(update=absent) if absent else model


def _build(family: type[C], data: Any) -> C:
    """Build one member from parsed data. A surrounding pydantic model adds the path to its errors."""
    if isinstance(data, str):
        data = {"kind": data}
    known = ", ".join(repr(kind) for kind in sorted(family._registry) if not kind.startswith(FUNCTION))
    what = family._family
    if isinstance(data, type) and issubclass(data, family):
        raise ValueError(f"{what}: found the class {data.__name__}, not an instance: write {data.__name__}()")
    if isinstance(data, Configured):
        raise ValueError(of_another_family(what, data._family, short(data)))
    if isinstance(data, type) and issubclass(data, Configured):
        raise ValueError(of_another_family(what, data._family, f"{data.__name__}()"))
    if not isinstance(data, dict):
        raise ValueError(no_member(what, family.__name__, data))
    if "kind" not in data:
        raise ValueError(f"{what}: found no 'kind' in {short(data)}; the kinds are {known}")
    kind = data["kind"]
    kind, data = _as_registered(family, kind, data)
    member = family._registry.get(kind) if isinstance(kind, str) else None
    if member is None:
        other = next(_elsewhere(kind), None) if isinstance(kind, str) and not _begins(kind, family) else None
        if other is not None:
            raise ValueError(of_another_family(what, *other))
        if isinstance(kind, str) and kind.startswith(FUNCTION):
            raise ValueError(missing_function(kind))
        near = get_close_matches(short(kind).strip("'").lower(), [name.lower() for name in family._registry], n=1)
        hint = next((f" (did you mean {name!r}?)" for name in family._registry if name.lower() in near), "")
        raise ValueError(f"{what}: kind {short(kind)} is not known{hint}; the kinds are {known}")
    return super(Configured, member).model_validate(data)  # type: ignore[return-value, misc]


def _begins(kind: str, family: type[Configured]) -> bool:
    """True for the beginning of a kind of this family: "cautious" of CautiousDecay, which is a policy as well."""
    return any(plain_name(name).startswith(plain_name(kind)) for name in family._registry)


def _elsewhere(kind: str) -> Iterator[tuple[str, str]]:
    """Yield the families that have this kind, or a short name for one, with the repr of what to write there."""
    for head in Configured._heads:
        names = [*head._registry, *head._short_names]
        yield from ((head._family, repr(name)) for name in names if plain_name(name) == plain_name(kind))


def kinds_of(data: Any) -> Any:
    """The kinds in a model's data, its own and those of what it is made of: what makes two models of one kind."""
    if not isinstance(data, dict) or "kind" not in data:
        return None
    return data["kind"], {key: kinds_of(value) for key, value in data.items() if kinds_of(value) is not None}


def _as_registered(family: type[Configured], kind: Any, data: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The kind as it is registered, and `data` with that kind and with the fields that a short name stands for.

    What is registered in exactly this way comes first. An unknown kind is returned as it is. Raises ValueError if two
    kinds differ only in what may be written differently.
    """
    registry = family._registry
    if not isinstance(kind, str) or kind in registry:
        return kind, data
    short = family._short_names.get(plain_name(kind))
    if short is not None:
        return short["kind"], {**short, **data, "kind": short["kind"]}
    alike = [name for name in registry if plain_name(name) == plain_name(kind)]
    if len(alike) > 1:
        raise ValueError(f"{family._family}: kind {kind!r} can be {' or '.join(map(repr, alike))}; write it as there")
    return (alike[0], {**data, "kind": alike[0]}) if alike else (kind, data)


def plain_name(name: str) -> str:
    """A name in lower case, without spaces, hyphens and underscores."""
    return re.sub(r"[\s_-]", "", name).lower()
