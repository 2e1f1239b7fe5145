"""Whoever reads a model does so in evaluation mode, and leaves every layer in the mode that it was in."""

import pytest
import torch
from test_trainer import trainer
from tiny import VOCAB, new_model, toy_examples, toy_pair

from switchkd import Switch, decode, decode_reference
from switchkd.decoding.settings import DecodeSettings
from switchkd.evaluation.evaluate import evaluate
from switchkd.evaluation.generate_backend import complete_by_generate
from switchkd.evaluation.samples import Reader
from switchkd.evaluation.settings import EvalSettings
from switchkd.evaluation.tasks import TASKS
from switchkd.forward.base_model import BaseModel
from switchkd.forward.head import Head
from switchkd.methods.mixes import Generated
from switchkd.methods.policy import StudentOnly
from switchkd.runner.modes import evaluating
from switchkd.studies.pruning import layer_influence
from switchkd.teachers.asked import Teachers
from switchkd.teachers.states import TeacherCache


def modes(model):
    return [module.training for module in model.modules()]


def dropping_pair():
    """GPT-2 with dropout in each layer, all in training mode but the first layer of each model."""
    pair = toy_pair("gpt2", make=new_model)
    for model in (pair.teacher, pair.student):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.4
        model.train()
        model.transformer.h[0].eval()
    return pair


def scores(pair):
    return evaluate(pair, pair.student, toy_examples(4), TASKS["references"], EvalSettings(4))


USES = {
    "decode": lambda pair, folder: decode(pair.student, pair.teacher, [[3, 4]], Switch(), 4),
    "decode_reference": lambda pair, folder: decode_reference(pair.student, pair.teacher, [[3, 4]], Switch(), 4),
    "teachers": lambda pair, folder: Teachers(pair, torch.device("cpu"))(toy_examples(4)),
    "cache": lambda pair, folder: TeacherCache.build(pair, toy_examples(4), folder, "hidden"),
    "evaluate": lambda pair, folder: scores(pair),
    "read": lambda pair, folder: Reader(pair)(decode(pair.student, pair.teacher, [[3, 4]], Switch(), 4)[0]),
    "generate": lambda pair, folder: complete_by_generate(pair.student, [[3, 4]], DecodeSettings(StudentOnly(), 3)),
    "influence": lambda pair, folder: layer_influence(pair.student, [[3, 4, 5]]),
    "head": lambda pair, folder: Head.of(pair.student, VOCAB),
}


@pytest.mark.parametrize("use", USES)
def test_each_layers_mode_is_as_it_was(use, tmp_path):
    """The mode of the whole was given to all: a layer frozen in evaluation mode came back training."""
    pair = dropping_pair()
    before = modes(pair.student), modes(pair.teacher)
    USES[use](pair, tmp_path / "store")
    assert (modes(pair.student), modes(pair.teacher)) == before


def test_modes_are_put_back_where_the_reading_fails():
    model = dropping_pair().student
    before = modes(model)
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(modes(model))
        raise RuntimeError
    assert modes(model) == before


def test_a_teacher_that_was_left_training_has_no_dropout():
    """In the loss, in a cache of what it says, in scores, and under an adapter."""
    quiet, loud = toy_pair("gpt2", make=new_model), dropping_pair()
    for use in (
        lambda pair: Teachers(pair, torch.device("cpu"))(toy_examples(4)).hidden,
        lambda pair: torch.tensor(scores(pair).means()["forward_kl"]),
        lambda pair: BaseModel(pair.teacher)(torch.tensor([[3, 4, 5]])).logits,
    ):
        torch.testing.assert_close(use(loud), use(quiet), atol=0, rtol=0)


def test_a_layer_frozen_in_evaluation_mode_stays_so_in_training(tmp_path):
    pair, seen = dropping_pair(), []
    pair.student.transformer.h[0].register_forward_hook(
        lambda module, *_: seen.append((module.training, torch.is_grad_enabled()))
    )
    other = []
    pair.student.transformer.h[1].register_forward_hook(lambda module, *_: other.append(module.training))
    before = modes(pair.student)
    trainer(tmp_path, pair, mix=Generated(0.0)).train_step()
    assert not any(training for training, _ in seen) and any(other)
    assert modes(pair.student) == before


def test_a_student_in_evaluation_mode_is_trained_with_its_dropout(tmp_path):
    pair, seen = dropping_pair(), []
    pair.student.eval()
    pair.student.transformer.h[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    trainer(tmp_path, pair, mix=Generated(0.0)).train_step()
    assert any(seen) and not any(modes(pair.student))
