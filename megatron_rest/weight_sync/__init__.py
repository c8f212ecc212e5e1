"""Training shards into rollout engines, proved on every transfer (docs/weight_sync.md).

sync.py         one verified transfer: push, compare, resend once, or stop and name the tensor
transport.py    what an engine offers and what a way of transferring promises

layouts.py      where pieces of HF tensors lie in Megatron's shards and in vLLM's parameters
engine_side.py  what a running engine takes, in which data types
plan.py         who sends which bytes to whom, as data
fp8.py          matrices in FP8, with scales, quantised before they are sent
slices.py       a plan carried out: packing, sending, receiving, putting together
sliced.py       transports gloo and nccl: layouts -> plans -> groups -> transfers by slices
links.py        bytes between two processes

source.py       Megatron shards -> full HF tensors on every rank, in layer order
stream.py       transport local: whole tensors, by reference

limits.py       how fast it can be, from the rates of links (command plan-sync; no torch)
digest.py       128 bits that change when any byte does
vllm_plugin.py  the receiving side, inside vLLM's worker
"""
