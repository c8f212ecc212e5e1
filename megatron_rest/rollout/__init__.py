"""Rollouts: token in, token out (docs/rollout.md).  Importing this package imports neither torch nor vLLM.

process.py        what a process must do before torch and vLLM are imported
engine.py         what the trainer asks of an engine (protocol), requests, seeds
rollouter.py      requests -> rollouts: one loop over episodes that are in different turns
vllm_engine.py    vLLM behind the protocol, in this process; imports vLLM when an engine is made
remote.py         an engine in a process of its own: the owner's handle, death and hanging noticed
worker.py         that process
wire.py           messages between the two
environments/     what answers the policy between its turns
translator.py     between token ids and the text of a conversation
conversations.py  from the configuration to the two above
certify.py        is this tokenizer with this template fit?
"""
