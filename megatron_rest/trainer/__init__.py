"""The training loop and what it tells people: step, state, metrics, console."""
