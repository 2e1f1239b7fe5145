"""What `test_parallel_teachers.py` runs in one process, and again in several that hold the teacher in shards.

``python -m torch.distributed.run … tests/parallel_teacher.py MODELS NAME`` does all of it in the folder NAME of the models' one.
"""

import dataclasses
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from tiny import _ROPE, pair_on_disk, tiny_model, toy_examples, toy_pair
from torch import distributed
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from switchkd import AdaSwitch, StudentOnly, Switch
from switchkd.base.errors import ModelError, SwitchKDWarning
from switchkd.cli.main import main
from switchkd.decoding.settings import DecodeSettings
from switchkd.evaluation.evaluate import evaluate
from switchkd.evaluation.samples import samples
from switchkd.evaluation.settings import EvalSettings
from switchkd.evaluation.tasks import TASKS
from switchkd.forward.head import Scorer
from switchkd.methods.mixes import Generated, GroundTruth, Pairs
from switchkd.methods.objectives import ForwardKL
from switchkd.models.loading import load_model
from switchkd.models.settings import Place
from switchkd.runner.architecture import num_parameters
from switchkd.teachers import asked
from switchkd.teachers.states import TeacherCache
from switchkd.teachers.store import weights_sha256
from switchkd.training import processes, reading
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer
from switchkd.writing.teacher_texts import teacher_texts

# By name: the teacher, whether its experts are in shards, who writes, which text a step reads, and more settings.
CASES = {
    "switch": ("llama", False, Switch(tau_0=0.6, decay=0.05), Generated(0.5), {}),
    "switch with half a student each": ("llama", False, Switch(tau_0=0.6, decay=0.05), Generated(1.0), {"fsdp": True}),
    "adaswitch": ("experts", False, AdaSwitch(window=2, ratio=1.1), Generated(1.0), {}),
    "adaswitch, whole experts": ("experts", True, AdaSwitch(window=2, ratio=1.1), Generated(1.0), {}),
    "kd": ("experts", True, StudentOnly(), GroundTruth(), {}),
    "pairs of two teachers": ("llama", False, Switch(tau_0=0.6, decay=0.05), Pairs(), {}),
}
COSTS = (1e-3, 1e-5) * 3


def experts(seed: int = 5) -> Qwen3MoeForCausalLM:
    """A small Qwen3 with four experts in each layer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = {"head_dim": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**_ROPE | settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.35)
    return model


def put_models(folder: Path) -> None:
    """The teachers of all cases, and a pair with data for the command line."""
    tiny_model("llama", 2, torch.float32).save_pretrained(folder / "llama")
    experts().save_pretrained(folder / "experts")
    tiny_model("gemma", 3, torch.float32).save_pretrained(folder / "tied")
    pair_on_disk(folder)


def routed() -> list:
    """Examples of two teachers in turn, so that some processes have rows of only one of them."""
    return [dataclasses.replace(e, teacher="other" if e.id % 2 else "") for e in toy_examples()]


class Runs:
    """All cases, with teachers that ``size`` processes run together."""

    def __init__(self, models: Path, out: Path, accelerator: Accelerator, size: int):
        self.models, self.out, self.accelerator, self.size = models, out, accelerator, size
        self.said: dict = {}

    def teacher(self, name: str, whole_experts: bool = False, dtype: str = "float32"):
        parallel = self.size > 1
        place = Place(tensor_parallel=self.size, expert_parallel=whole_experts and parallel)
        return load_model(str(self.models / name), dtype, "cpu", place=place).requires_grad_(False)

    def pair(self, name: str, whole_experts: bool = False):
        stays = self.size > 1
        return dataclasses.replace(
            toy_pair(dtype=torch.float32), teacher=self.teacher(name, whole_experts), teachers_stay=stays
        )

    def train(self, case: str, mistake: str = "") -> None:
        name, whole_experts, policy, mix, more = CASES[case]
        pair, folder = self.pair(name, whole_experts), self.out / (mistake or case)
        two = "two teachers" in case
        if two:
            pair = dataclasses.replace(pair, teachers={"other": self.teacher("tied")})
        config = TrainConfig(
            policy=policy, mix=mix, objective=ForwardKL(), max_new_tokens=6, max_steps=2, save_steps=2, learning_rate=3e-3, seed=3,
            per_device_train_batch_size=4 // self.accelerator.num_processes, gradient_accumulation_steps=2,
            output_dir=str(folder), costs=() if case == "switch" else COSTS, **more,
        )  # fmt: skip
        trainer = Trainer(pair, routed() if two else toy_examples(), config, self.accelerator)
        trainer.train()
        weights = {name: weight.clone() for name, weight in trainer.learner.masters.whole().items()}
        if self.accelerator.is_main_process:
            save_file(weights, folder / "weights.safetensors")

    def ask(self) -> None:
        """What else is asked of a teacher than in training."""
        pair, examples = self.pair("llama"), toy_examples(5)
        told = EvalSettings(max_new_tokens=5, own_text=True)
        models = {"teacher": pair.teacher, "student": pair.student}
        for role, model in models.items():
            found = evaluate(pair, model, examples, TASKS["references"], told)
            self.said[role] = found.means() | {"texts": [completion.text for completion in found.completions]}
        how = DecodeSettings(Switch(tau_0=0.6, decay=0.05), 6)
        self.said["samples"] = [
            (sample["completion_ids"], sample["jsd"]) for sample in samples(pair, examples[:2], how, None)
        ]
        for name in ("llama", "experts", "tied"):
            model = self.teacher(name, whole_experts=name == "experts")
            self.said[name] = [weights_sha256(model), num_parameters(model)]
        half = self.teacher("llama", dtype="bfloat16")  # proved in fp32 all the same
        reader = Scorer(half, pair.vocab_size)
        self.said["bfloat16"] = reader.hidden([([3, 4], [5, 6])]).float().tolist()
        with processes.first_group_first(self.accelerator, asked.Together.of(pair.teacher)):
            texts = teacher_texts(pair, examples, self.out / "texts", DecodeSettings(StudentOnly(), 6))
            cache = TeacherCache.build(pair, examples, self.out / "cache", "hidden")
        self.said["text"] = [text.completion_ids for text in texts]
        self.said["hidden"] = [cache.hidden(place).tolist() for place in range(len(examples))]

    def command(self) -> None:
        """A run from the command line, which stops and goes on."""
        lines = f"""
            train switch --template none --max-new-tokens 5 --max-steps 2 --save-steps 1 --sample-steps 1 --eval-steps 1
            --eval-samples 3 --eval-max-new-tokens 4 --metric-for-best-model forward_kl --learning-rate 3e-3 --quiet
            --per-device-train-batch-size {4 // self.accelerator.num_processes} --teacher-tensor-parallel {self.size}
        """
        names = {"teacher-model-name-or-path": "teacher", "student-model-name-or-path": "student"}
        names |= {"train-file": "data.jsonl", "eval-file": "data.jsonl"}
        files = [word for name, file in names.items() for word in (f"--{name}", str(self.models / file))]
        words = [*lines.split(), *files, "--output-dir", str(self.out / "run")]
        assert main(words) == 0
        self.accelerator.wait_for_everyone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SwitchKDWarning)  # what is later is set aside
            assert main([*words, "--resume-from", "checkpoint-1"]) == 0

    def everything(self) -> None:
        for case in CASES:
            self.train(case)
        self.ask()
        self.command()
        if self.accelerator.is_main_process:
            (self.out / "said.json").write_text(json.dumps(self.said))
        self.accelerator.wait_for_everyone()

    def mutants(self) -> None:
        """The first case under each mistake; what it raises goes to a file."""
        for mistake, (place, name, change) in MISTAKES.items():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(place, name, change(getattr(place, name)))
                try:
                    self.train(next(iter(CASES)), mistake)
                except ModelError as error:
                    (self.out / mistake / "error").write_text(str(error))
            self.accelerator.wait_for_everyone()


def _other_order(original):
    def hidden(reader, rows):
        return original(reader, rows).flip(0) if reader.together.rank else original(reader, rows)

    return hidden


def _other_token(original):
    def checked(rollouts, together, where):
        if together.rank:
            rollouts[0].completion_ids[-1] += 1
        return original(rollouts, together, where)

    return checked


# What is put in another's place, and what.
MISTAKES = {
    "states go to another row": (asked.GroupReader, "hidden", _other_order),
    "each row is trained on by all of a group": (
        reading.Reading,
        "mine",
        lambda _: property(lambda self: slice(self.ours.start, self.ours.start + self.rows_per_rank)),
    ),
    "a process writes another token": (reading, "check_agreed", _other_token),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    models, name = Path(sys.argv[1]), sys.argv[2]
    runs = Runs(models, models / name, processes.new_accelerator(), 2)
    runs.everything()
    if runs.accelerator.num_processes == 2:
        runs.mutants()
    distributed.destroy_process_group()
