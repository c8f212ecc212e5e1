"""After every weight transfer: does the engine compute what the trainer computes?

Checksums prove that bytes arrived; only log-probs prove that they arrived in the right place (a transposed fusion or
a stale tied head passes every checksum).  The first engine samples a few greedy tokens after a fixed prompt, every
engine scores that sequence, and the trainer scores it through its own pipeline.

What tells wrong weights from rounding is how many tokens are apart, not how far one is: a wrong tensor moves all of
them, rounding moves all a little, and a mixture of experts whose router stands on an edge moves a few of them far (the
two sides take different experts there).  So the middle of all tokens decides, and the farthest is only said.

    within the tolerance                  goes on; far above what this run has shown so far is said
    above it                              said; everything is sent once more
    above it again                        CanaryError: the run stops, and leaves a note in its folder
    the same again after a restart        what is left is arithmetic: engines are new and everything was sent anew, and
                                          earlier transfers of the run were right.  Said, and the run goes on
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rest.config import RestConfig, RolloutQuantization
from megatron_rest.data.alignment import UNALIGNED, PackingAlignment
from megatron_rest.data.batching import make_microbatch
from megatron_rest.errors import RunError
from megatron_rest.mcore.policy import MegatronPolicy
from megatron_rest.rollout.engine import EngineLostError
from megatron_rest.trainer.fleet import Singers
from megatron_rest.types import PromptSample, TokenRegion, TrainSample

__all__ = ["Canary", "CanaryError", "Sentry", "Song", "canary_prompt", "canary_tolerance"]

_log = logging.getLogger(__name__)

# Of the token in the middle, nats.  Seen: two float32 implementations 1e-6, two bfloat16 ones 7e-3;
# seeded misplacements of whole tensors in small models: tests/trainer/test_canary.py.
_FLOAT32 = 1e-4
_16_BIT = 0.05
_FP8 = 0.3
_FAR = 10.0  # times the tolerance: a token that rounding does not move so far
_MOST_PROMPT_TOKENS = 256  # more tell no more
_TOP = 5  # likeliest next tokens whose order is compared
_REMEMBERED = 20  # transfers that say what is usual
_LEAST_REMEMBERED = 3
_UNUSUAL = 8.0  # times the usual
_ALIKE = 2.0  # an alarm within this factor of an earlier one is the same
_FILE = "canary.json"

_T = TypeVar("_T")


class CanaryError(RunError):
    """Engine and trainer disagree on the log-probs of the same tokens under what should be the same weights.

    Attributes:
        song: what was measured, the same on every rank.
    """

    def __init__(self, message: str, song: Song) -> None:
        super().__init__(message)
        self.song = song


@dataclass(frozen=True, kw_only=True, slots=True)
class Song:
    """|engine - trainer| log-prob over the tokens of the canary, nats; of the engine that is worst in each."""

    middle: float  # of the token in the middle
    worst: float  # of the token that is farthest apart
    far: float  # share of tokens more than ten tolerances apart
    order: float  # share of pairs of the first engine's likeliest next tokens that the trainer puts in the same order


def canary_tolerance(config: RestConfig) -> float:
    """Allowed |engine - trainer| log-prob of the middle token, nats: as configured, or by both sides' precisions."""
    if config.weight_sync.canary_tolerance is not None:
        return config.weight_sync.canary_tolerance
    if config.rollout.quantization is not RolloutQuantization.NONE:
        return _FP8
    return _FLOAT32 if config.model.dtype == config.rollout.dtype == "float32" else _16_BIT


def canary_prompt(prompt: PromptSample, config: RestConfig) -> tuple[PromptSample, int]:
    """``prompt``, cut where it would not fit, and how many tokens are sampled after it."""
    longest = min(config.model.max_sequence_length - 1, config.trainer.max_tokens_per_microbatch)
    num_tokens = min(config.weight_sync.canary_tokens, max(longest // 2, 1))
    length = min(len(prompt.token_ids), max(longest - num_tokens, 1), _MOST_PROMPT_TOKENS)
    cut = PromptSample(
        prompt_id=prompt.prompt_id, token_ids=prompt.token_ids[:length], ground_truth="", index=prompt.index
    )
    return cut, num_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Canary:
    """A prompt whose continuation both sides must agree on.

    Args:
        prompt: any prompt of the data set that fits (:func:`canary_prompt`).
        num_tokens: greedy tokens sampled after it.
    """

    prompt: PromptSample
    num_tokens: int

    def sing(
        self,
        singers: Singers,
        policy: MegatronPolicy,
        *,
        tolerance: float,
        alignment: PackingAlignment = UNALIGNED,
        is_sharing: bool = False,
    ) -> Song | None:
        """What all singers together show, the same on every rank; None when an engine was lost meanwhile.

        ``is_sharing``: the attention takes shared prompts, so the likeliest next tokens cost a row each and not a
        sequence each.  Collective over all ranks: one broadcast of token ids, a scoring pass, one MAX all-reduce.
        """
        is_lost = False
        asked = torch.zeros(self.num_tokens + _TOP, dtype=torch.int64)  # greedy tokens; likeliest in the last's place
        likely = torch.zeros(_TOP, dtype=torch.float64)
        if singers.has_first:
            assert singers.engine is not None, "what has the first engine has one"
            try:
                greedy, _ = singers.engine.greedy(self.prompt.token_ids, self.num_tokens)
                before = np.concatenate([self.prompt.token_ids, greedy[:-1]])
                ids, log_probs = singers.engine.next_tokens(before, _TOP)
                asked[:] = torch.from_numpy(np.concatenate([greedy, ids]).astype(np.int64))
                likely[:] = torch.from_numpy(log_probs.astype(np.float64))
            except EngineLostError:
                is_lost = True  # the ranks agree on it below: alone it would leave the others waiting
        dist.broadcast(asked, src=singers.first_rank)
        tokens, others = asked[: self.num_tokens].numpy(), asked[self.num_tokens :].numpy()
        sequence = np.concatenate([self.prompt.token_ids, tokens]).astype(np.int32)
        trained, of_others = self._trainer_log_probs(policy, sequence, others, alignment, is_sharing)
        gaps, order = torch.zeros(3, dtype=torch.float64), 1.0
        try:
            if singers.engine is not None and not is_lost:
                scored = torch.from_numpy(np.array(singers.engine.prompt_log_probs(sequence), np.float32))
                gaps = _gaps(scored[1:].double() - trained.double(), tolerance)
        except EngineLostError:
            is_lost = True
        if singers.has_first:
            order = _same_order(likely, of_others.double(), tolerance)
        outcome = torch.tensor([*gaps.tolist(), 1.0 - order, float(is_lost)], dtype=torch.float64)
        dist.all_reduce(torch.nan_to_num_(outcome, nan=torch.inf), op=dist.ReduceOp.MAX)
        middle, worst, far, disorder, any_lost = outcome.tolist()
        return None if any_lost else Song(middle=middle, worst=worst, far=far, order=1.0 - disorder)

    def _trainer_log_probs(
        self,
        policy: MegatronPolicy,
        sequence: np.ndarray,
        others: np.ndarray,
        alignment: PackingAlignment,
        is_sharing: bool,
    ) -> tuple[Tensor, Tensor]:
        """float32 [L - 1], of every token but the first; and [k], of ``others`` in the place of the last."""
        n = len(sequence)

        def log_probs_of(sequences: list[np.ndarray], *, first: int, shared_by: list[int] | None = None) -> Tensor:
            samples = [
                TrainSample(
                    token_ids=token_ids,
                    loss_mask=np.arange(n) >= first,
                    region_ids=np.full(n, int(TokenRegion.CONTEXT), np.int8),
                    rollout_log_probs=np.zeros(n, np.float32),
                    advantage=0.0,
                    sequence_id=0,
                )
                for token_ids in sequences
            ]
            groups = [[sample] for sample in samples] if shared_by is None else [samples]
            batches = [make_microbatch(group, alignment=alignment, shared_by=shared_by) for group in groups]
            # Engines score given tokens with the model's own distribution, whatever the sampling temperature is, and in
            # their own precision: what FP8 products change is the certificate's business, no sign of wrong weights.
            scores = policy.score(batches, temperature=1.0, in_bf16=True)
            return torch.cat([s.log_probs.cpu()[m.loss_mask.cpu()] for s, m in zip(scores, batches, strict=True)])

        variants = [np.append(sequence[:-1], other).astype(np.int32) for other in others]
        shared_by = [len(variants)] if is_sharing else None
        return log_probs_of([sequence], first=1), log_probs_of(variants, first=n - 1, shared_by=shared_by)


def _gaps(differences: Tensor, tolerance: float) -> Tensor:
    """Middle and worst of |differences|, and the share of far ones; NaN is infinitely far."""
    gaps = torch.nan_to_num(differences.abs(), nan=torch.inf)
    return torch.stack([gaps.median(), gaps.max(), (gaps > _FAR * tolerance).double().mean()])


def _same_order(engine: Tensor, trainer: Tensor, tolerance: float) -> float:
    """Share of pairs that both sides put in the same order; pairs that the engine itself holds equal do not count."""
    ours, theirs = engine[:, None] - engine[None], trainer[:, None] - trainer[None]
    counts = ours > 2 * tolerance
    return float((theirs[counts] > 0).double().mean()) if counts.any() else 1.0


class Sentry:
    """Judges songs by the tolerance and by those of this run, and remembers alarms over restarts.

    Args:
        tolerance: for the token in the middle, nats.
        run_dir: where alarms are noted.
        setting: what placement and rounding depend on, as text: an alarm under another one is another alarm.
        is_moe: a router chooses experts.
        rank: this one; rank 0 reads, writes and says.

    Collective: one broadcast of the note that an earlier start has left.
    """

    def __init__(self, *, tolerance: float, run_dir: str | Path, setting: str, is_moe: bool, rank: int) -> None:
        self.tolerance = tolerance
        self._path = Path(run_dir) / _FILE
        self._setting, self._is_moe, self._rank = setting, is_moe, rank
        self._middles: deque[float] = deque(maxlen=_REMEMBERED)
        self._has_said_far = False
        note: list[Any] = [_read(self._path) if rank == 0 else None]
        dist.broadcast_object_list(note, src=0)
        self._note: dict[str, Any] | None = note[0]

    def guard(self, version: int, push: Callable[[], tuple[_T, Song]]) -> tuple[_T, Song]:
        """What ``push`` returns, if its song is within the tolerance, at once or when everything was sent once more.

        Raises CanaryError on every rank if it is not, and this is not the same alarm as one that has stopped the run
        before.
        """
        outcome, song = push()
        if song.middle > self.tolerance:
            self._say(f"{self._text(song)}: everything is sent once more")
            outcome, song = push()
        if song.middle > self.tolerance and not self._is_known(version, song):
            self._leave_note(version, song)
            raise CanaryError(
                f"{self._text(song)}, also after everything was sent again: a tensor is in the wrong place, or "
                "the two sides round very differently (then raise weight_sync.canary_tolerance)",
                song,
            )
        self._compare(song)
        return outcome, song

    def _text(self, song: Song) -> str:
        return (
            f"after the weight transfer the engine's log-probs differ from the trainer's by {song.middle:.3g} nats on "
            f"the middle token of the canary prompt and by {song.worst:.3g} at most, {song.order:.0%} of its likeliest "
            f"tokens are in the same order (allowed: {self.tolerance:g} in the middle, weight_sync.canary_tolerance)"
        )

    def _is_known(self, version: int, song: Song) -> bool:
        """Whether the run was stopped by the same before, in the same setting, after transfers that were right."""
        note = self._note
        if note is None or note["version"] != version or note["setting"] != self._setting or not note["num_right"]:
            return False
        if not 1 / _ALIKE < song.middle / note["song"]["middle"] < _ALIKE:
            return False
        self._say(
            f"{self._text(song)}: the same as when it stopped the run before; engines are new since, earlier transfers "
            "were right, so it is arithmetic and no tensor; the run goes on with twice that as the tolerance"
        )
        self.tolerance = _ALIKE * song.middle
        return True

    def _leave_note(self, version: int, song: Song) -> None:
        if self._rank == 0:
            earlier = 0 if self._note is None else self._note["num_right"]
            note = {"version": version, "setting": self._setting, "song": asdict(song)}
            self._path.write_text(json.dumps(note | {"num_right": len(self._middles) or earlier}), encoding="utf-8")

    def _compare(self, song: Song) -> None:
        """Say what is unusual and stops nothing."""
        usual = median(self._middles) if len(self._middles) >= _LEAST_REMEMBERED else None
        if usual is not None and song.middle > _UNUSUAL * usual and song.middle > self.tolerance / _FAR:
            self._say(f"{self._text(song)}; usual in this run: {usual:.3g}")
        if song.far and not self._has_said_far:
            self._has_said_far = True
            why = "its router takes other experts there on the two sides" if self._is_moe else "rounding is large there"
            self._say(
                f"{song.far:.1%} of the canary's tokens are more than {_FAR * self.tolerance:g} nats apart (at most "
                f"{song.worst:.3g}), and the one in the middle {song.middle:.3g}: no wrong tensor does that; {why}"
            )
        self._middles.append(song.middle)

    def _say(self, text: str) -> None:
        if self._rank == 0:
            _log.warning("%s", text)


def _read(path: Path) -> dict[str, Any] | None:
    """None if there is no note, or none of ours."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        int(note["version"]), int(note["num_right"]), str(note["setting"])
        return note if float(note["song"]["middle"]) > 0 else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
