"""Exactly the K largest scores of each tensor, without sorting: sample, count, settle, ties.

1. `sample_kernel` (`bracket.py`) forms the scores at drawn positions. Their ranks give two keys between which the K-th
   most likely lies: the bracket. A small tensor is its own sample, which gives the K-th itself (`small.py`).
2. The pass over everything (`selective_step_kernel`) counts the keys above the bracket, and leaves those inside
   undecided: one bit an element, and a histogram.
3. `find_kernel` finds the bin of the histogram that holds the K-th; `settle_kernel` decides every other bin, and lists
   the few elements of this one (`settle.py`).
4. `ties_kernel` ranks the listed elements, equal scores by their index.

A bracket that missed and a list that overflowed are noted on the device, and mended there by `repair.py`.
"""
