"""Flags by the names of TRL and ms-swift: taken where they mean the same, else answered with ours, which our parser takes."""

import shlex

import pytest
import torch

from switchkd.cli.evaluate import EvaluateConfig, LmEvalConfig
from switchkd.cli.flags import parse
from switchkd.cli.main import main
from switchkd.cli.other_names import ANSWERS, SAME, answered
from switchkd.methods import divergences
from switchkd.methods.mixes import Generated
from switchkd.methods.objectives import JSD, ForwardKL, ReverseKL
from switchkd.training.settings import TrainConfig

FIELDS = TrainConfig.__dataclass_fields__


def train(*words):
    return parse(TrainConfig, ["train", *words])


def answer(capfd, *words):
    """What is said of flags that are others here, and the flags that it says to give, one list an answer."""
    with pytest.raises(SystemExit, match="2"):
        train(*words)
    lines = capfd.readouterr().err.splitlines()
    assert all(line.startswith("error: --") for line in lines)
    return lines, [flags_of(line) for line in lines]


def flags_of(line):
    """The flags to give in one answer; none if the flag is to be left out."""
    if " is no setting here, leave it out: " in line:
        return []
    return shlex.split(line.partition(" is here: ")[2].partition(" (")[0])


@pytest.mark.parametrize("name", ANSWERS)
def test_every_answer_is_one_sentence_whose_flags_our_parser_takes(name, capfd):
    entry = ANSWERS[name]
    [line], [given] = answer(capfd, f"--{name}", *([entry.value] if entry.value else []))
    assert line == f"error: {answered(name, {name: entry.value})}" and entry.why in line
    before = train() if not given else None
    changed = train(*given)
    assert not given or given[0].startswith("--")
    assert (changed == before) is (not given)
    for flag in {word.split(".")[0] for word in given if word.startswith("--")}:
        assert flag.removeprefix("--").replace("-", "_") in {*FIELDS, "teacher", "student"}


def test_no_answer_has_the_place_of_a_flag_of_ours():
    assert not {*ANSWERS, *SAME} & {*FIELDS} and not {*ANSWERS} & {*SAME}
    assert {*SAME.values()} <= {*FIELDS}


@pytest.mark.parametrize(("theirs", "ours"), SAME.items())
@pytest.mark.parametrize("form", ["--{} {}", "--{}={}"])
@pytest.mark.parametrize("hyphens", [False, True])
def test_a_name_of_the_same_setting_is_taken(theirs, ours, form, hyphens):
    value = "3" if FIELDS[ours].type == "int" else "x/y"
    words = form.format(theirs.replace("_", "-") if hyphens else theirs, value).split()
    assert str(getattr(train(*words), ours)) == value


def test_a_name_is_taken_of_the_commands_that_have_its_setting_and_no_own_one():
    assert parse(EvaluateConfig, ["evaluate", "--model", "x/y"]).student_model_name_or_path == "x/y"
    with pytest.raises(SystemExit, match="2"):
        parse(LmEvalConfig, ["lm-eval", "--teacher_model", "x/y"])


@pytest.mark.parametrize(
    ("beta", "objective"), [("0", ForwardKL()), ("0.0", ForwardKL()), ("1", ReverseKL()), ("0.7", JSD(beta=0.7))]
)
def test_gkds_beta_has_its_direction_and_its_ends(beta, objective, capfd):
    _, [given] = answer(capfd, "--beta", beta)
    assert train(*given).objective == objective


def test_the_answer_to_beta_is_the_loss_that_trl_has_for_it(capfd):
    """TRL: the mixture is beta p + (1 - beta) q, the loss beta KL(p, m) + (1 - beta) KL(q, m), p the teacher's."""
    logp, logq = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5]], dtype=torch.float64).log()
    mixture = (0.8 * logp.exp() + 0.2 * logq.exp()).log()
    loss = 0.8 * divergences.forward_kl(logp, mixture) + 0.2 * divergences.forward_kl(logq, mixture)
    _, [given] = answer(capfd, "--beta=0.8")
    torch.testing.assert_close(train(*given).objective.per_token(logp, logq, None), loss)


def test_several_flags_are_answered_at_once(capfd):
    lines, given = answer(capfd, "gkd", "--beta", "0.5", "--lmbda", "0.25", "--use-vllm", "--learning_rate", "1e-5")
    assert len(lines) == 3
    config = train("gkd", *[word for flags in given for word in flags])
    assert (config.objective, config.mix) == (JSD(beta=0.5), Generated(0.25))


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (["--dataset_name", "a/b", "--dataset_config", "c", "--dataset_train_split", "d"], "hub:a/b/c:d"),
        (["--dataset_name", "a/b.v1"], "hub:a/b.v1:train"), (["--dataset", "rows.jsonl"], "rows.jsonl"),
        (["--dataset", "HF::a/b:c#500"], "hub:a/b/c:train"), (["--dataset_train_split", "d"], "hub:OWNER/NAME:d"),
    ],
)  # fmt: skip
def test_a_data_set_is_named_in_one_word(words, file, capfd):
    _, given = answer(capfd, *words)
    assert {train(*flags).train_file for flags in given} <= {file, (file,)}
    assert not any("#500" in word for word in words) or train(*given[0]).train_samples == 500


def test_a_push_that_is_a_switch_elsewhere_wants_a_name_here(capfd):
    for words in (["--push_to_hub"], ["--push_to_hub", "True"], ["--push-to-hub", "--seed", "3"]):
        [line], _ = answer(capfd, *words)
        assert "is here: --push-to-hub my-name/my-student" in line
    _, [given] = answer(capfd, "--push_to_hub", "--hub_model_id", "me/mine")
    assert train(*given).push_to_hub == train("--push-to-hub", "me/mine").push_to_hub == "me/mine"


def test_the_limit_of_generated_text_is_named_where_somebody_may_mean_it(capfd):
    """A setting of ours has the name that TRL gives to another one."""
    train("gkd", "--max_completion_length", "99")
    assert "what is generated has at most --max-new-tokens, 256" in capfd.readouterr().err
    train("kd", "--max_completion_length", "99")
    train("gkd", "--max_completion_length", "99", "--max_new_tokens", "99")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("--eval_strategy steps", "--eval-steps 100"), ("--eval_strategy no", "--eval-steps 0"),
        ("--eval_strategy steps --eval_steps 50", "--eval-steps 50"), ("--save_strategy epoch", "--save-steps 100"),
        ("--resume_from_checkpoint True", "--resume"), ("--resume_from_checkpoint a/checkpoint-7", "--resume-from checkpoint-7"),
        ("--torch_dtype float16", "--dtype auto"), ("--torch_dtype float32", "--dtype float32"), ("--train_type full", ""),
        ("--tuner_type qlora", "--use-peft --load-in-4bit"), ("--run_name a", "--output-dir runs/a"),
        ("--max_length 300", "--max-prompt-length 150 --max-completion-length 150 --max-new-tokens 150"),
    ],
)  # fmt: skip
def test_an_answer_goes_by_the_value(words, flags, capfd):
    assert answer(capfd, *words.split())[1] == [flags.split()]


def test_a_mistyped_flag_still_names_the_nearest(capfd):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--betta", "1", "--learning-rte", "1e-5"])
    assert "--learning-rate" in capfd.readouterr().err
