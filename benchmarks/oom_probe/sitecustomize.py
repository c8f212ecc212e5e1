"""First on PYTHONPATH, the processes of an engine run out of memory when they are told to: a stand-in for a full GPU.

SIGUSR1 raises ``torch.OutOfMemoryError`` in the main thread, wherever that is.  For ``benchmarks.chaos``.
"""

import os
import signal
from typing import Any, NoReturn


def _run_out(number: int, frame: Any) -> NoReturn:
    import torch  # it is there by now

    raise torch.OutOfMemoryError("CUDA out of memory, says the chaos; there is no GPU")


if "REST_ENGINE_FOLDER" in os.environ:  # megatron_rest.rollout.keeper.FOLDER: an engine's, workers of vLLM included
    signal.signal(signal.SIGUSR1, _run_out)
