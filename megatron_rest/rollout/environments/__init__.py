"""What a policy talks to: environments of multi-turn rollouts.

base.py      the protocol: reset, step, reward, close; single use
guest.py     what a foreign environment returned, made safe or refused
calls.py     tool calls in an answer
executor.py  calls carried out on objects: public methods, literal arguments, nothing evaluated
bfcl.py      BFCL's stateful API classes as an environment
"""
