"""Nothing that runs on a device needs float64, which Apple's do not have, unless the models themselves are that wide."""

import pytest
import torch
from tiny import POLICIES, tiny_model, toy_examples, toy_pair
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from switchkd import decode
from switchkd.decoding import engine
from switchkd.forward.ends import Ends
from switchkd.forward.proof import prove
from switchkd.methods.mixes import MIXES, Adaptive, Generated
from switchkd.methods.objectives import OBJECTIVES, MiniLLM
from switchkd.methods.policy import StudentOnly
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer


class WithoutFloat64(TorchDispatchMode):
    """A device as Apple's: making a float64 tensor is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_flatten(out)[0]:
            if isinstance(each, torch.Tensor) and each.dtype == torch.float64:
                raise TypeError(f"{func} gives float64, which this device does not have")
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", POLICIES)
def test_decoding(policy, dtype):
    pair = tiny_model("llama", 1, dtype), tiny_model("llama", 2, dtype)
    for model in pair:
        prove(model)  # which compares on the host, in float64
    with WithoutFloat64():
        rollouts = decode(
            *pair,
            [[3, 4], [5]],
            POLICIES[policy],
            8,
            temperature=0.8,
            top_p=0.95,
            top_k=20,
            min_p=0.01,
            keep_hidden=True,
        )
    assert all(rollout.completion_ids for rollout in rollouts)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_of_each_objective(tmp_path, objective):
    config = TrainConfig(
        # MiniLLM's weights want to know the mix-in that wrote: here none.
        objective=MiniLLM(alpha=0.0) if objective == "minillm" else OBJECTIVES[objective](),
        policy=StudentOnly(), mix=Generated(1.0), max_new_tokens=5, max_steps=2, per_device_train_batch_size=2,
        output_dir=str(tmp_path),
    )  # fmt: skip
    trainer = Trainer(toy_pair(dtype=torch.float32), toy_examples(), config)
    with WithoutFloat64():
        trainer.train_step()


def test_a_validation_loss(tmp_path):
    config = TrainConfig(
        mix=Adaptive(validation_steps=1),
        max_new_tokens=5,
        max_steps=2,
        per_device_train_batch_size=2,
        output_dir=str(tmp_path),
    )
    trainer = Trainer(toy_pair(dtype=torch.float32), toy_examples(), config, validation=toy_examples(3))
    with WithoutFloat64():
        trainer.train_step()
    assert MIXES and trainer.reading.memory["loss"] > 0


MUTANTS = {
    "noise": (engine, "gumbel_noise", lambda original: lambda *args: original(*args).double().float()),
    "walk": (Ends, "log_probs", lambda original: lambda *args: original(*args).double()),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_that_takes_float64_is_caught(name, monkeypatch):
    module, attribute, change = MUTANTS[name]
    monkeypatch.setattr(module, attribute, change(getattr(module, attribute)))
    with pytest.raises(TypeError, match="float64"):
        test_decoding("switch_constant", torch.float32)
