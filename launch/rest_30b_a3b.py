"""ResT on Qwen3-30B-A3B (128 experts, 8 a token): 2 nodes of 8 H100 train (DP 16, EP 8), 1 node holds engines.

nemo-run launch/rest_30b_a3b.py --dryrun model.path=/models/Qwen3-30B-A3B data.train=/data/rlla trainer.run_dir=/runs/a
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
    WeightSyncConfig,
)

NODES = 2
GPUS = NODES * 8  # what megatron-rest plan and simulate take the recipe for

RECIPE = RestConfig(
    model=ModelConfig(
        path="/models/Qwen3-30B-A3B",
        max_sequence_length=4096,  # 2048 + 2048, as the authors trained
        dtype="bfloat16",
    ),
    parallel=ParallelConfig(
        tensor_parallel=1,  # hidden size 2048: cutting it leaves products too small for a GPU
        # Training is planned at 52 s; PP 2 60 s (13 % of them bubble), in 45 GB instead of 61.  EP 16 is planned alike,
        # and the plan does not see that its all-to-all leaves the node.
        pipeline_parallel=1,
        expert_parallel=8,  # the GPUs of a node, so that the experts' all-to-all stays inside NVLink: 16 experts each
        distributed_optimizer=True,  # of the dense part over DP 16, of the experts over their two copies
        recompute="full",  # a token has 8 copies at its experts: without, 48 layers keep 8 MB a token
    ),
    data=DataConfig(
        train="/data/rlla_4k",
        prompts_per_step=512,  # authors
        max_prompt_tokens=2048,  # authors
    ),
    rollout=RolloutConfig(
        rollouts_per_prompt=4,  # authors
        max_response_tokens=2048,  # authors
        temperature=1.0,
        dtype="bfloat16",
        nodes=1,
        replicas=2,
        tensor_parallel=4,  # 61 GB of weights / 4 = 15 GB a GPU; 4 KV heads, one a GPU
        gpu_memory_utilization=0.9,  # the GPUs are the engine's own
        max_concurrent=512,  # 2048 sequences over 2 replicas, twice round
        max_staleness=1,  # engines sample the next step while this one trains: planned 78 s a step in place of 136
    ),
    loss=LossConfig(
        clip_low=0.2,  # authors, all three
        clip_high=0.2,
        dual_clip=3.0,
        tis_cap=2.0,  # weights of a step ago, and a token may be routed to other experts: the ratio is cut at 2
    ),
    optimizer=OptimizerConfig(
        lr=1e-6,  # authors (dense models); not tuned for experts
        weight_decay=0.01,
        clip_grad=1.0,
        updates_per_step=8,  # authors: mini-batches of 64 prompts
    ),
    # Gradients travel beside the backward passes and parameters beside the next forward pass.
    megatron=MegatronConfig(ddp={"overlap_grad_reduce": True, "overlap_param_gather": True}),
    weight_sync=WeightSyncConfig(
        transport="nccl",  # every worker of an engine gets its slices from the ranks that hold them, over NCCL
        bucket_bytes=256 << 20,  # an expert's matrices are 9 MB: thousands travel in a hundred messages
    ),
    checkpoint=CheckpointConfig(save_every=15, keep_last=2),  # authors save every 15 steps; 430 GB each
    trainer=TrainerConfig(
        run_dir="/runs/rest_30b_a3b",
        steps=105,  # authors
        max_tokens_per_microbatch=8192,  # two of the longest sequences
        timeout_minutes=60,  # the first collective waits for 16 ranks that read 61 GB
    ),
)


rest_30b_a3b = cluster_recipe(
    "rest_30b_a3b",
    "ResT on a 30B mixture of experts, 3 H100 nodes.",
    RECIPE,
    nodes=NODES,
    nodes_help="nodes of ranks; those of the engines are rollout.nodes.",
)

if __name__ == "__main__":
    run_recipe(rest_30b_a3b, executor="slurm")
