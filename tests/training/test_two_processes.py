"""Two CPU processes train on the rows of one, with the same choices, the same text and the same gradient."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from test_trainer import lines
from tiny import pair_on_disk, toy_examples, toy_pair

from switchkd.base.errors import ConfigError
from switchkd.cli.main import main
from switchkd.evaluation.results import read_results
from switchkd.training.checkpoint import checkpoints
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer

TESTS = Path(__file__).parents[1]
SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from accelerate import Accelerator
from safetensors.torch import save_file
from tiny import toy_examples, toy_pair
from switchkd import Switch
from switchkd.training.settings import TrainConfig
from switchkd.methods.mixes import Adaptive, Generated
from switchkd.methods.objectives import ForwardKL
from switchkd.forward.sharding import whole
from switchkd.training.trainer import Trainer

accelerator = Accelerator(cpu=True)
{mistake}
config = TrainConfig(
    policy=Switch(tau_0=0.6, decay=0.05), mix={mix}, objective=ForwardKL(), max_new_tokens=6, max_steps=5, save_steps=3,
    per_device_train_batch_size=4 // accelerator.num_processes, gradient_accumulation_steps=2, learning_rate=3e-3, seed=3,
    output_dir={output!r}, fsdp={fsdp}, dtype={dtype!r}, loss_over={loss_over!r}, eval_steps=2,
    metric_for_best_model="score", sample_steps=2, costs=(1e-3, 1e-5) * 3,
)
pair = toy_pair({family!r}, torch.float32 if {dtype!r} == "bfloat16" else torch.float64)
trainer = Trainer(pair, toy_examples(), config, accelerator, validation=toy_examples(5), corpus=toy_examples(9))
if {resume}:
    trainer.resume()
    assert trainer.step == 3
train_step = trainer.train_step
def dying(*arguments):
    if trainer.step == {dies_after} and accelerator.process_index == 1:
        os._exit(9)
    return train_step(*arguments)
trainer.train_step = dying
trainer.train(
    evaluate=lambda student: dict(score=sum(p.double().sum().item() for p in student.parameters())),
    sample=lambda progress: [dict(logits=trainer.pair.student(torch.tensor([[3, 4, 5]])).logits[0, -1].tolist())],
)
with whole(trainer.student):
    assert trainer.student.dtype == (torch.bfloat16 if {dtype!r} == "bfloat16" else torch.float64)
weights = dict((name, weight.clone()) for name, weight in trainer.learner.masters.whole().items())
sharded = sum(p.to_local().numel() for p in trainer.student.parameters()) if {fsdp} and {processes} > 1 else 0
if accelerator.is_main_process:
    assert accelerator.num_processes == {processes}
    assert not sharded or sharded <= 0.6 * sum(p.numel() for p in weights.values())
    save_file(weights, {output!r} + "/weights.safetensors")
"""


def launched(folder, processes, mix, resume=False, dies_after=-1, **more):
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    own = {"output": str(folder), "processes": processes, "mix": mix, "resume": resume, "dies_after": dies_after}
    own |= {"fsdp": False, "family": "llama", "mistake": "", "dtype": "auto", "loss_over": "tokens"} | more
    script.write_text(SCRIPT.format(tests=str(TESTS), **own))
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    command = [sys.executable, *(launch if processes > 1 else []), str(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=TESTS.parent)


def trained(folder, processes, mix, resume=False, **more):
    done = launched(folder, processes, mix, resume, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "weights.safetensors")


def assert_equal(one, two):
    """To rounding, which AdamW makes larger where a gradient is next to nothing."""
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-8, rtol=1e-8)


def written(folder):
    """Who wrote which tokens, in the order of the records."""
    rollouts = map(json.loads, (folder / "rollouts.jsonl").read_text().splitlines())
    return [[r["step"], r["sample_id"], r["completion_ids"], r["speakers"]] for r in rollouts]


@pytest.mark.parametrize("mix", ["Generated(0.5)", "Adaptive(share=0.9, capacity=8, validation_steps=2)"])
def test_two_ranks_are_one(tmp_path, mix):
    """Also with replay, a validation loss (five rows in batches of two, so one rank has none left), and a second corpus."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert_equal(straight := trained(one, 1, mix), trained(two, 2, mix))
    assert written(two) == written(one) and len({sample for _, sample, *_ in written(one)}) >= 8
    if mix.startswith("Adaptive"):
        # A run goes on with another number of processes, one way and the other.
        for folder, processes in ((one, 2), (two, 1)):
            (folder / "weights.safetensors").unlink()
            shutil.rmtree(folder / "checkpoint-5")
            assert_equal(straight, trained(folder, processes, mix, resume=True))
        assert written(two) == written(one)


def test_two_ranks_are_one_where_the_loss_is_over_texts(tmp_path):
    one, two = (trained(tmp_path / str(n), n, "Generated(0.5)", loss_over="sequences") for n in (1, 2))
    assert_equal(one, two)
    over_tokens = trained(tmp_path / "tokens", 1, "Generated(0.5)")
    assert any((weight - one[name]).abs().max() > 1e-5 for name, weight in over_tokens.items())


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_two_ranks_with_half_a_student_each_are_one(tmp_path, family):
    """Rows are decoded at their own pace, by ranks that hold half of every weight; gemma has tied ones."""
    mix, one, two = "Adaptive(share=0.9, capacity=8, validation_steps=2)", tmp_path / "one", tmp_path / "two"
    straight = trained(one, 1, mix, family=family)
    assert_equal(straight, trained(two, 2, mix, fsdp=True, family=family))
    assert written(two) == written(one)
    for name in ("optimizer.safetensors", "model.safetensors"):  # on the disk it is whole, for any number of processes
        assert_equal(load_file(one / "checkpoint-5" / name), load_file(two / "checkpoint-5" / name))
    for line, other in zip(lines(one, "samples.jsonl"), lines(two, "samples.jsonl"), strict=True):
        assert line["logits"] == pytest.approx(other["logits"], rel=1e-5)
    found = [[line["eval/score"] for line in lines(run, "metrics.jsonl") if "eval/score" in line] for run in (one, two)]
    assert len(found[0]) == 2 and found[1] == pytest.approx(found[0], rel=1e-6)
    for folder, processes in ((one, 2), (two, 1)):
        (folder / "weights.safetensors").unlink()
        shutil.rmtree(folder / "checkpoint-5")
        assert_equal(straight, trained(folder, processes, mix, resume=True, fsdp=True, family=family))


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_ranks_in_bfloat16_are_one_to_its_rounding(tmp_path, fsdp):
    """Masters and sums of gradients are in float32, in shards too: updates are far smaller than the last bit of a bfloat16."""
    mix = "Generated(0.0)"
    straight = trained(tmp_path / "one", 1, mix, dtype="bfloat16")
    two = trained(tmp_path / "two", 2, mix, dtype="bfloat16", fsdp=fsdp)
    assert straight.keys() == two.keys()
    for name, weight in straight.items():
        assert weight.dtype == two[name].dtype == torch.float32
        assert (weight - two[name]).abs().mean() < 0.2 * 3e-3, name  # of five updates of 3e-3
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in two.values())


MISTAKES = {
    "weights are left as they were gathered": """from switchkd.training import learner, trainer as module
gather, gathered = module.gather, []
module.gather = lambda model: gathered or gathered.append(gather(model))
torch.distributed.fsdp.FSDPModule.reshard = lambda unit: None
reducing = learner.reduce_in_next_backward
learner.reduce_in_next_backward = lambda model, last: reducing(model, last=False)
""",
    "both ranks read the same rows": """from switchkd.training.reading import Reading
Reading.mine = property(lambda reading: slice(0, reading.rows_per_rank))
""",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mutants_in_which_half_a_student_is_not_half_of_one(tmp_path, mistake):
    straight = trained(tmp_path / "one", 1, "Generated(0.5)")
    with pytest.raises(AssertionError):
        assert_equal(straight, trained(tmp_path / "two", 2, "Generated(0.5)", fsdp=True, mistake=MISTAKES[mistake]))


def test_a_rank_that_dies_ends_the_others_and_the_run_goes_on_from_a_whole_checkpoint(tmp_path):
    start = time.monotonic()
    done = launched(tmp_path / "two", 2, "Generated(0.5)", dies_after=4)
    assert done.returncode != 0 and time.monotonic() - start < 120  # two interpreters start in that time, too
    assert [folder.name for folder in checkpoints(tmp_path / "two")] == ["checkpoint-0", "checkpoint-3"]
    resumed = trained(tmp_path / "two", 2, "Generated(0.5)", resume=True)
    assert_equal(trained(tmp_path / "one", 1, "Generated(0.5)"), resumed)


def test_a_run_by_two_processes_with_half_a_student_each_is_scored_and_saved_whole(tmp_path):
    """From the command line: origin, scores of before and after, best student, model card, and a checkpoint to go on from."""
    arguments = [
        "train",
        "switch",
        "--template",
        "none",
        "--dtype",
        "float64",
        "--max-new-tokens",
        "5",
        "--max-steps",
        "4",
    ]
    arguments += [
        "--gradient-accumulation-steps",
        "2",
        "--eval-samples",
        "3",
        "--eval-max-new-tokens",
        "4",
        "--eval-steps",
        "2",
    ]
    arguments += ["--metric-for-best-model", "forward_kl", "--learning-rate", "3e-3", "--fsdp", "--quiet"]
    for name, value in pair_on_disk(tmp_path).items():
        arguments += [f"--{name.replace('_', '-')}", value]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*arguments, "--per-device-train-batch-size", "4", "--output-dir", str(one)]) == 0
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        "-m",
        "switchkd.cli",
    ]
    own = ["--per-device-train-batch-size", "2", "--output-dir", str(two)]
    done = subprocess.run([*launch, *arguments, *own], capture_output=True, text=True, timeout=240, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    origins = [json.loads((folder / "origin.json").read_text()) for folder in (one, two)]
    assert [origin["conditions"][0].pop("processes") for origin in origins] == [1, 2]
    assert origins[0] == origins[1]
    scores = [read_results(run / "evaluation.json") for run in (one, two)]
    for name, found in scores[0].items():
        assert scores[1][name].means() == pytest.approx(found.means(), rel=1e-6, nan_ok=True), name
    assert {path.relative_to(one) for path in one.rglob("*")} == {path.relative_to(two) for path in two.rglob("*")}
    assert_equal(*(load_file(run / "student" / "model.safetensors") for run in (one, two)))


@pytest.mark.parametrize("other", ["use_peft", "graphs"])
def test_what_does_not_go_with_a_student_in_shards_is_refused(other):
    with pytest.raises(ConfigError, match=f"fsdp does not go with {other}: .*; drop one of them"):
        TrainConfig(fsdp=True, **{other: True})


def test_sharded_weights_are_refused_before_they_can_wait_for_ever(tmp_path):
    sharded = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(ConfigError, match="sharded by accelerate's FSDP are not supported"):
        Trainer(toy_pair(), toy_examples(), TrainConfig(output_dir=str(tmp_path)), sharded)
