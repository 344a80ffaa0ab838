"""The checks of `scripts/sharded.py`: sharded steps against steps of whole tensors, in every layout."""
