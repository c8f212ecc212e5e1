"""Prepare tool-use data for training: Arrow (or JSON, Parquet, ...) in, memory-mappable Arrow out.

The command is ``megatron-rest-data`` (or ``python -m data_tools``); see ``docs/data.md``.  Nothing here needs torch.
"""
