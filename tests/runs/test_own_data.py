"""A run on one's own data: which methods need answers, what is held out, and what a teacher reads that the student does not."""

import dataclasses
import json

import pytest
import torch
from tiny import CHATML, byte_level_tokenizer, pair_on_disk, save_llama

from switchkd.base.errors import ConfigError, DataError, SwitchKDWarning
from switchkd.base.settings import shipped
from switchkd.evaluation.evaluate import evaluate
from switchkd.methods.policy import StudentOnly
from switchkd.reports.record import RunRecord
from switchkd.runs.distil import distil
from switchkd.runs.heldout import eval_settings, load_heldout, prompts_to_complete
from switchkd.runs.opening import load_train, needs_answers, open_pair, prompt_examples
from switchkd.training.settings import TrainConfig, load_recipe
from switchkd.writing.examples import decode_examples

SMALL = {
    "max_steps": 1, "max_new_tokens": 6, "eval_max_new_tokens": 6, "per_device_train_batch_size": 2, "eval_samples": 4,
    "max_prompt_length": 128, "sample_steps": 0,
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A tiny pair, a file of prompts alone, and a cache of one's own."""
    monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path / "cache"))
    names = pair_on_disk(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Name a river near {i}."}) + "\n" for i in range(24)))
    del names["eval_file"]
    return names, prompts


def settings(place, method="on_policy", **changes):
    names, prompts = place
    recipe = load_recipe(method)
    return dataclasses.replace(recipe, **names | {"train_file": str(prompts)} | SMALL | changes)


NEED_ANSWERS = {
    "sft", "kd", "taid", "akl", "gkd", "imitkd", "distillm", "switch", "switch_constant", "switch_growth", "switch_linear",
    "switch_mix_in", "switch_random", "minillm", "veto", "cross_kd", "cross_switch",
}  # fmt: skip


def test_the_method_decides_whether_answers_are_needed():
    needed = {name for name in shipped("recipes") if needs_answers(load_recipe(name))}
    assert needed <= NEED_ANSWERS and {"adaswitch", "on_policy", "seqkd", "skd", "distillm2"}.isdisjoint(needed)
    assert {"switch", "kd", "sft", "distillm"} <= needed
    assert needs_answers(dataclasses.replace(load_recipe("on_policy"), teacher_prompt="{prompt} ({completion})"))
    assert not needs_answers(dataclasses.replace(load_recipe("on_policy"), teacher_prompt="{prompt}!"))


@pytest.mark.parametrize("method", ["on_policy", "adaswitch", "seqkd", "distillm2"])
def test_prompts_alone_are_enough_for_a_whole_run(place, tmp_path, method, capsys):
    run = tmp_path / "run"
    results = distil(settings(place, method, output_dir=str(run)))
    record = RunRecord.read(run)
    assert record.finished and record.metrics[-1]["loss"] is not None
    assert "student after" in results and results["teacher"].means()["forward_kl"] == 0
    stored = json.loads((run / "evaluation.json").read_text())
    assert "0.05 of it held out, answered by the teacher where a row has no answer" in str(stored)
    assert results["teacher"].means()["rouge_l"] == pytest.approx(100 * (results["teacher"].means()["rouge_l"] > 0))


@pytest.mark.parametrize("method", ["kd", "switch"])
def test_a_method_that_reads_answers_says_that_they_are_missing(place, tmp_path, method):
    with pytest.raises(
        DataError, match=r"prompts.jsonl:1: .*a prompt without the answer \(completion or response\) that this use"
    ):
        distil(settings(place, method, output_dir=str(tmp_path / "run")))


def test_the_teachers_answers_are_its_greedy_text_and_are_stored(place, monkeypatch):
    config = settings(place)
    pair = open_pair(config, quiet=True)
    heldout = load_heldout(config, pair, quiet=True)
    asked = [dataclasses.replace(e, completion_ids=[], speakers=[]) for e in heldout.examples]
    greedy = config.decoding(policy=StudentOnly(), temperature=0.0, max_new_tokens=6)
    own = decode_examples(dataclasses.replace(pair, student=pair.teacher), asked, greedy, range(len(asked)))
    assert [e.completion_ids for e in heldout.examples] == [r.completion_ids for r in own]
    assert all(len(e.references) == 1 for e in heldout.examples)

    def no_text(*_, **__):
        raise AssertionError("it was written before")

    monkeypatch.setattr("switchkd.writing.teacher_texts.decode_examples", no_text)
    assert load_heldout(config, pair, quiet=True).sha256 == heldout.sha256


def test_a_part_of_ones_own_data_is_held_out_and_never_the_sample(place, capsys):
    config = settings(place)
    pair = open_pair(config, quiet=True)
    train, heldout = load_train(config, pair, quiet=True), load_heldout(config, pair, quiet=True)
    assert {e.id for e in train}.isdisjoint(e.id for e in heldout.examples)
    assert {e.id for e in train} | {e.id for e in heldout.examples} == set(range(24))
    assert heldout.sources == config.train_file
    load_train(config, pair), load_heldout(config, pair)
    said = capsys.readouterr().out
    assert f", to train on: {len(train)} examples" in said and f", held out: {24 - len(train)} examples" in said
    assert [e.id for e in prompts_to_complete(config, pair, 9)] == [e.id for e in heldout.examples][:9]
    nothing = dataclasses.replace(config, eval_split=0.0)
    assert load_heldout(nothing, pair, quiet=True).examples == [] and len(load_train(nothing, pair, quiet=True)) == 24
    given = dataclasses.replace(config, eval_file=place[0]["train_file"])
    assert (
        load_heldout(given, pair, quiet=True).sources == given.eval_file
        and len(load_train(given, pair, quiet=True)) == 24
    )
    sample = dataclasses.replace(config, train_file="gsm8k-sample:train", train_samples=3)
    assert load_heldout(sample, pair, quiet=True).sources == ("gsm8k-sample:heldout",)
    assert len(load_train(sample, pair, quiet=True)) <= 3


def test_nothing_held_out_is_said_and_the_run_ends_well(place, tmp_path, capsys):
    assert distil(settings(place, eval_split=0.0, output_dir=str(tmp_path / "run"))) == {}
    assert "nothing is held out, so nothing is scored: give --eval-file, or --eval-split" in capsys.readouterr().out


def test_a_run_on_several_files_goes_on_as_it_began(place, tmp_path):
    names, prompts = place
    files = [str(prompts), names["train_file"]]
    config = settings(place, "on_policy", train_file=files, max_steps=4, save_steps=2, output_dir=str(tmp_path / "a"))
    distil(config)
    distil(dataclasses.replace(config, max_steps=4, output_dir=str(tmp_path / "b")))
    (tmp_path / "b" / "student").rename(tmp_path / "gone")
    again = dataclasses.replace(config, output_dir=str(tmp_path / "b"), resume_from="checkpoint-2")
    with pytest.warns(SwitchKDWarning, match="checkpoint-4 is later"):
        distil(again)
    assert {e.source.rpartition(":")[0] for e in load_train(config, open_pair(config, quiet=True), quiet=True)} == set(
        files
    )
    loss = [[line["loss"] for line in RunRecord.read(tmp_path / name).metrics] for name in "ab"]
    assert loss[0] == loss[1]


# --- what a teacher reads that the student does not ---------------------------------------------------------------

OTHER = CHATML.replace("<|im_start|>", "<|im_start|>dear ")


@pytest.fixture
def two_templates(place, tmp_path):
    names, _ = place
    names["teacher_model_name_or_path"] = save_llama(tmp_path / "other", byte_level_tokenizer(template=OTHER), 1)
    return names, place[1]


def test_each_model_reads_under_its_own_template_if_asked_to(two_templates):
    config = settings(two_templates, teacher_template="own")
    pair = open_pair(config, quiet=True)
    assert pair.tokenizer.chat_template == CHATML and not any("template" in warning for warning in pair.warnings)
    for example in [*load_train(config, pair, quiet=True), *load_heldout(config, pair, quiet=True).examples]:
        student, teacher = map(pair.tokenizer.decode, (example.prompt_ids, example.teacher_reads))
        assert "dear" not in student and teacher == student.replace("<|im_start|>", "<|im_start|>dear ")
    [asked] = prompt_examples(["Where?"], config, pair)
    assert pair.tokenizer.decode(asked.teacher_reads).count("dear") == 2 and "dear" not in pair.tokenizer.decode(
        asked.prompt_ids
    )
    shared = open_pair(settings(two_templates), quiet=True)
    assert shared.tokenizer.chat_template == OTHER
    assert any("with teacher_template own each reads under its own" in warning for warning in shared.warnings)


def test_a_teacher_without_a_template_cannot_have_its_own_and_shares_the_students(place, tmp_path):
    names, _ = place
    names["teacher_model_name_or_path"] = save_llama(tmp_path / "bare", byte_level_tokenizer(template=None), 1)
    with pytest.raises(ConfigError, match="teacher_template 'own': the teacher has no chat template"):
        open_pair(settings(place, teacher_template="own"), quiet=True)
    pair = open_pair(settings(place), quiet=True)
    assert pair.tokenizer.chat_template == CHATML
    assert "note: the teacher has no chat template; the student's is used for both" in pair.warnings


def test_a_template_that_ends_an_answer_otherwise_makes_bad_rows(place, tmp_path):
    names, _ = place
    says = CHATML.replace("m['content'] + '", "m['content'] + '!")
    names["teacher_model_name_or_path"] = save_llama(tmp_path / "says", byte_level_tokenizer(template=says), 1)
    config = settings(place, "kd", train_file=names["train_file"], teacher_template="own")
    pair = open_pair(config, quiet=True)
    with pytest.raises(
        DataError, match="the teacher's own chat template writes this answer, or its end, as other tokens"
    ):
        load_train(config, pair, quiet=True)


def test_a_system_prompt_of_the_teacher_is_its_alone_in_training_and_in_scores(place):
    config = settings(place, teacher_system_prompt="Rivers flow.", template="chat")
    pair = open_pair(config, quiet=True)
    [*train], heldout = load_train(config, pair, quiet=True), load_heldout(config, pair, quiet=True)
    for example in [*train, *heldout.examples]:
        assert "Rivers" in pair.tokenizer.decode(example.teacher_reads)
        assert "Rivers" not in pair.tokenizer.decode(example.prompt_ids)
    plain = load_heldout(settings(place, template="chat"), pair, quiet=True)
    assert plain.sha256 != heldout.sha256, "scores of the two cannot be compared"
    how = eval_settings(config, StudentOnly())
    teacher = evaluate(pair, pair.teacher, heldout.examples, heldout.task, how)
    as_it_reads = [
        dataclasses.replace(e, prompt_ids=e.teacher_reads, teacher_prompt_ids=None) for e in heldout.examples
    ]
    alike = evaluate(pair, pair.teacher, as_it_reads, heldout.task, how)
    assert teacher.completions == alike.completions and str(teacher.means()) == str(alike.means())
    student = evaluate(pair, pair.student, heldout.examples, heldout.task, how)
    untold = [dataclasses.replace(e, teacher_prompt_ids=None) for e in heldout.examples]
    assert student.completions == evaluate(pair, pair.student, untold, heldout.task, how).completions
    assert (
        student.means()["perplexity"] == evaluate(pair, pair.student, untold, heldout.task, how).means()["perplexity"]
    )
    kl = by_hand(pair, heldout.examples)
    assert student.scores["forward_kl"].values[0] == pytest.approx(kl, rel=1e-4)


def by_hand(pair, examples):
    """Forward KL of each example, each model reading its own prompt."""
    found = []
    for e in examples:
        logs = []
        for model, prompt in (
            (pair.teacher, e.prompt_ids if e.teacher_prompt_ids is None else e.teacher_prompt_ids),
            (pair.student, e.prompt_ids),
        ):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *e.completion_ids]])).logits[0, len(prompt) - 1 : -1]
            logs.append(logits[:, : pair.vocab_size].double().log_softmax(-1))
        found.append(float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()))
    return found


def test_the_prompt_of_a_teacher_that_tells_the_answer_is_not_in_scores(place):
    names, _ = place
    config = settings(place, train_file=names["train_file"], teacher_prompt="{prompt} It is {completion}.")
    pair = open_pair(config, quiet=True)
    assert all(e.teacher_prompt_ids for e in load_train(config, pair, quiet=True))
    assert not any(e.teacher_prompt_ids for e in load_heldout(config, pair, quiet=True).examples)


def test_an_instruct_pair_reads_its_chat_template_and_a_base_pair_the_papers(place, tmp_path):
    names, _ = place
    for recipe in ("switch", "adaswitch", "distillm"):
        config = settings(place, recipe, train_file=names["train_file"])
        pair = open_pair(config, quiet=True)
        assert "<|im_start|>user" in pair.tokenizer.decode(load_train(config, pair, quiet=True)[0].prompt_ids)
    bare = {
        f"{role}_model_name_or_path": save_llama(tmp_path / f"bare-{role}", byte_level_tokenizer(template=None), seed)
        for seed, role in enumerate(("teacher", "student"))
    }
    config = dataclasses.replace(config, **bare, max_prompt_length=300, max_completion_length=64)
    pair = open_pair(config, quiet=True)
    assert "### Response:" in pair.tokenizer.decode(load_train(config, pair, quiet=True)[0].prompt_ids)
    run = tmp_path / "run"
    distil(dataclasses.replace(config, output_dir=str(run), mix="ground_truth", objective="forward_kl"))
    assert RunRecord.read(run).config.template == "alpaca", "what was chosen is recorded"


def test_the_default_config_is_as_it_stands_in_the_file():
    assert TrainConfig().train_file == ("gsm8k-sample:train",) and TrainConfig(train_file="a").train_file == ("a",)
