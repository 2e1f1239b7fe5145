"""Run directories that no run wrote, in any state, for what reads them."""

import json

import numpy as np
import yaml
from tiny import byte_level_tokenizer, save_llama

from switchkd.base.settings import to_dict
from switchkd.evaluation.results import Completion, Evaluation, Question, write_results
from switchkd.evaluation.statistics import Values
from switchkd.methods.policies import Switch
from switchkd.training.settings import TrainConfig

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!--&amp;"
TOKENIZER = byte_level_tokenizer()


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def rollout(step, text, prompt="What is 2 and 2?", sample_id=0):
    tokens = ids(text)
    count = len(tokens)
    return {
        "step": step, "sample_id": sample_id, "prompt_ids": ids(prompt), "completion_ids": tokens,
        "speakers": [t % 2 for t in range(count)], "divergences": [0.5] * count, "thresholds": [None] + [0.25] * (count - 1),
        "stop_reason": "eos", "error": None, "teacher_prompt_ids": None, "teacher": "",
    }  # fmt: skip


def sample(step, text, **changes):
    record = rollout(step, text, **changes)
    count = len(record["completion_ids"])
    best = [[[token, -0.1] for token in (5, 6, 7, 8, 9)]] * count
    own = {"log_probs": [[-1.0] * count, [-2.0] * count], "top": [best, best], "jsd": [0.5] * count}
    return record | own | {"scores": {"strict": 100.0}, "reference": "It is 4."}


def metric(step, **changes):
    return {
        "step": step,
        "loss": 2.0 / step,
        "num_tokens": 10 * step,
        "seconds": 1.0,
        "seconds/generate": 0.5,
        **changes,
    }


def run(folder, metrics=(), samples=(), rollouts=(), scores=None, answers=None, **settings):
    """A run directory, as far as it came. ``answers`` are texts by model, one for each of its ``scores``."""
    folder.mkdir(parents=True)
    teacher = save_llama(folder.parent / "teacher", TOKENIZER, 1)
    config = TrainConfig(teacher_model_name_or_path=teacher, output_dir=str(folder), policy=Switch(), **settings)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    for name, records in (("metrics", metrics), ("samples", samples), ("rollouts", rollouts)):
        if records:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if scores:
        arrays = {name: np.array([values]) for name, values in scores.items()}
        texts = {name: list(enumerate((answers or {}).get(name, ()))) for name in arrays}
        questions = [Question(f"Question {i}?", (f"Reference {i}.",)) for i in range(len(next(iter(scores.values()))))]
        results = {
            name: Evaluation(
                {"strict": Values(values, 1.0 * np.isfinite(values[0]))},
                "strict",
                model={"sha256": name},
                completions=[Completion(i, None, text, len(text.split()), "eos") for i, text in texts[name]],
                questions=questions if answers else (),
            )
            for name, values in arrays.items()
        }
        data = {"file": "sums.jsonl", "sha256": "d", "ids": list(range(len(questions))), "groups": []}
        task = {"name": "sums", "version": 1, "primary": "strict"}
        write_results(folder / "evaluation.json", task, data, {}, results)
    return folder
