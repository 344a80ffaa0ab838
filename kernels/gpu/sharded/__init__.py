"""The step of shards on a GPU: launches between collectives."""
