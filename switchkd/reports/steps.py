"""The step metrics of a run, with what each is measured on: only what is measured alike may stand on one axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from switchkd.base.settings import plain_values
from switchkd.data.settings import DATE
from switchkd.evaluation.tasks import TASKS
from switchkd.methods.rules import NOUNS

SCORE = "eval/"
ELAPSED = "elapsed"  # the seconds of training until a step, evaluations left out
# How metrics begin that tell of text being written; the speed of it depends on the machine.
WRITING = ("switch/", "completions/", "decode/agreement", "decode/block_length", "decode/kept_per_block")
CROSS = "cross/"  # how metrics begin that tell what two tokenizers have in common
# Settings that a score depends on; those that make the text that is scored; those that make the teacher's part in it.
SCORED_BY = (
    "task", "eval_max_new_tokens", "eval_temperature", "eval_top_p", "eval_top_k", "eval_min_p", "eval_seeds", "eval_backend",
    "dtype",
)  # fmt: skip
TEXT_BY = ("eval_file", "eval_samples", "template", "max_prompt_length", "max_completion_length")
TEACHER_BY = ("teacher_model_name_or_path", "teacher_dtype")
# Settings that make the text that is trained on, which the loss and all that is seen while text is written depend on.
TRAINED_BY = ("train_file", "train_samples", "template", "max_prompt_length", "max_completion_length")
TEACHER = "teacher_sha256"
# Where results that are compared may differ: the teacher moves divergences alone, and days stand beside the numbers.
MAY_DIFFER = (TEACHER, DATE)


class Steps(list[dict[str, Any]]):
    """The lines of metrics.jsonl of the run ``name``, with its plain ``settings``.

    ``sha256`` are the checksums of text and models by the setting that names them, as far as they are known, and ``primary`` is
    the main score. Where ``steps_a_line`` is above 1, a line is the mean of so many steps, and evaluations have lines of their own.
    """

    def __init__(
        self,
        lines: Iterable[dict[str, Any]],
        settings: Mapping[str, Any],
        name: str = "",
        sha256: Mapping[str, str] | None = None,
        primary: str = "",
        steps_a_line: int = 1,
    ):
        super().__init__(lines)
        self.settings, self.name, self.sha256 = settings, name, sha256 or {}
        self.steps_a_line = steps_a_line
        self.primary = primary or self._likely_primary()

    def measured_on(self, metric: str) -> dict[str, Any]:
        """All that must be the same in two runs for their values of ``metric`` to be compared, by name."""
        if metric.startswith(SCORE):
            text = self._known("eval_file", TEXT_BY)
            teacher = self._known("teacher_model_name_or_path", TEACHER_BY) if is_to_teacher(metric) else {}
            return {name: self.settings.get(name) for name in SCORED_BY} | text | teacher
        if metric == "lm_loss":
            return self._known("lm_file", ["lm_file"])
        if metric != "loss" and not metric.startswith((*WRITING, CROSS)):
            return {}
        # A text of another day has another checksum, and is the same text.
        dated = self.settings.get(DATE)
        text = {n: self.settings.get(n) for n in TRAINED_BY} if dated else self._known("train_file", TRAINED_BY)
        teacher = self._known("teacher_model_name_or_path", TEACHER_BY)
        if metric.startswith(CROSS):
            return {"alignment": self.settings.get("alignment")} | text | teacher
        if is_policys(metric):
            return {"unit": self.unit} | text | teacher
        if metric == "loss":
            own = {"objective": settings_text(self.settings, "objective"), "loss_over": self.settings.get("loss_over")}
            return own | text | teacher
        return text

    def _known(self, name: str, by: Iterable[str]) -> dict[str, Any]:
        """What a setting's file or model is: its checksum, which stands for the first of ``by`` and the text that all make."""
        if name not in self.sha256:
            return {each: self.settings.get(each) for each in by}
        return {f"{name} sha256": self.sha256[name][:12]} | {
            each: self.settings.get(each) for each in by if "dtype" in each
        }

    @property
    def unit(self) -> str:
        """The unit of the policy's divergences and thresholds; a rule from elsewhere is named in its place."""
        given = self.settings["policy"]
        if given.get("divergence") == "tvd":
            return "probability"
        policy = shipped_rule(self.settings, "policy")
        return policy.unit if policy else f"unit of {given['name']}"

    @property
    def loss_unit(self) -> str:
        """The unit of the loss."""
        name = self.settings["objective"]["name"]
        if shipped_rule(self.settings, "objective") is None:
            return f"unit of {name}"
        return "probability per token" if name == "tvd" else "nats per token"

    def _likely_primary(self) -> str:
        """The main score of the task, or of the task that has such scores: ROUGE-L stands in the results of most."""
        own = TASKS.get(self.settings.get("task", ""))
        if own:
            return own.primary
        known = sorted({task.primary for task in TASKS.values()}, key=lambda score: (score == "rouge_l", score))
        return next((score for score in known if any(SCORE + score in line for line in self)), "")


def is_to_teacher(score: str) -> bool:
    """Whether a score is a divergence to the teacher, which is another number for another teacher."""
    return "forward_kl" in score


def is_policys(metric: str) -> bool:
    """Whether a metric is a divergence or threshold, in the unit of the policy that measured it."""
    return metric.startswith("switch/divergence") or metric == "switch/threshold"


def shipped_rule(settings: Mapping[str, Any], noun: str) -> Any:
    """The policy, objective or mix of plain settings with its defaults; None for one that does not ship with the package."""
    known = NOUNS[noun][1].get(settings[noun]["name"])
    return known and known()


def unlike(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What stands in the way of comparing numbers that were made with ``theirs`` with those made with ``ours``, in words.

    The one check for all that is drawn, printed or compared of several runs. Both are what the numbers depend on, by name: task,
    data and settings. The day may differ, and the teacher of an evaluation, which is looked at for the scores that it moves.
    """
    found = []
    for name in dict.fromkeys([*ours, *theirs]):
        own, other = ours.get(name, "not set"), theirs.get(name, "not set")
        if own == other or name in MAY_DIFFER:
            continue
        if name == "ids" and "not set" not in (own, other):
            missing, more = (len(set(map(str, x)) - set(map(str, y))) for x, y in ((own, other), (other, own)))
            what = f"{missing} are missing and {more} are new" if missing or more else "they are in another order"
            found.append(f"ids of {len(other)} examples, not the same {len(own)}: {what}")
        else:
            found.append(f"{name} is {other!r}, not {own!r}")
    return found


def differences(a: Steps, b: Steps, metric: str) -> list[str]:
    """What stands in the way of comparing a metric of ``b`` with that of ``a``, in words."""
    return unlike(a.measured_on(metric), b.measured_on(metric))


def alike(runs: Mapping[str, Iterable[Steps]], metric: str) -> list[dict[str, list[Steps]]]:
    """The runs by label, apart where a metric is not measured alike. Runs in which it never stands have no part."""
    groups: list[dict[str, list[Steps]]] = []
    for label, own in runs.items():
        for run in (run for run in own if any(metric in line for line in run)):
            same = (g for g in groups if not differences(next(iter(g.values()))[0], run, metric))
            group = next(same, None)
            if group is None:
                groups.append(group := {})
            group.setdefault(label, []).append(run)
    return groups


def settings_text(settings: Mapping[str, Any], noun: str) -> str:
    """The name of the policy, objective or mix in plain settings, with what is set otherwise than by default; of one that does
    not ship with the package, which is not imported, with all that is set."""
    known = NOUNS[noun][1].get(settings[noun]["name"])
    default = plain_values(dataclasses.asdict(known())) if known else {}
    own = {name: value for name, value in settings[noun].items() if name != "name"}
    given = ", ".join(f"{name}={value}" for name, value in own.items() if name not in default or value != default[name])
    return settings[noun]["name"] + (f" ({given})" if given else "")


# Who writes the next token, in words.
RULES = {
    "student_only": "The student writes every token.",
    "teacher_only": "The teacher writes every token.",
    "switch": "The teacher writes where the two models disagree more than a threshold that depends on the place in the text; the "
    "student writes everywhere else.",
    "adaswitch": "The student writes until the two models suddenly disagree far more than before; then the teacher goes on.",
    "mix_in": "Each token is drawn from a mixture of the two models.",
    "skd": "The student writes; a token that is not among the teacher's most likely ones is written by the teacher instead.",
    "ssd": "The teacher writes where the two models disagree more than a fixed threshold; the student writes everywhere else.",
    "hysteresis": "The teacher takes over where the two models disagree much, and hands back where they agree again.",
    "ca_opd": "The student writes; a token that the teacher finds too unlikely is written by the teacher instead.",
    "trb": "Each token is drawn from a blend of the two models, as close to the teacher as a limit allows.",
    "relay": "The student writes; where the teacher would stop to think again, it writes a few paragraphs.",
}


def rule_words(settings: Mapping[str, Any]) -> str:
    """Who writes the next token in a run of these settings, in a sentence; "" for a rule that does not ship with the package."""
    return RULES.get(settings["policy"]["name"], "")
