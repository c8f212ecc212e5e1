"""Training shards into rollout engines, proved on every transfer (docs/weight_sync.md).

source.py       Megatron shards -> full HF tensors on every rank, in layer order
digest.py       128 bits that change when any byte does
sync.py         one verified transfer: push, compare, resend once, or stop and name the tensor
gloo.py         sender to engines in processes of their own
vllm_plugin.py  the receiving side, inside vLLM's worker (the only module here that imports vLLM)
"""
