"""What every rank and every command of the tests imports, imported once: by the server that they are forked from.

``torch``, Megatron-Core, transformers and vLLM cost ten CPU seconds a process.  ``multiprocessing``'s fork server
imports this module when the first test asks for a rank; every rank is then a fork of it: clean by construction, since
nobody has used it before, and there in milliseconds.  Only imports may stand here, and nothing that starts a thread of
Python's: a fork takes none along (``tests/helpers/test_forked.py`` looks).
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal

from megatron_rest.rollout.process import prepare_process

prepare_process()

import megatron.core.models.gpt  # noqa: E402, F401
import torch.distributed.checkpoint  # noqa: E402
import torch.distributed.run  # noqa: E402, F401
import transformers.models.auto  # noqa: E402, F401
import vllm.entrypoints.llm  # noqa: E402
import vllm.model_executor.models.llama  # noqa: E402
import vllm.model_executor.models.qwen2  # noqa: E402
import vllm.model_executor.models.qwen3  # noqa: E402
import vllm.model_executor.models.qwen3_moe  # noqa: E402
import vllm.v1.engine.core  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401

import megatron_rest.trainer.run  # noqa: E402, F401

SERVER = os.getpid()
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """SIGKILL for this process when its parent ends: pytest for the server, the server for its forks."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


end_with_parent()
gc.freeze()  # what is here stays shared with every fork: the collector need not touch its pages
