"""The elements inside of a matched control's bracket, and which of them are drawn."""

from __future__ import annotations

from torch import Tensor

from . import random as numbers
from . import top_k as ranking
from .chunks import scattered_ones


class Undecided:
    """Lists the elements inside of a bracket, a piece of the tensor at a time; then marks those with the largest."""

    def __init__(self) -> None:
        self.places: list[Tensor] = []  # int64, of each piece: its elements inside of the bracket, in no order
        self.hashes: list[Tensor] = []  # int32: the hash of each element's group

    def add(self, random: numbers.Ranking, start: int, inside: Tensor) -> None:
        """Add a piece, whose first element is `start`. `inside` (uint8) is 1 where a number is in the bracket."""
        places = scattered_ones(inside)
        self.hashes.append(random.hashes_at(places))
        self.places.append(places.add_(start) if start else places)

    def mark(self, count: int, marks: Tensor, alike: bool) -> bool:
        """Mark the `count` elements with the largest numbers, the first of those that are equal.

        `alike`: the upper 8 bits of all are equal. False, and nothing is marked, if the list does not have so many, or
        if `count` is below 0.
        """
        places = ranking.joined(self.places)
        if not 0 <= count <= places.numel():
            return False
        if count > 0:
            random = numbers.ranking_at(ranking.joined(self.hashes), places, alike)
            first = numbers.ordered(random, places).topk(count, largest=False, sorted=False).indices
            marks.index_fill_(0, places.index_select(0, first), 1)
        return True
