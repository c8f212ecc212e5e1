"""vLLM as a rollout engine inside its host's process, without side effects on the host.

An in-process vLLM reseeds torch, numpy and random when it is made, draws from torch's global generator at every
sampling call, rewrites ``LOCAL_WORLD_SIZE``, and destroys torch's default process group when it goes, Megatron's
groups with it.  All four are undone here.  On several ranks make the engines together: vLLM adds process groups of
its own, which is a collective.

Log-probs are those of the distribution sampled from (temperature, top-p and top-k applied), of the sampled token only.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rest.config import RolloutConfig, RolloutQuantization, vllm_backend
from megatron_rest.hf_folder import refuse_remote_code
from megatron_rest.processes import mapped_segments
from megatron_rest.rollout.chat import ChatSettings
from megatron_rest.rollout.conversations import exam_conversation
from megatron_rest.rollout.devices import expands_segments
from megatron_rest.rollout.engine import (
    NO_WEIGHTS,
    Cut,
    EngineStateError,
    Exam,
    MoreRequests,
    OnRollout,
    RefusedRequestError,
    RolloutRequest,
    as_groups,
    make_requests,
)
from megatron_rest.rollout.engine_args import check_engine_args
from megatron_rest.rollout.keeper import SHARED_BY_WORKERS, keep_own_segments
from megatron_rest.rollout.process import prepare_process
from megatron_rest.rollout.rollouter import Conversation, Turn, run_rollouts
from megatron_rest.types import PromptSample, Rollout, RolloutGroup

__all__ = ["VllmEngine"]

_CPU_BLOCK_SIZE = 32  # vLLM's CPU default of 128 gives prompts below 128 tokens no prefix cache at all
_WORKER_EXTENSION = "megatron_rest.weight_sync.vllm_plugin.WorkerExtension"
_TRANSPORTS_IN_PROCESS = ("local",)
_DROPS_WEIGHTS = 2  # vLLM's sleep level that does

_live_engines = 0


class VllmEngine:
    """One vLLM engine; implements :class:`megatron_rest.rollout.engine.RolloutEngine`.

    Args:
        model_path: HF folder with ``config.json`` and, unless ``random_weights``, safetensors.  No tokenizer is needed.
        config: sampling and memory settings.
        seed: seed of vLLM's own state; sampling is seeded per rollout.
        max_model_len: longest prompt + response in tokens.
        stop_token_ids: a sampled one ends the rollout and is its last token.
        transport: how weights come (``weight_sync.transport``).
        in_process: the engine lives in this process, or with ``tensor_parallel`` n in those of n ranks in a row, which
            must then make the same calls.  Else vLLM starts processes (and needs the caller's module to be importable:
            ``if __name__ == "__main__"``).  Default: with ``local`` it lives here.
        conversation: environments of multi-turn rollouts; None = one turn a rollout.
        chat: template and dialect of conversations that exams bring; None = the folder's template, ToolRL's tags.
        random_weights: start without weights.  The engine then holds ``NO_WEIGHTS`` and refuses to sample until a
            transfer has succeeded.

    Raises FileNotFoundError for a folder without configuration or weights, ValueError for a length that the model
    does not take and for a quantised engine that is not to start without weights (a transfer quantises them).
    Collectives: on several ranks construction creates process groups, so all ranks construct together.
    """

    def __init__(
        self,
        model_path: str | Path,
        config: RolloutConfig,
        *,
        seed: int,
        max_model_len: int,
        stop_token_ids: Sequence[int] = (),
        transport: str = "local",
        random_weights: bool = False,
        in_process: bool | None = None,
        conversation: Conversation | None = None,
        chat: ChatSettings | None = None,
    ) -> None:
        self._config = config
        self._chat = chat
        self._conversation = conversation
        self._model_path = Path(model_path)
        self._exams: dict[Exam, Conversation | None] = {}  # conversations of exams taken so far
        self._is_exam = False  # the call under way
        self._running: set[str] = set()  # requests of the call under way
        self._is_asleep = False
        self._max_model_len = max_model_len
        self._stop_token_ids = [int(i) for i in stop_token_ids]
        model = _read_folder(Path(model_path), max_model_len, random_weights)
        if config.quantization is not RolloutQuantization.NONE and not random_weights:
            raise ValueError(
                f"rollout.quantization is {config.quantization}, and the folder's weights are not quantised: pass "
                "random_weights=True and transfer them (a WeightSync quantises), or set rollout.quantization=none"
            )
        self._vocab_size = int(model["vocab_size"])
        in_process = transport in _TRANSPORTS_IN_PROCESS if in_process is None else in_process
        num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        if in_process and num_ranks % config.tensor_parallel:
            raise ValueError(
                f"rollout.tensor_parallel is {config.tensor_parallel}, but an engine with transport {transport!r} "
                f"lives in the ranks' processes, and there are {num_ranks}: set it to a divisor, or give engines "
                "processes of their own (rollout.replicas)"
            )
        self._llm: Any = None
        self._owns_default_group = in_process and not dist.is_initialized()
        segments = mapped_segments(os.getpid())
        with _trainer_state_preserved():
            # Read by vLLM when the engine is made, so it can follow the transport.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
            place = _take_our_place() if in_process and dist.is_initialized() else None
            self._llm, self._arguments = _make_llm(
                model_path, model, config, seed, max_model_len, transport, random_weights, is_ours=place is not None
            )
        if place is not None:
            _check_place(self._llm, place)
            if config.tensor_parallel > 1:
                dist.barrier()  # all of them have mapped it
                keep_own_segments(segments)
        _count_engines(+1)
        self.policy_version = NO_WEIGHTS if random_weights else 0
        """Version of the weights held; set by the weight transfer, NO_WEIGHTS while there are none."""

    @property
    def num_workers(self) -> int:
        """Workers that receive weights."""
        return self._config.tensor_parallel

    def generate(
        self, prompts: Sequence[PromptSample], *, rollouts_per_prompt: int, seed: int, max_response_tokens: int
    ) -> list[RolloutGroup]:
        """All siblings of every prompt at once; groups come back in the order of ``prompts``.

        The result depends on weights, configuration, ``seed`` and the prompts alone, not on the batch they came in
        (up to the last bit of the arithmetic).
        """
        requests = make_requests(prompts, rollouts_per_prompt=rollouts_per_prompt, seed=seed)
        rollouts: dict[int, Rollout] = {}
        self.run(requests, max_response_tokens=max_response_tokens, on_rollout=rollouts.__setitem__)
        return as_groups(requests, rollouts, rollouts_per_prompt)

    def run(
        self,
        requests: Sequence[RolloutRequest],
        *,
        max_response_tokens: int,
        on_rollout: OnRollout,
        beat: Callable[[], None] = lambda: None,
        exam: Exam | None = None,
        more: MoreRequests | None = None,
    ) -> None:
        """Sample all requests, or answer them greedily; see :class:`RolloutEngine`.

        A response is at most ``max_response_tokens`` long and ends earlier where the context is full.  Raises
        RefusedRequestError naming a prompt that leaves no room for a response.
        """
        self._usable()
        self._check(requests)

        def checked_more() -> Sequence[RolloutRequest] | Cut | None:
            new = more() if more is not None else None
            if new is not Cut.NOW:
                self._check(new or ())
            return new

        conversation = self._conversation if exam is None else self._exam_conversation(exam)
        with _rng_preserved():
            self._is_exam = exam is not None
            try:
                run_rollouts(
                    self,
                    requests,
                    max_response_tokens=max_response_tokens,
                    on_rollout=on_rollout,
                    conversation=conversation,
                    beat=beat,
                    more=None if more is None else checked_more,
                )
            finally:
                self._is_exam = False
                self._abandon()

    def _check(self, requests: Sequence[RolloutRequest]) -> None:
        for request in requests:
            self._room(request.prompt.token_ids, f"prompt {request.prompt.prompt_id}")

    def _exam_conversation(self, exam: Exam) -> Conversation | None:
        if exam not in self._exams:
            self._exams[exam] = exam_conversation(exam, self._config, self._model_path, self._chat)
        return self._exams[exam]

    # What the rollout loop calls (megatron_rest.rollout.rollouter.Sampler) -----------------------------------------

    def submit(self, key: int, token_ids: Sequence[int], *, seed: int, max_tokens: int) -> None:
        """Start one turn."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0 if self._is_exam else self._config.temperature,  # 0 is greedy: the next three do not count
            top_p=self._config.top_p,
            top_k=self._config.top_k,
            seed=seed,
            max_tokens=max_tokens,
            stop_token_ids=self._stop_token_ids,
            ignore_eos=True,  # only the ids that were passed in end a turn
            logprobs=None if self._is_exam else 0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        request = {"type": "token", "prompt_token_ids": list(token_ids)}
        self._usable().llm_engine.add_request(str(key), request, params)
        self._running.add(str(key))

    def step(self) -> list[Turn]:
        """One iteration; the turns that ended in it."""
        ended = [output for output in self._usable().llm_engine.step() if output.finished]
        self._running.difference_update(output.request_id for output in ended)
        return [_turn(output) for output in ended]

    def cut(self) -> list[Turn]:
        """End all turns that run; those that have tokens, as far as this process has seen them."""
        from vllm.v1.engine import FinishReason

        states = self._usable().llm_engine.output_processor.request_states.values()
        turns = [
            replace(_turn(state.make_request_output([], None, FinishReason.ABORT, None)), finish="cut")
            for state in states
            if state.detokenizer.num_output_tokens()
        ]
        self._abandon()
        return turns

    def room(self, num_tokens: int) -> int:
        """Tokens that the context takes behind ``num_tokens``."""
        return self._max_model_len - num_tokens

    def _abandon(self) -> None:
        """Nothing of this call may run on in the next one."""
        if self._running and self._llm is not None:
            self._llm.llm_engine.abort_request(list(self._running))
        self._running.clear()

    def greedy(self, token_ids: Sequence[int] | np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``n`` most likely next tokens, stop tokens not heeded, and their log-probs at temperature 1."""
        from vllm import SamplingParams

        ids = np.asarray(token_ids, dtype=np.int32)
        room = self._room(ids, "the greedy prompt")
        if n > room:
            raise RefusedRequestError(f"{len(ids)} + {n} tokens do not fit a context of {self._max_model_len}")
        params = SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, logprobs=0, detokenize=False)
        output = self._run([{"prompt_token_ids": ids.tolist()}], [params])[0].outputs[0]
        return np.asarray(output.token_ids, dtype=np.int32), _sampled_log_probs(output)

    def next_tokens(self, token_ids: Sequence[int] | np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` likeliest next tokens, at most 20, and their log-probs at temperature 1, likeliest first."""
        from vllm import SamplingParams

        ids = np.asarray(token_ids, dtype=np.int32)
        self._room(ids, "the prompt")
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=k, detokenize=False)
        [entry] = self._run([{"prompt_token_ids": ids.tolist()}], [params])[0].outputs[0].logprobs
        best = sorted(entry.items(), key=lambda item: -item[1].logprob)[:k]
        tokens, log_probs = zip(*((token, value.logprob) for token, value in best), strict=True)
        return np.asarray(tokens, dtype=np.int32), np.asarray(log_probs, dtype=np.float32)

    def prompt_log_probs(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [L]: log-prob of ``token_ids[t]`` given what precedes it, at temperature 1; element 0 is 0.

        The prefix cache is not read.  L must leave room for one more token.
        """
        from vllm import SamplingParams

        ids = np.asarray(token_ids, dtype=np.int32)
        self._room(ids, "the prompt")
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, ignore_eos=True, detokenize=False)
        entries = self._run([{"prompt_token_ids": ids.tolist()}], [params])[0].prompt_logprobs
        scored = [entry[int(token)].logprob for token, entry in zip(ids[1:], entries[1:], strict=True)]
        return np.asarray([0.0, *scored], dtype=np.float32)

    # What a weight transfer calls (megatron_rest.weight_sync.sync.SyncTarget) -------------------------------------

    def arguments(self) -> dict[str, Any]:
        """What vLLM's engine was made with, of this project's and ``rollout.engine_args``; plain values."""
        return self._arguments

    def weight_layout(self) -> list[dict[str, Any]]:
        """How each worker cuts the model, and the parameters that it loads."""
        return list(self._open().collective_rpc("weight_layout"))

    def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Connect the workers' transfer engine; backend-specific arguments."""
        self._open().init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """From here until a verified transfer ends the engine holds no usable weights."""
        self.policy_version = NO_WEIGHTS
        self._open().start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Let every worker receive and load one pass of weights."""
        self._open().update_weights({"update_info": update_info})

    def finish_weight_update(self) -> None:
        """Let every worker process what it loaded.  The prefix cache is NOT reset by this."""
        self._open().finish_weight_update()

    def received_weights(self) -> list[dict[str, Any]]:
        """What each worker received in the last pass: ``{"digests": {name: (int, int)}, "missing": [parameter]}``."""
        return list(self._open().collective_rpc("received_weights"))

    def reset_prefix_cache(self) -> bool:
        """Forget keys and values of old weights; False when vLLM could not, because requests are running."""
        return bool(self._open().reset_prefix_cache())

    def sleep(self) -> None:
        """Give GPU memory back: level 1 keeps the weights in host memory, level 2 drops them.  Level 0: does nothing.

        After level 2 the engine holds no weights until the next transfer.
        """
        if not self._config.sleep_level or self._is_asleep:
            return
        self._open().sleep(level=self._config.sleep_level)
        self._is_asleep = True
        if self._config.sleep_level == _DROPS_WEIGHTS:
            self.policy_version = NO_WEIGHTS

    def wake_up(self) -> None:
        """Take the memory again; does nothing to an engine that is awake."""
        if self._is_asleep:
            self._open().wake_up()
            self._is_asleep = False

    def close(self) -> None:
        """End the engine and free its memory.  The trainer's process groups stay.  Idempotent."""
        if self._llm is None:
            return
        self.policy_version = NO_WEIGHTS
        for conversation in (self._conversation, *self._exams.values()):
            if conversation is not None:
                conversation.close()
        llm, self._llm = self._llm, None
        _count_engines(-1)
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if self._owns_default_group and _live_engines == 0 and dist.is_initialized():
            dist.destroy_process_group()  # vLLM made it for itself; nobody else has

    def _open(self) -> Any:
        if self._llm is None:
            raise EngineStateError("the engine is closed")
        return self._llm

    def _room(self, token_ids: np.ndarray, what: str) -> int:
        """Tokens that fit behind a prompt; raises when there is none or an id is not in the vocabulary."""
        room = self._max_model_len - len(token_ids)
        if len(token_ids) == 0 or room < 1:
            raise RefusedRequestError(
                f"{what} has {len(token_ids)} tokens, the context takes 1 to {self._max_model_len - 1} and a response: "
                "filter long prompts (data.max_prompt_tokens) or raise model.max_sequence_length"
            )
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= self._vocab_size:
            wrong = low if low < 0 else high
            raise RefusedRequestError(f"{what} holds token id {wrong}, the vocabulary is 0..{self._vocab_size - 1}")
        return room

    def _usable(self) -> Any:
        llm = self._open()
        if self.policy_version == NO_WEIGHTS:
            raise EngineStateError("the engine holds no valid weights: transfer the policy's weights before sampling")
        if self._is_asleep:
            raise EngineStateError("the engine is asleep: wake it up before sampling")
        return llm

    def _run(self, requests: list[dict[str, Any]], params: list[Any]) -> list[Any]:
        llm = self._usable()
        with _rng_preserved():
            return llm.generate(requests, params, use_tqdm=False)


def _make_llm(
    model_path: str | Path,
    model: dict[str, Any],
    config: RolloutConfig,
    seed: int,
    max_model_len: int,
    transport: str,
    random_weights: bool,
    *,
    is_ours: bool,
) -> tuple[Any, dict[str, Any]]:
    """The engine and its arguments; ``is_ours``: its worker is this rank."""
    # Torch is loaded by now; whether that was too late for OpenMP is for the worker entry to refuse, not for a library.
    prepare_process(cpu=not torch.cuda.is_available(), allow_late=True)
    from vllm import LLM
    from vllm.platforms import current_platform

    _keep_default_group()
    if is_ours and config.tensor_parallel > 1 and current_platform.is_cpu():
        _name_shared_memory()
    arguments: dict[str, Any] = {
        "model": str(model_path),
        "dtype": config.dtype,  # always explicit: "auto" turns a float32 checkpoint into bfloat16
        "seed": seed,
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_concurrent,
        "tensor_parallel_size": config.tensor_parallel,
        # Also with one worker: vLLM's own choice for that takes GPU 0 on every rank, and makes it the trainer's, too.
        "distributed_executor_backend": "external_launcher" if is_ours else None,
        "load_format": "dummy" if random_weights else "safetensors",
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        "generation_config": "vllm",  # sampling defaults in the model's folder must not leak in
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "weight_transfer_config": {"backend": vllm_backend(transport)},
        "worker_extension_cls": _WORKER_EXTENSION,
    }
    if config.quantization is not RolloutQuantization.NONE:
        arguments["hf_overrides"] = {"quantization_config": _quantization_config(config.quantization, model)}
    if current_platform.is_cpu():
        if config.sleep_level:
            raise ValueError(
                f"rollout.sleep_level is {config.sleep_level}, but vLLM cannot sleep on CPU (there is no GPU memory to "
                "give back): set it to 0"
            )
        _check_cpu_head_size(model)
        # Without a stated size vLLM takes, and touches, 92 % of the machine's memory as KV cache.
        arguments |= {
            "kv_cache_memory_bytes": config.kv_cache_bytes,
            "block_size": _CPU_BLOCK_SIZE,
            "enforce_eager": True,
        }
    else:
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
        arguments["enable_sleep_mode"] = config.sleep_level > 0
        if expands_segments():  # the trainer's allocator, whose memory other workers cannot open
            arguments["disable_custom_all_reduce"] = True
    arguments |= check_engine_args(config.engine_args)
    return LLM(**arguments), arguments


def _name_shared_memory() -> None:
    """Let workers on CPU that are ranks share memory under a name of this engine's own.  A broadcast from rank 0.

    vLLM names it after where its group was made, which for ranks is ``env://`` on every machine and for every job: two
    jobs would write into each other's, and what a killed one leaves keeps all later ones from starting.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed as Shared

    token = torch.tensor(list(uuid.uuid4().bytes), dtype=torch.uint8)
    dist.broadcast(token, src=0)
    prefix = SHARED_BY_WORKERS + bytes(token.tolist()).hex()

    def name(communicator: Any) -> str:
        ranks = "-".join(map(str, communicator.ranks))
        return f"{prefix}-{communicator.unique_name}-[{ranks}]-cpushm"

    Shared.make_group_name = staticmethod(name)  # type: ignore[method-assign]


def _take_our_place() -> tuple[int, int | None]:
    """Let an engine in this process take this rank and its device: local rank and CUDA device (None on CPU).

    Written where vLLM reads it; :func:`_trainer_state_preserved` puts back what was there.
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    local_rank = device if device is not None else int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(local_rank)}
    return local_rank, device


def _check_place(llm: Any, place: tuple[int, int | None]) -> None:
    """The engine is where the trainer is, and has not moved it."""
    local_rank, device = place
    [(taken, where)] = llm.collective_rpc("place")
    expected = "cpu" if device is None else f"cuda:{device}"
    now = None if device is None else torch.cuda.current_device()
    if (taken, where, now) != (local_rank, expected, device):
        raise EngineStateError(
            f"the engine of local rank {local_rank} took local rank {taken} on {where} instead of {expected}, and the "
            f"trainer's device is {now} now: this vLLM does not follow distributed_executor_backend=external_launcher"
        )


def _quantization_config(quantization: RolloutQuantization, model: dict[str, Any]) -> dict[str, Any]:
    """What ``config.json`` of a checkpoint in this form says: vLLM then holds such a checkpoint's parameters.

    The output layer, embeddings, norms and routers stay as they are.
    """
    if quantization is RolloutQuantization.FP8_BLOCK:
        routers = [f"model.layers.{layer}.mlp.gate" for layer in range(int(model["num_hidden_layers"]))]
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", *routers],
        }
    value = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", r"re:.*\.mlp\.gate$"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**value, "strategy": "channel", "dynamic": False},
                "input_activations": {**value, "strategy": "token", "dynamic": True},
            }
        },
    }


def _read_folder(path: Path, max_model_len: int, random_weights: bool) -> dict[str, Any]:
    """``config.json`` of the model in ``path``; raises when it cannot be served."""
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not an HF model folder: it has no config.json")
    refuse_remote_code(path)
    model: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if not random_weights and not any(path.glob("*.safetensors")):
        raise FileNotFoundError(f"{path} holds no *.safetensors: pass random_weights=True to start without weights")
    longest = int(model.get("max_position_embeddings") or max_model_len)
    if max_model_len > longest:
        raise ValueError(f"max_model_len {max_model_len} exceeds the {longest} positions of the model in {path}")
    return model


def _check_cpu_head_size(model: dict[str, Any]) -> None:
    """vLLM itself says so only at the first request, with a C++ error."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size = int(model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"])
    known = CPUAttentionBackend.get_supported_head_sizes()
    if size not in known:
        raise ValueError(f"head_dim {size} is not one of {known}, which vLLM's CPU attention takes: change the model")


def _turn(output: Any) -> Turn:
    sampled = output.outputs[0]
    if not sampled.token_ids:
        raise RuntimeError(f"vLLM ended request {output.request_id} without a token ({sampled.finish_reason})")
    return Turn(
        key=int(output.request_id),
        token_ids=np.asarray(sampled.token_ids, dtype=np.int32),
        log_probs=_sampled_log_probs(sampled),
        finish=sampled.finish_reason,
    )


def _sampled_log_probs(output: Any) -> np.ndarray:
    if output.logprobs is None:  # not asked for: there was one way to go
        return np.zeros(len(output.token_ids), dtype=np.float32)
    values = [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)]
    return np.asarray(values, dtype=np.float32)


@contextlib.contextmanager
def _rng_preserved() -> Iterator[None]:
    """The trainer's random state (random, numpy, torch) is what it was, whatever happens inside."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def _trainer_state_preserved() -> Iterator[None]:
    """Random state and environment as before; vLLM's own variables stay, it reads some of them later."""
    before = dict(os.environ)
    with _rng_preserved():
        try:
            yield
        finally:
            for name in {*before, *os.environ}:
                if name.startswith("VLLM_") or os.environ.get(name) == before.get(name):
                    continue
                if name in before:
                    os.environ[name] = before[name]
                else:
                    del os.environ[name]


def _count_engines(change: int) -> None:
    global _live_engines
    _live_engines += change


def _keep_default_group() -> None:
    """Let an engine's shutdown take down vLLM's groups only, and those only when the last engine goes.

    vLLM ends an in-process engine, also from its finalizer at exit, with ``destroy_process_group()`` of the DEFAULT
    group.
    """
    import vllm.v1.engine.core as core
    from vllm.distributed import parallel_state

    def cleanup(shutdown_ray: bool = False) -> None:
        if _live_engines > 0:
            return
        if dist.is_initialized():
            parallel_state.destroy_model_parallel()
            if parallel_state._WORLD:
                parallel_state._WORLD.destroy()
        parallel_state._WORLD = parallel_state._NODE_COUNT = None

    core.cleanup_dist_env_and_memory = cleanup
