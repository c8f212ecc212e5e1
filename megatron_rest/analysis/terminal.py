"""A run's report for a terminal: the page's tables, and its sample rollouts in the regions' colours.

Without colours (a file, a pipe, NO_COLOR) every run of tokens of one region is marked ``[region weight]``.  What a
policy wrote reaches the terminal without control characters: an escape sequence in an answer is shown, not obeyed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from megatron_rest.analysis.samples import REGION_WORDS, SampleRollout, SampleToken, read_samples
from megatron_rest.analysis.sections import text_sections
from megatron_rest.analysis.series import RunMetrics
from megatron_rest.token_region import TokenRegion

__all__ = ["terminal_lines"]

_COLOURS = {  # of the 256-colour palette, near those of the plots
    TokenRegion.FORMAT: 32,
    TokenRegion.TOOL_NAME: 166,
    TokenRegion.TOOL_ARGS: 178,
    TokenRegion.THINK: 36,
    TokenRegion.RESPONSE: 175,
}
_KEPT = "\n\t"


def terminal_lines(run: RunMetrics, tokenizer: Any, *, is_coloured: bool) -> Iterator[str]:
    """Lines of the whole report; ``tokenizer`` None leaves the rollouts out and says so."""
    for title, lines in text_sections(run):
        yield from (f"== {title} ==", *lines, "")
    yield "== Sample rollouts =="
    if tokenizer is None:
        yield "not shown: the policy's tokenizer was not found (give --tokenizer FOLDER)"
        return
    samples = read_samples(run.run_dir, tokenizer)
    if not samples:
        yield "the run has saved none"
    elif is_coloured:
        yield " ".join(_paint(words, region) for region, words in REGION_WORDS.items())
    for sample in samples:
        more = f" ... and {sample.num_left_out} more tokens" if sample.num_left_out else ""
        yield from ("", sample.heading, (_coloured if is_coloured else _marked)(sample) + more)


def _coloured(sample: SampleRollout) -> str:
    return "".join(_paint(clean(_text(tokens)), tokens[0].region) for tokens in _runs(sample))


def _marked(sample: SampleRollout) -> str:
    """Runs of one region with the mean of their weights."""
    return "".join(f"[{_words(tokens)}]{clean(_text(tokens))}" for tokens in _runs(sample))


def _words(tokens: Sequence[SampleToken]) -> str:
    if not tokens[0].is_sampled:
        return "not sampled"
    weight = sum(token.weight for token in tokens) / len(tokens)
    return f"{REGION_WORDS.get(tokens[0].region, 'no region')} {weight:.2f}"


def _runs(sample: SampleRollout) -> Iterator[list[SampleToken]]:
    for _, tokens in groupby(sample.tokens, key=lambda token: (token.region, token.is_sampled)):
        yield list(tokens)


def _text(tokens: Sequence[SampleToken]) -> str:
    return "".join(token.text for token in tokens)


def _paint(text: str, region: TokenRegion) -> str:
    colour = _COLOURS.get(region)
    return text if colour is None else f"\x1b[38;5;{colour}m{text}\x1b[0m"


def clean(text: str) -> str:
    """Control characters as their escapes; line ends and tabs stay."""
    return "".join(c if c in _KEPT or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
