"""A contract for every recipe: which tokens it trains on and who wrote them, which loss reaches them, what its knobs move.

What a recipe says is not what is checked: rows, speakers, calls of the teacher and losses are taken from a run on a toy pair.
``trajectories.json`` freezes twenty steps of each; ``python tests/methods/test_methods.py`` writes it anew.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, toy_examples, toy_pair

from switchkd.base.settings import shipped
from switchkd.data.texts import collate
from switchkd.decoding.settings import DecodeSettings
from switchkd.forward.head import Head, response_hidden
from switchkd.methods.divergences import log_probs
from switchkd.methods.policy import REFERENCE, STUDENT, TEACHER, TeacherOnly
from switchkd.methods.relay import Relay
from switchkd.training.loss import response_tokens
from switchkd.training.settings import TrainConfig, load_recipe
from switchkd.training.trainer import Trainer
from switchkd.writing.teacher_texts import teacher_texts

TRAJECTORIES = Path(__file__).with_name("trajectories.json")
S, T, R = {STUDENT}, {TEACHER}, {REFERENCE}


@dataclass(frozen=True)
class Contract:
    """Sources of a run's steps, who wrote the tokens trained on, whether training reads a teacher, and what knobs move.

    A knob is a change to a rule; ``text`` knobs move the text and not the loss of a given text, ``loss`` knobs the reverse.
    """

    sources: set
    speakers: set
    teacher: bool = True
    text: dict = field(default_factory=dict)
    loss: dict = field(default_factory=dict)


SKEW = {"objective": {"alpha": 0.3}}
COIN = {"mix": {"lmbda": 0.9}}
# Toy distributions are far apart and texts short: knobs are turned to where a handful of tokens notice.
CONTRACTS = {
    "sft": Contract({"examples"}, R, teacher=False),
    "kd": Contract({"examples"}, R, loss={"objective": {"temperature": 2.0}}),
    "seqkd": Contract({"examples"}, T, teacher=False),
    "imitkd": Contract({"examples", "policy"}, S | R, text=COIN, loss={"objective": {"ce_weight": 0.5}}),
    "gkd": Contract({"examples", "policy"}, S | R, text=COIN, loss={"objective": {"beta": 0.2}}),
    "on_policy": Contract({"policy"}, S, loss={"objective": {"temperature": 2.0}}),
    "minillm": Contract({"policy"}, S | T, loss={"objective": {"length_normalised": False}}),
    "distillm": Contract({"examples", "policy", "replay"}, S | R, loss=SKEW),
    "distillm2": Contract({"pairs"}, S | T, loss={"objective": {"beta": 0.5}}),
    "skd": Contract({"policy"}, S | T, text={"policy": {"top_k": 1}}, loss={"objective": {"teacher_weight": 0.5}}),
    "ssd": Contract({"policy"}, S | T, text={"policy": {"tau": 0.6}}, loss={"objective": {"student_weight": 0.5}}),
    "ca_opd": Contract({"policy"}, S | T, text={"policy": {"alpha": 0.01}}, loss={"objective": {"divergence": "jsd"}}),
    "trb": Contract({"policy"}, S | T, text={"policy": {"budget": 0.01}}, loss={"objective": {"temperature": 2.0}}),
    "relay": Contract({"policy"}, S | T, text={"policy": {"leg_tokens": 1}}, loss={"objective": {"temperature": 2.0}}),
    "hysteresis": Contract(
        {"policy"}, S | T, text={"policy": {"take": 0.65, "give": 0.6}}, loss={"objective": {"temperature": 2.0}}
    ),
    "fast_opd": Contract({"policy"}, S, loss={"objective": {"temperature": 2.0}}),
    "opd": Contract({"policy"}, S, loss={"objective": {"temperature": 2.0}}),
    "veto": Contract({"policy"}, S, loss={"objective": {"beta": 0.1}}),
    "taid": Contract({"examples"}, R, loss={"objective": {"s": 0.7}}),
    "akl": Contract({"examples"}, R, loss={"objective": {"head_mass": 0.9}}),
    "adaswitch": Contract({"policy"}, S | T, text={"policy": {"ratio": 0.5}}, loss={"objective": {"temperature": 2.0}}),
    "switch": Contract({"examples", "policy"}, S | T | R, text={"policy": {"tau_0": 0.2}}, loss=SKEW),
    "switch_linear": Contract({"examples", "policy"}, S | T | R, text={"policy": {"tau_0": 0.2}}, loss=SKEW),
    "switch_growth": Contract({"examples", "policy"}, S | T | R, text={"policy": {"decay": 3.0}}, loss=SKEW),
    "switch_constant": Contract({"examples", "policy"}, S | T | R, text={"policy": {"tau_0": 0.9}}, loss=SKEW),
    "switch_mix_in": Contract({"examples", "policy"}, S | T | R, text={"policy": {"alpha": 0.8}}, loss=SKEW),
    "switch_random": Contract({"examples", "policy"}, S | T | R, text={"policy": {"alpha": 0.05}}, loss=SKEW),
    # Here with one tokenizer; with two, tests/training/test_across.py.
    "cross_kd": Contract({"examples"}, R, loss={"objective": {"temperature": 2.0}}),
    "cross_on_policy": Contract({"policy"}, S, loss={"objective": {"temperature": 2.0}}),
    "cross_switch": Contract({"examples", "policy"}, S | T | R, text={"policy": {"tau_0": 0.2}}, loss=SKEW),
    "cross_adaswitch": Contract(
        {"policy"}, S | T, text={"policy": {"ratio": 0.5}}, loss={"objective": {"temperature": 2.0}}
    ),
}
# What the size of the toys asks for; everything else is the recipe's.
SIZES = {
    "relay": {"policy": {"trigger_ids": tuple(range(2, 12)), "blank_ids": tuple(range(12, 18)), "student_top": 3}},
    "adaswitch": {"policy": {"window": 2, "ratio": 1.1}},
    "switch": {"policy": {"decay": 0.3}},
    "cross_adaswitch": {"policy": {"window": 2, "ratio": 1.1}},
    "cross_switch": {"policy": {"decay": 0.3}},
    "switch_growth": {"policy": {"tau_0": 0.3}},
    "skd": {"policy": {"top_k": 3}},
    "ca_opd": {"policy": {"alpha": 0.2, "alpha_end": 0.1}, "objective": {"top_k": 3}},
    "trb": {"policy": {"budget": 0.5, "warmup": 10}, "objective": {"top_k": 3}},
    "distillm": {"mix": {"share": 0.8, "capacity": 8, "validation_steps": 5}},
}


def turned(config, knobs):
    """A configuration with settings of its rules changed."""
    rules = {noun: dataclasses.replace(getattr(config, noun), **changes) for noun, changes in knobs.items()}
    return dataclasses.replace(config, **rules)


def small(name, folder, **changes):
    recipe = turned(load_recipe(name), SIZES.get(name, {}))
    return dataclasses.replace(
        recipe, max_new_tokens=min(recipe.max_new_tokens, 8), max_steps=20, per_device_train_batch_size=4, learning_rate=3e-3,
        gradient_accumulation_steps=1, warmup_ratio=0.0, lr_scheduler_type="constant", warmup_steps=0, save_steps=0, seed=3,
        output_dir=str(folder), **changes,
    )  # fmt: skip


def make_trainer(name, folder, knobs=None):
    config: TrainConfig = turned(small(name, folder), knobs or {})
    pair, examples = toy_pair("gpt2"), toy_examples()
    for module in pair.student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if config.mix.wants_teacher_text:
        examples = teacher_texts(
            pair, examples, folder / "text", DecodeSettings(TeacherOnly(), max_new_tokens=8, seed=3)
        )
    validation = toy_examples(3) if config.mix.validation_steps else ()
    return Trainer(pair, examples, config, validation=validation)


class Witness:
    """Sees the rows of every step's loss; forwards of the teacher that training itself asks for are counted apart."""

    def __init__(self, trainer):
        self.trainer, self.steps, self.read_for_loss = trainer, [], 0
        loss, teacher, generate = trainer.learner.loss, trainer.learner.teachers.voices, trainer.reading.generate
        self.generating = 0

        def seen_loss(rows, objective):
            if objective == trainer.config.objective.at(trainer.objective_memory):
                self.steps[-1] += rows
            return loss(rows, objective)

        def seen_teacher(rows):
            self.read_for_loss += 1
            return teacher(rows)

        def seen_generate(*args):
            self.generating += 1
            return generate(*args)

        trainer.learner.loss, trainer.learner.teachers.voices, trainer.reading.generate = (
            seen_loss,
            seen_teacher,
            seen_generate,
        )

    def run(self, steps):
        metrics = []
        for _ in range(steps):
            self.steps.append([])
            metrics.append(self.trainer.train_step()[0])
        return metrics


def dense_loss(objective, pair, rows, over="tokens"):
    """The objective on these rows as the models are now, by plain logits and no machinery of the trainer's."""
    batch = collate([(row.prompt_ids, row.completion_ids) for row in rows])
    tokens = response_tokens(batch, [row.speakers for row in rows])
    with torch.no_grad():
        logp, logq = (log_probs(Head.of(m, VOCAB)(response_hidden(m, batch))) for m in (pair.teacher, pair.student))
        if objective.looks_ahead:
            tokens = objective.look_ahead(tokens, *(x.gather(1, tokens.ids[:, None])[:, 0] for x in (logp, logq)))
        losses = objective.loss(logp, logq, tokens)
        if over == "tokens":
            return losses.mean().item()
        means = [losses[tokens.rows == row].mean().item() for row in tokens.rows.unique()]
        return sum(means) / len(means)


def test_every_recipe_has_a_contract():
    assert CONTRACTS.keys() == shipped("recipes").keys()


@pytest.mark.parametrize("name", CONTRACTS)
def test_twenty_steps(name, tmp_path):
    """Which text, by whom, read by which models, with which loss; and the losses of twenty steps as they were."""
    contract, trainer = CONTRACTS[name], make_trainer(name, tmp_path)
    witness = Witness(trainer)
    objective = trainer.config.objective.at(trainer.objective_memory)
    before = toy_pair("gpt2")
    metrics = witness.run(20)
    assert {m["source"] for m in metrics} == contract.sources
    assert {s for rows in witness.steps for row in rows for s in row.speakers} == contract.speakers
    assert bool(witness.read_for_loss) == contract.teacher
    assert bool(witness.generating) == bool(contract.sources - {"examples"})
    first = witness.steps[0]
    assert metrics[0]["loss"] == pytest.approx(dense_loss(objective, before, first, trainer.config.loss_over), rel=1e-9)
    prompts = {json.dumps(example.prompt_ids) for example in toy_examples()}
    assert all(json.dumps(row.prompt_ids) in prompts for rows in witness.steps for row in rows)
    frozen = json.loads(TRAJECTORIES.read_text())[name]
    assert [m["loss"] for m in metrics] == pytest.approx(frozen, abs=1e-9, rel=1e-9)


@pytest.mark.parametrize("name", ["sft", "kd", "taid", "akl"])
def test_ground_truth_methods_train_on_the_datas_own_tokens(name, tmp_path):
    witness = Witness(make_trainer(name, tmp_path))
    witness.run(3)
    own = {(tuple(e.prompt_ids), tuple(e.completion_ids)) for e in toy_examples()}
    assert all((tuple(r.prompt_ids), tuple(r.completion_ids)) in own for rows in witness.steps for r in rows)


@pytest.mark.parametrize("name", ["seqkd", "distillm2"])
def test_the_teachers_text_is_the_teachers(name, tmp_path):
    """Each stored completion is what decoding the teacher alone gives, and not the data's."""
    trainer = make_trainer(name, tmp_path)
    fresh = teacher_texts(
        toy_pair("gpt2"), toy_examples(), tmp_path / "again", DecodeSettings(TeacherOnly(), max_new_tokens=8, seed=3)
    )
    assert trainer.examples == fresh
    assert sum(a.completion_ids == b.completion_ids for a, b in zip(fresh, toy_examples(), strict=True)) < 2


def moved(name, folder, knobs, kind):
    """Texts of the first steps, their loss as the untrained models have it, and as reported; as in the recipe, and turned."""
    results = []
    for step, turn in enumerate((None, knobs)):
        trainer = make_trainer(name, folder / str(step), turn)
        trainer.config = dataclasses.replace(trainer.config, learning_rate=0.0)
        witness = Witness(trainer)
        metrics = witness.run(8)
        texts = [[(r.prompt_ids, r.completion_ids, r.speakers) for r in rows] for rows in witness.steps]
        losses = [dense_loss(trainer.config.objective, toy_pair("gpt2"), rows) for rows in witness.steps]
        results.append((texts, losses, [m["loss"] for m in metrics]))
    return results


@pytest.mark.parametrize("name,kind", [(n, k) for n, c in CONTRACTS.items() for k in ("text", "loss") if getattr(c, k)])
def test_knobs_move_what_they_should_and_nothing_else(name, kind, tmp_path):
    knobs = getattr(CONTRACTS[name], kind)
    (texts, losses, seen), (other_texts, other_losses, other_seen) = moved(name, tmp_path, knobs, kind)
    if kind == "loss":
        assert texts == other_texts and losses != other_losses and seen != other_seen
    else:
        assert texts != other_texts
        same = [i for i, (a, b) in enumerate(zip(texts, other_texts, strict=True)) if a == b]
        assert [losses[i] for i in same] == [other_losses[i] for i in same]


def test_fast_opd_ends_rollout_and_loss_after_the_prefix(tmp_path):
    recipe = load_recipe("fast_opd")
    assert recipe.max_new_tokens < load_recipe("on_policy").max_new_tokens
    trainer = make_trainer("fast_opd", tmp_path)
    trainer.reading.config = dataclasses.replace(trainer.config, max_new_tokens=3)
    witness = Witness(trainer)
    witness.run(2)
    assert max(len(row.completion_ids) for rows in witness.steps for row in rows) == 3


def test_the_random_source_is_the_mix_in_with_another_probability():
    assert type(load_recipe("switch_random").policy) is type(load_recipe("switch_mix_in").policy)
    assert isinstance(load_recipe("relay").policy, Relay)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        frozen = {}
        for recipe_name in CONTRACTS:
            run = Witness(make_trainer(recipe_name, Path(temporary) / recipe_name)).run(20)
            frozen[recipe_name] = [m["loss"] for m in run]
        TRAJECTORIES.write_text(json.dumps(frozen, indent=1) + "\n")
