"""Flags by the names that TRL and ms-swift have for them: the same setting is taken, any other is answered with ours.

A name is taken in the place of ours where it means exactly the same. Where the meaning differs, or a value has to be written
otherwise, the command ends with one sentence that holds the flags to give. Names that mean the same here and there, such as
`--learning_rate`, are simply ours and do not stand here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from switchkd.base.terminal import complain
from switchkd.training.settings import TrainConfig

# Theirs by ours: the model that is trained is the student.
SAME = {
    "model_name_or_path": "student_model_name_or_path",
    "model": "student_model_name_or_path",
    "teacher_model": "teacher_model_name_or_path",
    "lora_rank": "lora_r",
}

Given = dict[str, str]


class Answer(NamedTuple):
    """What to give in the place of a flag: ``flags``, which may depend on the value and on the other flags, or none, and why.

    ``value`` is an example of a value, "" for a flag that takes none.
    """

    flags: str | Callable[[str, Given], str]
    why: str
    value: str = ""


def _beta(value: str, given: Given) -> str:
    """Of GKD in TRL and ms-swift: the weight of the teacher in the mixture, as ours, and a plain divergence at both ends."""
    ends = {0.0: "--objective forward_kl", 1.0: "--objective reverse_kl"}
    return ends.get(_number(value, -1.0), f"--objective jsd --objective.beta {value}")


def _data(flag: str) -> Callable[[str, Given], str]:
    def found(value: str, given: Given) -> str:
        name, _, count = value.partition("#")
        samples = f" --train-samples {count}" if count and flag == "train-file" else ""
        if Path(name).suffix in _FILES or Path(name).exists():
            return f"--{flag} {name}{samples}"
        name, _, subset = name.removeprefix("HF::").partition(":")
        config = given.get("dataset_config") or subset
        usual = "train" if flag == "train-file" else "test"
        split = given.get(f"dataset_{usual}_split") or usual
        return f"--{flag} hub:{name}{f'/{config}' if config else ''}:{split}{samples}"

    return found


def _split(flag: str) -> Callable[[str, Given], str]:
    return lambda value, given: _data(flag)(given.get("dataset_name", "OWNER/NAME"), given)


def _lengths(value: str, given: Given) -> str:
    half = max(int(_number(value, 512)) // 2, 1)
    return f"--max-prompt-length {half} --max-completion-length {half} --max-new-tokens {half}"


def _dtype(value: str, given: Given) -> str:
    name = value.removeprefix("torch.")
    return f"--dtype {name if name in ('float32', 'bfloat16', 'float64') else 'auto'}"


def _by_value(**ways: str) -> Callable[[str, Given], str]:
    """The flags for a value; "" for one that asks for what is done anyway."""
    return lambda value, given: ways.get(value.lower(), "")


def _every(what: str) -> Callable[[str, Given], str]:
    return lambda value, given: f"--{what}-steps {0 if value == 'no' else given.get(f'{what}_steps', 100)}"


def _resume(value: str, given: Given) -> str:
    checkpoint = Path(value).name
    return f"--resume-from {checkpoint}" if checkpoint.startswith("checkpoint-") else "--resume"


def _number(value: str, otherwise: float) -> float:
    try:
        return float(value)
    except ValueError:
        return otherwise


_TUNER = _by_value(lora="--use-peft", qlora="--use-peft --load-in-4bit")
_FILES = (".json", ".jsonl", ".gz", ".csv", ".tsv", ".parquet", ".arrow")
_ENGINE = "the student's text is written here by an engine of its own, and a teacher behind vLLM is named by its address, --teacher"
_EACH_STEP = "every step is written to metrics.jsonl, and to --report-to"
_CHOSEN = "it is chosen by itself"
_NO_CODE = "no code of a model or data folder is ever run"
_HUB = "a data set on the hub is named in one word, hub:OWNER/NAME/CONFIG:SPLIT"

ANSWERS: dict[str, Answer] = {
    # --- the method
    "beta": Answer(_beta, "beta is the teacher's weight in the mixture, as in GKD", "0.7"),
    "lmbda": Answer(
        "--mix generated --mix.lmbda {}", "it is a setting of a mix, the share of steps on generated text", "0.5"
    ),
    "seq_kd": Answer(_by_value(true="--mix teacher_text"), "the mix says which text a step reads", "true"),
    "sft_alpha": Answer(
        "--objective.ce-weight {}",
        "here it is the share of cross-entropy in the loss, and on the data's own answers alone",
        "0.1",
    ),
    "loss_top_k": Answer("", "objectives compare whole distributions"),
    "loss_add_tail": Answer("", "objectives compare whole distributions"),
    "rlhf_type": Answer("", "the method is the first word: switchkd train gkd", "gkd"),
    "num_generations": Answer("", "a step writes one completion to each of its prompts", "1"),
    "disable_dropout": Answer("", "text is written without dropout, and trained with the student's own", "true"),
    # --- models
    "teacher_model_server_url": Answer(
        "--teacher {}", "a teacher behind a server is named by its address", "http://host:8000"
    ),
    "teacher_model_server": Answer(
        "--teacher {}", "a teacher behind a server is named by its address", "http://host:8000"
    ),
    "use_teacher_server": Answer("--teacher http://host:8000", "a teacher behind a server is named by its address"),
    "torch_dtype": Answer(
        _dtype, "what the student multiplies in; its weights are kept and updated in float32", "bfloat16"
    ),
    "fp16": Answer(
        "--dtype bfloat16", "float16 loses small gradients; a teacher may be in it, --teacher-dtype float16"
    ),
    "load_in_8bit": Answer(
        "--use-peft --load-in-4bit", "a student is in 4 bits; a teacher may be in 8, --teacher-load-in-8bit"
    ),
    "quant_bits": Answer("--use-peft --load-in-4bit", "a frozen student is in 4 bits (NF4)", "4"),
    "quant_method": Answer("", "weights in 4 bits (--load-in-4bit) are by bitsandbytes", "bnb"),
    "attn_implementation": Answer("", _CHOSEN, "flash_attention_2"),
    "attn_impl": Answer("", _CHOSEN, "flash_attn"),
    "use_liger_kernel": Answer("", "the loss never holds the logits of a whole text"),
    "trust_remote_code": Answer("", _NO_CODE),
    "model_revision": Answer("", "of another revision, download it and name its folder", "main"),
    "teacher_model_revision": Answer("", "of another revision, download it and name its folder", "main"),
    "model_init_kwargs": Answer("", "settings of the student are flags of their own, such as --dtype", "{}"),
    "teacher_model_init_kwargs": Answer(
        "", "settings of the teacher are flags of their own, such as --teacher-dtype", "{}"
    ),
    "offload_teacher_model": Answer(
        "--teacher-device cpu", "a teacher may be on another device for the whole run", "true"
    ),
    "train_type": Answer(_TUNER, "without it all weights are trained", "lora"),
    "tuner_type": Answer(_TUNER, "without it all weights are trained", "lora"),
    "target_modules": Answer(
        lambda value, given: "" if value == "all-linear" else f"--lora-target-modules {value}",
        "all linear layers are the default",
        "q_proj",
    ),
    "deepspeed": Answer("--fsdp", "weights in shards are FSDP2, started by torchrun or accelerate", "zero3"),
    # --- data
    "dataset_name": Answer(_data("train-file"), _HUB, "openai/gsm8k"),
    "dataset": Answer(_data("train-file"), _HUB, "openai/gsm8k#500"),
    "val_dataset": Answer(_data("eval-file"), _HUB, "openai/gsm8k"),
    "dataset_config": Answer(_split("train-file"), _HUB, "main"),
    "dataset_train_split": Answer(_split("train-file"), _HUB, "train"),
    "dataset_test_split": Answer(_split("eval-file"), _HUB, "test"),
    "max_length": Answer(_lengths, "prompt and completion have a limit each", "1024"),
    "packing": Answer("", "each row is a text of its own; rows of a forward are padded", "true"),
    "truncation_strategy": Answer("", "prompts that are too long are left out and counted", "delete"),
    "split_dataset_ratio": Answer(
        "--eval-split {}", "the share of the training data that is held out and scored", "0.1"
    ),
    "system": Answer("", "write a system message into the rows, as the first of `messages`", "You are brief."),
    "dataset_num_proc": Answer("", _CHOSEN, "4"),
    "dataloader_num_workers": Answer("", _CHOSEN, "4"),
    "remove_unused_columns": Answer("", "columns that are not read are left alone", "false"),
    # --- writing
    "use_vllm": Answer("", _ENGINE),
    "vllm_mode": Answer("", _ENGINE, "colocate"),
    "vllm_server_base_url": Answer("", _ENGINE, "http://host:8000"),
    "vllm_server_host": Answer("", _ENGINE, "host"),
    "vllm_server_port": Answer("", _ENGINE, "8000"),
    "vllm_gpu_memory_utilization": Answer("", _ENGINE, "0.3"),
    "vllm_tensor_parallel_size": Answer("", _ENGINE, "1"),
    # --- training and evaluation
    "optim": Answer("", "the optimizer is AdamW", "adamw_torch"),
    "eval_strategy": Answer(_every("eval"), "it is a number of steps, 0 for none", "steps"),
    "save_strategy": Answer(_every("save"), "it is a number of steps, 0 for the end", "steps"),
    "load_best_model_at_end": Answer(
        "--metric-for-best-model forward_kl --eval-steps 100",
        "the best student by a score is kept where one is named",
        "true",
    ),
    "greater_is_better": Answer("", "each score knows which way is better", "false"),
    "do_train": Answer("", "train trains, and evaluate evaluates"),
    "do_eval": Answer("", "it is evaluated at the end; in the run with --eval-steps"),
    "ddp_timeout": Answer("", "processes wait a day for the first one", "1800"),
    # --- output
    "logging_steps": Answer("", _EACH_STEP, "10"),
    "logging_strategy": Answer("", _EACH_STEP, "steps"),
    "logging_first_step": Answer("", _EACH_STEP),
    "logging_dir": Answer("", "trackers write into the run directory, trackers/", "logs"),
    "log_completions": Answer("", "all generated text is in rollouts.jsonl; `switchkd report RUN` shows it"),
    "run_name": Answer("--output-dir runs/{}", "a run has the name of its directory", "mine"),
    "hub_model_id": Answer("--push-to-hub {}", "the name on the hub is its value", "me/student"),
    "hub_strategy": Answer("", "the student is put there once, at the end", "every_save"),
    "overwrite_output_dir": Answer("", "a run directory is never written over: choose another --output-dir"),
    "resume_from_checkpoint": Answer(_resume, "the newest checkpoint, or one by its name", "out/checkpoint-100"),
}


# A switch there, and the name here.
PUSH = Answer("--push-to-hub my-name/my-student", "its value is the name on the hub")


def in_our_words(cls: type, words: Sequence[str]) -> list[str]:
    """``words`` of a command line for the settings ``cls``, with ours for other names of the same setting.

    Ends with code 2 and the answer for one that is given here in another way.
    """
    names = {setting.name for setting in dataclasses.fields(cls)}
    given = _given(words)
    others = [flag for flag in given if flag not in names and flag in ANSWERS]
    if given.get("push_to_hub", "a name").lower() in ("", "true") and "hub_model_id" not in given:
        others.append("push_to_hub")
    if not others or not issubclass(cls, TrainConfig):
        return [_ours(word, names) for word in words]
    for flag in dict.fromkeys(others):
        complain(f"error: {answered(flag, given)}")
    raise SystemExit(2)


def answered(flag: str, given: Given) -> str:
    """One sentence that says what to give in the place of a flag, with the value that it is ``given``."""
    answer, value = ANSWERS.get(flag, PUSH), given[flag]
    flags = answer.flags(value, given) if callable(answer.flags) else answer.flags.format(value)
    theirs = f"--{flag} {value}".rstrip()
    return (
        f"{theirs} is here: {flags} ({answer.why})"
        if flags
        else f"{theirs} is no setting here, leave it out: {answer.why}"
    )


def _given(words: Sequence[str]) -> Given:
    """The flags among the words of a command line, with what follows them."""
    found: Given = {}
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name.replace("-", "_")] = value if equals else "" if following.startswith("--") else following
    return found


def _ours(word: str, names: set[str]) -> str:
    flag, equals, value = word.partition("=")
    name = flag.removeprefix("--").replace("-", "_")
    if name == flag or name in names or SAME.get(name) not in names:
        return word
    return f"--{SAME[name].replace('_', '-')}{equals}{value}"


def note_on_lengths(words: Sequence[str], config: TrainConfig) -> None:
    """Say what ``max_completion_length`` is here, where somebody may mean the text that is generated, as TRL does."""
    given = _given(words)
    if "max_completion_length" in given and "max_new_tokens" not in given and config.mix.generates:
        complain(
            f"note: --max-completion-length cuts the completions of the data; what is generated has at most --max-new-tokens, "
            f"{config.max_new_tokens}"
        )
