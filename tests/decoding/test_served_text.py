"""Text that a student begins and a teacher behind servers ends is the engine's, whatever the server drafts."""

import dataclasses
import sys
import types
import warnings

import pytest
import torch
from fake_server import serving
from test_served import lines, names, quick, settings  # noqa: F401  # fixtures
from tiny import assert_same, byte_level_tokenizer, save_llama, toy_examples
from transformers import AutoModelForCausalLM

from switchkd.base.errors import ConfigError, ModelError, ServerError, SwitchKDWarning
from switchkd.decoding import served as served_module
from switchkd.decoding.settings import DecodeSettings
from switchkd.methods.policies import AdaSwitch
from switchkd.methods.policy import STUDENT, TEACHER, TeacherOnly
from switchkd.methods.sampling import gumbel_noise, keys_tensor, noise_key, row_key
from switchkd.models.pair import load_pair
from switchkd.runs.distil import distil
from switchkd.runs.opening import open_pair
from switchkd.training.settings import load_recipe
from switchkd.writing.examples import decode_examples
from switchkd.writing.teacher_texts import teacher_texts

RULES = {
    "adaswitch": AdaSwitch(window=2, ratio=1.1),
    "by the student": AdaSwitch(window=3, ratio=1.2, divergence="tvd", switch_token_by="student", require_full_window=False),
    "never": AdaSwitch(window=2, ratio=1e9),
    "at once": AdaSwitch(window=1, ratio=0.0, floor=0.0),
    "teacher_only": TeacherOnly(),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pair that speaks in different ways."""
    folder, tokenizer = tmp_path_factory.mktemp("peaked"), byte_level_tokenizer()
    found = [
        save_llama(folder / role, tokenizer, seed, eos_token_id=1) for role, seed in (("teacher", 1), ("student", 2))
    ]
    for name in found:
        model = AutoModelForCausalLM.from_pretrained(name)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(found.index(name))
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.35)
            model.get_output_embeddings().weight.mul_(0.5)
        model.save_pretrained(name)
    return found


@pytest.fixture(scope="module")
def here(folders):
    return load_pair(*folders)


@pytest.fixture
def servers(folders, here):
    with serving(here.teacher, folders[0]) as reads, serving(here.teacher, folders[0], kind="generate") as writes:
        yield reads, writes


def opened(servers, folders):
    return load_pair(servers[0].address, folders[1], teacher_writer=servers[1].address)


def examples(count=7):
    return [
        dataclasses.replace(each, prompt_ids=[40 + each.id, 50, 60][: 1 + each.id % 3]) for each in toy_examples(count)
    ]


def text(pair, rule, count=7, **changes):
    how = DecodeSettings(rule, **dict(max_new_tokens=24, seed=3) | changes)
    return decode_examples(pair, examples(count), how, range(count))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", RULES)
def test_text_is_the_engines(servers, folders, here, rule, temperature):
    """Also where pieces of a few positions are decided at a time, and where a row's draft goes wrong halfway."""
    theirs = text(opened(servers, folders), RULES[rule], temperature=temperature)
    assert_same(theirs, text(here, RULES[rule], temperature=temperature))
    assert theirs.cost.kept_tokens == sum(len(r.completion_ids) for r in theirs)
    assert theirs.cost.teacher_tokens == sum(sum(r.speakers) for r in theirs)
    if rule == "adaswitch":
        assert {STUDENT, TEACHER} == {who for r in theirs for who in r.speakers}
        assert len({r.speakers.index(TEACHER) for r in theirs if TEACHER in r.speakers}) > 2
        assert theirs.cost.rounds <= 4


@pytest.mark.parametrize("rule", ["adaswitch", "teacher_only"])
def test_the_writer_moves_rounds_and_never_text(servers, folders, here, rule, monkeypatch):
    """One that draws otherwise, one of another model, cuts that it does not know: and the first is said."""
    monkeypatch.setattr(served_module, "_SHORTEST", 2)
    monkeypatch.setattr(served_module, "_ENOUGH", 10)

    def short(pair, **changes):
        return text(pair, RULES[rule], count=3, max_new_tokens=12, **changes)

    pair, own = opened(servers, folders), short(here)
    first = short(pair).cost.rounds
    servers[1].keyed = False
    with pytest.warns(SwitchKDWarning, match=r"foresees .*--logits-processors switchkd_noise:KeyedNoise"):
        slow = short(pair)
    assert_same(slow, own)
    assert slow.cost.rounds > first + 3
    assert_same(short(pair), own)  # and nothing more is said
    pair.teacher.told_of_drafts = False
    servers[1].keyed, servers[1].model = True, here.student
    with pytest.warns(SwitchKDWarning, match="foresees"):
        assert_same(short(pair), own)
    servers[1].model = here.teacher
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SwitchKDWarning)
        assert_same(short(pair, top_p=0.7), short(here, top_p=0.7))


@pytest.mark.parametrize("rule", ["adaswitch", "teacher_only"])
def test_pieces_move_nothing(servers, folders, here, rule, monkeypatch):
    sizes = types.SimpleNamespace(chunk=4 * here.vocab_size * 7 * 3)
    monkeypatch.setattr(served_module, "sizes_on", lambda _: sizes)
    monkeypatch.setattr(served_module, "_ROWS", 4)
    assert_same(text(opened(servers, folders), RULES[rule], batch_size=5), text(here, RULES[rule]))


def test_a_student_whose_draft_goes_wrong_goes_on_from_there(servers, folders, here, monkeypatch):
    """As where rounding decides a tie otherwise: what the engine drafts next has the noise of those positions."""
    rest, starts = served_module._Drafted._rest, []

    def spoilt(self, drafted):
        starts.append(drafted.start)
        return rest(self, drafted)

    draft = served_module._Drafted._draft

    def wrong(self, students, writers):
        draft(self, students, writers)
        for place in students:
            if self.texts[place].start == 0:
                own = self.texts[place].draft
                own[1:2] = [(own[1] + 1) % 100 + 2] if len(own) > 1 else []

    monkeypatch.setattr(served_module._Drafted, "_rest", spoilt)
    monkeypatch.setattr(served_module._Drafted, "_draft", wrong)
    theirs = text(opened(servers, folders), RULES["never"])
    assert_same(theirs, text(here, RULES["never"]))
    # Noise of other positions would make wrong drafts, and a round of each.
    assert 2 in starts and theirs.cost.rounds == 2


def test_a_teachers_own_prompt_is_what_the_servers_read(servers, folders, here):
    def told(pair):
        rows = [dataclasses.replace(each, teacher_prompt_ids=[70, 80, 90]) for each in examples()]
        return decode_examples(pair, rows, DecodeSettings(RULES["adaswitch"], 16, seed=3), range(len(rows)))

    theirs = told(opened(servers, folders))
    assert_same(theirs, told(here))
    assert [r.completion_ids for r in theirs] != [
        r.completion_ids for r in text(here, RULES["adaswitch"], max_new_tokens=16)
    ]


def test_what_the_teacher_said_while_deciding_is_kept_for_the_loss(servers, folders, here):
    theirs = text(opened(servers, folders), RULES["adaswitch"], keep_hidden=True)
    asked = servers[0].asked
    for ours, rollout in zip(text(here, RULES["adaswitch"], keep_hidden=True), theirs, strict=True):
        torch.testing.assert_close(rollout.said, ours.said, rtol=1e-4, atol=1e-5)
    assert servers[0].asked == asked and all(r.said is None for r in text(opened(servers, folders), RULES["adaswitch"]))


def test_the_teachers_stored_text_is_the_one_it_writes_here(servers, folders, here, tmp_path):
    how = DecodeSettings(TeacherOnly(), max_new_tokens=12, seed=5, batch_size=2)
    stored = {
        place: teacher_texts(pair, examples(9), tmp_path / place, how)
        for place, pair in (("here", here), ("there", opened(servers, folders)))
    }
    assert [e.completion_ids for e in stored["there"]] == [e.completion_ids for e in stored["here"]]
    assert [e.truncated for e in stored["there"]] == [e.truncated for e in stored["here"]]


@pytest.mark.parametrize("recipe", ["adaswitch", "seqkd"])
def test_a_run_is_the_run_with_the_teacher_here(servers, folders, names, tmp_path, recipe, monkeypatch):  # noqa: F811
    steps = {}
    for place in "here", "there":
        monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path / f"cache-{place}"))
        mine = names | {"student_model_name_or_path": folders[1], "teacher_model_name_or_path": folders[0]}
        if place == "there":
            mine |= {"teacher_model_name_or_path": servers[0].address, "teacher_writer": servers[1].address}
        rule = {"policy": AdaSwitch(window=2, ratio=1.05)} if recipe == "adaswitch" else {}
        distil(settings(mine, recipe, tmp_path / place, **rule))
        steps[place] = lines(tmp_path / place, "metrics.jsonl")
    if recipe == "adaswitch":
        here, there = (lines(tmp_path / place, "rollouts.jsonl") for place in ("here", "there"))
        for name in ("completion_ids", "speakers", "stop_reason"):
            assert [row[name] for row in here] == [row[name] for row in there]
        assert any(TEACHER in row["speakers"] for row in here)
    for ours, theirs in zip(steps["here"], steps["there"], strict=True):
        assert [theirs[k] for k in ("loss", "grad_norm")] == pytest.approx(
            [ours[k] for k in ("loss", "grad_norm")], rel=1e-5
        )


# --- what is refused ----------------------------------------------------------------------------------------------


def test_a_writer_of_another_model_or_that_does_not_write_is_refused(servers, folders, here):
    servers[1].model = here.student
    with pytest.raises(ModelError, match="writes with another model"):
        opened(servers, folders)
    servers[1].kind = "pooling"
    with pytest.raises(ServerError, match=r"generates.*vllm serve .* --logits-processors switchkd_noise:KeyedNoise"):
        opened(servers, folders)


def test_without_a_writer_the_way_to_one_is_said(names):  # noqa: F811
    nobody = names | {"teacher_model_name_or_path": "http://127.0.0.1:9"}
    for recipe in ("adaswitch", "seqkd", "distillm2"):
        with pytest.raises(ConfigError, match="--teacher-writer"):
            open_pair(dataclasses.replace(load_recipe(recipe), **nobody))
    with pytest.raises(ConfigError, match="asks the teacher at every token"):
        open_pair(dataclasses.replace(load_recipe("switch"), **nobody, teacher_writer="http://127.0.0.1:10"))
    with pytest.raises(ConfigError, match="no address"):
        dataclasses.replace(load_recipe("adaswitch"), **nobody, teacher_writer="somewhere")


# --- the noise in the server --------------------------------------------------------------------------------------


@pytest.fixture
def noise(monkeypatch):
    """The file that runs in vLLM's environment, beside as much of vLLM as it imports."""
    swap, other = object(), object()
    stub = types.ModuleType("vllm.v1.sample.logits_processor")
    stub.LogitsProcessor = object
    stub.MoveDirectionality = types.SimpleNamespace(SWAP=swap, UNIDIRECTIONAL=other)
    for name in ("vllm", "vllm.v1", "vllm.v1.sample"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    from switchkd.teachers import switchkd_noise

    yield switchkd_noise
    sys.modules.pop("switchkd.teachers.switchkd_noise", None)


def test_the_servers_noise_is_ours_to_the_bit(noise):
    for seed, row, position in ((0, 0, 0), (3, 7, 1), (2**63, 12345, 999), (5, 2**40, 4)):
        key = noise_key(seed, row, position)
        assert noise.key_at(row_key(seed, row), position) == key
        assert torch.equal(noise.gumbel(key, 3000, "cpu"), gumbel_noise(keys_tensor([key]), 3000)[0])


def test_the_noise_follows_its_request_through_the_servers_batch(noise):
    def request(key, start, temperature=1.0):
        asked = {
            "switchkd_key": str(key),
            "switchkd_start": start,
            "switchkd_temperature": temperature,
            "switchkd_vocab_size": 8,
        }
        return types.SimpleNamespace(extra_args=asked)

    def update(removed=(), added=(), moved=()):
        return types.SimpleNamespace(removed=removed, added=added, moved=moved)

    def of(key, position, temperature=1.0):
        own = temperature * gumbel_noise(keys_tensor([noise.key_at(key, position)]), 8)[0]
        return torch.cat([own, torch.full((2,), -torch.inf)])

    swap, plain = (
        sys.modules["vllm.v1.sample.logits_processor"].MoveDirectionality.SWAP,
        types.SimpleNamespace(extra_args=None),
    )
    processor, zero, written = noise.KeyedNoise(None, "cpu", False), torch.zeros(10), []
    processor.update_state(None)
    processor.update_state(
        update(added=[(0, request(11, 5), [1], written), (1, plain, [1], []), (2, request(12, 0, 0.5), [], [])])
    )
    logits = processor.apply(torch.zeros(3, 10))
    assert torch.equal(logits, torch.stack([of(11, 5), zero, of(12, 0, 0.5)]))
    written.append(3)
    processor.update_state(update(moved=[(0, 1, swap)]))
    assert torch.equal(processor.apply(torch.zeros(3, 10)), torch.stack([zero, of(11, 6), of(12, 0, 0.5)]))
    processor.update_state(update(removed=[2], moved=[(1, 0, None)]))
    assert torch.equal(processor.apply(torch.zeros(3, 10)), torch.stack([of(11, 6), zero, zero]))
    processor.update_state(update(added=[(0, plain, [], [])]))
    assert torch.equal(processor.apply(torch.zeros(3, 10)), torch.zeros(3, 10))
