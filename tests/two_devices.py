"""A run whose teacher is on a second device, as a whole or with its last layer and output layer: as on one device, or an error.

For a process of its own: ``python tests/two_devices.py FOLDER``.
"""

import contextlib
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from second_device import SECOND, SecondDevice, put_there
from tiny import toy_examples, toy_pair

from switchkd import AdaSwitch, StudentOnly, Switch
from switchkd.base.errors import ModelError
from switchkd.data.texts import collate
from switchkd.decoding.settings import DecodeSettings
from switchkd.evaluation.evaluate import evaluate
from switchkd.evaluation.samples import samples
from switchkd.evaluation.settings import EvalSettings
from switchkd.evaluation.tasks import TASKS
from switchkd.forward import head
from switchkd.methods.mixes import Generated, GroundTruth
from switchkd.methods.objectives import ForwardKL
from switchkd.runner import cache
from switchkd.teachers import said
from switchkd.teachers.states import TeacherCache
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer

CASES = {
    "switch": (Switch(tau_0=0.6, decay=0.05), Generated(1.0)),
    "adaswitch": (AdaSwitch(window=2, ratio=1.1), Generated(1.0)),
    "kd": (StudentOnly(), GroundTruth()),
}


def whole(model):
    put_there(model)


def halves(model):
    """As accelerate leaves a model that is spread over the devices of one process."""
    last, host = [model.model.layers[-1], model.lm_head], torch.device("cpu")
    for module in last:
        put_there(module)
        add_hook_to_module(module, AlignDevicesHook(SECOND, skip_keys=["past_key_values", "cache"]))
    add_hook_to_module(model.model.norm, AlignDevicesHook(host))
    add_hook_to_module(model, AlignDevicesHook(host, io_same_device=True, skip_keys=["past_key_values", "cache"]))


def run(folder, places):
    pair = toy_pair(dtype=torch.float32)
    other = toy_pair("gemma", dtype=torch.float32).teacher
    if places is not None:
        places(pair.teacher)
        whole(other)
        pair = dataclasses.replace(pair, teachers_stay=True)
    found = []
    for name, (policy, mix) in CASES.items():
        config = TrainConfig(
            policy=policy, mix=mix, objective=ForwardKL(), max_new_tokens=5, max_steps=1, per_device_train_batch_size=4,
            costs=(1e-3, 1e-5) * 3, output_dir=str(folder / name),
        )  # fmt: skip
        examples = toy_examples()
        if name != "kd":  # whose rows are all of one teacher
            examples = [dataclasses.replace(e, teacher="other" if e.id % 2 else "") for e in examples]
        mine = dataclasses.replace(pair, teachers={"other": other}, student=toy_pair(dtype=torch.float32).student)
        metrics, rollouts = Trainer(mine, examples, config, Accelerator(cpu=True)).train_step()
        found.append([metrics["loss"], metrics["grad_norm"], [r.completion_ids for r in rollouts]])
    examples = toy_examples(4)
    for model in (pair.student, pair.teacher):
        scores = evaluate(pair, model, examples, TASKS["references"], EvalSettings(4, own_text=True))
        found.append([*scores.means().values()])
    found.append(
        [sample["completion_ids"] for sample in samples(pair, examples, DecodeSettings(CASES["switch"][0], 5), None)]
    )
    kept = TeacherCache.build(pair, examples, folder / "cache", "top_k", top_k=3)
    found.append([[round(value, 4) for row in kept.top_k(at)[1].tolist() for value in row] for at in range(4)])
    return found


def _alone(_):
    return lambda self, rows: lambda piece, logq: (self.head.log_probs(self.head(self.hidden[rows])[piece]), logq)


# What is put in another's place, and what.
MISTAKES = {
    "what the teacher says stays where it is": (said.TeacherStates, "at", _alone),
    "rows of the cache are looked up on one device": (cache.Places, "on", lambda _: lambda self, device: self),
    "states stay where they entered the output layer": (
        head.Scorer,
        "hidden",
        lambda _: lambda self, rows: head.response_hidden(self.model, collate(rows).to(self.model.device)),
    ),
}


def near(one, two):
    if isinstance(one, list):
        return len(one) == len(two) and all(map(near, one, two))
    return one == two or abs(one - two) < 1e-4 * abs(one) + 1e-5 or (one != one and two != two)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with contextlib.suppress(OSError):
        folder.mkdir()
    expected = run(folder / "one", None)
    with SecondDevice():
        for places in (whole, halves):
            found = run(folder / places.__name__, places)
            assert near(expected, found), (places.__name__, expected, found)
        for mistake, (place, name, change) in MISTAKES.items():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(place, name, change(getattr(place, name)))
                with pytest.raises((RuntimeError, ModelError), match="on two devices"):
                    run(folder / mistake, halves)
