"""Distilling from a teacher with a tokenizer of its own: the loss by hand, each method end to end, runs that go on or are split."""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from fake_server import serving
from two_tokenizers import across_on_disk, bridge_of, model_of, side

from switchkd.base.errors import ConfigError
from switchkd.base.signals import Stopped
from switchkd.cli.main import main
from switchkd.crossing.bridge import Bridge
from switchkd.data.texts import TokenizedExample
from switchkd.decoding.settings import DecodeSettings
from switchkd.evaluation.evaluate import evaluate
from switchkd.evaluation.samples import Reader, trace
from switchkd.evaluation.settings import EvalSettings
from switchkd.evaluation.tasks import TASKS
from switchkd.methods.mixes import Generated, GroundTruth
from switchkd.methods.objectives import JSD, OPD, ForwardKL, MiniLLM
from switchkd.methods.policies import CAOPD, SKD, TRB, AdaSwitch, MixIn, Switch
from switchkd.methods.policy import REFERENCE, STUDENT, TEACHER, StudentOnly, TeacherOnly
from switchkd.methods.relay import Relay
from switchkd.models.pair import Pair, load_pair
from switchkd.reports.record import RunRecord
from switchkd.runs.replay import check_records
from switchkd.studies.study import flags
from switchkd.teachers.states import TeacherCache
from switchkd.training.learner import Learner, Part
from switchkd.training.processes import new_accelerator
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer
from switchkd.writing.examples import decode_examples
from switchkd.writing.teacher_texts import teacher_texts

ANSWERS = ["It is four, and that is all.", "naïve café 東京", "I don't know: 12 and 345", "the cats sat"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return across_on_disk(tmp_path_factory.mktemp("across"))


def pair_of(student="coarse", teacher="fine", bridge=None) -> Pair:
    """A pair in float64, whose student may be trained."""
    bridge = bridge or bridge_of(student, teacher)
    own = model_of(student, "llama", 1)
    copy = type(own)(own.config).double().eval()
    copy.load_state_dict(own.state_dict())
    own_side = bridge.student
    return Pair(
        model_of(teacher, "llama", 2),
        copy,
        own_side.tokenizer,
        own_side.vocab_size,
        own_side.ends.ids,
        (),
        bridges={"": bridge},
    )


def examples_of(pair: Pair, texts=ANSWERS) -> list[TokenizedExample]:
    bridge, found = pair.bridges[""], []
    for i, text in enumerate(texts):
        ids = [*bridge.student.spelling.encode(text.encode()), bridge.student.end]
        prompts = [each.spelling.encode(b"What is two and two?") for each in bridge.sides]
        found.append(
            TokenizedExample(
                i, prompts[STUDENT], ids, [REFERENCE] * len(ids), (text,), False, f"row {i}",
                teacher_prompt_ids=prompts[TEACHER], teacher_completion_ids=bridge.teacher_reading(ids),
            )
        )  # fmt: skip
    return found


def config_of(folder="unused", **changes) -> TrainConfig:
    settings = {
        "policy": StudentOnly(), "mix": GroundTruth(), "objective": ForwardKL(), "dtype": "float64", "learning_rate": 3e-3,
        "per_device_train_batch_size": 4, "max_steps": 3, "max_new_tokens": 12, "output_dir": str(folder), "sample_steps": 0,
        "costs": (1e-3, 1e-5) * 3, "quiet": True,
    }  # fmt: skip
    return TrainConfig(**settings | changes)


def gradient_of(pair: Pair, rows, objective=None, size=4, **changes):
    """The loss of a step and the student's gradient."""
    objective = objective or ForwardKL()
    learner = Learner(pair, config_of(objective=objective, **changes), new_accelerator())
    total = sum(learner._trained(row, objective) for row in rows)
    counts = [len(rows) if changes.get("loss_over") == "sequences" else total]
    loss = learner._gradients([Part(rows, objective)], counts, [total], 0, size)[0]
    return loss.item(), [weight.grad.clone() for weight in learner.masters.named.values() if weight.grad is not None]


def log_laws(model, prompt, completion, vocab):
    """Next-token log-probabilities before each token of a completion, by the model's own forward."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1, :vocab]
    return logits.log_softmax(-1)


def by_hand(pair: Pair, rows) -> torch.Tensor:
    """Forward KL on the shared tokens at tokens that are equal bytes at an equal place, a mean over these: in plain loops."""
    bridge, losses = pair.bridges[""], []
    mine, theirs = (torch.tensor(ids) for ids in bridge.shared)
    for row in rows:
        q = log_laws(pair.student, row.prompt_ids, row.completion_ids, pair.vocab_size)
        p = log_laws(pair.teacher, row.teacher_reads, row.teacher_completion, bridge.teacher.vocab_size).detach()
        spelt = [
            [each.spelling.bytes_of[i] for i in ids]
            for each, ids in zip(bridge.sides, (row.completion_ids, row.teacher_completion), strict=True)
        ]
        for i, one in enumerate(spelt[0]):
            for j, other in enumerate(spelt[1]):
                same_place = b"".join(spelt[0][:i]) == b"".join(spelt[1][:j])
                ended = row.completion_ids[-1] == bridge.student.end
                both_end = ended and i == len(spelt[0]) - 1 and j == len(spelt[1]) - 1
                if (one == other and one and same_place) or both_end:
                    own_p, own_q = p[j, theirs].exp(), q[i, mine].exp()
                    own_p, own_q = own_p / own_p.sum(), own_q / own_q.sum()
                    losses.append((own_p * (own_p / own_q).log()).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("student", "teacher"), [("coarse", "fine"), ("fine", "sentencepiece"), ("sentencepiece", "coarse")]
)
def test_the_loss_and_its_gradient_are_those_of_matching_tokens(student, teacher):
    pair = pair_of(student, teacher)
    rows = examples_of(pair)
    loss = by_hand(pair, rows)
    loss.backward()
    own = [weight.grad.clone() for weight in pair.student.parameters()]
    pair.student.zero_grad()
    found, gradient = gradient_of(pair, rows)
    assert math.isclose(found, loss.item(), rel_tol=1e-9)
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-12) for a, b in zip(gradient, own, strict=True))


def test_equal_tokenizers_give_the_ordinary_loss_to_the_bit():
    """Over a bridge between a tokenizer and itself all tokens match, and both laws stay what they are."""
    bridge = Bridge(side("coarse"), side("coarse", "teacher"))
    pair = pair_of("coarse", "coarse", bridge)
    assert bridge.complete == (True, True)
    rows = examples_of(pair)
    assert all(row.teacher_completion_ids == row.completion_ids for row in rows)
    plain = dataclasses.replace(pair_of("coarse", "coarse", bridge), bridges={})
    for objective in (ForwardKL(), JSD(beta=0.1), OPD()):
        one, other = gradient_of(pair, rows, objective), gradient_of(plain, rows, objective)
        assert one[0] == other[0] and all(map(torch.equal, one[1], other[1]))


def test_micro_batches_and_means_over_texts():
    pair = pair_of()
    rows = examples_of(pair)
    whole, gradient = gradient_of(pair, rows)
    for size in (1, 2):
        parts, others = gradient_of(pair, rows, size=size)
        assert math.isclose(parts, whole, rel_tol=1e-12)
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-13) for a, b in zip(gradient, others, strict=True))
    by_text, _ = gradient_of(pair, rows, loss_over="sequences")
    each = [gradient_of(pair, [row])[0] for row in rows]
    assert math.isclose(by_text, sum(each) / len(each), rel_tol=1e-9) and not math.isclose(by_text, whole, rel_tol=1e-3)


def test_a_teacher_of_each_kind_in_one_batch():
    """The default teacher has the student's tokenizer, a named one its own: the loss is the mean over the tokens of both."""
    across = pair_of()
    bridge = across.bridges[""]
    rows = [dataclasses.replace(row, teacher="other") for row in examples_of(across)]
    plain = [
        dataclasses.replace(row, teacher="", teacher_prompt_ids=None, teacher_completion_ids=None) for row in rows[:2]
    ]
    pair = dataclasses.replace(
        across, teacher=model_of("coarse", "llama", 3), teachers={"other": across.teacher}, bridges={"other": bridge}
    )
    mixed = [plain[0], *rows, plain[1]]
    (one, _), (other, _), (both, _) = (gradient_of(pair, each) for each in (plain, rows, mixed))
    tokens = [
        sum(len(row.completion_ids) for row in plain),
        sum(len(bridge.matches(r.completion_ids, r.teacher_completion)[0]) for r in rows),
    ]
    assert math.isclose(both, (one * tokens[0] + other * tokens[1]) / sum(tokens), rel_tol=1e-12)


def test_kept_states_of_the_teacher_give_the_same_loss(tmp_path):
    pair = pair_of()
    rows = examples_of(pair)
    cache = TeacherCache.build(pair, rows, tmp_path / "states", "hidden")
    kept = [cache.attached(row, i) for i, row in enumerate(rows)]
    assert len(kept[1].said) == len(rows[1].teacher_completion) != len(rows[1].completion_ids)
    one, other = gradient_of(pair, rows), gradient_of(pair, kept)
    assert math.isclose(one[0], other[0], rel_tol=1e-12)
    with pytest.raises(ConfigError, match=r"top_k.*use 'hidden'"):
        TeacherCache.build(pair, rows, tmp_path / "top", "top_k")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": SKD()}, "skd.*turns of words"),
        ({"policy": MixIn()}, "mix_in.*blends"),
        ({"policy": CAOPD()}, "ca_opd"),
        ({"policy": TRB()}, "trb"),
        ({"policy": Relay(trigger_ids=(1,), blank_ids=(2,))}, "relay"),
        ({"objective": MiniLLM(alpha=0)}, "minillm adds up rewards"),
        ({"objective": ForwardKL(ce_weight=0.5)}, "ce_weight 0.5"),
        ({"objective": ForwardKL(), "alignment": "sorted"}, "forward_kl.*sorted"),
    ],
)
def test_what_needs_one_tokenizer_is_refused_by_name(changes, words):
    pair = pair_of()
    mix = TrainConfig().mix if "policy" in changes else GroundTruth()
    with pytest.raises(ConfigError, match=words):
        Trainer(pair, examples_of(pair), config_of(**{"mix": mix} | changes))


# --- whole runs ---------------------------------------------------------------------------------------------------


def train(place, output, method, *more, **changes):
    settings = {
        **place, "template": "none", "max_prompt_length": 60, "max_new_tokens": 14, "max_completion_length": 40,
        "eval_samples": 0, "per_device_train_batch_size": 3, "max_steps": 2, "sample_steps": 1, "sample_prompts": 2,
        "dtype": "float64", "learning_rate": 3e-3, "output_dir": output,
    } | changes  # fmt: skip
    assert main(["train", method, *flags(settings), *more]) == 0
    return RunRecord.read(output)


RUNS = {
    "kd": {}, "on_policy": {}, "seqkd": {}, "gkd": {"mix.lmbda": 1}, "opd": {}, "distillm2": {}, "taid": {}, "veto": {},
    "switch": {"mix.lmbda": 1, "policy.tau_0": 0.4}, "adaswitch": {"policy.window": 1, "policy.ratio": 1.05},
    "ssd": {"policy.tau": 0.13}, "hysteresis": {"policy.take": 0.14, "policy.give": 0.12},
    "cross_kd": {}, "cross_on_policy": {}, "cross_switch": {"policy.tau_0": 0.4},
    "cross_adaswitch": {"policy.window": 1, "policy.ratio": 1.05},
}  # fmt: skip


@pytest.mark.parametrize("method", RUNS)
def test_every_method_that_can_runs_and_its_records_are_true(place, tmp_path, method):
    run = train(place, tmp_path / "run", method, **RUNS[method], teacher_store_dir=tmp_path / "store")
    assert all(math.isfinite(line["loss"]) for line in run.metrics)
    if method != "seqkd":
        assert all(0 < line["cross/coverage"] <= 1 and 0 < line["cross/teacher_mass"] <= 1 for line in run.metrics)
    pair = load_pair(place["teacher_model_name_or_path"], place["student_model_name_or_path"], dtype="float64")
    assert pair.bridges
    found = list(check_records(run, pair))
    assert found and all(each.holds("float64") and each.tokens for each in found), found
    written = [*run.samples, *run.rollouts_of([1, 2], 9)[1], *run.rollouts_of([1, 2], 9)[2]]
    for record in written:
        student, teacher = (
            b"".join(own.bytes_of(ids))
            for own, ids in zip(
                pair.bridges[""].sides, (record["completion_ids"], record["teacher_completion_ids"]), strict=True
            )
        )
        assert student == teacher
    if RUNS[method] and method not in ("gkd",):
        assert {speaker for record in written for speaker in record["speakers"]} == {STUDENT, TEACHER}


def test_records_that_were_changed_are_found_out(place, tmp_path):
    run = train(place, tmp_path / "run", "switch", **RUNS["switch"])
    pair = load_pair(place["teacher_model_name_or_path"], place["student_model_name_or_path"], dtype="float64")
    file = tmp_path / "run" / "rollouts.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for change in ("speaker", "divergence", "reading"):
        broken = json.loads(json.dumps(lines[0]))
        if change == "speaker":
            broken["speakers"] = [1 - who for who in broken["speakers"]]
        elif change == "divergence":
            broken["divergences"] = [d if d is None else d + 1e-6 for d in broken["divergences"]]
        else:
            broken["teacher_completion_ids"] = broken["teacher_completion_ids"][1:]
        file.write_text("".join(json.dumps(line) + "\n" for line in [broken, *lines[1:]]))
        assert not all(each.holds("float64") for each in check_records(RunRecord.read(run.path), pair)), change


@pytest.mark.parametrize("policy", [Switch(tau_0=0.05, decay=0.01), AdaSwitch(window=1, ratio=1.01)])
def test_a_run_that_was_stopped_is_the_run_that_was_not(tmp_path, policy):
    def run(folder, stop_after=None, **changes):
        pair, losses = pair_of(), []

        def on_step(metrics, _):
            losses.append(metrics["loss"])
            if metrics["step"] == stop_after:
                raise Stopped(signal.SIGTERM)

        config = config_of(folder, policy=policy, mix=Generated(1.0), max_steps=4, save_steps=2, **changes)
        trainer = Trainer(pair, examples_of(pair), config)
        if config.resumes:
            trainer.resume()
        with suppress(Stopped):
            trainer.train(on_step)
        return losses, [weight.clone() for weight in pair.student.parameters()]

    losses, weights = run(tmp_path / "straight")
    first, _ = run(tmp_path / "stopped", stop_after=2)
    then, others = run(tmp_path / "stopped", resume=True)
    # The step in which it stopped is told of again.
    assert len(first) == 2 and first[:1] + then == losses and all(map(torch.equal, weights, others))


def test_two_processes_are_one(place, tmp_path):
    """Equal texts, and losses equal to the rounding of sums."""
    one = train(place, tmp_path / "one", "cross_switch", **RUNS["cross_switch"], per_device_train_batch_size=4)
    settings = {
        **place, "template": "none", "max_prompt_length": 60, "max_new_tokens": 14, "max_completion_length": 40,
        "eval_samples": 0, "max_steps": 2, "sample_steps": 1, "sample_prompts": 2, "dtype": "float64", "learning_rate": 3e-3,
        "output_dir": tmp_path / "two", "per_device_train_batch_size": 2, **RUNS["cross_switch"],
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "-m",
        "switchkd.cli",
    ]
    subprocess.run([*command, "train", "cross_switch", *flags(settings)], check=True, timeout=240, capture_output=True)
    two = RunRecord.read(tmp_path / "two")
    ids = "step", "sample_id", "completion_ids", "teacher_completion_ids", "speakers"
    texts = [sorted([line[name] for name in ids] for line in run.rollouts(99)) for run in (one, two)]
    assert texts[0] == texts[1] and len(texts[0]) > 1
    for a, b in zip(one.metrics, two.metrics, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-9) and a["num_tokens"] == b["num_tokens"]


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_each_model_reads_under_its_own_template_also_when_a_run_goes_on(place, tmp_path, role):
    """Where one of the two has a chat template, ``auto`` is one template for each, and stands in the records."""
    folders = {name: tmp_path / name for name in ("student", "teacher")}
    for name, folder in folders.items():
        shutil.copytree(place[f"{name}_model_name_or_path"], folder)
    (folders[role] / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    named = {f"{name}_model_name_or_path": str(folder) for name, folder in folders.items()}
    settings = {"template": "auto", "max_prompt_length": 125, "max_steps": 1, "save_steps": 1}
    train(place | named, tmp_path / "run", "cross_on_policy", **settings)
    shutil.rmtree(tmp_path / "run" / "student")
    further = "--resume", "--allow-change", "max_steps"
    run = train(place | named, tmp_path / "run", "cross_on_policy", *further, **settings | {"max_steps": 2})
    sides = load_pair(*map(str, (folders["teacher"], folders["student"]))).bridges[""].sides
    for record in run.rollouts(99):
        for name, own, ids in zip(folders, sides, (record["prompt_ids"], record["teacher_prompt_ids"]), strict=True):
            assert own.spelling.decode(ids).startswith(b"user: What" if name == role else b"Below is")
    assert run.settings["template"] == "auto" and len(run.metrics) == 2


def test_an_adapter_is_trained(place, tmp_path):
    pytest.importorskip("peft")
    run = train(place, tmp_path / "run", "cross_adaswitch", "--use-peft", **RUNS["cross_adaswitch"], lora_r=2)
    assert len(run.metrics) == 2 and (tmp_path / "run" / "student" / "adapter_config.json").is_file()


# --- who writes ---------------------------------------------------------------------------------------------------


def test_one_model_alone_writes_in_its_own_tokens():
    """Student and teacher alone are the plain engine's texts, with the other's reading; the text of both is cut to the budget."""
    pair = pair_of()
    bridge, rows = pair.bridges[""], examples_of(pair)
    for policy, who in ((StudentOnly(), STUDENT), (TeacherOnly(), TEACHER)):
        seen = []
        found = decode_examples(pair, rows, DecodeSettings(policy, 20, seed=4), range(4), watch=seen.append)
        assert [r.completion_ids for r in seen[-1]] == [r.completion_ids for r in found] and len(seen) > 1
        assert all(r.prompt_ids == rows[0].prompt_ids and r.teacher_completion_ids is not None for r in seen[0])
        alone = dataclasses.replace(
            pair, student=(pair.student, pair.teacher)[who], teacher=(pair.student, pair.teacher)[who], bridges={},
            vocab_size=bridge.sides[who].vocab_size, eos_token_ids=bridge.sides[who].ends.ids,
        )  # fmt: skip
        own = [
            dataclasses.replace(r, prompt_ids=r.teacher_reads if who else r.prompt_ids, teacher_prompt_ids=None)
            for r in rows
        ]
        plain = decode_examples(alone, own, DecodeSettings(StudentOnly(), 20, seed=4), range(4))
        for one, other in zip(found, plain, strict=True):
            assert set(one.speakers) == {who} and one.prompt_ids == rows[0].prompt_ids
            assert len(one.completion_ids) <= 20
            if who == STUDENT:
                assert one.completion_ids == other.completion_ids
            else:
                length = len(one.teacher_completion_ids) - 2  # but for the end of a text that was cut
                assert one.teacher_completion_ids[:length] == other.completion_ids[:length]
            spelt = [
                b"".join(s.bytes_of(i))
                for s, i in zip(bridge.sides, (one.completion_ids, one.teacher_completion_ids), strict=True)
            ]
            assert spelt[0] == spelt[1]


def test_the_teachers_stored_text_is_the_students_to_learn(tmp_path):
    pair = pair_of()
    rows, settings = examples_of(pair), DecodeSettings(StudentOnly(), 20, seed=1)
    made = teacher_texts(pair, rows, tmp_path, settings)
    again = teacher_texts(pair, rows, tmp_path, settings)
    assert made == again and all(set(row.speakers) == {TEACHER} and row.teacher_completion_ids for row in made)


def test_a_teacher_behind_a_server_scores_and_writes_nothing(place):
    teacher, student = place["teacher_model_name_or_path"], place["student_model_name_or_path"]
    here = load_pair(teacher, student, device="cpu")
    with serving(here.teacher, teacher) as server:
        there = load_pair(server.address, student, device="cpu")
        rows = examples_of(here)
        one, other = (gradient_of(pair, rows, dtype="float32") for pair in (here, there))
        assert math.isclose(one[0], other[0], rel_tol=1e-5)
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(one[1], other[1], strict=True))
        texts = [decode_examples(pair, rows, DecodeSettings(StudentOnly(), 8), range(4)) for pair in (here, there)]
        assert [r.to_json() for r in texts[0]] == [r.to_json() for r in texts[1]]
        for policy in (Switch(), AdaSwitch(), TeacherOnly()):
            with pytest.raises(ConfigError, match="behind a server"):
                decode_examples(there, rows, DecodeSettings(policy, 8), range(4))


# --- scores -------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_matching_tokens():
    """Divergences by hand, of references and of the student's own text; likelihoods of each model's own tokens."""
    pair = pair_of()
    rows, settings = examples_of(pair), EvalSettings(8, temperature=1.0, seeds=(3,), own_text=True, score_batch_size=3)
    student, teacher = (
        evaluate(pair, model, rows, TASKS["references"], settings) for model in (pair.student, pair.teacher)
    )
    side = pair.bridges[""].teacher
    with torch.no_grad():
        assert math.isclose(student.means()["forward_kl"], by_hand(pair, rows).item(), rel_tol=1e-9)
        nll = [
            -log_laws(model, prompt, ids, vocab).gather(1, torch.tensor(ids).unsqueeze(1)).mean().item()
            for model, prompt, ids, vocab in (
                (pair.student, rows[1].prompt_ids, rows[1].completion_ids, pair.vocab_size),
                (pair.teacher, rows[1].teacher_reads, rows[1].teacher_completion, side.vocab_size),
            )
        ]
        own = decode_examples(pair, rows, settings.decoding(3), range(4))
        apart = [by_hand(pair, [text]).item() for text in own]
    for result, value in zip((student, teacher), nll, strict=True):
        assert math.isclose(result.scores["perplexity"].values[0, 1], value, rel_tol=1e-9)
    assert [text.tokens for text in student.completions] == [len(text.completion_ids) for text in own]
    assert student.scores["own_forward_kl"].values[0].tolist() == pytest.approx(apart, rel=1e-9)
    assert teacher.means()["forward_kl"] == 0 and teacher.means()["own_forward_kl"] == 0


def test_a_trace_says_what_both_models_say_of_matching_tokens():
    pair = pair_of("sentencepiece", "coarse")  # of whose ids few are the places of shared tokens
    bridge, [text] = (
        pair.bridges[""],
        decode_examples(pair, examples_of(pair)[:1], DecodeSettings(Switch(), 12, seed=5), [0]),
    )
    found, [mine, theirs] = trace(Reader(pair), text), bridge.matches(text.completion_ids, text.teacher_completion)
    with torch.no_grad():
        q = log_laws(pair.student, text.prompt_ids, text.completion_ids, pair.vocab_size)
        p = log_laws(pair.teacher, text.teacher_reads, text.teacher_completion, bridge.teacher.vocab_size)
    ids = [torch.from_numpy(each) for each in bridge.shared]
    known = dict(zip(mine.tolist(), theirs.tolist(), strict=True))
    assert 0 < len(known) < len(text.completion_ids)
    for i, token in enumerate(text.completion_ids):
        assert math.isclose(found.log_probs[STUDENT][i], q[i, token].item(), rel_tol=1e-9)
        if i not in known:
            assert found.jsd[i] is None and found.log_probs[TEACHER][i] is None and found.top[TEACHER][i] == []
            continue
        own, other = p[known[i], ids[TEACHER]].softmax(0), q[i, ids[STUDENT]].softmax(0)
        middle = (own + other) / 2
        bits = ((own * (own / middle).log()).sum() + (other * (other / middle).log()).sum()).item() / 2 / math.log(2)
        best = own.argmax().item()
        assert math.isclose(found.jsd[i], bits, rel_tol=1e-6)
        assert found.top[TEACHER][i][0][0] == ids[STUDENT][best].item()
        assert math.isclose(
            found.log_probs[TEACHER][i], own[ids[STUDENT].tolist().index(token)].log().item(), rel_tol=1e-9
        )
