"""Two CPU processes train on the rows of one, with the same choices and the same gradient."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TESTS = Path(__file__).parents[1]
SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from accelerate import Accelerator
from safetensors.torch import save_file
from tiny import toy_examples, toy_pair
from switchkd import Switch
from switchkd.config import TrainConfig
from switchkd.mixes import Adaptive, Generated
from switchkd.objectives import ForwardKL
from switchkd.trainer import Trainer

accelerator = Accelerator(cpu=True)
config = TrainConfig(
    policy=Switch(tau_0=0.6, decay=0.05), mix={mix}, objective=ForwardKL(), max_new_tokens=6, max_steps=5, save_steps=0,
    per_device_train_batch_size=4 // accelerator.num_processes, gradient_accumulation_steps=2, learning_rate=3e-3, seed=3,
    output_dir={output!r},
)
trainer = Trainer(toy_pair(), toy_examples(), config, accelerator, validation=toy_examples(5), corpus=toy_examples(9))
trainer.train()
if accelerator.is_main_process:
    assert accelerator.num_processes == {processes}
    student = accelerator.unwrap_model(trainer.student)
    save_file({{name: p.detach() for name, p in student.named_parameters()}}, {output!r} + "/weights.safetensors")
"""


def trained(folder, processes, mix):
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT.format(tests=str(TESTS), output=str(folder), processes=processes, mix=mix))
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), str(script)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "weights.safetensors")


@pytest.mark.parametrize("mix", ["Generated(0.5)", "Adaptive(share=0.9, capacity=8, validation_steps=2)"])
def test_two_ranks_are_one(tmp_path, mix):
    """Also with replay, a validation loss (five rows in batches of two, so one rank has none left), and a second corpus."""
    one, two = trained(tmp_path / "one", 1, mix), trained(tmp_path / "two", 2, mix)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-10, rtol=1e-8)
