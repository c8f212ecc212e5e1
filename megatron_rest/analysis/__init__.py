"""Reading a run back: series, tables, plots and comparisons of what the trainer wrote.  No engine is imported."""
