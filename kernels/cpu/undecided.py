"""The elements of a tensor whose upper 8 bits lie inside of a matched control's bracket, and which of them are drawn.

They are kept in words of eight neighbours, as marks of one byte and as hashes. To find words takes fewer operations
than to find elements. An element's neighbours cost little, as an operation on a short list is mostly its call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import random as numbers
from . import top_k as ranking
from .chunks import ones_of

WORD = 8  # elements of a word
WIDTH = 3.5  # half the bracket within the list, in standard deviations of the last number's place


class Undecided:
    """Lists the elements inside of the bracket from `low` to `high`; then marks those with the largest numbers."""

    def __init__(self, low: int, high: int, moving: int) -> None:
        """`moving` is the number of the tensor's elements that are ranked at all."""
        self.low, self.width, self.density = low, (high + 1 - low) << 16, moving / (1 << 24)
        self.words: list[Tensor] = []  # int64, of each piece: the places of its words
        self.marks: list[Tensor] = []  # int64, of each piece: the marks of all of its words
        self.inside: list[Tensor] = []  # int64: eight marks of one byte each, 1 for an element that is undecided
        self.hashes: list[Tensor] = []  # int64: the hashes of two groups
        self.tail: tuple[Tensor, Tensor] | None = None  # marks of the last elements that fill no word; the same, padded

    def add(self, hashes: Tensor, inside: Tensor, marks: Tensor) -> None:
        """Add a piece of the tensor, which begins with a word: its groups' hashes, and marks of one byte (uint8).

        `inside` is 1 where a number lies in the bracket and is to be ranked, and is not kept. `marks` are what `mark`
        adds to.
        """
        whole = inside.numel() // WORD * WORD
        self._add(hashes[: whole // numbers.GROUP], inside[:whole], marks[:whole])
        if whole < inside.numel():
            tail = _padded(marks[whole:], WORD)
            self.tail = marks[whole:], tail
            words = WORD // numbers.GROUP
            self._add(_padded(hashes[whole // numbers.GROUP :], words), _padded(inside[whole:], WORD), tail)

    def _add(self, hashes: Tensor, inside: Tensor, marks: Tensor) -> None:
        flags = inside.view(torch.int64)
        words = torch.nonzero(flags).view(-1)
        self.words.append(words)
        self.marks.append(marks.view(torch.int64))
        self.inside.append(flags.index_select(0, words))
        self.hashes.append(hashes.view(torch.int64).index_select(0, words))

    def mark(self, count: int) -> bool:
        """Mark the `count` elements with the largest numbers, the first of those that are equal.

        False, and nothing is marked, if the list does not have so many, or if `count` is below 0.
        """
        drawn = self._largest(count) if count > 0 else None
        if drawn is not None:
            self._write(drawn.view(torch.int64))
        return count == 0 or drawn is not None

    def _write(self, drawn: Tensor) -> None:
        """Add the marks of the listed words to those of the tensor. No byte has both."""
        for words, marks in zip(self.words, self.marks, strict=True):
            marks.index_add_(0, words, drawn[: words.numel()])
            drawn = drawn[words.numel() :]
        if self.tail is not None:
            marks, padded = self.tail
            marks.copy_(padded[: marks.numel()])

    def _keys(self) -> Tensor:
        """Of each element of the words: 1 more than its number's distance from the bracket's lower end; 0 elsewhere."""
        keys = numbers.ranking_of_words(ranking.joined(self.hashes))
        inside = ranking.joined(self.inside).view(torch.uint8)
        return keys.sub_((self.low << 16) - 1).mul_(inside.to(torch.int32))

    def _largest(self, count: int) -> Tensor | None:
        """Marks (uint8) of the `count` largest numbers; None if there are fewer.

        They are uniform, `density` of them for each value, so that a bracket for the last of them is known here, too.
        """
        keys, last, half = self._keys(), self.width - count / self.density, WIDTH * math.sqrt(count) / self.density
        lower, upper = max(math.floor(last - half), 1), math.ceil(last + half)
        drawn = _marks(keys, upper + 1)
        missing = count - int(drawn.sum())
        places = ones_of(_marks(keys, lower).sub_(drawn))
        if not 0 <= missing <= places.numel():
            return self._by_order(keys, count)
        order = keys.index_select(0, places).sort(descending=True, stable=True).indices
        return drawn.index_fill_(0, places.index_select(0, order[:missing]), 1)

    def _by_order(self, keys: Tensor, count: int) -> Tensor | None:
        """`_largest` without a bracket: if it has missed."""
        ordered = keys.sort(descending=True, stable=True)
        if count > keys.numel() or ordered.values[count - 1] == 0:
            return None
        drawn = torch.zeros(keys.numel(), dtype=torch.uint8, device="cpu")
        return drawn.index_fill_(0, ordered.indices[:count], 1)


def _marks(keys: Tensor, lowest: int) -> Tensor:
    """1 where a key is `lowest` or more, else 0: uint8, by way of int32, which is faster than bool."""
    return torch.ge(keys, lowest, out=torch.empty_like(keys)).to(torch.uint8)


def _padded(x: Tensor, size: int) -> Tensor:
    """A copy of `x` with zeros at its end, `size` elements long."""
    padded = x.new_zeros(size)
    padded[: x.numel()] = x
    return padded
