"""ResT's parts without Megatron: torch and process groups, in a training loop of your own.

    python examples/ops_only.py                                    # one process
    torchrun --nproc-per-node 2 examples/ops_only.py               # vocabulary split over two gloo ranks, same numbers

A policy (an embedding and an output matrix, whose rows are split over the ranks) learns to answer a prompt with the one
tool call that is rewarded.  Per step: sample groups, reward, advantages within the group, token weights by region,
clipped loss.  The head never makes a logits tensor; ``policy_step`` returns the loss with its gradient.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from megatron_rest.algorithms import group_relative_advantages
from megatron_rest.ops import ClippedTokenLoss, linear_log_probs_and_entropy, policy_step
from megatron_rest.regions import label_regions
from megatron_rest.weighting import RestWeighting

ANSWERS = [b"<think>", b"</think>", b"<tool_call>", b'{"name": "', b"search", b"weather", b'", ', b'"parameters": {}}']
ANSWERS += [b"</tool_call>", b"a", b"b", b"c"]
WANTED = [0, 9, 1, 2, 3, 5, 6, 7, 8]  # <think>a</think><tool_call>{"name": "weather", "parameters": {}}</tool_call>
VOCAB, HIDDEN, PROMPTS, GROUP, STEPS = len(ANSWERS), 32, 4, 16, 120


def main() -> None:
    group = start()
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    generator = torch.Generator().manual_seed(0)  # the same on every rank: replicated parts stay replicated
    length = len(WANTED)
    hidden = torch.nn.Parameter(torch.randn(PROMPTS, length, HIDDEN, generator=generator))
    whole = 0.1 * torch.randn(VOCAB, HIDDEN, generator=generator)
    weight = torch.nn.Parameter(whole.chunk(size)[rank].clone())  # this rank's rows of the output matrix
    optimizer = torch.optim.Adam([hidden, weight], lr=0.05)
    weighting = RestWeighting.paper()
    wanted = torch.tensor(WANTED)

    rewards = []
    for step in range(STEPS):
        labels = sample(hidden, weight, group, generator)  # [P, G, L]
        is_right = (labels == wanted).float()
        reward = is_right.mean(-1)  # [P, G]
        advantages = group_relative_advantages(reward)[..., None].expand(labels.shape)
        region_ids = torch.stack(
            [torch.from_numpy(label_regions([ANSWERS[i] for i in row])) for row in labels.flatten(0, 1).tolist()]
        )
        weights = torch.stack([weighting(row, progress=step / STEPS) for row in region_ids.long()])
        x = hidden[:, None].expand(*labels.shape, HIDDEN).reshape(-1, HIDDEN)
        with torch.no_grad():  # the old policy, scored as a trainer would score it
            old = linear_log_probs_and_entropy(x, weight, labels.flatten(), tp_group=group)
        loss = ClippedTokenLoss(
            old_log_probs=old.log_probs,
            advantages=advantages.flatten().float(),
            weights=weights.flatten() / labels.numel(),
        )
        result = policy_step(x, weight, labels.flatten(), loss, tp_group=group)
        optimizer.zero_grad()
        result.loss_sum.backward()
        optimizer.step()
        rewards.append(float(reward.mean()))
        if rank == 0 and step % 20 == 0:
            print(f"step {step:3d}  reward {rewards[-1]:.3f}  entropy {float(result.entropy.mean()):.3f} nats")
    if rank == 0:
        print(f"mean reward {sum(rewards[:5]) / 5:.3f} -> {sum(rewards[-5:]) / 5:.3f}")
    if group is not None:
        dist.destroy_process_group()


def start() -> dist.ProcessGroup | None:
    """The group that the vocabulary is split over; None for a process alone."""
    torch.set_num_threads(1)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    dist.init_process_group("gloo")
    if VOCAB % dist.get_world_size():
        raise SystemExit(f"{dist.get_world_size()} ranks do not divide a vocabulary of {VOCAB}")
    return dist.group.WORLD


@torch.no_grad()
def sample(
    hidden: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup | None, generator: torch.Generator
) -> torch.Tensor:
    """Token ids ``[P, G, L]`` from the current policy; the same on every rank."""
    parts = [hidden @ weight.t()]
    if group is not None:
        parts = [torch.empty_like(parts[0]) for _ in range(group.size())]
        dist.all_gather(parts, hidden @ weight.t(), group=group)
    probabilities = torch.cat(parts, dim=-1).softmax(-1)
    flat = probabilities.flatten(0, 1)  # [P * L, V]
    drawn = torch.multinomial(flat, GROUP, replacement=True, generator=generator)
    return drawn.view(*hidden.shape[:2], GROUP).transpose(1, 2)


if __name__ == "__main__":
    main()
