"""Cases to prompts, rollouts to answers: what lies between a benchmark and an engine, for one tokenizer.

    exams = Interviewer(tokenizer, ...).exams(cases)     one for all cases with the same environment
    engine.run(requests of exam.prompts, max_response_tokens=exam.max_response_tokens, exam=exam.exam, ...)
    interviewer.answer(case, rollout)                    text, or a conversation's texts

Nothing is cut: a case whose prompt does not fit is left out by name, and the caller decides what that means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_rest.data.prompt_style import apply_style
from megatron_rest.eval.cases import Answer, EvalCase
from megatron_rest.eval.selection import draw
from megatron_rest.regions import TOOLRL, Dialect, answer_prefix, in_tags, token_bytes_table
from megatron_rest.rollout.chat import ChatSettings
from megatron_rest.rollout.engine import Exam
from megatron_rest.rollout.environments.base import Message
from megatron_rest.rollout.environments.calls import parse_calls
from megatron_rest.rollout.translator import ChatTranslator
from megatron_rest.types import PromptSample, Rollout

__all__ = ["CaseExam", "Interviewer", "choose"]

_MAX_TURNS = 10_000  # environments of benchmarks end by themselves: BFCL's after 20 answers with calls to one request


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseExam:
    """Cases that are answered in one run of an engine, with their prompts in the same order."""

    exam: Exam
    cases: tuple[EvalCase, ...]
    prompts: tuple[PromptSample, ...]
    max_response_tokens: int  # of an answer; of all answers and tool outputs in a conversation


def choose(
    interviewer: Interviewer, cases: Sequence[EvalCase], count: int, *, seed: int
) -> tuple[list[EvalCase], list[EvalCase]]:
    """``count`` cases of each category (0 = all) drawn among those that fit, and all that do not fit.

    Raises ValueError for a category of which nothing fits.
    """
    fitting = [case for case in cases if interviewer.fits(case)]
    for category in dict.fromkeys(case.category for case in cases):
        if not any(case.category == category for case in fitting):
            shortest = min(interviewer.length(case) for case in cases if case.category == category)
            raise ValueError(
                f"no prompt of {category} fits: answers leave {interviewer.max_prompt_tokens} tokens for one, and the "
                f"shortest has {shortest}"
            )
    return draw(fitting, count, seed=seed), [case for case in cases if not interviewer.fits(case)]


class Interviewer:
    """Asks cases with a chat template and reads what was sampled.

    Args:
        tokenizer: of transformers, byte-level, with a chat template.
        prompt_style: how the training data was written (megatron_rest.data.prompt_style).
        max_model_len: tokens of prompt and answer together.
        max_response_tokens: longest answer; conversations may fill the context.
        chat: template and dialect of the model; None = the tokenizer's template, ToolRL's tags.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        prompt_style: str,
        max_model_len: int,
        max_response_tokens: int,
        chat: ChatSettings | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._chat = chat or ChatSettings()
        self._template = self._chat.template(tokenizer)
        self._style = prompt_style
        self._max_model_len = max_model_len
        self._max_response_tokens = max_response_tokens
        self._bytes = token_bytes_table(tokenizer)
        self._encoded: dict[str, np.ndarray] = {}

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that leaves room for an answer."""
        return self._max_model_len - self._max_response_tokens

    def length(self, case: EvalCase) -> int:
        """Tokens of its prompt."""
        return len(self._encode(case))

    def fits(self, case: EvalCase) -> bool:
        """Whether its prompt leaves room for an answer."""
        return self.length(case) <= self.max_prompt_tokens

    def exams(self, cases: Sequence[EvalCase]) -> list[CaseExam]:
        """The cases, which must fit, by environment.

        Raises ValueError for conversations with a chat template that ends a turn with no token.
        """
        environments = dict.fromkeys(case.environment for case in cases)
        return [self._exam(name, [case for case in cases if case.environment == name]) for name in environments]

    def answer(self, case: EvalCase, rollout: Rollout) -> Answer:
        """What the policy said, in ToolRL's tags (``regions.in_tags``); bytes that are no UTF-8 become U+FFFD."""
        if not case.environment:
            return self._in_tags(case, self._prefix(case) + self._text(rollout.token_ids))
        edges = np.flatnonzero(np.diff(rollout.loss_mask.astype(np.int8))) + 1
        prefix = self._prefix(case)  # the same for every turn
        texts = [prefix + self._text(p) for p in np.split(rollout.token_ids, edges)[::2]]  # between: tools and users
        turns: list[list[str]] = [[]]
        for text in texts:
            turns[-1].append(self._in_tags(case, text))
            calls = parse_calls(text, dialect=self._reads(case))
            if not calls.calls and not calls.errors:  # as the environment has it: the user speaks next
                turns.append([])
        return turns if turns[-1] else turns[:-1]

    def _exam(self, environment: str, cases: Sequence[EvalCase]) -> CaseExam:
        if environment:
            translator = ChatTranslator(self._tokenizer, chat=self._chat)
            for role in ("tool", "user"):  # raises for a chat template that no conversation can be appended to
                translator.end_and_suffix([Message(role=role, content="ok")])
        prompts = tuple(
            PromptSample(prompt_id=case.case_id, token_ids=self._encode(case), ground_truth=case.task) for case in cases
        )
        return CaseExam(
            exam=Exam(environment=environment, max_turns=_MAX_TURNS if environment else 1),
            cases=tuple(cases),
            prompts=prompts,
            max_response_tokens=self._max_model_len if environment else self._max_response_tokens,
        )

    def _encode(self, case: EvalCase) -> np.ndarray:
        if case.case_id not in self._encoded:
            if self._reads(case) is TOOLRL:
                messages = apply_style(case.messages, self._style)
                text = self._template.render(messages, add_generation_prompt=True)
            else:
                tools = list(case.native_tools)
                text = self._template.render(case.native_messages, tools, add_generation_prompt=True)
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            self._encoded[case.case_id] = np.asarray(ids, dtype=np.int32)
        return self._encoded[case.case_id]

    def _reads(self, case: EvalCase) -> Dialect:
        """The model's dialect, but for cases whose own text asks for ToolRL's tags."""
        return self._chat.reads if case.native_messages else TOOLRL

    def _in_tags(self, case: EvalCase, text: str) -> str:
        return in_tags(text, self._reads(case), case.schemas)

    def _prefix(self, case: EvalCase) -> str:
        """What the generation prompt has written of the answer."""
        return answer_prefix(self._text(self._encode(case)[-32:]).encode(), self._reads(case))

    def _text(self, token_ids: np.ndarray) -> str:
        return b"".join(self._bytes[i] for i in token_ids).decode("utf-8", errors="replace")
