"""The check of the English: it finds what it is there for, at its line, and looks at prose only."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from documentation.openings import openings, question
from documentation.prose import markdown, prose_of, sentences

ROOT = Path(__file__).parents[2]
PAGE = """# A page

Nobody looks at `what becomes of` this, nor at [a link](once-more.md "x").

```python
what = "becomes of"  # what becomes of it
```

<!-- what becomes of it -->
This is what
becomes of it. The the end.
"""
MODULE = '''"""Once more."""

NAME = "once more"


class A:
    x: int = 1
    """A field, once more."""


def f(n):  # once more
    # `once more` in code
    raise ValueError(f"once more: {n}")


def g():
    warnings.warn(
        "a warning, "
        "once more",
    )
'''
QUESTIONS = '''"""What a module has."""


class A:
    """Whose it is."""
    x: int = 1
    """Where it lies."""
    y = "What is no docstring"

    def f(self):
        """
        Which of them.
        """

    async def g(self):
        """Whether it is one, or not."""

    def h(self):
        """Return what is asked for."""
        def inner():
            """When it is called."""
'''


def test_prose_keeps_its_place(tmp_path: Path) -> None:
    prose = markdown(PAGE)
    assert len(prose) == len(PAGE) and prose.count("\n") == PAGE.count("\n")
    assert "what becomes of" not in prose and "once-more" not in prose and "a link" in prose
    (tmp_path / "a.py").write_text(MODULE)
    prose = prose_of(tmp_path / "a.py")
    assert len(prose) == len(MODULE)
    said = [number for number, line in enumerate(prose.splitlines(), 1) if "once more" in line.lower()]
    assert said == [1, 8, 11, 13, 19]


def test_sentences_end() -> None:
    text = "# One\n\nTwo words. Three\nwords here; four: five\n\n- six\n- seven\n\n| eight | nine |\n"
    words = ["# One", "Two words", "Three\nwords here", "four", "five", "- six", "- seven", "eight", "nine"]
    assert [sentence for _, sentence in sentences(text)] == words
    assert all(text[at:].startswith(sentence) for at, sentence in sentences(text))


def test_findings_have_their_line(tmp_path: Path) -> None:
    if importlib.util.find_spec("proselint") is None:
        assert not os.environ.get("CI"), "CI installs the extra `dev`"
        pytest.skip("the style is checked with the extra `dev`, which is not installed")
    from documentation.style import LONGEST, findings, vocabulary

    page, module = tmp_path / "a.md", tmp_path / "a.py"
    page.write_text(PAGE + "\n" + "word " * LONGEST + "more.\n")
    module.write_text(MODULE)
    lines = list(findings([page, module], vocabulary()))
    assert lines[0] == f"{page}:10: vocabulary: write 'what happens to' instead of 'what becomes of'"
    assert lines[1].startswith(f"{page}:11: lexical_illusions")
    assert lines[2] == f"{page}:13: {LONGEST} words at most in a sentence: {LONGEST + 1}"
    assert [line.partition(": vocabulary")[0] for line in lines[3:]] == [f"{module}:{n}" for n in (1, 8, 11, 13, 19)]
    page.write_text("# A page\n\nA page that says what it says.\n")
    assert list(findings([page], vocabulary())) == []


def test_a_line_of_the_vocabulary_that_is_no_rule_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("proselint")
    from documentation.style import vocabulary

    (tmp_path / "words.txt").write_text("# words\n\nonce more -> again\n")
    assert vocabulary(tmp_path / "words.txt") == {"once more": "again"}
    (tmp_path / "words.txt").write_text("once more: again\n")
    with pytest.raises(ValueError, match="phrase -> instead"):
        vocabulary(tmp_path / "words.txt")


def test_docstrings_that_open_with_a_question_word_have_their_line(tmp_path: Path) -> None:
    module = tmp_path / "a.py"
    module.write_text(QUESTIONS)
    found = [line.removeprefix(f"{module}:").partition(":")[0] for line in openings([module])]
    assert sorted(map(int, found)) == [1, 5, 7, 11, 16, 21]
    assert all(" is or does, and does not open with 'W" in line for line in openings([module]))
    module.write_text(MODULE)
    assert list(openings([module])) == []


def test_a_condition_may_open_a_docstring() -> None:
    """As long as it is a whole sentence: something follows from it."""
    assert question("If brackets miss, no element goes to a list.") is None
    assert question("When it fails,\nthe old basis stays.") is None
    assert question("If brackets miss. No, that is not all") == "If"
    assert question("When a solver fails: float64, the CPU") == "When"
    assert question("Whatever the base is, it is stepped") is None
    assert question("However it is called") is None
