"""On a CUDA device: the block engine is the reference loop there too, and a training step runs. Skipped without one."""

import dataclasses

import pytest
import torch
from tiny import FAMILIES, POLICIES, assert_same, tiny_model, toy_examples, toy_pair

from switchkd import decode, decode_reference
from switchkd.methods.mixes import Generated
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PROMPTS = [[3, 4, 5], [7], [2, 2, 9, 11, 4, 6, 8]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["switch_exponential", "adaswitch", "spell"])
def test_lossless_on_cuda(family, policy):
    student, teacher = tiny_model(family, 1).cuda(), tiny_model(family, 2).cuda()
    reference = decode_reference(student, teacher, PROMPTS, POLICIES[policy], 9)
    for drafter in ("student", "teacher", "auto"):
        for static in (False, True):
            out = decode(
                student,
                teacher,
                PROMPTS,
                POLICIES[policy],
                9,
                block_size=4,
                drafter=drafter,
                batch_size=2,
                graphs=static,
            )
            assert_same(out, reference)


def test_a_training_step_on_cuda(tmp_path):
    pair = toy_pair()
    pair = dataclasses.replace(pair, teacher=pair.teacher.cuda(), student=pair.student.cuda())
    config = TrainConfig(max_new_tokens=6, max_steps=1, per_device_train_batch_size=4, output_dir=str(tmp_path))
    metrics, _ = Trainer(pair, toy_examples(), dataclasses.replace(config, mix=Generated(1.0))).train_step()
    assert metrics["loss"] > 0
