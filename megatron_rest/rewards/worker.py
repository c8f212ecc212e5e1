"""The process of :mod:`megatron_rest.rewards.workers`: KEY REFERENCE as arguments, then JSON lines.

The first line in holds the keyword arguments.  What the function prints goes to the standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from megatron_rest.errors import described
from megatron_rest.processes import serve_as_worker
from megatron_rest.rewards.functions import RewardInput, checked_reward
from megatron_rest.user_code import NamedCode, load_named

__all__ = ["main"]


def main(argv: list[str]) -> None:
    """Serve until the owner closes the pipe."""
    key, reference = argv
    requests, replies = serve_as_worker()

    def reply(**values: Any) -> None:
        replies.write(json.dumps(values).encode() + b"\n")
        replies.flush()

    arguments = json.loads(requests.readline())
    try:
        function: Callable[..., Any] = load_named(
            NamedCode(key=key, reference=reference, called_with=("answer",), arguments=arguments)
        )
    except Exception as error:  # noqa: BLE001  told to the owner
        reply(error=str(error))
        return
    reply(ready=True)
    for line in requests:
        answer = RewardInput.from_json(json.loads(line))
        try:
            reward = checked_reward(function(answer, **arguments), answer)
        except BaseException as error:  # noqa: BLE001  told to the owner; this answer's alone
            reply(error=described(error))
        else:
            reply(reward=reward.to_json())


if __name__ == "__main__":
    main(sys.argv[1:])
