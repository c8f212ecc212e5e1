"""Rules of token credit against float64 references written from their papers, a loop at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest

from megatron_rest.algorithms import JudgedRollouts, find_estimator
from megatron_rest.config import AdvantageConfig, ConfigError, WeightingConfig, WeightSource, load
from megatron_rest.credit_traits import BUILT_IN, STATISTICS, Scope, traits_of
from megatron_rest.types import TokenRegion
from megatron_rest.weighting import Credit, CreditRule, CreditTraits, Normalisation, RestWeighting, find_credit
from tests.weighting.steps import Step, random_step

References = dict[str, Callable[[Step], list[np.ndarray]]]
OTHERS = sorted(name for name in BUILT_IN if name not in list(WeightSource))


def rule_of(source: str, **options: object) -> CreditRule:
    return find_credit(WeightingConfig(source=source, options=dict(options)))


def given(step: Step, rule: CreditRule) -> list[np.ndarray]:
    """Weights or advantages of each rollout."""
    credit = rule.credit(step.rows(needs=rule.traits.needs)).check(step.rows(), rule.traits, "test")
    value = credit.weights if credit.advantages is None else credit.advantages
    assert value is not None and (credit.weights is None or credit.advantages is None)
    return np.split(value, np.cumsum([int(s.loss_mask.sum()) for s in step.samples])[:-1])


def turns_of(step: Step, i: int) -> list[list[int]]:
    """Places of the loss tokens of each turn of a rollout."""
    tokens = np.flatnonzero(step.samples[i].loss_mask).tolist()
    turns: list[list[int]] = []
    for number, token in enumerate(tokens):
        if number and token == tokens[number - 1] + 1:
            turns[-1].append(number)
        else:
            turns.append([number])
    return turns


def siblings(step: Step, i: int) -> list[int]:
    return [k for k, s in enumerate(step.samples) if s.group_id == step.samples[i].group_id]


def entropy_mask(step: Step) -> list[np.ndarray]:
    every = sorted((float(h) for hs in step.by_rollout("entropy") for h in hs), reverse=True)
    threshold = every[math.ceil(0.2 * len(every) - 1e-9) - 1]
    return [np.array([1.0 if h >= threshold else 0.0 for h in hs]) for hs in step.by_rollout("entropy")]


def hicra(step: Step) -> list[np.ndarray]:
    out = []
    for s in step.samples:
        regions = s.region_ids[s.loss_mask]
        out.append(np.array([s.advantage + (0.2 * abs(s.advantage) if r == 2 else 0.0) for r in regions]))
    return out


def egpo(step: Step) -> list[np.ndarray]:
    out = []
    for s, entropies in zip(step.samples, step.by_rollout("entropy"), strict=True):
        thought = [float(h) for h, r in zip(entropies, s.region_ids[s.loss_mask], strict=True) if r == 2]
        mean = sum(thought) / len(thought) if thought else 0.0
        bonus = 0.4 * min(max(mean, -abs(s.advantage) / 2), abs(s.advantage) / 2)
        out.append(np.full(len(entropies), s.advantage + bonus))
    return out


def message_penalty(step: Step) -> list[np.ndarray]:
    out = []
    for s in step.samples:
        assert s.marks is not None
        out.append(np.array([-5.0 if m else s.advantage for m in s.marks[s.loss_mask]]))
    return out


def mean_entropies(step: Step, i: int) -> list[float]:
    entropies = step.by_rollout("entropy")[i]
    return [sum(float(entropies[t]) for t in turn) / len(turn) for turn in turns_of(step, i)]


def aem(step: Step) -> list[np.ndarray]:
    out = []
    for i, s in enumerate(step.samples):
        group = [h for k in siblings(step, i) for h in mean_entropies(step, k)]
        least, most = min(group), max(group)
        mean = sum(math.exp(-(h - least) / (most - least)) for h in group) / len(group)
        advantages = np.zeros(int(s.loss_mask.sum()))
        for turn, h in zip(turns_of(step, i), mean_entropies(step, i), strict=True):
            alpha = 1.0 if most - least < 0.1 else math.exp(-(h - least) / (most - least)) / mean
            advantages[turn] = alpha * s.advantage
        out.append(advantages)
    return out


def empg(step: Step) -> list[np.ndarray]:
    means = [mean_entropies(step, i) for i in range(len(step.samples))]
    every = [h for hs in means for h in hs]
    scaled = [[(h - min(every)) / (max(every) - min(every) + 1e-8) for h in hs] for hs in means]
    mean = sum(math.exp(-h) for hs in scaled for h in hs) / len(every)
    moved = []
    for s, hs in zip(step.samples, scaled, strict=True):
        bonus = [0.1 * math.exp(-h) for h in hs[1:]] + [0.0]
        moved.append([s.advantage * math.exp(-h) / (mean + 1e-8) + b for h, b in zip(hs, bonus, strict=False)])
    centre = sum(a for turns in moved for a in turns) / len(every)
    out = []
    for i, s in enumerate(step.samples):
        advantages = np.zeros(int(s.loss_mask.sum()))
        for turn, a in zip(turns_of(step, i), moved[i], strict=True):
            advantages[turn] = a - centre
        out.append(advantages)
    return out


def gtpo(step: Step) -> list[np.ndarray]:
    entropy = step.by_rollout("entropy")
    out = [np.zeros(len(hs)) for hs in entropy]
    for group in sorted({s.group_id for s in step.samples}):
        mine = [i for i, s in enumerate(step.samples) if s.group_id == group]
        for sign in (1, -1):
            side = [i for i in mine if step.samples[i].advantage * sign > 0]
            shaped: dict[tuple[int, int], float] = {}
            for i in side:
                for t, h in enumerate(entropy[i]):
                    there = [k for k in side if len(entropy[k]) > t]
                    share = [float(entropy[k][t]) if sign > 0 else 1.0 / float(entropy[k][t]) for k in there]
                    own = float(h) if sign > 0 else 1.0 / float(h)
                    shaped[i, t] = sign * (0.9 + 0.1 * own / sum(share) * len(there))
            if not shaped:
                continue
            mean = sum(shaped.values()) / len(shaped)
            deviation = math.sqrt(sum((r - mean) ** 2 for r in shaped.values()) / len(shaped))
            for (i, t), r in shaped.items():
                out[i][t] = (r - mean) / (deviation + 1e-8)
    return out


def earned(step: Step, i: int) -> list[float]:
    """Rewards of a rollout by token; what was not said of single ones lies on the last."""
    s = step.samples[i]
    said = [] if s.token_rewards is None else s.token_rewards[s.loss_mask].tolist()
    values = [0.0 if math.isnan(v) else v for v in said] or [0.0] * int(s.loss_mask.sum())
    if values:
        values[-1] += step.rewards[i] - sum(values)
    return values


def normalised(values: list[float]) -> list[float]:
    """As GRPO does it."""
    if len(values) == 1:
        return [values[0] / (1 + 1e-6)]
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return [0.0 if max(values) == min(values) else (v - mean) / (deviation + 1e-6) for v in values]


def process(step: Step) -> list[np.ndarray]:
    out = [np.zeros(int(s.loss_mask.sum())) for s in step.samples]
    for group in sorted({s.group_id for s in step.samples}):
        mine = [i for i, s in enumerate(step.samples) if s.group_id == group and len(out[i])]
        steps = []
        for i in mine:
            said = step.samples[i].token_rewards
            told = [False] * len(out[i]) if said is None else (~np.isnan(said[step.samples[i].loss_mask])).tolist()
            told[-1] = True  # some answer of each of these groups earned something as a whole
            steps += [(i, t) for t, is_told in enumerate(told) if is_told]
        for (i, t), value in zip(steps, normalised([earned(step, i)[t] for i, t in steps]), strict=True):
            out[i][: t + 1] += value
    return out


def matchtir(step: Step) -> list[np.ndarray]:
    to_go: dict[tuple[int, int, int], float] = {}
    for i, s in enumerate(step.samples):
        later = 0.0
        for j, turn in reversed(list(enumerate(turns_of(step, i)))):
            later = sum(earned(step, i)[t] for t in turn) + 0.9 * later
            to_go[s.group_id, j, i] = later
    out = [np.zeros(int(s.loss_mask.sum())) for s in step.samples]
    for group, j in sorted({key[:2] for key in to_go}):
        there = [key for key in to_go if key[:2] == (group, j)]
        for (_, _, i), value in zip(there, normalised([to_go[key] for key in there]), strict=True):
            out[i][turns_of(step, i)[j]] = (step.samples[i].advantage + value) / 2
    return out


def reward_to_go(step: Step) -> list[np.ndarray]:
    to_go = [[sum(earned(step, i)[t:]) for t in range(len(earned(step, i)))] for i in range(len(step.samples))]
    every = [g for gs in to_go for g in gs]
    mean = sum(every) / len(every)
    variance = sum((g - mean) ** 2 for g in every) / (len(every) - 1)
    return [np.array([(g - mean) / math.sqrt(variance + 1e-8) for g in gs]) for gs in to_go]


def otb(step: Step, *, own_tokens: bool = False) -> list[np.ndarray]:
    log_probs, sum_p2 = step.by_rollout("log_probs"), step.by_rollout("sum_p2")
    places, energy = [], []
    for i, s in enumerate(step.samples):
        tokens = np.flatnonzero(s.loss_mask)
        places.append(list(range(len(tokens))) if own_tokens else [int(t - tokens[0]) for t in tokens])
        total, mine = 0.0, []
        for lp, p2 in zip(log_probs[i], sum_p2[i], strict=True):
            total += max(1.0 - 2.0 * math.exp(lp) + p2, 0.0)
            mine.append(total)
        energy.append(mine)
    out = []
    for i in range(len(step.samples)):
        members = [k for k in siblings(step, i) if places[k]]
        advantages = np.zeros(len(places[i]))
        for number, t in enumerate(places[i]):
            there = [(k, places[k].index(t)) for k in members if t in places[k]]
            weights = [energy[k][n] for k, n in there]
            baseline = sum(w * sum(earned(step, k)[n:]) for w, (k, n) in zip(weights, there, strict=True))
            baseline = 0.0 if len(there) == 1 else baseline / (sum(weights) + 1e-8)
            advantages[number] = sum(earned(step, i)[number:]) - baseline
        out.append(advantages)
    return out


REFERENCES: References = {
    "entropy_mask": entropy_mask,
    "hicra": hicra,
    "egpo": egpo,
    "message_penalty": message_penalty,
    "aem": aem,
    "empg": empg,
    "gtpo": gtpo,
    "otb": otb,
    "otb_turns": lambda step: otb(step, own_tokens=True),
    "process": process,
    "matchtir": matchtir,
    "reward_to_go": reward_to_go,
}


@pytest.mark.parametrize("source", OTHERS)
@pytest.mark.parametrize("seed", range(4))
def test_a_rule_is_what_its_paper_says(source, seed):
    step = random_step(seed)
    want, got = REFERENCES[source](step), given(step, rule_of(source))
    for expected, found in zip(want, got, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert max(np.ptp(found) for found in got if len(found)) > 0 or source == "egpo", "not uniform"


def test_process_supervision_of_whole_answers_is_grpo():
    """A reward that says nothing of single tokens: its advantages; one that is left of its group: none."""
    step = random_step(6, groups=4)
    advantages = find_estimator(AdvantageConfig())(
        JudgedRollouts(rewards=np.array(step.rewards), groups=np.repeat(np.arange(4), 4), parts={})
    )
    samples = [replace(s, token_rewards=None, advantage=a) for s, a in zip(step.samples, advantages, strict=True)]
    whole = Step(samples, step.rewards, step.scores)
    for i, found in enumerate(given(whole, rule_of("process"))):
        group = np.arange(i // 4 * 4, i // 4 * 4 + 4)
        if all(len(np.flatnonzero(samples[k].loss_mask)) for k in group):
            np.testing.assert_allclose(found, advantages[i], rtol=1e-14, atol=0)
    assert any(a == 0 for a in advantages[4:8]) and not np.any(given(whole, rule_of("process"))[4])
    nothing = np.zeros_like(samples[0].loss_mask)
    alone = [s if i == 0 else replace(s, loss_mask=nothing[:1].repeat(len(s.loss_mask))) for i, s in enumerate(samples)]
    for source in ("process", "matchtir"):
        assert not np.any(given(Step(alone, step.rewards, {}), rule_of(source))[0]), "nobody to be compared with"


@pytest.mark.parametrize("source", list(BUILT_IN))
def test_a_step_without_loss_has_no_credit(source):
    step = random_step(8)
    samples = [replace(s, loss_mask=np.zeros_like(s.loss_mask)) for s in step.samples]
    none = Step(samples, step.rewards, {name: np.zeros(0) for name in step.scores})
    assert [len(found) for found in given(none, rule_of(source))] == [0] * len(samples)


@pytest.mark.parametrize("source", ["otb", "otb_turns"])
def test_without_token_rewards_otb_takes_the_rollouts(source):
    step = random_step(7)
    whole = Step([replace(s, token_rewards=None) for s in step.samples], step.rewards, step.scores)
    one, other = given(whole, rule_of(source)), given(step, rule_of(source))
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    for i, (advantages, want) in enumerate(zip(one, REFERENCES[source](whole), strict=True)):
        np.testing.assert_allclose(advantages, want, rtol=1e-9, atol=1e-9, err_msg=str(i))


@pytest.mark.parametrize("source", [s for s in BUILT_IN if traits_of(s).scope is not Scope.STEP])
@pytest.mark.parametrize("kept", [1, 3])
def test_credit_depends_on_no_more_than_its_scope(source, kept):
    """Alone, or beside others in another order: the same to 1e-14 (measured: bit for bit)."""
    step, rule = random_step(5), rule_of(source)
    scope, needs = rule.traits.scope, rule.traits.needs
    whole = given(step, rule)
    groups = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    parts = groups if scope is Scope.GROUP else [[i] for i in range(12)]
    parts = [[i for part in parts[::-1][k : k + kept] for i in part] for k in range(0, len(parts), kept)]
    for part in parts:
        credit = rule.credit(step.rows(part, needs=needs))
        value = credit.weights if credit.advantages is None else credit.advantages
        expected = np.concatenate([whole[i] for i in part])
        assert value is not None
        np.testing.assert_allclose(value, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("source", list(BUILT_IN))
def test_a_rule_uses_what_it_declares(source):
    step, rule = random_step(2), rule_of(source)
    assert traits_of(source) == rule.traits or source == "otb_turns"
    full = step.rows(needs=frozenset(STATISTICS) - {"ref_log_probs"})  # token rewards are in both
    for kind in ("weights", "advantages"):
        few, many = (getattr(rule.credit(rows), kind) for rows in (step.rows(needs=rule.traits.needs), full))
        assert (few is None) == (many is None)
        if few is not None:
            np.testing.assert_array_equal(few, many)
    if not rule.traits.moves_zero:
        zero = [i for i, s in enumerate(step.samples) if s.advantage == 0]
        advantages = rule.credit(step.rows(needs=rule.traits.needs)).advantages
        if advantages is not None:
            assert (advantages[np.isin(step.rows().sequence, zero)] == 0).all(), "moves_zero is not declared"


def test_directions():
    """What docs/algorithm.md says: who gains where the entropy is high."""
    step = random_step(3, groups=6, size=6)
    rows = step.rows()
    entropy = step.scores["entropy"]

    def slope(source: str) -> float:
        """Of |advantage| times weight over entropy, within successes."""
        rule = rule_of(source)
        credit = rule.credit(step.rows(needs=rule.traits.needs))
        advantages = rows.advantages[rows.sequence] if credit.advantages is None else credit.advantages
        pull = advantages * (1.0 if credit.weights is None else credit.weights)
        mine = rows.advantages[rows.sequence] > 0
        relative = pull[mine] / rows.advantages[rows.sequence][mine]
        return float(np.corrcoef(entropy[mine], relative)[0, 1])

    assert slope("entropy_mask") > 0.3
    assert slope("gtpo") > 0.05
    assert slope("aem") < -0.05
    assert slope("empg") < -0.01


@pytest.mark.parametrize("source", list(WeightSource))
def test_sources_of_rest_are_what_they_were(source):
    """Rows of a rollout at a time, and all together: the weights that packed() gives, bit for bit."""
    step = random_step(1)
    config = load(overrides=[f"weighting.source={source}"]).weighting
    rule, old = find_credit(config), RestWeighting.from_config(config)
    if rule.traits.follows:
        sums = np.array([0, 3.0, 8.0, 0.4, 2.0, 9.0]), np.array([0, 10.0, 12.0, 3.0, 5.0, 7.0])
        assert isinstance(rule, RestWeighting)
        rule.update(*sums)
        old.update(*sums)
    regions = np.concatenate([s.region_ids for s in step.samples]).astype(np.int64)
    owner = np.repeat(np.arange(len(step.samples)), [len(s.token_ids) for s in step.samples])
    mask = np.concatenate([s.loss_mask for s in step.samples])
    want = old.packed(regions, owner, progress=0.3, loss_mask=mask)[mask]
    got = rule.credit(step.rows()).check(step.rows(), rule.traits, "test").weights
    assert got is not None
    np.testing.assert_array_equal(got.astype(np.float32), want)


def test_rows_know_turns_and_places():
    step = random_step(4)
    rows = step.rows()
    for i, s in enumerate(step.samples):
        mine = rows.sequence == i
        tokens = np.flatnonzero(s.loss_mask)
        assert rows.place[mine].tolist() == (tokens - tokens[0]).tolist() if len(tokens) else not mine.any()
        assert rows.index[mine].tolist() == list(range(len(tokens)))
        assert [len(t) for t in turns_of(step, i)] == np.bincount(rows.turn[mine]).tolist()
        assert (rows.regions[mine] == s.region_ids[s.loss_mask]).all()
    numbers, owners = rows.turns
    assert len(owners) == sum(len(turns_of(step, i)) for i in range(len(step.samples)))
    assert (owners[numbers] == rows.sequence).all()


@dataclass(frozen=True)
class Wrong(CreditRule):
    """What a rule must not give, by name."""

    what: str
    traits = CreditTraits(normalisation=Normalisation.ROLLOUT)

    def credit(self, rows):
        ones = np.ones(len(rows.sequence))
        return {
            "short": Credit(weights=ones[1:]),
            "list": Credit(weights=ones.tolist()),
            "nan": Credit(advantages=ones * np.nan),
            "negative": Credit(weights=-ones),
            "unnormalised": Credit(weights=2 * ones),
        }[self.what]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("short", "expected numpy"),
        ("list", "of list, expected numpy"),
        ("nan", "not finite: nan at row 0"),
        ("negative", "negative weight"),
        ("unnormalised", "mean 1 in each rollout, and one has 2"),
    ],
)
def test_what_a_rule_must_not_give(what, message):
    rows = random_step(0).rows()
    rule = Wrong(what)
    with pytest.raises(ValueError, match=message):
        rule.credit(rows).check(rows, rule.traits, "weighting.source=mine")


HERE = "tests.weighting.test_credit"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("otbb", {}, "did you mean otb"),
        ("mine", {}, "your own is package.module:attribute"),
        ("a b:c", {}, "expected package.module:attribute"),
        ("constant", {"alpha": 1}, "takes its numbers from the keys of the weighting section"),
        ("hicra", {"alpha": 1.5}, "from 1 on signs change"),
        ("hicra", {"beta": 1}, "takes .*alpha"),
        ("hicra", {"regions": ["thought"]}, "expected some of format, think"),
        ("egpo", {"strength": 3.0}, "signs change"),
        ("entropy_mask", {"share": 0}, r"in \(0, 1\]"),
        ("gtpo", {"share": 0}, "share 0"),
        ("message_penalty", {"calls": None, "thought": None}, "one at least"),
        ("message_penalty", {"calls": 1.0}, "expected numbers <= 0"),
        ("otb", {"tail": "none"}, "reward or zero"),
        ("aem", {"least_range": 0}, "least_range 0"),
        ("matchtir", {"discount": 1.5}, "discount 1.5"),
        (f"{HERE}:nothing", {}, "defines no nothing"),
        (f"{HERE}:HERE", {}, "expected a class or a factory"),
        (f"{HERE}:Wrong", {}, "takes .*what"),
        (f"{HERE}:random_step", {}, "derives from"),
    ],
)
def test_names_and_options_that_cannot_be(source, options, message):
    with pytest.raises(ConfigError, match=message):
        rule_of(source, **options)


def test_a_rule_of_ones_own_by_name():
    assert rule_of(f"{HERE}:Wrong", what="nan") == Wrong("nan")


def test_regions_have_the_numbers_that_the_references_use():
    assert TokenRegion.THINK == 2
