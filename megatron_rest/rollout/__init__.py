"""Rollouts: token in, token out.  Importing this package imports neither torch nor vLLM.

process.py      what a process must do before torch and vLLM are imported
engine.py       what the trainer asks of an engine (protocol), seeds
vllm_engine.py  vLLM behind that protocol; imports vLLM when an engine is made
"""
