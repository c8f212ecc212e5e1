"""The seam into Megatron-Core.  The only package that imports ``megatron``; ``build.py`` alone reads its global state.

cpu.py          what Megatron-Core needs to run on a machine without CUDA (inert where CUDA is available)
context_parallel.py  which tokens lie on which rank: cut microbatches, gather scores
attention.py    core attention for packed sequences and context parallelism where Transformer Engine is not there
specs.py        layer specs: Transformer Engine where installed, local modules otherwise
precision.py    FP8: Megatron's settings, delayed scales of scoring and training kept apart
accelerations.py  which fused parts run: Transformer Engine's, Apex's, torch's
build.py        process groups, model, optimiser: configuration in, objects out
output.py       log-probs and entropy in the place of Megatron's cross-entropy
head.py         what output.py puts there: hidden states in, log-probs and entropy out
step_loss.py    a policy loss for one microbatch, as Megatron's ``loss_func`` contract wants it
forward_step.py ``forward_step`` functions of the trainer
policy.py       the policy the trainer sees: score, update, shards
optimizer_state.py   the state of torch's Adam under the distributed optimiser
checkpoint.py   Megatron distributed checkpoints, asynchronous if asked
hf.py           HF safetensors into Megatron shards
dry.py          any rank of a layout on the meta device; tensor_memory.py counts the bytes
"""

import logging
import warnings

# Megatron says what is not installed once a module and rank; ``megatron-rest doctor`` says it once, with what each
# would give.
# And says on every start that its fault-injection machinery is off.
logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")
