"""vLLM runs inside the test process."""

from megatron_rest.rollout.process import prepare_process

prepare_process(allow_late=True)
