"""Megatron's pipeline schedules, event by event: forward and backward passes of unequal microbatches.

``megatron.core.pipeline_parallel.schedules``: 1F1B, and with virtual stages the interleaved order.  Communication takes
no time here (``steptime`` counts it).
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["pipeline_seconds"]

_Pass = tuple[bool, int, int]  # is forward, microbatch, chunk of the stage


def pipeline_seconds(
    forward: Sequence[float],
    *,
    stages: int,
    chunks: int = 1,
    backward: float = 2.0,
    head: Sequence[float] | None = None,
    shares: Sequence[Sequence[float]] | None = None,
) -> float:
    """Until the last stage has nothing left to do.

    Args:
        forward: seconds of each microbatch's forward pass through all layers on one stage's GPUs.
        stages: pipeline stages.
        chunks: virtual stages of each.
        backward: seconds of a backward pass over those of a forward pass.
        head: seconds of each microbatch's forward pass through the output layer, in the last chunk of the last stage;
            None: it takes none.
        shares: ``[stage][chunk]``: of the layers; None: all alike.

    Raises ValueError where ``chunks`` > 1 and the microbatches are no multiple of ``stages``, as Megatron does.
    """
    count = len(forward)
    if chunks > 1 and count % stages:
        raise ValueError(f"{count} microbatches are no multiple of {stages} stages, which interleaving wants")
    if shares is None:
        shares = [[1 / (stages * chunks)] * chunks] * stages
    orders = [_order(stage, stages, chunks, count) for stage in range(stages)]
    at, free = [0] * stages, [0.0] * stages
    done: dict[tuple[bool, int, int, int], float] = {}
    left = sum(map(len, orders))
    while left:
        before = left
        for stage in range(stages):
            while at[stage] < len(orders[stage]):
                step = orders[stage][at[stage]]
                is_forward, microbatch, chunk = step
                source = _source(step, stage, stages, chunks)
                if source is not None and source not in done:
                    break
                begin = max(free[stage], done[source] if source is not None else 0.0)
                seconds = forward[microbatch] * shares[stage][chunk]
                if head is not None and (stage, chunk) == (stages - 1, chunks - 1):
                    seconds += head[microbatch]
                free[stage] = done[*step, stage] = begin + seconds * (1.0 if is_forward else backward)
                at[stage] += 1
                left -= 1
        assert left < before, "every stage waits: the order is not Megatron's"
    return max(free)


def _order(stage: int, stages: int, chunks: int, count: int) -> list[_Pass]:
    """Of the passes of one stage."""
    if chunks == 1:
        ahead = min(stages - stage - 1, count)
        table = [(microbatch, 0) for microbatch in range(count)]
    else:
        ahead = min((stages - stage - 1) * 2 + (chunks - 1) * stages, count * chunks)
        if count == stages:
            ahead = count * chunks  # Megatron then runs everything forward first
        table = [
            (microbatch, chunk)
            for group in range(0, count, stages)
            for chunk in range(chunks)
            for microbatch in range(group, group + stages)
        ]
    forward: list[_Pass] = [(True, microbatch, chunk) for microbatch, chunk in table]
    backward: list[_Pass] = [(False, microbatch, chunks - 1 - chunk) for microbatch, chunk in table]
    order = forward[:ahead]
    for i in range(len(table) - ahead):
        order += [forward[ahead + i], backward[i]]
    return order + backward[len(table) - ahead :]


def _source(step: _Pass, stage: int, stages: int, chunks: int) -> tuple[bool, int, int, int] | None:
    """The pass whose result this one starts from, and its stage."""
    is_forward, microbatch, chunk = step
    if is_forward:
        if stage > 0:
            return True, microbatch, chunk, stage - 1
        return (True, microbatch, chunk - 1, stages - 1) if chunk > 0 else None
    if stage < stages - 1:
        return False, microbatch, chunk, stage + 1
    return (False, microbatch, chunk + 1, 0) if chunk < chunks - 1 else (True, microbatch, chunk, stage)
