"""The loop: gradients independent of the split, choices keyed by (seed, step), resume equal to the straight run."""

import dataclasses
import json
import math
from contextlib import nullcontext

import pytest
import torch
from families import small_model
from tiny import VOCAB, retold, toy_examples, toy_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from switchkd import AdaSwitch, StudentOnly, Switch
from switchkd.base.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from switchkd.evaluation.evaluate import evaluate
from switchkd.evaluation.settings import EvalSettings
from switchkd.evaluation.tasks import TASKS
from switchkd.methods.mixes import Adaptive, Generated, Pairs
from switchkd.methods.objective import CrossEntropy
from switchkd.methods.objectives import DistiLLM2, ForwardKL, MiniLLM
from switchkd.runner.runner import Runner
from switchkd.training.checkpoint import checkpoints
from switchkd.training.learner import Part
from switchkd.training.optimizer import learning_rate
from switchkd.training.settings import TrainConfig
from switchkd.training.trainer import Trainer

SETTINGS = TrainConfig(
    policy=Switch(tau_0=0.6, decay=0.05),
    mix=Generated(0.5),
    objective=ForwardKL(),
    max_new_tokens=6,
    max_steps=6,
    per_device_train_batch_size=4,
    learning_rate=3e-3,
    save_steps=0,
    seed=3,
)


def trainer(folder, pair=None, examples=None, cache=None, validation=(), corpus=(), **changes):
    config = dataclasses.replace(SETTINGS, output_dir=str(folder), **changes)
    more = {"teacher_cache": cache, "validation": validation, "corpus": corpus}
    return Trainer(pair or toy_pair(), examples or toy_examples(), config, **more)


def weights(t):
    return {name: p.detach().clone() for name, p in t.pair.student.named_parameters()}


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def without_times(records):
    """What equal runs have in common: not how long they took, nor what the process held."""
    return [{k: v for k, v in r.items() if "second" not in k and k != "memory_gib"} for r in records]


def gradient_step(folder, **changes):
    t = trainer(folder, **changes)
    gradients = {}
    t.learner.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in t.pair.student.named_parameters()})
    )
    metrics, rollouts = t.train_step()
    return gradients, metrics, rollouts


@pytest.mark.parametrize("over", ["tokens", "sequences"])
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_accumulation_8x1_4x2_1x8_is_one_gradient(tmp_path, lmbda, over):
    """Also on ragged rows, where normalising each micro-batch by its own tokens would weigh rows differently."""
    runs = [
        gradient_step(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            mix=Generated(lmbda),
            loss_over=over,
            seed=1,
        )
        for size in (8, 4, 1)
    ]
    for gradients, metrics, rollouts in runs[1:]:
        assert metrics["loss"] == pytest.approx(runs[0][1]["loss"], rel=1e-12)
        assert [r.completion_ids for r in rollouts] == [r.completion_ids for r in runs[0][2]]
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, runs[0][0][name], atol=1e-12, rtol=1e-9)


def test_loss_is_normalised_by_the_tokens_in_it(tmp_path):
    _, metrics, rollouts = gradient_step(tmp_path, mix=Generated(1.0))
    assert metrics["num_tokens"] == sum(len(r.completion_ids) for r in rollouts)
    _, metrics, _ = gradient_step(tmp_path, mix=Generated(0.0))
    from switchkd.data.texts import batch_indices

    examples = toy_examples()
    used = [examples[i] for i in batch_indices(len(examples), 4, 0, SETTINGS.seed)]
    assert metrics["num_tokens"] == sum(len(e.completion_ids) for e in used)


def without_dropout():
    """A toy pair whose norms do not go through fp32."""
    pair = toy_pair("gpt2")
    for module in pair.student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return pair


def of_lengths(*lengths):
    """Ground-truth rows of the toy vocabulary with completions so long."""
    row = toy_examples(1)[0]
    tokens = [[2 + (5 * i + 7 * j) % 20 for j in range(length)] for i, length in enumerate(lengths)]
    return [retold(row, id=i, prompt_ids=[3, 4], completion_ids=ids) for i, ids in enumerate(tokens)]


@pytest.mark.parametrize("lengths", [(10, 40), (1, 30, 0, 7), (0, 0), (5, 5)])
def test_a_loss_over_texts_is_the_mean_of_their_means(tmp_path, lengths):
    """A text of 10 tokens weighs as much as one of 250, where over tokens it weighs .04; one without tokens weighs nothing.

    The loss that is reported is the one whose gradient is taken: finite differences of it agree.
    """
    rows, settings = of_lengths(*lengths), {"mix": Generated(0.0), "max_grad_norm": 0.0}
    settings |= {"per_device_train_batch_size": len(lengths), "loss_over": "sequences", "learning_rate": 0.0}

    def step(examples, **changes):
        return gradient_step(tmp_path, examples=examples, pair=without_dropout(), **settings | changes)

    (gradients, metrics, _) = step(rows)
    one = {"per_device_train_batch_size": 1}
    alone = [step([row], **one) for row in rows if row.completion_ids]
    assert metrics["loss"] == pytest.approx(sum(m["loss"] for _, m, _ in alone) / max(len(alone), 1), rel=1e-12)
    assert metrics["num_tokens"] == sum(lengths)
    for name, gradient in gradients.items():
        mean = sum(own[name] for own, *_ in alone) / max(len(alone), 1)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) + mean, atol=1e-12, rtol=1e-9)
    if len(set(lengths)) > 1:
        assert step(rows, loss_over="tokens")[1]["loss"] != pytest.approx(metrics["loss"], rel=1e-3)


def test_a_loss_over_texts_leaves_the_corpus_and_the_validation_loss_over_tokens(tmp_path):
    corpus, validation = of_lengths(3, 30), of_lengths(2, 20)
    found = {}
    for over in ("tokens", "sequences"):
        more = {"corpus": corpus, "validation": validation, "mix": Adaptive(validation_steps=1), "loss_over": over}
        t = trainer(tmp_path, per_device_train_batch_size=2, objective=CrossEntropy(), **more)
        found[over] = t.train_step()[0] | {"validation": t.reading.memory["loss"]}
    for name in ("lm_loss", "validation"):
        assert found["sequences"][name] == pytest.approx(found["tokens"][name], rel=1e-12)
    assert found["sequences"]["loss"] != pytest.approx(found["tokens"]["loss"], rel=1e-6)


@pytest.mark.parametrize("objective", [MiniLLM(alpha=0.0, clip=1e9), DistiLLM2()])
def test_a_loss_over_texts_goes_with_pairs_and_with_returns(tmp_path, objective):
    """Every text by its own mean, whoever wrote it, and whatever chunks the loss is computed in."""
    stored = [dataclasses.replace(example, speakers=[1] * len(example.completion_ids)) for example in toy_examples()]
    more = {"policy": StudentOnly(), "mix": Pairs(), "objective": objective, "per_device_train_batch_size": 2}
    t = trainer(tmp_path, without_dropout(), stored, learning_rate=0.0, loss_over="sequences", **more)
    seen, loss = [], t.learner.loss
    t.learner.loss = lambda rows, own: seen.append(rows) or loss(rows, own)
    metrics, _ = t.train_step()
    over_tokens = trainer(tmp_path, without_dropout(), stored, **more)
    rows = [row for part in seen for row in part]
    means = [over_tokens.learner.loss([row], objective).item() / len(row.completion_ids) for row in rows]
    assert len(rows) == 4 and metrics["loss"] == pytest.approx(sum(means) / 4, rel=1e-9)


def test_a_data_batch_and_a_generated_batch_with_equal_ids_give_one_loss(tmp_path):
    gradients, metrics, rollouts = gradient_step(tmp_path, mix=Generated(1.0))
    t = trainer(tmp_path, mix=Generated(0.0))
    [loss], tokens, norm = t.learner.update(
        [Part([dataclasses.replace(r, said=None) for r in rollouts], ForwardKL())], t.step, 1e-3
    )
    assert (loss, norm) == pytest.approx((metrics["loss"], metrics["grad_norm"]), abs=1e-10)
    assert gradients and tokens == metrics["num_tokens"]


def test_the_teacher_reads_generated_text_once(tmp_path):
    """What it computed while decoding serves the loss; text that it has not seen is read in one forward."""
    t = trainer(tmp_path, mix=Generated(1.0))
    rollouts = t.reading.generate(t.reading.next(t.examples), t.step, t.schedule, None)
    assert all(len(r.said) == len(r.completion_ids) for r in rollouts)
    calls = []
    t.pair.teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    t.learner.update([Part(rollouts, ForwardKL())], t.step, 1e-3)
    assert not calls
    t.learner.update([Part([dataclasses.replace(r, said=None) for r in rollouts], ForwardKL())], t.step, 1e-3)
    assert len(calls) == t.config.gradient_accumulation_steps


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resumed_run_is_the_straight_run_bit_for_bit(tmp_path, dropout):
    """Prompts, tokens, losses, moments and weights; also with dropout, which is keyed by the step."""
    family = "gpt2" if dropout else "llama"

    def pair():
        made = toy_pair(family)
        for module in made.student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        return made

    straight = trainer(tmp_path / "straight", pair(), save_steps=1, save_total_limit=2)
    straight.train()
    for crash in (3, 5, None):
        part = trainer(tmp_path / "parts", pair(), save_steps=1, save_total_limit=2)
        torch.rand(crash or 1)  # another process, another global random state
        if crash != 3:
            part.resume()
            assert part.step == (2 if crash else 4)

        def on_step(metrics, _, crash=crash):
            """The line of the step is written and its checkpoint is not when the process dies."""
            if metrics["step"] == crash:
                with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
                    file.write('{"step": 9, "lo')
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) if crash else nullcontext():
            part.train(on_step)
    expected, ours = weights(straight), weights(part)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    for a, b in zip(straight.pair.student.parameters(), part.pair.student.parameters(), strict=True):
        assert (
            straight.learner.optimizer.state[a].keys()
            == part.learner.optimizer.state[b].keys()
            >= {"exp_avg", "exp_avg_sq"}
        )
        for key, moment in straight.learner.optimizer.state[a].items():
            assert torch.equal(moment, part.learner.optimizer.state[b][key])
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert without_times(lines(tmp_path / "parts", name)) == without_times(lines(tmp_path / "straight", name))


def test_steps_choose_data_or_generation_by_seed_and_step_alone(tmp_path):
    t = trainer(tmp_path, mix=Generated(0.3))
    choices = []
    for t.step in range(400):
        choices.append(t.reading.source(t.step, t.schedule))
    assert 90 < choices.count("policy") < 150 and set(choices) == {"policy", "examples"}
    other = trainer(tmp_path / "other", mix=Generated(0.3))
    other.step = 17
    assert other.reading.source(other.step, other.schedule) == choices[17]
    assert trainer(tmp_path, mix=Generated(0.0)).reading.source(0, 0.0) == "examples"
    assert trainer(tmp_path, mix=Generated(1.0)).reading.source(0, 0.0) == "policy"


def test_each_step_draws_other_text_for_the_same_prompts(tmp_path):
    t = trainer(tmp_path, examples=toy_examples(4), policy=StudentOnly(), mix=Generated(1.0), learning_rate=0.0)
    texts = [sorted((r.prompt_ids, r.completion_ids) for r in t.train_step()[1]) for _ in range(3)]
    assert [[p for p, _ in text] for text in texts][1:] == [[p for p, _ in text] for text in texts][:-1]
    assert texts[0] != texts[1] != texts[2]


@pytest.mark.parametrize("policy", [StudentOnly(), Switch(tau_0=0.6, decay=0.05), AdaSwitch(window=2, ratio=1.1)])
def test_the_student_learns(tmp_path, policy):
    t = trainer(
        tmp_path, policy=policy, mix=Generated(1.0), max_steps=40, lr_scheduler_type="constant", learning_rate=1e-2
    )
    t.train()
    losses = [m["loss"] for m in lines(tmp_path, "metrics.jsonl")]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_teacher_gets_no_gradient_and_does_not_move(tmp_path):
    t = trainer(tmp_path, mix=Generated(1.0))
    before = [p.clone() for p in t.pair.teacher.parameters()]
    t.train_step()
    assert all(p.grad is None and not p.requires_grad for p in t.pair.teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, t.pair.teacher.parameters(), strict=True))
    assert not t.pair.teacher.training


def test_sampling_temperature_and_loss_temperature_each_reach_their_own(tmp_path):
    _, base, text = gradient_step(tmp_path, mix=Generated(1.0))
    _, hotter_loss, same_text = gradient_step(tmp_path, mix=Generated(1.0), objective=ForwardKL(temperature=2.0))
    _, _, other_text = gradient_step(tmp_path, mix=Generated(1.0), temperature=2.0)
    ids = [[r.completion_ids for r in rollouts] for rollouts in (text, same_text, other_text)]
    assert ids[0] == ids[1] != ids[2]
    assert hotter_loss["loss"] != base["loss"]
    on_data = [gradient_step(tmp_path, mix=Generated(0.0), temperature=t)[1]["loss"] for t in (1.0, 2.0)]
    assert on_data[0] == on_data[1]


def test_non_finite_logits_while_generating_name_model_sample_and_position(tmp_path):
    t = trainer(tmp_path, mix=Generated(1.0))
    with torch.no_grad():
        t.pair.student.lm_head.weight[3, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"step 1, toy:\d+: the student's logits .*sample \d, response position 0"):
        t.train_step()


def test_a_prompt_that_cannot_be_decoded_is_named(tmp_path):
    t = trainer(tmp_path, mix=Generated(1.0), max_new_tokens=64)
    with pytest.raises(DataError, match=r"toy:\d+: sample \d: \d prompt tokens \+ max_new_tokens 64 exceed"):
        t.train_step()


def test_empty_responses_only(tmp_path):
    examples = [retold(e, completion_ids=[]) for e in toy_examples(4)]
    t = trainer(tmp_path, examples=examples, mix=Generated(0.0))
    metrics, _ = t.train_step()
    assert metrics["loss"] == 0.0 and metrics["num_tokens"] == 0


def test_learning_rates():
    config = dataclasses.replace(SETTINGS, learning_rate=1.0, warmup_steps=4)
    rates = [learning_rate(config, step, 12) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.5) and rates[12] == pytest.approx(0.0)
    constant = dataclasses.replace(config, lr_scheduler_type="constant")
    assert learning_rate(constant, 11, 12) == 1.0


def test_epochs_count_steps(tmp_path):
    assert trainer(tmp_path, max_steps=-1, num_train_epochs=2.0).total_steps == 6
    assert trainer(tmp_path, max_steps=5).total_steps == 5


def test_weight_decay_spares_norms_and_biases(tmp_path):
    t = trainer(tmp_path, toy_pair("gpt2"), weight_decay=0.3)
    decays = {g["weight_decay"]: {p.dim() for p in g["params"]} for g in t.learner.optimizer.param_groups}
    assert decays == {0.3: {2}, 0.0: {1}}


def test_clipping(tmp_path):
    gradients, metrics, _ = gradient_step(tmp_path, mix=Generated(0.0), max_grad_norm=1e-3)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    assert metrics["grad_norm"] > 1e-2 and norm == pytest.approx(1e-3, rel=1e-3)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, _, _ = gradient_step(tmp_path, mix=Generated(1.0))
    checkpointed, _, _ = gradient_step(tmp_path, mix=Generated(1.0), gradient_checkpointing=True)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-12, rtol=1e-9)


def test_checkpoints_open_with_transformers_alone_and_the_oldest_go(tmp_path):
    t = trainer(tmp_path, save_steps=2, save_total_limit=2)
    t.train()
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6", dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), t.pair.student.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "checkpoint-6").eos_token == "<|im_end|>"


def test_models_that_keep_a_state_resume_bit_for_bit(tmp_path):
    """Qwen3.5 teaches Qwen3.5: text is switched, the student learns from it, and a run that stopped goes on."""

    def pair():
        return toy_pair(make=lambda _, seed, dtype: small_model("qwen3_5_text", seed).to(dtype))

    straight = trainer(tmp_path / "straight", pair(), mix=Generated(1.0), max_steps=3, save_steps=1)
    before = weights(straight)
    straight.train()
    assert any(not torch.equal(before[name], after) for name, after in weights(straight).items())
    speakers = {speaker for row in lines(tmp_path / "straight", "rollouts.jsonl") for speaker in row["speakers"]}
    assert speakers == {0, 1}

    def stop(metrics, _):
        if metrics["step"] == 2:
            raise KeyboardInterrupt

    part = trainer(tmp_path / "parts", pair(), mix=Generated(1.0), max_steps=3, save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        part.train(stop)
    part = trainer(tmp_path / "parts", pair(), mix=Generated(1.0), max_steps=3, save_steps=1)
    part.resume()
    part.train()
    expected, ours = weights(straight), weights(part)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_no_checkpoint_to_resume_from(tmp_path):
    with pytest.raises(CheckpointError, match="start without --resume"):
        trainer(tmp_path).resume()


def test_a_frozen_student_is_refused(tmp_path):
    pair = toy_pair()
    pair.student.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable parameters"):
        trainer(tmp_path, pair)


def test_metrics_say_who_spoke_and_what_it_cost(tmp_path):
    t = trainer(tmp_path, mix=Generated(1.0), policy=AdaSwitch(window=1, ratio=0.0))
    seen = []
    metrics, rollouts = t.train_step(seen.append)
    assert seen[-1].kept_tokens == rollouts.cost.kept_tokens == sum(len(r.completion_ids) for r in rollouts)
    assert all(r.speakers == [0] + [1] * (len(r.speakers) - 1) for r in rollouts)
    tokens = sum(len(r.speakers) for r in rollouts)
    assert metrics["switch/teacher_share"] == pytest.approx(sum(sum(r.speakers) for r in rollouts) / tokens)
    assert metrics["switch/first_switch"] == 1.0
    assert 0 < metrics["decode/student_forwards_per_token"] < 1
    assert max(max(r.completion_ids) for r in rollouts) < VOCAB


@pytest.mark.parametrize("eval_steps", [0, 1, 2])
def test_evaluating_in_the_run_changes_nothing_in_it(tmp_path, eval_steps):
    """Weights, moments, tokens and losses, also with dropout and with sampled completions (trap 19)."""

    def run(folder, **changes):
        pair = toy_pair("gpt2")
        pair.tokenizer.batch_decode = lambda rows, **_: [str(row) for row in rows]
        for module in pair.student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        t, calls = trainer(folder, pair, **changes), []

        def scores(student):
            calls.append(t.step)
            settings = EvalSettings(max_new_tokens=4, temperature=1.0, seeds=(1, 2), batch_size=3)
            return evaluate(pair, student, toy_examples(4), TASKS["references"], settings).means()

        t.train(evaluate=scores)
        return t, calls

    plain, none = run(tmp_path / "plain")
    seen, calls = run(tmp_path / "seen", eval_steps=eval_steps)
    assert none == [] and calls == ([] if not eval_steps else list(range(eval_steps, 7, eval_steps)))
    assert all(torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(seen).values(), strict=True))
    ours, theirs = (without_times(lines(tmp_path / name, "metrics.jsonl")) for name in ("seen", "plain"))
    assert [m["step"] for m in ours if "eval/rouge_l" in m] == calls
    assert [{k: v for k, v in m.items() if not k.startswith("eval/")} for m in ours] == theirs
    assert lines(tmp_path / "seen", "rollouts.jsonl") == lines(tmp_path / "plain", "rollouts.jsonl")


@pytest.mark.parametrize(("metric", "best"), [("rouge_l", 2), ("forward_kl", 4)])
def test_the_best_student_is_kept_also_over_a_stop(tmp_path, metric, best):
    scores = {1: 3.0, 2: 7.0, 3: 7.0, 4: 1.0, 5: 2.0, 6: 5.0}
    made = {}

    def part(stop=None):
        t = trainer(tmp_path, eval_steps=1, metric_for_best_model=metric, save_steps=1)
        if stop is None:
            t.resume()

        def evaluate_(student):
            made[t.step] = {name: p.clone() for name, p in student.named_parameters()}
            if t.step == stop:
                raise KeyboardInterrupt
            return {metric: scores[t.step]}

        with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
            t.train(evaluate=evaluate_)
        return t

    part(stop=4)
    assert part().best == {"step": best, "score": scores[best]}
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / f"best-{best}", dtype=torch.float64)
    assert all(torch.equal(p, made[best][name]) for name, p in kept.named_parameters())


def test_a_run_ends_when_its_tokens_are_trained_on(tmp_path):
    t = trainer(tmp_path, max_steps=-1, max_train_tokens=150, warmup_steps=2, save_steps=3)
    t.train()
    metrics = lines(tmp_path, "metrics.jsonl")
    assert metrics[-2]["num_tokens"] < 150 <= metrics[-1]["num_tokens"] and t.progress == 1
    rates = [m["learning_rate"] for m in metrics]
    assert rates[1] == SETTINGS.learning_rate and rates[-1] < 0.4 * rates[1]
    assert checkpoints(tmp_path)[-1].name == f"checkpoint-{t.step}"
    again = trainer(tmp_path, max_steps=-1, max_train_tokens=150, warmup_steps=2, save_steps=3)
    again.resume()
    assert again.progress == 1
    capped = trainer(tmp_path / "capped", max_steps=2, max_train_tokens=150)
    capped.train()
    assert capped.step == 2


def test_a_run_ends_when_its_time_is_over_and_remembers_it(tmp_path):
    t = trainer(tmp_path, max_steps=-1, max_train_seconds=1e9, save_steps=1)
    t.train_step()
    t.save()
    assert 0 < t.progress < 1
    seconds = t.seconds
    t = trainer(tmp_path, max_steps=-1, max_train_seconds=1.5 * seconds, save_steps=1)
    t.resume()
    assert t.seconds == seconds and t.progress == pytest.approx(1 / 1.5)
    t.seconds += 0.49 * seconds
    t.train()
    assert t.step == 2 and t.progress == 1


def test_a_best_student_needs_evaluations():
    with pytest.raises(ConfigError, match="give eval_steps, eval_samples"):
        dataclasses.replace(SETTINGS, metric_for_best_model="rouge_l")


def test_what_decoding_has_prepared_is_kept_from_step_to_step(tmp_path, monkeypatch):
    """Of both models one runner serves all steps of a run: the teacher's packed weights are made once."""
    t, made, init = trainer(tmp_path, mix=Generated(1.0), max_steps=3), [], Runner.__init__
    monkeypatch.setattr(Runner, "__init__", lambda self, model, *rest: made.append(model) or init(self, model, *rest))
    for _ in range(3):
        t.train_step()
    assert made == [t.pair.student, t.pair.teacher]
