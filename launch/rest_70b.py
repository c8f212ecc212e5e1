"""ResT on a 70B model: 8 nodes of 8 H100 train (TP 4 x PP 8 x DP 2), 4 nodes hold vLLM engines.

nemo-run launch/rest_70b.py --dryrun model.path=/models/Llama-3.3-70B data.train=/data/rlla trainer.run_dir=/runs/r70
nemo-run launch/rest_70b.py --yes --detach links=6 ...      six jobs of four hours, each continues the last
nemo-run launch/rest_70b.py family=qwen ...                 Qwen2.5-72B
"""

import dataclasses

from launch.cli import run_recipe
from launch.cluster import cluster_recipe
from megatron_rest.config import (
    CheckpointConfig,
    DataConfig,
    Fp8Recipe,
    LossConfig,
    MegatronConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RestConfig,
    RolloutConfig,
    TrainerConfig,
    WeightSyncConfig,
)

NODES = 8  # of ranks; a multiple of 4 (TP 4 x PP 8 = 32 GPUs a replica)
GPUS = NODES * 8  # what megatron-rest plan and simulate take the recipe for

RECIPE = RestConfig(
    model=ModelConfig(
        path="/models/Llama-3.3-70B-Instruct",
        max_sequence_length=4096,  # 2048 + 2048, as the authors trained
        dtype="bfloat16",
    ),
    parallel=ParallelConfig(
        # Planned 72 s a step; TP 8 x PP 4 82 s (twice as many TP exchanges of rows, and FP8 blocks x TP: lengths in
        # steps of 1,024).  With 32 nodes of ranks or more TP 8 x PP 4 is better: 8 stages want 16 microbatches each.
        tensor_parallel=4,  # half a node: TP's exchanges four times a layer need NVLink; 8 KV heads, two a rank
        pipeline_parallel=8,  # 80 layers / 8 = 10 a stage; weights 70.6e9 x 2 bytes / 32 = 4.4 GB a GPU
        virtual_pipeline=5,  # 2 layers a chunk: the bubble (PP-1)/(PP-1 + VPP x microbatches) shrinks by 5
        sequence_parallel=True,  # activations of norms and residuals / 8
        distributed_optimizer=True,  # 12 bytes a parameter over DP 2: 13.6 GB a GPU instead of 27
    ),
    precision=PrecisionConfig(
        recipe=Fp8Recipe.BLOCKWISE,  # scales of 128 x 128 blocks: no history, least error of Hopper's recipes
        bf16_layers_start=1,  # first and last layer see the widest values; 2 of 80 cost 1 % of the speed-up
        bf16_layers_end=1,
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
        nodes=4,  # half as many GPUs sample as train: planned 50 s beside 65; 3 would do (57) unless answers get long
        replicas=4,  # one a node
        tensor_parallel=8,  # 141 GB of weights over one node: 17.7 GB a GPU
        gpu_memory_utilization=0.9,  # the GPUs are the engine's own: 54 GB of KV cache, 1.3 M tokens
        max_concurrent=512,  # 2048 sequences over 4 replicas: all of a step at once
        max_staleness=1,  # engines sample the next step while this one trains: planned 72 s a step in place of 127
    ),
    loss=LossConfig(
        clip_low=0.2,  # authors, all three
        clip_high=0.2,
        dual_clip=3.0,
        tis_cap=2.0,  # trains in FP8, samples in BF16 with the weights of a step ago: their ratio is cut at 2
    ),
    optimizer=OptimizerConfig(
        lr=1e-6,  # authors (for 1.7B); not tuned at 70B
        weight_decay=0.01,
        clip_grad=1.0,
        updates_per_step=8,  # authors: mini-batches of 64 prompts
    ),
    # Gradients travel beside the backward passes and parameters beside the next forward pass.
    megatron=MegatronConfig(ddp={"overlap_grad_reduce": True, "overlap_param_gather": True}),
    weight_sync=WeightSyncConfig(
        transport="nccl",  # every worker of an engine gets its slices from the ranks that hold them, over NCCL
        bucket_bytes=512 << 20,  # large enough to fill a link, small beside the 2.1 GB of the embedding
    ),
    checkpoint=CheckpointConfig(
        save_every=5,  # 70B x 14 bytes = 1 TB a checkpoint; a lost node costs at most 5 steps
        keep_last=2,
    ),
    trainer=TrainerConfig(
        run_dir="/runs/rest_70b",
        steps=105,  # authors
        # Planned 74 GB of 80.  4096, the longest sequence, takes 62 GB and 76 s; 8192 does not fit (87 GB).
        max_tokens_per_microbatch=6144,
        timeout_minutes=60,  # the first collective waits for 64 ranks that read 141 GB
    ),
)

QWEN = dataclasses.replace(
    RECIPE,
    model=dataclasses.replace(RECIPE.model, path="/models/Qwen2.5-72B-Instruct"),
    # its feed-forward width 29,568 / TP 4 = 7,392 is a multiple of 16, not of blockwise's 128
    precision=PrecisionConfig(recipe=Fp8Recipe.TENSORWISE, bf16_layers_start=1, bf16_layers_end=1),
)
FAMILIES = {"llama": RECIPE, "qwen": QWEN}


rest_70b = cluster_recipe(
    "rest_70b",
    "ResT on a 70B model, 12 H100 nodes.",
    FAMILIES,
    nodes=NODES,
    nodes_help="nodes of ranks, a multiple of 4; those of the engines are rollout.nodes.",
    families="llama = Llama-3.3-70B, qwen = Qwen2.5-72B.",
)

if __name__ == "__main__":
    run_recipe(rest_70b, executor="slurm")
