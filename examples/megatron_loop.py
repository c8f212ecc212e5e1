"""A plain Megatron-Core training loop; ResT is in it in two lines (marked).

    python examples/megatron_loop.py                                                  # one process
    torchrun --nproc-per-node 2 examples/megatron_loop.py --tensor-parallel 2         # gloo ranks
    torchrun --nproc-per-node 2 examples/megatron_loop.py                             # data parallel

Everything else is Megatron's: its model, layer specs, DistributedDataParallel, optimizer and schedule, and batches that
are dicts of ``[b, s]`` tensors.  The policy learns to answer with multiples of four: rollouts are sampled from the
model itself, the reward is the share of right tokens, advantages are relative to the group.
Without a GPU ``megatron_rest.mcore.cpu.enable`` makes Megatron-Core run on gloo ranks (see docs/embedding.md).
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rest.algorithms import RestPolicyLoss, group_relative_advantages
from megatron_rest.config import LossConfig
from megatron_rest.mcore import cpu
from megatron_rest.mcore.output import attach
from megatron_rest.mcore.step_loss import LossTokens, StepLoss

VOCAB, PROMPT, ANSWER, PROMPTS, GROUP = 32, 2, 4, 8, 16
LENGTH = PROMPT + ANSWER - 1  # of the model's input: the last token is only a label
LOSS = RestPolicyLoss(LossConfig(clip_low=0.2, clip_high=0.28))


def forward_step(data_iterator, model):
    """Megatron's forward_step: a batch, the model's output, and a loss function for it."""
    batch = next(data_iterator)
    loss_func = StepLoss(LOSS, LossTokens.of_batch(batch))  # ours, instead of partial(loss_func, loss_mask)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        output_processor_context=loss_func.context,  # optional: rows without loss are not projected
    )
    return output, loss_func


def main() -> None:
    args = parse()
    groups = start(args)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        tensor_model_parallel_size=args.tensor_parallel,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,  # what the 3-tuple of the loss needs
    )
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
        pg_collection=groups,
    ).to(device)
    attach(model, vocab_size=VOCAB)  # ours: log-probs and entropy where the cross-entropy was
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    model.broadcast_params()
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=args.lr, weight_decay=0.0), [model])
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss

    generator = torch.Generator().manual_seed(args.seed + groups.dp.rank())  # replicas draw different prompts
    rewards = []
    for step in range(args.steps):
        batch, reward = rollouts(model, generator, device)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([batch]),
            model=model,
            num_microbatches=1,
            seq_length=LENGTH,
            micro_batch_size=PROMPTS * GROUP,
            forward_only=False,
        )
        optimizer.step()
        dist.all_reduce(reward, group=groups.dp)
        rewards.append(float(reward) / groups.dp.size())
        if dist.get_rank() == 0 and step % 10 == 0:
            metrics = {name: float(pair[0] / pair[1]) for name, pair in losses[0].items()}
            print(f"step {step:3d}  reward {rewards[-1]:.3f}  entropy {metrics['entropy']:.3f}  "
                  f"clipped {metrics['clip_fraction']:.3f}")  # fmt: skip
    if dist.get_rank() == 0:
        print(f"mean reward {sum(rewards[:5]) / 5:.3f} -> {sum(rewards[-5:]) / 5:.3f}")
    dist.destroy_process_group()


@torch.no_grad()
def rollouts(model, generator, device):
    """A batch as a Megatron-LM data loader would give it, and its mean reward."""
    model.eval()
    prompts = torch.randint(0, VOCAB, (PROMPTS, PROMPT), generator=generator)
    tokens = prompts.repeat_interleave(GROUP, 0).to(device)
    for _ in range(ANSWER):
        padded = torch.nn.functional.pad(tokens, (0, LENGTH - tokens.shape[1]))
        logits = model(padded, positions(padded), None, runtime_gather_output=True)  # no labels: logits, as ever
        p = logits[:, tokens.shape[1] - 1].float().softmax(-1).cpu()
        tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=generator).to(device)], dim=1)
    model.train()
    reward = (tokens[:, PROMPT:] % 4 == 0).float().mean(1)
    advantages = group_relative_advantages(reward.view(PROMPTS, GROUP).cpu()).flatten().to(device)
    loss_mask = torch.zeros(len(tokens), LENGTH)
    loss_mask[:, PROMPT - 1 :] = 1.0  # labels that the policy sampled
    batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": loss_mask.to(device),
        "active_rows": (loss_mask.t().reshape(-1) != 0).nonzero()[:, 0],  # stays on the CPU: no device is asked for it
        "advantages": advantages,  # one a sequence; no old_log_probs: every rollout is used once, the ratio is 1
    }
    batch["position_ids"] = positions(batch["tokens"])
    return batch, reward.mean()


def positions(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def start(args: argparse.Namespace) -> ProcessGroupCollection:
    """Process groups and random streams, from torchrun's environment or for one process alone."""
    cpu.enable()  # before a model is built; does nothing where CUDA is available
    torch.set_num_threads(1)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if has_gpu else "gloo")
    parallel_state.initialize_model_parallel(args.tensor_parallel)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    cpu.seed_model_parallel(args.seed, tp_rank=groups.tp.rank())
    return groups


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks that share every matrix")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and sampling")
    return parser.parse_args()


if __name__ == "__main__":
    main()
