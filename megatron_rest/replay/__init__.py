"""A microbatch of a run in one file, and the same numbers computed again in float64 by other code."""
