"""A teacher behind a server says what it says in this process; what fails in passing is waited for, all else is refused by name."""

import copy
import dataclasses
import functools
import json
import signal

import pytest
import torch
from fake_server import serving
from safetensors.torch import load_file
from tiny import FAMILIES, byte_level_tokenizer, pair_on_disk, save_llama
from tokenizers import normalizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from switchkd.base import signals
from switchkd.base.errors import ConfigError, ModelError, ServerError, SwitchKDWarning, VocabularyError
from switchkd.data.texts import TokenizedExample
from switchkd.forward import server as server_module
from switchkd.forward.served import ServedModel, output_law
from switchkd.methods.policy import REFERENCE
from switchkd.models import served_teacher
from switchkd.models.pair import load_pair
from switchkd.runs.distil import distil
from switchkd.runs.opening import load_training_text, open_pair
from switchkd.teachers.asked import text_reader
from switchkd.teachers.states import TeacherCache
from switchkd.teachers.store import weights_sha256
from switchkd.training.settings import TrainConfig, load_recipe
from switchkd.training.trainer import Trainer

ROWS = [([5 + i, 9, 40 + i], [7 + (i * 5 + j) % 90 for j in range(3 * i)]) for i in range(6)]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path_factory):
    """No waiting, and a cache of its own."""
    monkeypatch.setattr(server_module, "_PAUSES", (0.01, 0.02))
    monkeypatch.setattr(served_teacher, "OPENING", 0.1)
    monkeypatch.setattr(served_teacher, "PATIENCE", 0.3)
    monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    return pair_on_disk(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def model(names):
    return AutoModelForCausalLM.from_pretrained(names["teacher_model_name_or_path"]).eval()


@pytest.fixture(scope="module")
def other():
    """A model of the same architecture with other weights."""
    return lambda model: type(model)(model.config).eval()


@pytest.fixture
def server(model, names):
    with serving(model, names["teacher_model_name_or_path"]) as running:
        yield running


def both(server, names):
    """Whoever reads the teacher behind the server, and in this process."""
    student = names["student_model_name_or_path"]
    pairs = [load_pair(name, student) for name in (server.address, names["teacher_model_name_or_path"])]
    return [text_reader(pair.teacher, pair.vocab_size, pair.ends) for pair in pairs]


def settings(names, recipe, folder, **changes):
    return dataclasses.replace(
        load_recipe(recipe), **names, output_dir=str(folder), max_steps=3, max_new_tokens=8, per_device_train_batch_size=4,
        eval_samples=2, eval_max_new_tokens=4, sample_prompts=1, template="none", max_prompt_length=64, max_completion_length=32,
        save_steps=1, quiet=True, **changes,
    )  # fmt: skip


def lines(run, name):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


# --- it says the same ---------------------------------------------------------------------------------------------


def test_it_says_what_the_model_says_here_in_several_requests(server, names, monkeypatch):
    monkeypatch.setattr("switchkd.forward.served.REQUEST_TOKENS", 20)
    served, local = both(server, names)
    hidden = served.hidden(ROWS)
    assert hidden.shape == (sum(len(completion) for _, completion in ROWS), 16) and server.asked > len(ROWS)
    torch.testing.assert_close(hidden, local.hidden(ROWS), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(served.log_probs(hidden), local.log_probs(local.hidden(ROWS)), rtol=1e-5, atol=1e-6)


def _tiny(config, model, **more):
    sizes = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    tokens = dict(vocab_size=len(byte_level_tokenizer()), pad_token_id=0, bos_token_id=None, eos_token_id=1, head_dim=4)
    return lambda: model(config(**sizes | tokens | more))


LAWS = {
    "capped": _tiny(Gemma2Config, Gemma2ForCausalLM, final_logit_softcapping=0.5),
    "divided": _tiny(GraniteConfig, GraniteForCausalLM, logits_scaling=4.0),
    "multiplied": _tiny(CohereConfig, CohereForCausalLM, logit_scale=0.25),
    "gpt2": FAMILIES["gpt2"],
    "opt": FAMILIES["opt"],
}


@pytest.mark.parametrize("law", LAWS)
def test_whatever_follows_on_the_output_layer_follows_here_too(tmp_path, law):
    """Of a tied one, of one in several files, with a cap or a scale."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LAWS[law]().eval()
    model.save_pretrained(tmp_path, max_shard_size="8KB" if law in ("capped", "opt") else "5GB")
    names, scale, cap = output_law(model.config)
    weight, bias = served_teacher._output_layer(str(tmp_path), True, names)
    ids = torch.tensor([[3, 8, 2, 5]])
    with torch.no_grad():
        logits = torch.nn.functional.linear(model.base_model(ids).last_hidden_state, weight, bias) * scale
        logits = logits if cap is None else cap * (logits / cap).tanh()
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("law", ["capped", "divided", "multiplied"])
def test_log_probabilities_behind_a_server_have_scale_and_cap(tmp_path, names, law):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LAWS[law]().eval()
    model.save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    with serving(model, str(tmp_path)) as running:
        served, local = both(running, {**names, "teacher_model_name_or_path": str(tmp_path)})
        ours, theirs = (reader.log_probs(reader.hidden(ROWS)) for reader in (served, local))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ours.std() > 0.01  # a law of equal chances would say nothing


def test_a_model_that_does_more_before_its_output_layer_is_refused(model):
    def doubled(_, __, output):
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    class Doubling(type(model)):
        def forward(self, *args, **kwargs):
            handle = self.model.register_forward_hook(doubled)
            try:
                return super().forward(*args, **kwargs)
            finally:
                handle.remove()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("switchkd.forward.served.model_class", lambda _: Doubling)
        with pytest.raises(ModelError, match="last hidden states"):
            output_law(model.config)


@pytest.mark.parametrize("recipe", ["on_policy", "kd", "distillm"])
def test_a_run_is_the_run_with_the_teacher_here(server, names, tmp_path, recipe):
    """Text and speakers equal, losses and gradients but for rounding; scores of the teacher's own text are left out."""
    results = {}
    for place, teacher in ("here", names["teacher_model_name_or_path"]), ("there", server.address):
        mine = names | {"teacher_model_name_or_path": teacher}
        results[place] = distil(settings(mine, recipe, tmp_path / place))
    for name in ("rollouts.jsonl", "samples.jsonl") if recipe == "on_policy" else ("samples.jsonl",):
        here, there = lines(tmp_path / "here", name), lines(tmp_path / "there", name)
        assert [row["completion_ids"] for row in here] == [row["completion_ids"] for row in there]
        assert [row["speakers"] for row in here] == [row["speakers"] for row in there]
    steps = zip(*(lines(tmp_path / place, "metrics.jsonl") for place in ("here", "there")), strict=True)
    for here, there in steps:
        assert [there[k] for k in ("loss", "grad_norm")] == pytest.approx(
            [here[k] for k in ("loss", "grad_norm")], rel=1e-5
        )
    assert results["there"].keys() == results["here"].keys() - {"teacher"}
    after = [results[place]["student after"].means()["forward_kl"] for place in ("here", "there")]
    assert after[0] == pytest.approx(after[1], rel=1e-4) and after[0] > 0


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_a_store_is_the_store_of_the_teacher_here_and_needs_no_server_afterwards(server, names, tmp_path, kind):
    student, stored = names["student_model_name_or_path"], {}
    examples = [TokenizedExample(i, *row, [REFERENCE] * len(row[1]), (), False, "") for i, row in enumerate(ROWS)]
    for place, teacher in ("here", names["teacher_model_name_or_path"]), ("there", server.address):
        pair = load_pair(teacher, student)
        stored[place] = TeacherCache.build(pair, examples, tmp_path / place, kind, top_k=4)
    server.stop()
    again = TeacherCache.open(pair, examples, tmp_path / "there", kind, top_k=4)
    for i in range(len(ROWS)):
        here, *there = (getattr(cache, kind)(i) for cache in (stored["here"], stored["there"], again))
        for each in there:
            torch.testing.assert_close(each, here, rtol=1e-5, atol=1e-5)
    with pytest.raises(ServerError), pytest.warns(SwitchKDWarning):
        text_reader(pair.teacher, pair.vocab_size).hidden(ROWS)
    server.start()


def test_a_run_on_a_store_trains_without_the_server(server, names, tmp_path):
    """It is asked before the first step, and then no more."""
    run = settings(names | {"teacher_model_name_or_path": server.address}, "kd", tmp_path / "run", teacher_cache="hidden",
                   teacher_store_dir=str(tmp_path / "store"), sample_steps=0, eval_on_start=False)  # fmt: skip
    pair = open_pair(run, quiet=True, train=True)
    examples, cache = load_training_text(run, pair, quiet=True)
    server.stop()
    trainer = Trainer(pair, examples, run, teacher_cache=cache)
    trainer.train()
    assert trainer.step == 3 and lines(tmp_path / "run", "metrics.jsonl")[-1]["loss"] > 0
    server.start()


# --- what passes, and what does not -------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [500, 503, 429, "drop", "half", "cut", "slow"])
def test_what_fails_in_passing_is_asked_again(server, names, fault):
    served, local = both(server, names)
    served.model.server = dataclasses.replace(served.model.server, timeout=0.3, patience=5.0)
    server.faults = [fault] * 2
    with pytest.warns(SwitchKDWarning, match="no usable answer"):
        hidden = served.hidden(ROWS)
    torch.testing.assert_close(hidden, local.hidden(ROWS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fault, words", [
    (400, "answers 400: told to say 400"), (404, "answers 404"), ("shape", "one row a token"), ("dtype", "another dtype"),
    ("nonsense", "without the shapes"),
])  # fmt: skip
def test_what_does_not_pass_is_an_error_at_once(server, names, fault, words):
    served, _ = both(server, names)
    server.faults = [fault]
    with pytest.raises(ServerError, match=words):
        served.hidden(ROWS)


def test_a_server_that_stays_away_is_an_error_after_a_while(server, names):
    served, _ = both(server, names)
    server.faults = [500] * 1000
    with pytest.raises(ServerError, match=r"no usable answer .* for 0.3 seconds"), pytest.warns(SwitchKDWarning):
        served.hidden(ROWS)


def test_a_signal_ends_the_waiting(server, names):
    served, _ = both(server, names)
    server.faults = [500] * 1000
    served.model.server = dataclasses.replace(served.model.server, patience=60.0)
    with signals.deferred(), pytest.warns(SwitchKDWarning), pytest.raises(signals.Stopped):
        signal.raise_signal(signal.SIGTERM)
        served.hidden(ROWS)


def test_another_model_behind_the_same_address_is_refused_and_the_same_one_is_not(server, names, model, other):
    served, local = both(server, names)
    server.stop()
    server.restart()
    torch.testing.assert_close(served.hidden(ROWS), local.hidden(ROWS), rtol=1e-5, atol=1e-6)
    server.stop()
    server.restart(other(model))
    with pytest.raises(ServerError, match="serves another model than before"):
        served.hidden(ROWS)


def test_a_text_beyond_the_servers_length_is_refused_before_it_is_sent(server, names):
    served, _ = both(server, names)
    asked = server.asked
    with pytest.raises(ModelError, match=r"300 tokens exceeds max_model_len 256 .*--max-model-len 300"):
        served.hidden([([5], [6] * 300)])
    assert server.asked == asked


# --- what is refused before anything has begun --------------------------------------------------------------------


def test_a_server_that_does_not_answer_as_it_must_is_refused_with_the_way_out(server, names, tmp_path):
    def opened(**more):
        return load_pair(server.address, names["student_model_name_or_path"], **more)

    server.normalised = True
    with pytest.raises(ServerError, match=r'normalised .*"use_activation":false'):
        opened()
    server.normalised, server.kind = False, "generate"
    with pytest.raises(ServerError, match=f"generate alone; start it with: vllm serve {server.root} --runner pooling"):
        opened()
    server.kind, server.root = "pooling", "/not/here"
    with pytest.raises(ModelError, match=r"not on this machine.*--teacher-files"):
        opened()
    assert isinstance(opened(teacher_files=names["teacher_model_name_or_path"]).teacher, ServedModel)
    save_llama(tmp_path / "wide", byte_level_tokenizer(), 1, hidden_size=32)
    with pytest.raises(ModelError, match=r"sends 16 numbers a token.*--teacher-files"):
        opened(teacher_files=str(tmp_path / "wide"))
    foreign = byte_level_tokenizer(specials=("<x>", "<|im_end|>"))
    foreign.backend_tokenizer.normalizer = normalizers.Lowercase()
    save_llama(tmp_path / "foreign", foreign, 1)
    with pytest.raises(VocabularyError, match="changes text"):
        opened(teacher_files=str(tmp_path / "foreign"))
    server.stop()
    with pytest.raises(ServerError, match="no usable answer"), pytest.warns(SwitchKDWarning):
        opened()
    server.start()


@pytest.mark.parametrize("recipe", ["switch", "skd", "relay", "minillm", "trb"])
def test_a_rule_that_asks_at_every_token_is_refused_before_anything_is_loaded(names, recipe):
    nobody = names | {"teacher_model_name_or_path": "http://127.0.0.1:9"}
    with pytest.raises(ConfigError, match=r"asks the teacher at every token.*--teacher-tensor-parallel"):
        open_pair(dataclasses.replace(load_recipe(recipe), **nobody))


def test_files_without_a_server_are_refused(names):
    with pytest.raises(ConfigError, match="teacher_files"):
        TrainConfig(**names, teacher_files="somewhere")


# --- which model it is --------------------------------------------------------------------------------------------


def test_rounding_leaves_the_checksum_and_another_model_does_not(server, names, model, other):
    def checksum():
        return weights_sha256(load_pair(server.address, names["student_model_name_or_path"]).teacher)

    first = checksum()
    rounded, little = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        rounded.model.norm.weight *= 1 + 1e-6
        little.model.layers[0].mlp.down_proj.weight *= 1.1
    server.model = rounded
    assert checksum() == first
    server.model = little
    assert checksum() != first
    server.model = other(model)
    assert checksum() != first
    server.model, server.longest = model, 128
    assert checksum() != first
    server.longest = 256
    assert checksum() == first


def test_a_server_that_dies_stops_the_run_at_a_whole_step_from_which_it_goes_on(server, names, model, other, tmp_path):
    """At another address too; and not with another model behind it."""
    mine = names | {"teacher_model_name_or_path": server.address}
    distil(settings(mine, "on_policy", tmp_path / "straight"))
    asked, server.asked = server.asked, 0

    def dies(self, *given, reply=server.reply):
        if server.asked > asked // 2:
            server.faults = ["drop"]
        reply(*given)

    server.reply = functools.partial(dies, server)
    # Nothing is saved but where the run begins and where it stops.
    run = dataclasses.replace(settings(mine, "on_policy", tmp_path / "run"), save_steps=0)
    with pytest.raises(ServerError) as died, pytest.warns(SwitchKDWarning):
        distil(run)
    done = len(lines(tmp_path / "run", "metrics.jsonl"))
    assert 0 < done < 3 and f"checkpoint-{done} stands" in died.value.__notes__[-1]
    root = names["teacher_model_name_or_path"]
    with serving(other(model), root) as wrong, pytest.raises(ConfigError, match="other contents"):
        distil(dataclasses.replace(run, teacher_model_name_or_path=wrong.address, resume=True))
    with serving(model, root) as right:
        distil(dataclasses.replace(run, teacher_model_name_or_path=right.address, resume=True))
    for folder in "straight", "run":
        assert len(lines(tmp_path / folder, "metrics.jsonl")) == 3
    weights = [load_file(tmp_path / folder / "student" / "model.safetensors") for folder in ("straight", "run")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
