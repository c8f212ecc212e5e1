"""ResT on an 8B model (Qwen3-8B, Llama-3.1-8B): one node of 8 H100, training and rollouts on the same GPUs.

nemo-run launch/rest_8b.py --dryrun model.path=/models/Qwen3-8B data.train=/data/rlla trainer.run_dir=/runs/rest_8b
"""

from launch.cli import run_recipe
from launch.cluster import cluster_recipe
from megatron_rest.config import (
    CheckpointConfig,
    DataConfig,
    LossConfig,
    MegatronConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RestConfig,
    RolloutConfig,
    TrainerConfig,
)

NODES = 1
GPUS = NODES * 8  # what megatron-rest plan and simulate take the recipe for

RECIPE = RestConfig(
    model=ModelConfig(
        path="/models/Qwen3-8B",
        max_sequence_length=4096,  # 2048 + 2048, as the authors trained
        dtype="bfloat16",
    ),
    parallel=ParallelConfig(
        # Planned 165 s a step, engines asleep while the policy trains; TP 4 beside engines that are awake 177 s.
        tensor_parallel=2,  # state of 8.2e9 parameters: 6 bytes / 2 + 12 / 8 = 37 GB a GPU; TP stays inside NVLink
        sequence_parallel=True,  # norms' activations shrink by TP at no extra communication
        distributed_optimizer=True,  # fp32 master + two moments, 12 bytes a parameter, over DP 4: 12 GB instead of 49
    ),
    data=DataConfig(
        train="/data/rlla_4k",
        prompts_per_step=512,  # authors
        max_prompt_tokens=2048,  # authors
    ),
    rollout=RolloutConfig(
        rollouts_per_prompt=4,  # authors: n = 4, 2048 responses a step
        max_response_tokens=2048,  # authors
        temperature=1.0,  # authors; RL samples from the policy itself
        dtype="bfloat16",
        tensor_parallel=1,  # an engine in a rank's process has one GPU; 16 GB of weights, 8 replicas
        gpu_memory_utilization=0.45,  # 36 GB beside weights, gradients and optimiser; the authors' 0.5 is 0.1 too much
        sleep_level=2,  # while the policy trains: weights and cache are dropped, every step brings new ones anyway
        max_concurrent=256,  # a replica's share of 2048 sequences over 8 replicas: all of a step at once
    ),
    loss=LossConfig(
        clip_low=0.2,  # authors
        clip_high=0.2,
        dual_clip=3.0,  # authors' framework default
    ),
    optimizer=OptimizerConfig(
        lr=1e-6,  # authors, constant, no warm-up
        weight_decay=0.01,
        clip_grad=1.0,
        updates_per_step=8,  # mini-batches of 64 prompts out of 512
    ),
    # Gradients travel beside the backward passes and parameters beside the next forward pass.
    megatron=MegatronConfig(ddp={"overlap_grad_reduce": True, "overlap_param_gather": True}),
    checkpoint=CheckpointConfig(save_every=15, keep_last=2),  # authors save every 15 steps
    trainer=TrainerConfig(
        run_dir="/runs/rest_8b",
        steps=105,  # authors: 15 epochs of 7 steps
        max_tokens_per_microbatch=8192,  # half of the authors' 16,384: activations take 11 GB instead of 21
    ),
)


rest_8b = cluster_recipe(
    "rest_8b",
    "ResT on an 8B model, one H100 node.",
    RECIPE,
    nodes=NODES,
    nodes_help="nodes of 8 GPUs; more nodes are more data parallelism.",
)

if __name__ == "__main__":
    run_recipe(rest_8b, executor="slurm")
