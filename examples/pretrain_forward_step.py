"""The pieces that a Megatron-LM pre-training script is made of, with ResT in them: ``model_provider``, ``get_batch``,
``forward_step``, as ``pretrain(datasets_provider, model_provider, ModelType.encoder_or_decoder, forward_step)`` takes.

    python examples/pretrain_forward_step.py                                               # one process
    torchrun --nproc-per-node 2 examples/pretrain_forward_step.py --pipeline-parallel 2    # gloo ranks

The data loader gives dicts of padded ``[b, s]`` tensors; beside Megatron-LM's own ``tokens, labels, loss_mask,
position_ids`` they hold ``advantages`` and ``token_weights``.  Here they are made from four answers to one prompt, good
and bad, judged by the tool-call reward and weighted by region.  ``train`` stands for Megatron-LM's loop, which needs
its arguments and a GPU: several microbatches a step, losses reduced as its ``train_step`` does.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from itertools import cycle

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rest.algorithms import RestPolicyLoss, group_relative_advantages
from megatron_rest.config import LossConfig
from megatron_rest.mcore import cpu
from megatron_rest.mcore.output import attach
from megatron_rest.mcore.step_loss import LossTokens, StepLoss
from megatron_rest.regions import label_regions
from megatron_rest.rewards import tool_call_reward
from megatron_rest.weighting import RestWeighting

PROMPT = "Weather in Oslo?\n"
RIGHT = '<think>ask</think>\n<tool_call>\n{"name": "weather", "parameters": {"city": "Oslo"}}\n</tool_call>'
ANSWERS = [RIGHT, RIGHT.replace("weather", "stocks"), RIGHT.replace("Oslo", "Rome"), "It is sunny."]
VOCAB, LENGTH = 256, 128  # bytes are tokens
LOSS = RestPolicyLoss(LossConfig())


def model_provider(pre_process: bool = True, post_process: bool = True) -> GPTModel:
    """The model of this pipeline stage."""
    model = GPTModel(
        transformer_config(),
        get_gpt_layer_local_spec(),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type="rope",
    )
    attach(model, vocab_size=VOCAB)  # ours, on every stage: log-probs and entropy where the cross-entropy was
    return model


def get_batch(data_iterator: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One microbatch on the device; ``active_rows`` stay on the CPU, where the data loader made them."""
    batch = next(data_iterator)
    return {k: v if k == "active_rows" else v.to(device(), non_blocking=True) for k, v in batch.items()}


def forward_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module):
    """Megatron's forward_step; in ``pretrain_gpt.py`` the marked line is ``partial(loss_func, loss_mask)``."""
    batch = get_batch(data_iterator)
    loss_func = StepLoss(LOSS, LossTokens.of_batch(batch))  # ours
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        output_processor_context=loss_func.context,
    )
    return output, loss_func


def datasets_provider(progress: float) -> list[dict[str, torch.Tensor]]:
    """Microbatches of two answers each, as a collate function makes them on the CPU."""
    weighting = RestWeighting.paper()
    rows = []
    for answer, advantage in zip(ANSWERS, advantages(), strict=True):
        prompt, answer_bytes = PROMPT.encode(), answer.encode()
        tokens = torch.tensor(list(prompt + answer_bytes))
        regions = torch.from_numpy(label_regions([bytes([b]) for b in answer_bytes])).long()
        row = {
            "tokens": tokens[:-1],
            "labels": tokens[1:],  # Megatron-LM's alignment: index t of everything speaks of labels[t]
            "loss_mask": torch.cat([torch.zeros(len(prompt) - 1), torch.ones(len(answer_bytes))]),
            "token_weights": torch.cat([torch.zeros(len(prompt) - 1), weighting(regions, progress=progress)]),
        }
        rows.append({k: torch.nn.functional.pad(v, (0, LENGTH - len(v))) for k, v in row.items()})
        rows[-1]["advantages"] = advantage
        rows[-1]["position_ids"] = torch.arange(LENGTH)
    batches = [{k: torch.stack([row[k] for row in rows[i : i + 2]]) for k in rows[0]} for i in range(0, len(rows), 2)]
    for batch in batches:
        batch["active_rows"] = (batch["loss_mask"].t().reshape(-1) != 0).nonzero()[:, 0]
    return batches


def advantages() -> torch.Tensor:
    """float32 [4]: how much better than its siblings each answer is."""
    rewards = [tool_call_reward(answer, RIGHT, step=1).total for answer in ANSWERS]
    return torch.from_numpy(group_relative_advantages(rewards)).float()


def train(args: argparse.Namespace) -> None:
    """What Megatron-LM's ``pretrain`` does, in short."""
    first = parallel_state.is_pipeline_first_stage()
    last = parallel_state.is_pipeline_last_stage()
    module = model_provider(pre_process=first, post_process=last).to(device())
    config = module.config
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), module)
    model.broadcast_params()
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=args.lr, weight_decay=0.0), [model])
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    before = answer_log_probs(model)
    for step in range(args.steps):
        batches = datasets_provider(progress=step / args.steps)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = run(forward_step, batches, model, forward_only=False)
        _, grad_norm, _ = optimizer.step()
        if last and step % 5 == 0:
            reduced = reduce_losses(losses)
            print(f"step {step:3d}  loss {reduced['loss']:+.4f}  entropy {reduced['entropy']:.3f}  "
                  f"gradient norm {grad_norm:.3f}")  # fmt: skip
    after = answer_log_probs(model)
    if last:
        for answer, advantage, a, b in zip(ANSWERS, advantages(), before, after, strict=True):
            print(f"advantage {float(advantage):+.2f}  log-prob a token {a:.2f} -> {b:.2f}  {answer!r}")


def reduce_losses(losses: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """As Megatron-LM's ``train_step`` reports: [sum, count] over microbatches and replicas, divided once."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    reduced = {}
    for key in losses[0]:
        value = torch.vstack([loss[key].view(-1) for loss in losses]).sum(dim=0)
        dist.all_reduce(value, group=group)
        reduced[key] = float(value[0] / value[1])
    return reduced


@torch.no_grad()
def answer_log_probs(model: torch.nn.Module) -> list[float]:
    """Mean log-prob of each answer's tokens; on the last stage."""

    def score_step(data_iterator, model):
        batch = get_batch(data_iterator)
        mask = batch["loss_mask"]

        def mean_log_prob(output):
            return torch.zeros(()), torch.zeros((), dtype=torch.int), (output[0] * mask).sum(1) / mask.sum(1)

        return model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]), mean_log_prob

    values = run(score_step, datasets_provider(progress=0.0), model, forward_only=True)
    return torch.cat(values).tolist() if values else []


def run(step, batches, model, *, forward_only: bool):
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=cycle(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=LENGTH,
        micro_batch_size=2,
        forward_only=forward_only,
    )


def transformer_config() -> TransformerConfig:
    return TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,  # --calculate-per-token-loss
    )


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline-parallel", type=int, default=1, help="pipeline stages")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate")
    args = parser.parse_args()
    cpu.enable()  # before a model is built; does nothing where CUDA is available
    torch.set_num_threads(1)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    parallel_state.initialize_model_parallel(1, args.pipeline_parallel)
    cpu.seed_model_parallel(0, tp_rank=0)
    train(args)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
