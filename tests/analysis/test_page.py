"""The HTML page of a run: whole, self-contained, true to the metrics, and safe with what a policy wrote.

The last test looks at it in a real browser and needs chromium (apt-get install chromium).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from megatron_rest.analysis import report
from megatron_rest.analysis.page import PAGE_FILE
from megatron_rest.analysis.planned import planned_lines
from megatron_rest.analysis.series import load_runs
from megatron_rest.analysis.summary import learning_lines, phase_lines
from megatron_rest.analysis.terminal import clean, terminal_lines
from megatron_rest.config import DataConfig, ModelConfig, RestConfig, RolloutConfig, load, to_dict
from megatron_rest.data.rollout_file import SavedRollouts, write_rollouts
from megatron_rest.eval.cases import Score
from megatron_rest.eval.scoring import Verdict, summarise, write_json
from megatron_rest.planner.hardware import HARDWARE
from megatron_rest.planner.plan import make_plan
from megatron_rest.types import TokenRegion
from tests.analysis.runs import draw_only, make_run
from tests.helpers.tiny_model import VOCAB_SIZE, build_tiny_model, build_tokenizer

HOSTILE = '<script>alert(1)</script> & "quoted" \N{SNOWMAN}'
WRONG = "wrong <b>"
EMPTY_TAGS = {"meta", "img"}


def rollouts(step: int) -> SavedRollouts:
    """Three rollouts of a byte-level vocabulary (id = place of the byte's character): prompt "q", then an answer."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    spell = ByteLevel(add_prefix_space=False, use_regex=False)
    texts = [HOSTILE, "plain answer", "x" * 3000]
    ids = [[alphabet[c] for c in spell.pre_tokenize_str("q" + text)[0][0]] for text in texts]
    lengths = np.array([len(i) for i in ids], np.int64)
    total = int(lengths.sum())
    mask = np.ones(total, bool)
    mask[np.concatenate([[0], np.cumsum(lengths)[:-1]])] = False
    floats = {name: np.linspace(0, 1, total, dtype=np.float32) for name in ("entropy", "token_weights")}
    return SavedRollouts(
        step=step,
        progress=0.5,
        lengths=lengths,
        group_ids=np.zeros(3, np.int32),
        advantages=np.array([1.0, -1.0, 0.0], np.float32),
        rewards=np.array([2.5, -1.5, 0.0], np.float32) * (1 if step == 1 else -1),
        token_ids=np.concatenate(ids).astype(np.int32),
        loss_mask=mask,
        region_ids=np.where(mask, int(TokenRegion.THINK), 0).astype(np.int8),
        rollout_log_probs=floats["entropy"],
        old_log_probs=floats["entropy"],
        **floats,
    )


class Structure(HTMLParser):
    """Tags and text; fails on one that is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("page") / "<b>rest</b>", 12)
    build_tokenizer(folder / "hf")
    for step in (1, 6, 12):
        write_rollouts(folder, rollouts(step))
    fill(folder)
    assert report.main([str(folder)]) == 0
    return folder


def fill(folder: Path) -> None:
    """What else may lie in a run's folder: benchmark scores, measured variance, the configuration and its start."""
    cases = [("level-1", True), ("level-1", False), ("level-2", True), ("level-1", True)]
    verdicts = [
        Verdict(case_id=str(i), category=category, score=Score(is_correct=right, outcome="correct" if right else WRONG))
        for i, (category, right) in enumerate(cases)
    ]
    (folder / "eval" / "api-bank").mkdir(parents=True)
    write_json(folder / "eval" / "api-bank" / "summary.json", summarise(verdicts))
    for version, part in ((5, verdicts), (10, verdicts[2:])):
        place = folder / "validation" / f"version_{version:06d}" / "api-bank"
        place.mkdir(parents=True)
        write_json(place / "summary.json", summarise(part))
    rows = [
        {
            "name": name, "variance": 2 * ratio, "standard_error": 0.1, "ratio": ratio, "ratio_standard_error": 0.02,
            "signal": 0.5,
        }
        for name, ratio in (("uniform", 1.0), ("Theorem 2 <b>", 0.625))
    ]  # fmt: skip
    regions = {"think": {"tokens": 7, "entropy": 0.25, "score_norm": 0.125}}
    part = {"regions": regions, "correlation": 0.5}
    step = {
        "step": 1, "num_sequences": 8, "num_groups": 2, "num_parameters": 1234, "model": "toy",
        "mean_abs_log_ratio": 0.0, "variance": rows, "entropy": part, "last_layer": part,
    }  # fmt: skip
    (folder / "variance.json").write_text(json.dumps({"steps": [step]}))
    build_tiny_model(folder / "policy", with_tokenizer=False)
    config = RestConfig(model=ModelConfig(path=str(folder / "policy"), max_sequence_length=512))
    config = dataclasses.replace(
        config,
        data=DataConfig(max_prompt_tokens=128, prompts_per_step=2),
        rollout=RolloutConfig(max_response_tokens=256, rollouts_per_prompt=4),
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    (folder / "starts.jsonl").write_text(json.dumps({"world_size": 2, "gpu": None}) + "\n")


@pytest.fixture(scope="module")
def page(run_dir) -> Structure:
    structure = Structure()
    structure.feed((run_dir / PAGE_FILE).read_text(encoding="utf-8"))
    assert not structure.open
    return structure


def test_page_is_small_and_fetches_nothing(run_dir, page):
    assert (run_dir / PAGE_FILE).stat().st_size < 5 << 20
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "b"})
    sources = [attributes["src"] for tag, attributes in page.tags if "src" in attributes]
    assert len(sources) == 9, "all plots but that of a validation, which this run does not have"
    assert all(str(source).startswith("data:image/png;base64,") for source in sources)
    assert "http" not in (run_dir / PAGE_FILE).read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]


def test_its_numbers_are_those_of_the_metrics(run_dir, page):
    (run,) = load_runs([run_dir])
    for line in [*learning_lines(run), *phase_lines(run)]:
        assert line in page.text or set(line) == {"-", " "}, "the rule below a header is drawn"
    assert sum(tag == "table" for tag, _ in page.tags) >= 6 and sum(tag == "th" for tag, _ in page.tags) > 20
    first = [text for text in page.text.splitlines() if text.strip() in ("Reward", "What it learned")]
    assert first[0].strip() == "Reward", "the curves stand first"


def number(text: str, line: str, column: int) -> float:
    """The number in a column (from 0, columns are two blanks apart) of the page's line that starts so."""
    [found] = [row for row in text.splitlines() if row.startswith(line)]
    return float(re.split(r"\s{2,}", found.strip())[column].rstrip(" %").split(" +- ")[0].replace(",", ""))


def test_its_numbers_are_those_in_the_file(run_dir, page):
    """Worked out again from metrics.jsonl with nothing but json and statistics."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    def mean(part: str, name: str, at: slice) -> float:
        return statistics.fmean(row[part][name] for row in rows[at] if name in row[part])

    first, last = slice(0, 3), slice(-3, None)
    for line, name in {
        "reward, total": "reward/total",
        "reward, correctness": "reward/correctness",
        "response length (tokens)": "response/length",
        "entropy, think (nats)": "entropy/think",
        "entropy, response (nats)": "entropy/response",  # which some steps do not have
    }.items():
        shown = [number(page.text, line, column) for column in (1, 2, 3)]
        wanted = [mean("metrics", name, first), mean("metrics", name, last)]
        assert shown == pytest.approx([*wanted, wanted[1] - wanted[0]], abs=0.051 if "tokens" in line else 5.1e-4)
    regions = page.text.split("last steps")[1].split("Variance of")[0]
    for region in ("format", "name", "args", "think", "response"):
        shown = [number(regions, region + "  ", column) for column in (1, 2)]
        metric = f"mismatch/{region}"
        assert shown == pytest.approx([mean("metrics", metric, first), mean("metrics", metric, last)], rel=5e-3)
    seconds = re.split(r"a step +share", page.text)[1].split("Time against")[0]
    for phase in ("rollout", "update", "checkpoint"):
        total = math.fsum(row["seconds"].get(phase, 0.0) for row in rows)
        assert number(seconds, phase + "  ", 1) == pytest.approx(total, abs=0.051)


def test_plan_beside_what_was_measured(run_dir, page):
    """Two groups of four, operations by hand: 2 per weight and row, 4 per head dimension and attended row."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    prompt, response = 64.0, statistics.fmean(row["metrics"]["response/length"] for row in rows)
    plan = make_plan(load(run_dir / "config.yaml"), HARDWARE["cpu"], world_size=2, mean_response=response)
    weights = 2 * (64 * 4 * 32 * 2 + 64 * 2 * 32 * 2 + 3 * 64 * 128)
    seen = prompt**2 / 2 + 4 * response * (prompt + response / 2)  # the prompt is there once on a CPU
    forward = 2 * (2 * weights * (prompt + 4 * response) + 4 * 2 * 4 * 32 * seen)
    forward += 2 * 4 * response * 2 * 64 * VOCAB_SIZE
    assert plan.work.update_flops == pytest.approx(3 * forward, rel=0.2), "lengths are drawn around the means"
    table = page.text.split("planned, s a step")[1]
    for phase, shown, seconds in (("score", "-", 3.0), ("update", f"{plan.work.update_flops / 8 / 2 / 1e9:,.1f}", 8.0)):
        [line] = [row for row in table.splitlines() if row.startswith(phase + " ")]
        assert line.split() == [phase, "-", f"{seconds:.3g}", "-", shown], "one update a step is not scored"
    assert "the planner estimates no time on a CPU" in page.text


def test_plan_of_a_known_and_of_an_unknown_gpu(run_dir, tmp_path):
    (run,) = load_runs([run_dir])
    for name in ("metrics.jsonl", "config.yaml"):
        (tmp_path / name).write_bytes((run_dir / name).read_bytes())
    run = dataclasses.replace(run, run_dir=tmp_path)
    assert planned_lines(run) == ["no plan: the run's folder has no starts.jsonl with run.yaml or config.yaml"]
    (tmp_path / "starts.jsonl").write_text('{"world_size": 2, "gpu": "NVIDIA H100 80GB HBM3"}\n')
    lines = planned_lines(run)
    plan = make_plan(
        load(tmp_path / "config.yaml"), HARDWARE["h100"], world_size=2,
        mean_response=float(run.series("response/length")[1].mean()),
    )  # fmt: skip
    assert plan.time is not None
    [line] = [line for line in lines if line.startswith("update")]
    assert line.split()[1:4] == [f"{plan.time.update:.3g}", "8", f"{8.0 / plan.time.update:.2f}"]
    (tmp_path / "starts.jsonl").write_text('{"world_size": 2, "gpu": "Radeon VII"}\n')
    assert planned_lines(run)[0].startswith("no plan: the planner does not know Radeon VII (it knows h100")


def test_benchmark_scores_stand_on_it(page):
    assert re.search(r"eval/api-bank +level-1 +3 +66\.7% +20\.8% to 93\.9% +- +wrong <b> 1", page.text)
    assert re.search(r"eval/api-bank +all +4 +75\.0%", page.text)
    assert re.search(r"validation/version_000010/api-bank +all +2 +100\.0%", page.text)
    assert "version_000005" not in page.text, "the last validation stands for all"


def test_a_damaged_summary_is_one_line(run_dir, tmp_path, capsys, monkeypatch):
    draw_only(monkeypatch, "reward")
    folder = make_run(tmp_path / "damaged", 3)
    (folder / "eval").mkdir()
    (folder / "eval" / "summary.json").write_text('{"all": 3}')
    for arguments in ([], ["--text"]):
        assert report.main([str(folder), *arguments]) == 2
        assert "is not a summary of megatron-rest eval" in capsys.readouterr().err
    assert not (folder / PAGE_FILE).exists()


def test_the_terminal_shows_the_same(run_dir, page, capsys):
    before = sorted(run_dir.rglob("*"))
    assert report.main([str(run_dir), "--text"]) == 0
    said = capsys.readouterr().out
    assert sorted(run_dir.rglob("*")) == before, "no file written"
    tables = [line for line in page.text.split("Sample rollouts")[0].splitlines() if "  " in line]
    assert len(tables) > 40 and all(line in said for line in tables)
    assert "Step 1, reward 2.500" in said
    assert re.search(r"\[thinking \d\.\d\d\]<script>alert\(1\)</script>", said)


def test_the_terminal_obeys_no_escape_sequence_of_a_policy():
    assert clean("a\x1b[2Jb\x07\tc\nd\x9b1m\u202e\N{SNOWMAN}") == "a\\x1b[2Jb\\x07\tc\nd\\x9b1m\\u202e\N{SNOWMAN}"


def test_terminal_colours_are_closed_and_can_be_switched_off(run_dir):
    (run,) = load_runs([run_dir])
    tokenizer = report._tokenizer(run_dir, None)
    coloured = "\n".join(terminal_lines(run, tokenizer, is_coloured=True))
    assert coloured.count("\x1b[38;5;") == coloured.count("\x1b[0m") > 5
    assert "\x1b" not in "\n".join(terminal_lines(run, tokenizer, is_coloured=False))


def test_best_and_worst_rollout_of_the_first_and_the_last_step(page):
    heads = re.findall(r"Step (\d+), reward (\S+),", page.text)
    assert heads == [("1", "2.500"), ("1", "-1.500"), ("12", "1.500"), ("12", "-2.500")]
    shown = "".join(page.text.split("Step 1, reward 2.500")[1].split("tokens", 1)[1].split("Step 1, ")[0].split())
    snowman_in_bytes = "\ufffd" * 3  # one token a byte: none of them is a character
    assert shown == "".join(HOSTILE.replace("\N{SNOWMAN}", snowman_in_bytes).split())


def test_tokens_say_region_weight_and_entropy(page):
    titles = [str(attributes["title"]) for tag, attributes in page.tags if tag == "span" and "title" in attributes]
    assert all(re.fullmatch(r"thinking, weight \d\.\d{3}, entropy \d\.\d{3} nats", title) for title in titles)


def test_a_long_rollout_is_cut_and_says_so(tmp_path, capsys, monkeypatch):
    draw_only(monkeypatch, "reward")
    folder = make_run(tmp_path / "long", 3)
    build_tokenizer(folder / "hf")
    one = rollouts(1)
    keep = slice(one.slices[2].start, one.slices[2].stop)
    write_rollouts(
        folder,
        SavedRollouts(
            step=1, progress=0.0, lengths=one.lengths[2:], group_ids=one.group_ids[2:], advantages=one.advantages[2:],
            rewards=one.rewards[2:], **{
                name: getattr(one, name)[keep]
                for name in (
                    "token_ids", "loss_mask", "region_ids", "rollout_log_probs", "old_log_probs", "entropy",
                    "token_weights",
                )
            },
        ),
    )  # fmt: skip
    report.main([str(folder)])
    assert "... and 1800 more tokens" in (folder / PAGE_FILE).read_text(encoding="utf-8")
    assert report.main([str(folder), "--text"]) == 0
    assert "... and 1800 more tokens" in capsys.readouterr().out


def test_without_a_tokenizer_the_page_says_what_is_missing(tmp_path, capsys, monkeypatch):
    draw_only(monkeypatch, "reward")
    folder = make_run(tmp_path / "bare", 3)
    assert report.main([str(folder)]) == 0
    assert "tokenizer was not found" in (folder / PAGE_FILE).read_text(encoding="utf-8")
    assert report.main([str(folder), "--tokenizer", str(tmp_path)]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_it_looks_right_in_a_browser(run_dir, tmp_path):
    picture = tmp_path / "page.png"
    (tmp_path / "page.html").write_bytes((run_dir / PAGE_FILE).read_bytes())
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=1200,4600",
    ]
    done = subprocess.run(
        [*command, f"--screenshot={picture}", f"--user-data-dir={tmp_path / 'profile'}", str(tmp_path / "page.html")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert picture.is_file(), done.stderr[-2000:]
    pixels = imread(picture)[..., :3]
    inked = (pixels < 0.6).any(axis=-1)
    rows = np.flatnonzero(inked.any(axis=1))
    assert len(rows) > 1500, "tables, seven plots and four rollouts"
