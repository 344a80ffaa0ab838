"""A metaclass that allows `reads: ClassVar = ...`, without brackets, in a file that postpones its annotations.

`from __future__ import annotations` turns the annotation into the text "ClassVar". Python 3.10 refuses to evaluate that
on behalf of pydantic ("Unable to evaluate type annotation"). So the text is replaced as soon as the class body has
written it, before pydantic reads it. Python 3.11 to 3.13 would evaluate the text, and get the same treatment.
"""

from __future__ import annotations

import re
import sys
from collections.abc import MutableMapping
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

# Python 3.14 keeps annotations that are not postponed elsewhere, and evaluates the text without brackets.
_TEXT_IS_EVALUATED = sys.version_info >= (3, 14)
_DOTTED_NAME = re.compile(r"\s*[^\W\d]\w*(\s*\.\s*[^\W\d]\w*)*\s*")


class _Annotations(dict[str, Any]):
    """The annotations of a class body. A text that means the bare `ClassVar` becomes `ClassVar[Any]`."""

    def __setitem__(self, name: str, annotation: Any) -> None:
        bare = isinstance(annotation, str) and _is_class_var(annotation, sys._getframe(1))
        super().__setitem__(name, ClassVar[Any] if bare else annotation)


def _is_class_var(text: str, body: FrameType) -> bool:
    """True if `text` names `typing.ClassVar` in the class body: imported, renamed, dotted, for type checkers."""
    if _DOTTED_NAME.fullmatch(text) is None:
        return False
    first, *attributes = (part.strip() for part in text.split("."))
    around = body.f_back.f_locals if body.f_back is not None else {}
    known = next((names for names in (body.f_locals, around, body.f_globals) if first in names), None)
    if known is None:
        return [first, *attributes][-1] == "ClassVar"
    value = known[first]
    for attribute in attributes:
        value = getattr(value, attribute, None)
    return value is ClassVar


if TYPE_CHECKING:
    ConfiguredMeta = type(BaseModel)
else:

    class ConfiguredMeta(type(BaseModel)):
        """pydantic's metaclass, with a namespace for class bodies that reads each annotation as it is written.

        Only `__prepare__` is ours. A `__new__` of ours would hide the frame that called it, in which pydantic looks up
        names.
        """

        @classmethod
        def __prepare__(cls, *args: Any, **kwargs: Any) -> MutableMapping[str, Any]:
            namespace = super().__prepare__(*args, **kwargs)
            if not _TEXT_IS_EVALUATED:
                namespace["__annotations__"] = _Annotations()
            return namespace
