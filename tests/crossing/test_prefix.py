"""The teacher's law in the student's tokens by prefixes, against enumeration; and the law by rank."""

import math
import random

import numpy as np
import pytest
import torch
from test_objectives import TOKENS, N
from two_tokenizers import LINES, bridge_of, side, tokenizer_of

from switchkd.base.errors import ConfigError, DataError
from switchkd.crossing.alignments import ALIGNMENTS, alignment_of, check_objective
from switchkd.crossing.bridge import Bridge, Side
from switchkd.crossing.laws import Places, SharedLaw, SortedLaw
from switchkd.crossing.prefix import PrefixLaw
from switchkd.forward.ends import Ends
from switchkd.methods.objective import Tokens
from switchkd.methods.objectives import OBJECTIVES, TAID, ForwardKL, ReplacedCE, ReverseKL, Veto

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(11)
LEAST = 1.2e-7


class Toy:
    """As much of a spelling as a bridge looks at; the last id is the end, the one before it a mark without bytes."""

    missing = frozenset()

    def __init__(self, tokens):
        self.bytes_of = [*tokens, b"", b""]
        self.ids = {}
        for index, data in enumerate(tokens):
            self.ids.setdefault(data, []).append(index)


def toy_bridge(student, teacher):
    sides = []
    for tokens, role in ((student, "student"), (teacher, "teacher")):
        own = Side(None, len(tokens) + 2, Ends((len(tokens) + 1,)), role)
        own.__dict__["spelling"] = Toy(tokens)
        sides.append(own)
    return Bridge(*sides)


def logs(*shape):
    return (2 * torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)).log_softmax(-1)


def routed(student, data):
    """The longest student token that ``data`` begins with, None for the bucket."""
    fitting = [token for token in student if data.startswith(token)]
    return student.index(max(fitting, key=len)) if data and fitting else None


def reference(student, teacher, p, written, longer=None):
    """The law of the student's tokens by its definition: ``p`` of each teacher token, end and mark last; a bucket behind all.

    ``longer`` is a student token, by its place, that reaches over the teacher tokens after the first, with the first and the
    product of what the teacher gives to the others.
    """
    size = len(student) + 2
    law = [0.0] * (size + 1)
    possible = [w for w, data in enumerate(teacher) if data.startswith(written) and data != written]
    whole = sum(p[w] for w in possible) if written else sum(p)
    for w in possible:
        place = routed(student, teacher[w][len(written) :])
        law[size if place is None else place] += p[w] / whole
    if not written:
        law[size] += p[-2]
        law[size - 1] += p[-1]
    if longer is not None:
        token, first, others = longer
        place = routed(student, teacher[first][len(written) :])
        law[size if place is None else place] -= p[first] / whole * others
        law[token] += p[first] / whole * others
    return law


def cut(text, tokens, dice):
    """Some way to cut a text into tokens, None if there is none."""
    if not text:
        return []
    fitting = [index for index, token in enumerate(tokens) if text.startswith(token)]
    for index in dice.sample(fitting, len(fitting)):
        if (rest := cut(text[len(tokens[index]) :], tokens, dice)) is not None:
            return [index, *rest]
    return None


def two_readings(student, teacher, dice):
    """A text of either's tokens that both can spell, as each may read it."""
    while True:
        text = b"".join(dice.choices(dice.choice((student, teacher)), k=5))
        own, read = cut(text, student, dice), cut(text, teacher, dice)
        if own is not None and read is not None:
            return text, own, read


def begins(teacher, p, data):
    """How likely a text of independent teacher tokens begins with ``data``."""
    if not data:
        return 1.0
    found = 0.0
    for w, token in enumerate(teacher):
        if token.startswith(data):
            found += p[w]
        elif data.startswith(token):
            found += p[w] * begins(teacher, p, data[len(token) :])
    return found


def vocabularies(dice):
    texts = [bytes(dice.choices(b"ab ", k=dice.choice((1, 2, 2, 3, 4)))) for _ in range(24)]
    both = [list(dict.fromkeys([b"a", b"b", b" ", *dice.sample(texts, 7)])) for _ in range(2)]
    return both[0], [token for token in both[1] if token != b"b" or dice.random() < 0.7]


@pytest.mark.parametrize("seed", range(40))
def test_the_law_is_the_one_of_its_definition(seed):
    dice = random.Random(seed)
    student, teacher = vocabularies(dice)
    if seed % 5 == 0:
        student.remove(b"a")  # some of the teacher's tokens have no student token at all
    law = PrefixLaw.of(toy_bridge(student, teacher), CPU)
    seen = set()
    for _ in range(6):
        text, own, read = two_readings(student, teacher, dice)
        logp, logq = logs(len(read) + 1, len(teacher) + 2), logs(len(own) + 1, len(student) + 2)
        own, read = [*own, len(student) + 1], [*read, len(teacher) + 1]
        token_logs = logp[range(len(read)), read]
        places = law.places(own, read)
        found, student_law = law(logp[places.teacher], logq[places.student], places, token_logs)
        starts = np.cumsum([0, *(len(teacher[w]) for w in read[:-1])]).tolist()
        for row, (i, j) in enumerate(zip(places.student, places.teacher, strict=True)):
            begin = sum(len(student[s]) for s in own[:i])
            assert starts[j] <= begin
            written, longer = text[starts[j] : begin], None
            if own[i] != len(student) + 1:
                assert begin < starts[j + 1]
                end = begin + len(student[own[i]])
                under = [k for k in range(j + 1, len(read) - 1) if starts[k] < end]
                if under:
                    longer = own[i], read[j], token_logs[under].sum().exp().item()
                seen.add((bool(written), bool(under), bool(under) and starts[under[-1] + 1] == end))
            expected = reference(student, teacher, logp[j].exp().tolist(), written, longer)
            assert found[row].exp().tolist() == pytest.approx([*expected[:-1], max(expected[-1], LEAST)], abs=1e-12)
            assert found[row].exp().sum().item() == pytest.approx(1, abs=2 * LEAST)
        assert torch.equal(student_law[:, :-1], logq[places.student])
        assert student_law[:, -1].exp().tolist() == pytest.approx([LEAST] * len(places))
    assert len(seen) >= 3


@pytest.mark.parametrize("seed", range(8))
def test_no_token_gets_more_than_the_teacher_gives_to_texts_that_begin_with_it(seed):
    """A teacher whose tokens are drawn one by one: how likely each student token is to stand next can be counted."""
    dice = random.Random(seed)
    student, teacher = vocabularies(dice)
    law = PrefixLaw.of(toy_bridge(student, teacher), CPU)
    logp = logs(len(teacher) + 2)
    p = logp.exp().tolist()
    for _ in range(6):
        _, own, read = two_readings(student, teacher, dice)
        places = law.places(own, read)
        found, _ = law(logp.expand(len(places), -1), logs(len(places), len(student) + 2), places, logp[read])
        for row, written in enumerate(places.written):
            if written == b"":
                for index, token in enumerate(student):
                    assert found[row, index].exp() <= begins(teacher, p, token) + 1e-12


def test_every_teacher_token_goes_to_the_longest_student_token_that_it_begins_with():
    student, teacher = [b"t", b"the", b" c", b"at", b"\xe6"], [b"theory", b"the", b"to", b" cat", b"x", "東".encode()]
    law = PrefixLaw.of(toy_bridge(student, teacher), CPU)
    bucket = len(student) + 2
    assert law.route.tolist() == [1, 1, 0, 2, bucket, 4, bucket, len(student) + 1]
    assert law.index.tolist() == list(range(len(student) + 2))


def test_ends_are_joined_and_marks_that_a_person_names_are_kept():
    name = "sentencepiece"
    tokenizer = tokenizer_of(name)
    student = Side(tokenizer, len(tokenizer), Ends((1, 2), merged_into=2))
    teacher = Side(tokenizer, len(tokenizer), Ends((1, 2), merged_into=1), "teacher")
    law = PrefixLaw.of(Bridge(student, teacher), CPU)
    assert law.route[[1, 2]].tolist() == [2, 2]
    assert law.index[[1, 2]].tolist() == [2, 2]
    assert law.route[0] == len(tokenizer)  # <unk>
    named = PrefixLaw.of(Bridge(student, teacher, {"<unk>": "<unk>"}), CPU)
    assert named.route[0] == 0


def test_tokens_go_only_to_what_the_student_may_write_and_to_the_token_that_it_writes():
    bridge = bridge_of("sentencepiece", "coarse")
    vocab = bridge.student.tokenizer.get_vocab()
    doubles = {vocab[f"<0x{ord(letter):02X}>"] for letter in "aet"}
    assert doubles.isdisjoint(PrefixLaw.of(bridge, CPU).route.tolist())
    # Of a student with fewer ids, whose end is an ordinary token, neither the ids behind are there nor the end as text.
    tokenizer = tokenizer_of("coarse")
    small = Bridge(Side(tokenizer, 300, Ends((5,))), side("coarse", "teacher"))
    law = PrefixLaw.of(small, CPU)
    assert law.route.max() == 300  # the bucket
    assert law.route[5] == 300
    assert (law.route == 5).nonzero().flatten().tolist() == [small.teacher.end]
    longer = max(range(300, len(tokenizer)), key=lambda index: len(small.teacher.spelling.bytes_of[index]))
    place = int(law.route[longer])
    assert 0 < place < 300
    assert small.teacher.spelling.bytes_of[longer].startswith(small.student.spelling.bytes_of[place])


# --- places ----------------------------------------------------------------------------------------------------------


def named(places, student, own, teacher, read):
    tokens = [*teacher, b"mark", b"end"]
    return [
        ([*student, b"mark", b"end"][own[i]], tokens[read[j]], written, last)
        for i, j, written, last in zip(places.student, places.teacher, places.written, places.last, strict=True)
    ]


def of(tokens, *parts):
    known = [*tokens, b"mark", b"end"]
    return [known.index(part) for part in parts]


def places_of(student, teacher, own, read):
    own, read = of(student, *own), of(teacher, *read)
    places = PrefixLaw.of(toy_bridge(student, teacher), CPU).places(own, read)
    return named(places, student, own, teacher, read)


def test_where_tokens_are_scored_and_what_is_written_of_them_there():
    student, teacher = [b"ab", b"c", b"d", b"cde", b"e"], [b"abc", b"d", b"de", b"a", b"b", b"c", b"e"]
    found = places_of(student, teacher, [b"ab", b"c", b"d", b"end"], [b"abc", b"d", b"end"])
    assert found == [
        (b"ab", b"abc", b"", 0),
        (b"c", b"abc", b"ab", 0),
        (b"d", b"d", b"", 0),
        (b"end", b"end", b"", 0),
    ]
    # Over teacher boundaries, from one and from within a token, up to a boundary and up to the middle of a token.
    assert places_of(student, teacher, [b"ab", b"cde"], [b"a", b"b", b"c", b"d", b"e"]) == [
        (b"ab", b"a", b"", 1), (b"cde", b"c", b"", 2),
    ]  # fmt: skip
    assert places_of(student, teacher, [b"ab", b"cde"], [b"abc", b"de"]) == [
        (b"ab", b"abc", b"", 0), (b"cde", b"abc", b"ab", 1),
    ]  # fmt: skip
    assert places_of([b"abcd", b"e"], teacher, [b"abcd", b"e"], [b"abc", b"de"]) == [
        (b"abcd", b"abc", b"", 1), (b"e", b"de", b"d", 0),
    ]  # fmt: skip


def test_tokens_without_bytes_and_what_the_teacher_does_not_read_are_not_scored():
    student, teacher = [b"a", b"bc"], [b"a", b"b", b"c"]
    assert places_of(student, teacher, [b"mark", b"a", b"bc", b"end"], [b"a", b"b"]) == [(b"a", b"a", b"", 0)]
    assert places_of(student, teacher, [b"a", b"bc"], []) == []
    assert places_of(student, teacher, [b"end"], [b"end"]) == [(b"end", b"end", b"", 0)]
    assert places_of(student, teacher, [b"a", b"end"], [b"a"]) == [(b"a", b"a", b"", 0)]
    assert places_of(student, teacher, [b"a", b"mark", b"bc"], [b"a", b"mark", b"b", b"c"])[1] == (b"bc", b"b", b"", 1)
    with pytest.raises(DataError, match="two texts"):
        places_of(student, teacher, [b"a"], [b"b"])


def test_white_space_alone_is_scored_where_it_matches_one_to_one():
    student, teacher = [b"a", b" ", b"\n", b"\n\n", b" a"], [b"a", b" a", b" ", b"\n", b"\n\n"]
    assert [each[0] for each in places_of(student, teacher, [b"a", b" ", b"a"], [b"a", b" a"])] == [b"a", b"a"]
    assert [each[0] for each in places_of(student, teacher, [b"a", b" ", b"a"], [b"a", b" ", b"a"])] == [
        b"a",
        b" ",
        b"a",
    ]
    assert [each[0] for each in places_of(student, teacher, [b"\n\n", b"a"], [b"\n", b"\n", b"a"])] == [b"a"]
    assert [each[0] for each in places_of(student, teacher, [b"\n", b"\n", b"a"], [b"\n\n", b"a"])] == [b"a"]
    assert [each[0] for each in places_of(student, teacher, [b"\n\n", b" a"], [b"\n\n", b" ", b"a"])] == [
        b"\n\n",
        b" a",
    ]


def test_two_texts_at_once_are_each_of_them():
    bridge = bridge_of("coarse", "fine")
    law = PrefixLaw.of(bridge, CPU)
    sizes = [len(tokenizer_of(name)) for name in ("coarse", "fine")]
    texts, parts, before = [], [], (0, 0)
    for line in LINES[2:5]:
        own = [*bridge.student.spelling.encode(line.encode()), bridge.student.end]
        read = bridge.teacher_reading(own)
        logp, logq = logs(len(read), sizes[1]), logs(len(own), sizes[0])
        texts.append((law.places(own, read), logp, logq, logp[range(len(read)), read]))
        parts.append(texts[-1][0].moved(*before))
        before = before[0] + len(own), before[1] + len(read)
    alone = [law(p[at.teacher], q[at.student], at, token) for at, p, q, token in texts]
    at = Places.joined(parts)
    logp, logq, token = (torch.cat([each[place] for each in texts]) for place in (1, 2, 3))
    expected = [torch.cat(each) for each in zip(*alone, strict=True)]
    # Of a chain, the sum may be rounded otherwise beside a longer one.
    tight = {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close([*law(logp[at.teacher], logq[at.student], at, token)], expected, **tight)
    middle = slice(5, 20)
    chunk = law(logp[at[middle].teacher], logq[at[middle].student], at[middle], token)
    torch.testing.assert_close([*chunk], [each[middle] for each in expected], **tight)


@pytest.mark.parametrize(("student", "teacher"), [("coarse", "fine"), ("fine", "sentencepiece"), ("gemma", "coarse")])
def test_all_but_white_space_is_scored_between_real_tokenizers(student, teacher):
    bridge = bridge_of(student, teacher)
    law = PrefixLaw.of(bridge, CPU)
    for line in LINES[:5]:
        own = [*bridge.student.spelling.encode(line.encode()), bridge.student.end]
        read = bridge.teacher_reading(own)
        logp = logs(len(read), bridge.teacher.vocab_size)
        places = law.places(own, read)
        p, _ = law(
            logp[places.teacher], logs(len(places), bridge.student.vocab_size), places, logp[range(len(read)), read]
        )
        assert p.exp().sum(-1).tolist() == pytest.approx([1] * len(places), abs=2 * LEAST)
        data = bridge.student.bytes_of(own)
        assert set(range(len(own))) - set(places.student.tolist()) <= {
            at for at, each in enumerate(data) if each.isspace()
        }
        # What was written is never without mass: the teacher read it, and so gave it some.
        assert p[range(len(places)), [own[i] for i in places.student]].isfinite().all()


# --- gradients and equal tokenizers ----------------------------------------------------------------------------------


def test_gradients_reach_the_student_and_not_the_teacher():
    bridge = bridge_of("coarse", "fine")
    law = PrefixLaw.of(bridge, CPU)
    own = bridge.student.spelling.encode(LINES[1].encode())
    read = bridge.teacher_reading(own)
    places = law.places(own, read)
    logp = logs(len(read), bridge.teacher.vocab_size).requires_grad_()
    leaf = (
        2 * torch.randn(len(places), bridge.student.vocab_size, dtype=torch.float64, generator=GENERATOR)
    ).requires_grad_()
    p, q = law(logp[places.teacher], leaf.log_softmax(-1), places, logp[range(len(read)), read])
    assert not p.requires_grad
    tokens = torch.zeros(len(places), dtype=torch.int64)
    ForwardKL().loss(p, q, Tokens(tokens, tokens, tokens)).sum().backward()
    # Of −Σ p' log q: q times the mass on the student's tokens, less p'.
    mine = p[:, :-1].exp()
    expected = leaf.detach().softmax(-1) * mine.sum(-1, keepdim=True) - mine
    torch.testing.assert_close(leaf.grad, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("name", ["coarse", "sentencepiece"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_equal_tokenizers_the_target_is_the_teachers_law_to_the_bit(name, dtype):
    """Both laws have an empty bucket more; the forward KL and its gradient differ by the rounding of sums alone."""
    marks = {token: token for token in tokenizer_of(name).all_special_tokens}
    bridge = Bridge(side(name), side(name, "teacher"), marks)
    law = PrefixLaw.of(bridge, CPU)
    own = [*bridge.student.spelling.encode(LINES[3].encode()), bridge.student.end]
    places = law.places(own, own)
    assert places.student.tolist() == places.teacher.tolist() == list(range(len(own)))
    assert {*places.written} == {b""} and not places.last.any()
    logp, logq = (logs(len(own), bridge.student.vocab_size).to(dtype) for _ in range(2))
    p, q = law(logp, logq, places, logp[range(len(own)), own])
    assert torch.equal(p[:, :-1], logp)
    assert torch.equal(q[:, :-1], logq)
    assert torch.equal(p[:, -1], q[:, -1])
    found = []
    tokens = torch.zeros(len(own), dtype=torch.int64)
    for through in (lambda leaf: (logp, leaf), lambda leaf: law(logp, leaf, places, logp[range(len(own)), own])):
        leaf = logq.clone().requires_grad_()
        values = ForwardKL().loss(*through(leaf), Tokens(tokens, tokens, tokens))
        found.append((values.detach(), torch.autograd.grad(values.sum(), leaf)[0]))
    tight = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    for ordinary, through_law in zip(*found, strict=True):
        torch.testing.assert_close(through_law, ordinary, **tight)


def test_a_teacher_that_gives_no_mass_to_what_was_written_leaves_everything_finite():
    student, teacher = [b"a", b"b", b"bc"], [b"ab", b"c", b"ax", b"b"]
    law = PrefixLaw.of(toy_bridge(student, teacher), CPU)
    own, read = of(student, b"a", b"bc"), of(teacher, b"ab", b"c")
    places = law.places(own, read)
    logp = torch.tensor([[0, 0.4, 0, 0.2, 0.2, 0.2], [1 / 6] * 6], dtype=torch.float64).log()
    leaf = logs(2, 5).requires_grad_()
    p, q = law(logp[places.teacher], leaf, places, logp[range(2), read])
    assert not p.isnan().any() and p[0].exp().sum().item() == pytest.approx(1)
    ids = torch.tensor([0, 2])
    ForwardKL().loss(p, q, Tokens(ids, ids, ids)).sum().backward()
    assert leaf.grad.isfinite().all()


def test_no_more_mass_is_moved_than_there_is_however_the_teacher_was_rounded():
    """Log-probabilities of the text that come from another forward may be a bit larger than those of the law."""
    student, teacher = [b"a", b"ab"], [b"a", b"b"]
    law = PrefixLaw.of(toy_bridge(student, teacher), CPU)
    own, read = of(student, b"ab"), of(teacher, b"a", b"b")
    places = law.places(own, read)
    logp = torch.tensor([[0.5, 0.3, 0.1, 0.1]], dtype=torch.float64).log()
    p, _ = law(logp, logs(1, 4), places, torch.tensor([math.log(0.5) + 1e-6, 0.0]))
    assert p[0].exp().tolist() == pytest.approx([0, 0.5, 0, 0.1, 0.4])  # of b, no student token can stand for


# --- by rank ---------------------------------------------------------------------------------------------------------


def test_laws_by_rank():
    law = SortedLaw.of(bridge_of("coarse", "fine"), CPU)
    logp, logq = logs(N, 9), logs(N, 6).requires_grad_()
    p, q = law(logp, logq)
    assert p.tolist() == [sorted(row, reverse=True) for row in logp.tolist()]
    assert q.tolist() == [sorted(row, reverse=True) + [-math.inf] * 3 for row in logq.tolist()]
    assert all(each.shape == (N, 9) for each in law(logq.detach(), logp))
    values = OBJECTIVES["tvd"]().loss(p, q, TOKENS)
    mine = np.pad(-np.sort(-logq.detach().exp().numpy()), ((0, 0), (0, 3)))
    expected = 0.5 * np.abs(-np.sort(-logp.exp().numpy()) - mine).sum(-1)
    assert values.tolist() == pytest.approx(expected.tolist())
    for row in range(N):  # the sign of each rank's difference, at the id that has the rank
        (gradient,) = torch.autograd.grad(values[row], logq, retain_graph=True)
        order = logq[row].argsort(descending=True)
        sign = (q[row, :6] - p[row, :6]).sign() / 2
        torch.testing.assert_close(gradient[row, order], (sign * q[row, :6].exp()).detach())


# --- the three of them -----------------------------------------------------------------------------------------------


def test_alignments_by_name_have_what_a_learner_asks_of_them():
    bridge = bridge_of("coarse", "fine")
    own = [*bridge.student.spelling.encode(LINES[0].encode()), bridge.student.end]
    read = bridge.teacher_reading(own)
    logp, logq = logs(len(read), bridge.teacher.vocab_size), logs(len(own), bridge.student.vocab_size)
    for name, kind in (("strict", SharedLaw), ("prefix", PrefixLaw), ("sorted", SortedLaw)):
        law = alignment_of(name, bridge, CPU)
        assert isinstance(law, kind)
        places = law.places(own, read)
        token_logs = logp[range(len(read)), read] if law.reads_tokens else None
        p, q = law(logp[places.teacher], logq[places.student], places, token_logs)
        assert p.shape == q.shape and p.shape[0] == len(places) > 0
        assert len(law.index) == bridge.student.vocab_size
        if name != "prefix":
            assert [places.student.tolist(), places.teacher.tolist()] == [
                each.tolist() for each in bridge.matches(own, read)
            ]
    with pytest.raises(ConfigError, match="unknown alignment 'strickt'; did you mean 'strict'"):
        alignment_of("strickt", bridge, CPU)


FINITE = {
    "strict": {*OBJECTIVES},
    "prefix": {*OBJECTIVES} - {"reverse_kl", "akl", "opd", "minillm"},
    "sorted": {"cross_entropy", "jsd", "tvd", "skew_kl", "skew_reverse_kl", "distillm2"},
}


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_that_are_infinite_with_an_alignment_are_refused_by_name(alignment, name):
    if name in FINITE[alignment]:
        check_objective(alignment, OBJECTIVES[name]())
    else:
        with pytest.raises(
            ConfigError, match=f"objective {name} (is infinite|looks at).*alignment {alignment}.*take .*strict"
        ):
            check_objective(alignment, OBJECTIVES[name]())


def test_what_an_objective_is_set_to_is_asked_too():
    for objective in (Veto(divergence="reverse_kl"), ReplacedCE(divergence="reverse_kl"), ReverseKL(top_k=1)):
        with pytest.raises(ConfigError, match="infinite"):
            check_objective("prefix", objective)
    with pytest.raises(ConfigError, match="infinite"):  # finite as it begins
        check_objective("sorted", TAID(s=0.4, s_end=1.0))
    check_objective("prefix", ForwardKL(ce_weight=0.5))
    with pytest.raises(ConfigError, match="looks at the token written, which the alignment sorted does not know"):
        check_objective("sorted", OBJECTIVES["tvd"](ce_weight=0.5))
    with pytest.raises(ConfigError, match="unknown alignment"):
        check_objective("uld", ForwardKL())
