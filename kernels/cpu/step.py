"""One tensor's step on a CPU. `selective_step.py` says in which passes, and with how much memory."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ..reference.random import sample_positions
from ..reference.rules import Advanced, begin
from ..spec import GivenRule, Item, StepSpec, Sums
from . import chunks
from . import top_k as ranking
from .apply import Applier, Totals
from .chunks import Flat, Scratch, buffer, count_ones, keep_marks, spans
from .control import WIDE, Matched, with_needed_norm
from .draw import Target
from .rules import Mover, Slice
from .selections import Selector, negated_score
from .strengths import Gatherer


class Step:
    """One tensor's step."""

    def __init__(self, item: Item, spec: StepSpec, scratch: Scratch) -> None:
        rule, selection, strength = spec.rule, spec.selection, spec.strength
        self.item, self.spec, self.rule, self.selection, self.strength = item, spec, rule, selection, strength
        self.scratch = scratch
        numbers = begin(item, rule)
        self.flat = Flat(item, writes_state=not isinstance(rule, GivenRule))
        self.numel = item.param.numel()
        self.mover = Mover(item, rule, numbers, self.flat)
        self.dtype = self.mover.dtype
        self.k = selection.k_of(self.numel) if selection.kind == "top_k" else -1
        self.selector = Selector(spec, item, self.flat)
        self.matched: Matched | None = None  # its control, if there is a choice to be controlled for
        self.in_place = False  # True if the control multiplies d by the mask before it knows the factor
        if selection.control is not None and self.k != 0 and not self.selector.everything:
            control = with_needed_norm(selection.control, strength)
            self.in_place = self._can_mask_in_place()
            self.matched = Matched(control, strength, self.numel, self.dtype, self.in_place)
        # True if nothing but numbers is asked of the policy's selection: then it is not formed.
        self.counts_only = self.matched is not None and self.matched.counts_only and self.selector.counts_by_sign
        self.threshold: ranking.Threshold | None = None
        # True if a chunk is selected in as soon as it has moved, because nothing is ranked or only a sample was.
        self.at_once = True
        self.sample: Tensor | None = None  # -score of some elements, of which the bracket is made
        self.scores: Tensor | None = None  # -score of the whole tensor, if it cannot be formed again
        self.x: Tensor | None = None  # likewise the x of norm_preserving
        self.chosen: Tensor | None = None  # 1 where exact top-K selects (uint8), of a tensor that is not small
        self.offset = 0  # of this tensor in `scratch`, where those of others lie beside it
        self.totals = Totals() if spec.statistics else None

    def run(self) -> Sums | None:
        """Step the tensor; its report, if statistics are asked for. Of a control: `prepare`, the draw, and `finish`."""
        self._sample()
        if self.strength.kind == "fixed" and self.at_once:
            pair = self._one_pass(self.totals)
        else:
            self._all_but_parameter()
            pair = self.pair
            self._second_pass(self.minus_updates, self.marks, self._applier(pair), self.totals)
        return self._report(pair)

    def prepare(self) -> Target:
        """Step all but the parameter. Returns what a control has to draw."""
        assert self.matched is not None
        self._sample()
        self._all_but_parameter()
        return self.matched.target(self.item.address, self.offset, self.minus_updates, self.mover.gradient)

    def finish(self) -> Sums | None:
        """Step the parameter, by what a control has drawn. The report, if statistics are asked for."""
        assert self.matched is not None
        marks = self._get("marks", torch.uint8)
        selected, rest = self.pair
        if self.in_place:
            scale, factor, masked_sq = self.matched.mask_(marks, selected, rest, self.totals is not None)
            self._applier((factor, 0.0)).write_masked(self.minus_updates)
            if self.totals is not None:
                self.totals.selected, self.totals.masked_sq = self.matched.count, masked_sq
        else:
            scale = self.matched.scale(marks, selected, rest)
            applier = self._applier((selected * scale, rest * scale))
            self._second_pass(self.minus_updates, marks, applier, self.totals)
        return self._report((selected * scale, rest * scale))

    def _report(self, pair: tuple[float, float]) -> Sums | None:
        self.flat.write_back()
        return self.totals.sums(self.numel, *pair) if self.totals is not None else None

    def _get(self, name: str, dtype: torch.dtype) -> Tensor:
        """Memory of the size of the tensor."""
        return self.scratch.get(name, self.numel, dtype, self.offset)

    def _sample(self) -> None:
        """Compute what a sampled estimate needs, before the moments move."""
        wanted = self.strength.is_sampled
        by_sample = self.k > 0 and self.selection.quantile == "sampled"
        positions = None
        if wanted or by_sample:
            positions = sample_positions(self.spec.draw, self.item.address, self.numel, "cpu")
        peeked = None if positions is None else self.mover.peek(positions)
        self.gatherer = Gatherer(self.strength, positions if wanted else None, peeked)
        if by_sample and peeked is not None:
            t = self._peeked_scores(peeked)
            t = torch.where(torch.isnan(t), torch.inf, t)
            rank = max(self.selection.k_of(t.numel()), 1)
            self.threshold = ranking.Threshold(ranking.smallest(t, (rank,))[0], self.numel)
        self.at_once = self.k <= 0 or self.threshold is not None

    def _peeked_scores(self, peeked: Advanced) -> Tensor:
        piece = Slice(-peeked.update, peeked.grad, peeked.momentum, None)
        return negated_score(self.selection, self.rule, piece, torch.empty_like(peeked.update))

    def _select(self, start: int, end: int, piece: Slice) -> Tensor | None:
        """1.0 where a chunk is selected, else 0.0; None if everything is selected."""
        out = buffer("selected", end - start, self.dtype)
        if self.k < 0:
            return self.selector(start, end, piece, out)
        if self.k == 0:
            return None
        if self.chosen is not None:
            return out.copy_(self.chosen[start:end])
        assert self.threshold is not None
        t = negated_score(self.selection, self.rule, piece, out) if self.scores is None else self.scores[start:end]
        return self.threshold.mark(t, start, out)

    def _applier(self, pair: tuple[float, float]) -> Applier:
        # A control has seen whether there is a coordinate that stands still.
        still = self.strength.still and self.k != 0 if self.matched is None else self.matched.still
        return Applier(self.spec, self.flat, self.dtype, pair, still=still, address=self.item.address)

    def _one_pass(self, totals: Totals | None) -> tuple[float, float]:
        pair = (1.0, 1.0) if self.k == 0 else (self.strength.selected, self.strength.rest)
        apply = self._applier(pair)
        for start, end in spans(self.numel):
            out = buffer("minus_update", end - start, self.dtype)
            piece = self.mover(start, end, out, self.selector.keep_previous)
            apply(start, end, piece.minus_update, piece.grad, self._select(start, end, piece), totals)
        return pair

    def _all_but_parameter(self) -> None:
        """The first of two passes: leave d of the whole tensor, marks of it if they are read again, and multipliers."""
        self.minus_updates = self._minus_updates()
        self.marks = self._marks() if self.at_once else None
        self._keep_whole()
        collector = None if self.at_once else self._collector()
        wide, mode = 1, contextlib.nullcontext()
        if self.matched is not None and collector is None:  # of a collector, tensors are written to later
            wide, mode = WIDE, torch.inference_mode()
        with mode:
            for start, end, piece in self.mover.chunks(self.minus_updates, self.selector.keep_previous, wide):
                update_sq = self._first_pass(start, end, piece, self.marks, collector)
                if self.in_place and self.totals is not None:
                    self.totals.add(piece.minus_update, piece.grad, update_sq)
        if collector is not None:
            self.marks = self._rank(self.minus_updates, collector)
        self.pair = (1.0, 1.0) if self.k == 0 else (self.strength.selected, self.strength.rest)
        if self.strength.kind != "fixed":
            pair = self.gatherer.multipliers(self.item, self.marks)
            self.pair = (1.0, 1.0) if self.k == 0 else pair

    def _can_mask_in_place(self) -> bool:
        """True if a control may multiply d by the mask, before it knows the factor that keeps the norm.

        Then it reads and writes less than with marks. It can't where something reads the update after that.
        """
        if self.spec.decay is not None:
            return False
        return not (isinstance(self.rule, GivenRule) and (self.rule.offset != 0 or self._holds_minus_updates()))

    def _marks(self) -> Tensor | None:
        """Memory for what is selected (uint8); None if nothing reads it again, or if to select again is as fast."""
        by_update = self.k > 0 and self.selection.score == "update" and self.strength.kind in ("fixed", "alignment")
        if self.selector.everything or self.k == 0 or (by_update and not self.gatherer.sampled):
            return None
        if self.matched is not None and not self.gatherer.sampled:
            return None
        return self._get("marks", torch.uint8)

    def _minus_updates(self) -> Tensor:
        """Memory for d of the whole tensor; if a capture has left d in float32, the tensor that holds it."""
        if self._holds_minus_updates():
            return self.flat.state["update"]
        return self._get("minus_updates", self.dtype)

    def _holds_minus_updates(self) -> bool:
        rule = self.rule
        return isinstance(rule, GivenRule) and rule.negated and self.flat.state["update"].dtype == self.dtype

    def _keep_whole(self) -> None:
        """Allocate memory for what the second pass cannot form from d and g: anything with the momentum in it."""
        if self.at_once:
            return
        if self.selection.score != "update":
            self.scores = self.scratch.get("scores", self.numel, self.dtype)
        if self.strength.kind == "norm_preserving" and self.strength.of == "momentum":
            self.x = self.scratch.get("x", self.numel, self.dtype)

    def _collector(self) -> ranking.Collector:
        if self.numel <= 4 * ranking.SAMPLE:  # everything is collected: no sample needed
            return ranking.Collector(self.k, self.numel, -torch.inf, torch.inf, self.scores)
        piece = self.mover.peek_runs(ranking.bracket_runs(self.numel), ranking.RUN)
        room = buffer("sampled scores", piece.minus_update.numel(), self.dtype)
        self.sample = negated_score(self.selection, self.rule, piece, room)
        ends = ranking.bracket(self.sample, self.k, self.numel, ranking.WIDTH)
        self.chosen = self._get("marks", torch.uint8)
        return ranking.Collector(self.k, self.numel, *ends, self.scores, self.chosen)

    def _first_pass(
        self, start: int, end: int, piece: Slice, marks: Tensor | None, collector: ranking.Collector | None
    ) -> float | None:
        """Select in a chunk, or collect its scores. Returns the sum of u^2 if a control has added it up."""
        if collector is not None:
            t = collector.room(start, end, self.dtype)
            collector.add(negated_score(self.selection, self.rule, piece, t), start)
            if self.x is not None:
                assert piece.momentum is not None
                self.x[start:end].copy_(piece.momentum)
            if self.strength.kind == "alignment":
                self.gatherer.add(piece, None, end - start)
            return None
        return self._note(start, end, piece, marks)

    def _note(self, start: int, end: int, piece: Slice, marks: Tensor | None) -> float | None:
        """Select in a chunk, remember it in `marks`, and add it to the sums of the strength and of the control.

        Returns what `Matched.add` does.
        """
        if self.counts_only:
            assert self.matched is not None
            self.matched.add_counts(*self.selector.counts(piece))
            return None
        selected, count = self._select(start, end, piece), end - start
        if selected is not None and (self.matched is not None or self.strength.kind == "mean_preserving"):
            count = count_ones(selected)
        # Of an alignment it was added before anything was ranked.
        if self.strength.kind != "fixed" and (self.at_once or self.strength.kind != "alignment"):
            self.gatherer.add(piece, selected, count)
        if marks is not None:
            assert selected is not None
            keep_marks(selected, marks[start:end])
        if self.matched is None:
            return None
        product = self.selector.product if self.selector.keep_product else None
        return self.matched.add(piece.minus_update, piece.grad, selected, count, product)

    def _again(self, minus_updates: Tensor, start: int, end: int) -> Slice:
        """The chunk again, from what the first pass has left."""
        x = None if self.x is None else self.x[start:end]
        return Slice(minus_updates[start:end], self.mover.seen_gradient(start, end), x, None)

    def _rank(self, minus_updates: Tensor, collector: ranking.Collector) -> Tensor | None:
        """Settle who is selected; mark the tensor if a strength or a control depends on that."""
        if not (self._settle(collector) or self._settle_beside(minus_updates, collector)):
            self._rank_whole(minus_updates)
        if self.strength.kind in ("fixed", "alignment") and self.matched is None:
            return self.chosen
        marks = self._marks() if self.chosen is None else None
        for start, end in spans(self.numel):
            self._note(start, end, self._again(minus_updates, start, end), marks)
        return self.chosen if marks is None else marks

    def _settle(self, collector: ranking.Collector) -> bool:
        """Find the threshold in what is collected, and complete the marks. False if the bracket has missed."""
        self.threshold = collector.settle()
        if self.threshold is not None and self.chosen is not None:
            collector.mark(self.threshold)
        return self.threshold is not None

    def _settle_beside(self, minus_updates: Tensor, missed: ranking.Collector) -> bool:
        """The same by a wider bracket than the one that has missed. False if that has missed, too."""
        if self.sample is None:
            return False
        collector = missed.beside(*ranking.bracket(self.sample, self.k, self.numel, ranking.RESCUE))
        for start, end in spans(self.numel):
            t = collector.room(start, end, self.dtype)
            if self.scores is None:
                negated_score(self.selection, self.rule, self._again(minus_updates, start, end), t)
            collector.add(t, start)
        return self._settle(collector)

    def _rank_whole(self, minus_updates: Tensor) -> None:
        """Find the threshold among all scores."""
        whole = self.scores
        if whole is None:
            whole = torch.empty(self.numel, dtype=self.dtype, device="cpu")
            for start, end in spans(self.numel):
                negated_score(self.selection, self.rule, self._again(minus_updates, start, end), whole[start:end])
        self.threshold = threshold = ranking.exact(whole, self.k)
        for start, end in spans(self.numel if self.chosen is not None else 0):
            assert self.chosen is not None
            selected = threshold.mark(whole[start:end], start, buffer("selected", end - start, self.dtype))
            keep_marks(selected, self.chosen[start:end])

    def _second_pass(self, minus_updates: Tensor, marks: Tensor | None, apply: Applier, totals: Totals | None) -> None:
        # Of marks, only the mask is in more than one operation, so that two chunks of it stay in the cache.
        for start, end in spans(self.numel, None if marks is None else 2 * chunks.chunk()):
            piece = self._again(minus_updates, start, end)
            if marks is not None:
                selected: Tensor | None = buffer("selected", end - start, self.dtype).copy_(marks[start:end])
            elif self.k > 0:
                selected = self._select(start, end, piece)
            else:
                selected = None
            apply(start, end, piece.minus_update, piece.grad, selected, totals)
