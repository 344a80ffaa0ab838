"""Checks prose: with rules of proselint, with the words of vocabulary.txt, and for sentences that are too long.

proselint's other rules are about typography that Markdown does by itself, or about taste.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from proselint.checks import __register__ as of_proselint
from proselint.registry.checks import Check, types

from documentation.prose import prose_of, sentences

RULES = (
    "archaism",
    "hedging",
    "lexical_illusions",
    "malapropisms",
    "mixed_metaphors",
    "nonwords",
    "oxymorons",
    "redundancy",
    "uncomparables",
)
VOCABULARY = Path(__file__).with_name("vocabulary.txt")
LONGEST = 40  # words of a sentence on a page


def vocabulary(file: Path = VOCABULARY) -> dict[str, str]:
    """Read the phrases, each with the one to write instead.

    Raises:
        ValueError: a line is not "phrase -> instead".
    """
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    for line in lines:
        if line.count(" -> ") != 1:
            raise ValueError(f'{file.name}: {line!r} is not "phrase -> instead"')
    return dict(line.split(" -> ") for line in lines)


def checks(words: dict[str, str]) -> list[Check]:
    chosen = [check for check in of_proselint if any(check.matches_partial(rule) for rule in RULES)]
    ours = types.PreferredForms(items={phrase.replace(" ", r"\s+"): instead for phrase, instead in words.items()})
    return [*chosen, Check(check_type=ours, path="vocabulary", message="write '{}' instead of '{}'")]


def findings(files: Iterable[Path], words: dict[str, str]) -> Iterator[str]:
    """A line for each finding, with its file and line."""
    rules = checks(words)
    for file in files:
        prose = prose_of(file)
        found = [(at, f"{LONGEST} words at most in a sentence: {n}") for at, n in _long(prose) if file.suffix == ".md"]
        # A heading and the paragraph below it are no sentence. Same length: offsets stay.
        text = f"\n{prose}\n".replace("\n\n", ".\n")
        for rule in rules:
            for result in rule.check(text):
                if rule.path != "lexical_illusions" or _is_twice(text[slice(*result.span)]):
                    found.append((result.span[0] - 1, f"{rule.path}: {_one_line(result.message)}"))
        for at, message in sorted(found):
            yield f"{file}:{prose.count(chr(10), 0, max(at, 0)) + 1}: {message}"


def _long(prose: str) -> Iterator[tuple[int, int]]:
    for at, sentence in sentences(prose):
        if (number := len(sentence.split())) > LONGEST:
            yield at, number


def _is_twice(text: str) -> bool:
    """True if a word stands twice in a row. Symbols of a formula don't count, and neither do ends of two comments."""
    first, *more = text.split()
    return "  " not in text and more in ([first], [first.lower()]) and first.isalpha() and not first.isupper()


def _one_line(message: str) -> str:
    return re.sub(r"\s+", " ", message)
