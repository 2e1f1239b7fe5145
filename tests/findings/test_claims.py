"""Claims judged on made-up runs whose answer is known by hand, and everything that a claim may not say."""

import dataclasses

import numpy as np
import pytest
import yaml

from switchkd.base.errors import ConfigError
from switchkd.base.settings import to_dict
from switchkd.evaluation.statistics import Estimate, t_interval
from switchkd.findings.claims import (
    CANNOT_TELL,
    HOLDS,
    NO_GAIN,
    NOT_JUDGED,
    NOT_RUN,
    OPPOSITE,
    changes,
    inside,
    judge,
    register,
    registered,
    seeds_to_tell,
    value_at,
    verdict_of,
)
from switchkd.findings.collected import FORMAT, Collected
from switchkd.findings.report import words
from switchkd.reports.steps import ELAPSED
from switchkd.studies.plan import Claim, Plan, Size, load_plan
from switchkd.training.settings import TrainConfig

ROWS = 12
LENGTHS = [10.0] * 4 + [50.0] * 4 + [200.0] * 4


def scored(student, ids="same"):
    """An evaluation of ``student``, a value a row, which all weigh alike."""
    return {
        "measured": 0 if ids == "same" else 1,
        "results": {
            "student after": {
                "model": {"sha256": "a"},
                "scores": {
                    "rouge_l": {"values": [[float(v) for v in student]], "weights": None},
                    "forward_kl": {"values": [[float(v) for v in student]], "weights": None},
                    "perplexity": {"values": [[1.0] * ROWS], "weights": LENGTHS},
                },
            }
        },
    }


def run(method, seed, rows, group="", ids="same", policy="switch", along=(), steps=None):
    """A run as its file has it; ``along`` are tokens and the score there, ``steps`` tokens and divergence."""
    steps = steps or [(1000, 0.1)]
    columns = {
        "step": list(range(1, len(steps) + 1)), "num_tokens": [t for t, _ in steps],
        ELAPSED: [t / 10 for t, _ in steps], "switch/divergence_mean": [d for _, d in steps],
    }  # fmt: skip
    evaluated = {
        "step": [100 + i for i in range(len(along))], "num_tokens": [t for t, _ in along],
        ELAPSED: [t / 10 for t, _ in along], "eval/rouge_l": [v for _, v in along], "eval/forward_kl": [v for _, v in along],
    }  # fmt: skip
    return {
        "name": "-".join(part for part in (group, method, f"seed{seed}") if part), "method": method, "group": group, "seed": seed,
        "settings": {"seed": seed, "policy": {"name": policy}}, "origin": {}, "cost": {"seconds": 1.0},
        "evaluations": {"": scored(np.broadcast_to(rows, ROWS), ids)}, "steps_a_line": 1, "steps": columns,
        "along": evaluated if along else {},
    }  # fmt: skip


def collected(*runs):
    settings = to_dict(TrainConfig(max_train_tokens=1000))
    task = {"name": "references", "version": 1, "primary": "rouge_l"}
    measured = [
        {"task": task, "data": {"file": f, "sha256": f, "ids": list(range(ROWS)), "groups": []}, "settings": {}}
        for f in ("a", "b")
    ]
    return Collected(
        {"format": FORMAT, "plan": {}, "claims": {}, "settings": settings, "measured": measured, "runs": list(runs)}
    )


def judged(claim, *runs, seeds=(0, 1, 2), groups=()):
    given = {"says": "so it is", "better": "a", **({} if "change" in claim else {"than": ["b"]}), **claim}
    made = Claim(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    plan = Plan("t", {"a": "kd", "b": "kd"}, claims={"c": made})
    size = Size(seeds=seeds, pairs={group: {} for group in groups})
    found = judge(plan, size, collected(*runs))
    return found, [words(each, plan.claims["c"], size) for each in found]


def pairs(firsts, seconds, **more):
    """Runs of both methods, a seed for each of these values of all rows."""
    values = {"a": firsts, "b": seconds}
    return [run(method, seed, v, **more) for method, own in values.items() for seed, v in enumerate(own)]


def at_end(firsts, seconds):
    """The same along the way: the score is 0 in the beginning and these at the end."""
    values = {"a": firsts, "b": seconds}
    return [
        run(method, seed, 0.0, along=[(100, 0.0), (1000, v)]) for method, own in values.items() for seed, v in enumerate(own)
    ]  # fmt: skip


# --- verdicts -----------------------------------------------------------------------------------------------------

# Student's t at 95 % with three runs is 4.303, so the interval of differences d is mean(d) ± 2.484 · std(d).
BASE = np.array([10.0, 20.0, 30.0])
ALONG = {
    "holds, the claimed size inside": ([1.9, 2.0, 2.1], 0.1, HOLDS, "is inside the interval"),
    "holds, less was claimed": ([1.9, 2.0, 2.1], 0.01, HOLDS, "The claimed +1% (+0.200) is less than that."),
    "holds, more was claimed": ([1.9, 2.0, 2.1], 0.5, HOLDS, "The claimed +50% (+10.0) is more than that."),
    "the opposite": ([-1.9, -2.0, -2.1], 0.1, OPPOSITE, "difference −2.00 [−2.25, −1.75], 3 seeds."),
    "no gain of that size": ([-0.1, 0.0, 0.1], 0.1, NO_GAIN, "0 is inside the interval, the claimed +10% (+2.00) is outside"),
    "cannot tell": ([1.0, 2.0, 3.0], 0.1, CANNOT_TELL, "About 7 seeds would tell."),
    "cannot tell, of no size": ([1.0, 2.0, 3.0], 0.0, CANNOT_TELL, "0 is inside the interval, and the claim names no size."),
}  # fmt: skip


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("what", ALONG)
def test_a_score_along_the_way_is_judged_by_student_s_t_over_pairs_of_seeds(what, lower):
    """The runs differ far more between seeds than the two methods do."""
    differences, expected, verdict, text = ALONG[what]
    score = "eval/forward_kl" if lower else "eval/rouge_l"
    turned = -1 if lower else 1
    [found], [said] = judged(
        {"score": score, "expected": expected}, *at_end(BASE + turned * np.array(differences), BASE)
    )
    assert found.verdict == verdict and found.seeds == (0, 1, 2)
    if not lower:
        assert text in said, said
    mean, half = turned * np.mean(differences), 4.302653 / 3**0.5 * np.std(differences, ddof=1)
    assert found.difference.mean == pytest.approx(mean)
    assert (found.difference.low, found.difference.high) == pytest.approx((mean - half, mean + half), abs=1e-5)
    assert found.lower is lower and f"claimed: {'lower' if lower else 'higher'}" in said


def test_the_runs_are_part_of_the_interval_of_row_scores():
    """All rows agree; the seeds do not: a gain of -4, 0 and 10 is none that three seeds could show."""
    [found], _ = judged({"expected": 0.1}, *pairs([16, 20, 40], [20, 20, 30]))
    assert found.verdict == CANNOT_TELL and found.difference.low < 0 < found.difference.high
    assert found.difference.std == pytest.approx(np.std([-4, 0, 10], ddof=1))


def test_row_scores_are_paired_by_row_and_by_seed():
    rows = np.arange(ROWS) * 5.0
    runs = [run(m, s, rows + 30 * s + (m == "a")) for m in "ab" for s in range(3)]
    [found], [said] = judged({"expected": 0.02, "source": "x"}, *runs)
    assert found.verdict == HOLDS and found.score == "rouge_l"
    assert (found.difference.low, found.difference.high) == pytest.approx((1.0, 1.0))
    assert found.means == pytest.approx((58.5, 57.5)) and found.claimed == pytest.approx(0.02 * 57.5)
    assert said.startswith(
        "rouge_l (claimed: higher): a 58.5, b 57.5; difference +1.00 [+1.00, +1.00], 3 seeds, 12 rows."
    )


def test_of_a_divergence_less_is_better():
    for firsts, seconds, verdict in (([1, 1, 1], [2, 2, 2], HOLDS), ([2, 2, 2], [1, 1, 1], OPPOSITE)):
        [found], [said] = judged({"score": "forward_kl", "expected": 0.5}, *pairs(firsts, seconds))
        assert (found.verdict, found.claimed) == (
            verdict,
            pytest.approx(-0.5 * seconds[0]),
        ) and "claimed: lower" in said


def test_a_line_for_each_method_and_group():
    runs = [*pairs([3, 3, 3], [2, 2, 2], group="near"), *pairs([1, 1, 1], [2, 2, 2], group="far")]
    found, _ = judged({}, *runs, groups=("near", "far"))
    assert [(each.group, each.verdict) for each in found] == [("near", HOLDS), ("far", OPPOSITE)]
    found, _ = judged({"groups": ["far"]}, *runs, groups=("near", "far"))
    assert [each.group for each in found] == ["far"]
    assert judged({"groups": ["far"]}, *runs)[0] == []  # a size without such groups


@pytest.mark.parametrize("ids", ["same", "others"])
def test_a_gain_that_is_larger_in_one_group_than_in_another(ids):
    """On the same rows all is paired; on others each group is resampled by itself."""
    rows = np.arange(ROWS) * 5.0
    far = [run(m, s, rows + 4 * (m == "a"), group="far") for m in "ab" for s in range(3)]
    near = [run(m, s, rows + 1 * (m == "a"), group="near", ids=ids) for m in "ab" for s in range(3)]
    [found], [said] = judged({"against": "near", "expected": 0.1}, *far, *near, groups=("near", "far"))
    assert (found.verdict, found.group, found.means) == (HOLDS, "far", pytest.approx((4.0, 1.0)))
    assert found.difference.mean == pytest.approx(3.0) and found.claimed == pytest.approx(2.75)
    assert "a less b +4.00 in far, +1.00 in near" in said and "and more so in far" in said
    [back], _ = judged({"groups": ["near"], "against": "far"}, *far, *near, groups=("near", "far"))
    assert back.verdict == OPPOSITE


def test_other_rows_are_no_pairs():
    """One method in two groups: equal scores on the same rows leave no doubt, on other rows they do."""
    rows = np.arange(ROWS) * 5.0
    widths = []
    for ids in ("same", "others"):
        runs = [
            run("a", s, rows, group=g, ids=ids if g == "near" else "same") for g in ("near", "far") for s in range(3)
        ]
        [found], _ = judged({"than": [], "against": "near"}, *runs, groups=("near", "far"))
        widths.append(found.difference.high - found.difference.low)
    assert widths[0] == pytest.approx(0) and widths[1] > 10


def test_short_and_long_rows_are_thirds_by_the_reference():
    gain = np.array([0.0] * 4 + [7.0] * 4 + [4.0] * 4)
    runs = [run(m, s, 20 + gain * (m == "a")) for m in "ab" for s in range(3)]
    for rows, mean in (("short", 0.0), ("long", 4.0)):
        [found], [said] = judged({"rows": rows}, *runs)
        assert found.difference.mean == pytest.approx(mean) and found.difference.examples == 4
        assert f"the {rows}est references" in said
    [found], [said] = judged({"rows": "long", "against_rows": "short"}, *runs)
    assert (found.verdict, found.means) == (HOLDS, pytest.approx((4.0, 0.0)))
    assert inside(np.array([1.0, 1, 1, 2, 3, 4, 4, 9]), "short").tolist() == [True] * 3 + [False] * 5
    assert inside(np.array([9.0, 1, 4, 2, 3, 4, 1, 1]), "long").tolist() == [
        True,
        False,
        True,
        False,
        False,
        True,
        False,
        False,
    ]


# --- along the way ------------------------------------------------------------------------------------------------


def test_a_score_between_two_evaluations_lies_on_the_line_between_them():
    [one] = collected(
        run("a", 0, 0.0, along=[(100, 1.0), (300, 5.0), (1040, 9.0)], steps=[(200, 0.5), (1040, 0.1)])
    ).runs
    assert [value_at(one, "eval/rouge_l", at) for at in (0.1, 0.2, 0.3)] == pytest.approx([1.0, 3.0, 5.0])
    assert value_at(one, "eval/rouge_l", 1.0) == pytest.approx(
        5 + 4 * 700 / 740
    )  # of the budget, which the last step exceeds
    assert value_at(one, "seconds", 0.1) == pytest.approx(10.0) and value_at(one, "seconds", 0.2) == pytest.approx(20.0)


def test_a_claim_is_measured_where_it_says():
    runs = [
        run(m, s, 0.0, along=[(100, v), (500, 10 - v), (1000, 10.0)])
        for m, v in (("a", 6.0), ("b", 2.0))
        for s in range(3)
    ]
    for at, verdict in ((0.1, HOLDS), (0.5, OPPOSITE)):
        [found], [said] = judged({"at": at}, *runs)
        assert found.verdict == verdict and f"after {at:.0%} of the tokens" in said
    [found], [said] = judged({"at": 0.05}, *runs)
    assert found.verdict == NOT_JUDGED and "a-seed0 was evaluated from 100 to 1,000 tokens, not at 50" in said


def test_a_metric_of_the_steps_is_the_mean_of_the_tenth_that_ends_there():
    steps = [(50, 9.0), (100, 7.0), (500, 5.0), (901, 2.0), (1000, 4.0)]
    one = collected(run("a", 0, 0.0, steps=steps)).runs[0]
    assert [value_at(one, "switch/divergence_mean", at) for at in (0.1, 0.5, 1.0)] == [8.0, 5.0, 3.0]
    runs = [run("a", s, 0.0, steps=steps) for s in range(2)]
    [found], [said] = judged({"score": "switch/divergence_mean", "change": "falls"}, *runs, seeds=(0, 1))
    assert (found.verdict, found.means) == (HOLDS, (3.0, 8.0))
    assert "(claimed: a fall): a 8.00 in the first 10% of the tokens, 3.00 in the last 10% of the tokens" in said
    [found], _ = judged({"score": "switch/divergence_mean", "change": "rises"}, *runs, seeds=(0, 1))
    assert found.verdict == OPPOSITE
    [found], [said] = judged({"score": "switch/divergence_mean", "change": "falls", "since": 0.3}, *runs, seeds=(0, 1))
    assert found.verdict == NOT_JUDGED and "a-seed0 has no step with switch/divergence_mean between 200 and 300" in said


def test_of_seconds_less_is_better_and_other_machines_are_told_of():
    runs = [run(m, s, 0.0, steps=[(1000, 0.0)]) for m in "ab" for s in range(2)]
    for one in runs[2:]:
        one["steps"][ELAPSED] = [150.0]
        one["origin"] = {"conditions": [{"device": "another"}]}
    [found], [said] = judged({"score": "seconds", "expected": 0.2}, *runs, seeds=(0, 1))
    assert (found.verdict, found.means) == (HOLDS, (100.0, 150.0)) and "not all on the same device" in said


def test_what_is_not_measured_alike_is_not_judged():
    runs = [run(m, s, 0.0, policy=p) for m, p in (("a", "switch"), ("b", "adaswitch")) for s in range(2)]
    [found], [said] = judged({"score": "switch/divergence_mean"}, *runs, seeds=(0, 1))
    assert found.verdict == NOT_JUDGED and "unit is" in said


# --- what is not there --------------------------------------------------------------------------------------------


def test_runs_that_are_not_done():
    runs = pairs([3, 3, 3], [2, 2, 2])
    [found], [said] = judged({}, *runs[:3])
    assert found.verdict == NOT_RUN and said == "Not done: b-seed0, b-seed1, b-seed2."
    [found], [said] = judged({}, *runs[:4])  # one pair
    assert found.verdict == NOT_RUN and found.seeds == (0,)
    [found], [said] = judged({}, *runs[:5])
    assert found.verdict == HOLDS and said.startswith("So far 2 of 3 seeds (not done: b-seed2). ")


def test_one_seed_is_not_judged():
    [found], [said] = judged({}, *pairs([3], [2]), seeds=(0,))
    assert found.verdict == NOT_JUDGED and "one training seed says nothing of others" in said


def test_a_score_that_is_not_there():
    [found], [said] = judged({"score": "rouge_9"}, *pairs([3, 3, 3], [2, 2, 2]))
    assert found.verdict == NOT_JUDGED and "a-seed0 has no score 'rouge_9'" in said
    [found], [said] = judged({"at": 0.5}, *pairs([3, 3, 3], [2, 2, 2]))
    assert found.verdict == NOT_JUDGED and "a-seed0 has no eval/rouge_l, which needs eval_steps" in said


def test_how_many_seeds_would_tell():
    assert seeds_to_tell(t_interval([1.0, 2.0, 3.0]), 3, 2.0) == 7  # 2 · 2.447 / √7 = 1.85, and of six 2.10
    assert seeds_to_tell(t_interval([1.0, 2.0, 3.0]), 3, 1e-3) is None
    wide = dataclasses.replace(t_interval([1.0, 2.0, 3.0]), low=-8.0, high=12.0)  # for its rows
    assert seeds_to_tell(wide, 3, 2.0) is None and seeds_to_tell(wide, 3, 25.0) == 4


def test_an_interval_that_ends_at_0_excludes_nothing():
    assert verdict_of(Estimate(1.0, None, 0.0, 2.0, 9), 1, None) == CANNOT_TELL
    assert verdict_of(Estimate(0.0, None, 0.0, 0.0, 9), 1, 1.0) == NO_GAIN
    assert verdict_of(Estimate(1.0, None, 0.0, 2.0, 9), 1, 2.0) == CANNOT_TELL


# --- what a claim may say -----------------------------------------------------------------------------------------

WRONG = {
    "no sentence": ({"says": " "}, "it needs `says`"),
    "no method": ({"better": ""}, "it needs `better`"),
    "an unknown method": ({"better": "swich"}, "no method 'swich'; did you mean 'switch'"),
    "an unknown method to compare": ({"than": ["k"]}, "no method 'k'"),
    "nothing to compare": ({"than": []}, "it needs `than`"),
    "itself": ({"than": ["switch"]}, "cannot be better than itself"),
    "a method twice": ({"than": ["kd", "kd"]}, "twice in `than`"),
    "an unknown group": ({"groups": ["nar"]}, "no group 'nar'; did you mean 'near'"),
    "a group twice": ({"groups": ["far", "far"]}, "twice in `groups`"),
    "an unknown group to hold against": ({"against": "x"}, "no group 'x'"),
    "a group against itself": ({"groups": ["far"], "against": "far"}, "compared with itself"),
    "an unknown task": ({"task": "gsm"}, "no task among the plan's evaluations 'gsm'"),
    "an unknown metric": ({"score": "switch/share"}, "no metric 'switch/share' of the training steps"),
    "no share": ({"expected": -0.1}, "expected is a share"),
    "an infinite share": ({"expected": float("inf")}, "expected is a share"),
    "at the very beginning": ({"at": 0.0}, "at is a share"),
    "after the end": ({"at": 1.1}, "at is a share"),
    "unknown rows": ({"rows": "log"}, "rows are all, short or long"),
    "rows against themselves": ({"rows": "long", "against_rows": "long"}, "against_rows are"),
    "rows along the way": ({"rows": "long", "at": 0.1}, "leave `rows` out"),
    "rows of a metric of the steps": ({"rows": "long", "score": "seconds"}, "leave `rows` out"),
    "a task along the way": ({"task": "references", "at": 0.1}, "leave `task` out"),
    "two things to hold against": ({"against": "far", "against_rows": "short"}, "not both"),
    "a change of two": ({"change": "falls"}, "of one method alone"),
    "an unknown change": ({"change": "up", "than": []}, "change is 'falls' or 'rises'"),
    "a change before its beginning": ({"change": "falls", "than": [], "since": 0.5, "at": 0.5}, "since is a share"),
    "an unknown name": ({"than_what": 1}, "unknown setting 'than_what'"),
    "another type": ({"at": "soon"}, "at"),
}  # fmt: skip


def plan_with(tmp_path, **claim):
    tree = {
        "methods": {"kd": "kd", "switch": "switch"},
        "sizes": {"s": {"pairs": {"near": {}, "far": {}}, "evaluations": {"references": {}}}},
        "claims": {"mine": {"says": "SWITCH > KD", "better": "switch", "than": ["kd"], **claim}},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(tree))
    return load_plan(str(tmp_path / "plan.yaml"))


@pytest.mark.parametrize("what", WRONG)
def test_a_claim_that_could_not_be_judged_is_refused(tmp_path, what):
    claim, message = WRONG[what]
    with pytest.raises(ConfigError, match=message) as error:
        plan_with(tmp_path, **claim)
    assert "claim mine" in str(error.value)


def test_claims_that_are_none(tmp_path):
    (tmp_path / "plan.yaml").write_text("{methods: {kd: kd}, sizes: {s: {}}, claims: [kd]}")
    with pytest.raises(ConfigError, match="claims are given by name"):
        load_plan(str(tmp_path / "plan.yaml"))


# --- claims as they were ------------------------------------------------------------------------------------------


def test_what_of_the_claims_is_new_since_the_study_began_is_told(tmp_path):
    st = tmp_path / "st"
    plan = plan_with(tmp_path, expected=0.05)
    register(plan, st)
    assert list(changes(plan, registered(st))) == []
    later = plan_with(tmp_path, expected=0.01)
    register(later, st)  # goes on
    told = dict(changes(later, registered(st)))
    assert told == {"mine": "changed after the study began (expected: 0.05 -> 0.01)"}
    renamed = dataclasses.replace(plan, claims={"other": plan.claims["mine"]})
    told = dict(changes(renamed, registered(st)))
    assert told == {"other": "added after the study began", "mine": "taken out after the study began: SWITCH > KD"}


def test_a_study_that_began_without_claims_has_registered_none(tmp_path):
    (tmp_path / "st" / "cells").mkdir(parents=True)
    (tmp_path / "st" / "cells" / "kd-seed0.yaml").write_text("{}")
    plan = plan_with(tmp_path)
    register(plan, tmp_path / "st")
    assert dict(changes(plan, registered(tmp_path / "st"))) == {"mine": "added after the study began"}
