"""Texts in turns of words that no model wrote, and run directories of such, for what shows them."""

import json
import math

from two_tokenizers import bridge_of, model_of, tokenizer_of

from switchkd.base.settings import to_dict
from switchkd.decoding.rollouts import Rollout
from switchkd.methods.policies import Switch
from switchkd.training.settings import TrainConfig

STUDENT, TEACHER = "coarse", "fine"
BRIDGE = bridge_of(STUDENT, TEACHER)
SIDES = BRIDGE.sides


def written_by(parts, sample_id=0, end=True):
    """A rollout in which student (0) and teacher (1) wrote these words in turn; the rule looked at the first token of each."""
    ids, others, speakers, seen = [], [], [], []
    for place, (who, text) in enumerate(parts):
        own = BRIDGE.student.spelling.encode(text.encode())
        ids, others = ids + own, others + BRIDGE.teacher.spelling.encode(text.encode())
        speakers += [who] * len(own)
        seen += [(place + 1) / 16] + [math.nan] * (len(own) - 1)
    if end:
        ids, others = [*ids, BRIDGE.student.end], [*others, BRIDGE.teacher.end]
        speakers, seen = [*speakers, 0], [*seen, 0.0]
    limits = [math.nan if math.isnan(value) else 0.5 for value in seen]
    return Rollout(
        sample_id, [5], ids, speakers, seen, limits, "eos" if end else "length",
        None if end else "cut", teacher_prompt_ids=[6], teacher_completion_ids=others,
    )  # fmt: skip


PARTS = [(0, "the"), (1, " cats"), (0, " sat"), (1, " naïve"), (0, " 東京")]
WORDS = ["the", " cats", " sat", " naïve", " 東京", "<|end|>"]


def save_models(folder):
    """Folders ``student`` and ``teacher`` with different tokenizers; returns ``folder``."""
    for seed, (role, name) in enumerate((("student", STUDENT), ("teacher", TEACHER))):
        model_of(name, seed=seed + 1).save_pretrained(folder / role)
        tokenizer_of(name).save_pretrained(folder / role)
    return folder


def run_of(models, folder, rollouts=(), samples=(), metrics=(), **changes):
    """A run of ``save_models`` that has no student yet."""
    folder.mkdir()
    names = {f"{role}_model_name_or_path": str(models / role) for role in ("student", "teacher")}
    settings = to_dict(TrainConfig(**{**names, "output_dir": str(folder), "policy": Switch(), **changes}))
    (folder / "config.yaml").write_text(json.dumps(settings))
    for file, records in (("rollouts", rollouts), ("samples", samples), ("metrics", metrics)):
        lines = [each if isinstance(each, dict) else {"step": 1, **each.to_json()} for each in records]
        if lines:
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
