"""One text in two readings: which tokens match, and what two vocabularies share."""

import copy
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from two_tokenizers import LINES, TOKENIZERS, bridge_of, byte_level, side, tokenizer_of

from switchkd.base.errors import DataError, VocabularyError
from switchkd.crossing.bridge import Bridge, Side
from switchkd.crossing.readings import one_to_one, spans
from switchkd.forward.ends import Ends
from switchkd.methods.policy import STUDENT, TEACHER

PAIRS = [("coarse", "fine"), ("fine", "sentencepiece"), ("gemma", "coarse"), ("unigram", "metaspace")]


def pairs(found):
    return list(zip(*(each.tolist() for each in found), strict=True))


# --- alignment -------------------------------------------------------------------------------------------------------


def test_spans():
    assert spans([b"ab", b"", b"c"]).tolist() == [[0, 2], [2, 2], [2, 3]]
    assert spans([]).shape == (0, 2)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([b"the", b" cat"], [b"the", b" cat"], [(0, 0), (1, 1)]),
        ([b"the", b" ca", b"t"], [b"the", b" cat"], [(0, 0)]),
        ([b"a", b"b", b"c"], [b"ab", b"c"], [(2, 1)]),
        ([b"ab", b"cd"], [b"a", b"bc", b"d"], []),  # the same tokens at other places are no match
        ([b"a", b"a", b"aa"], [b"aa", b"a", b"a"], []),
        ([b"", b"a", b"", b"b"], [b"a", b"b", b""], [(1, 0), (3, 1)]),  # without bytes: nothing, and no shift
        ([b"a", b"b", b"c"], [b"a", b"b"], [(0, 0), (1, 1)]),  # a reading of the beginning
        ([b"a"], [b"a", b"bc"], [(0, 0)]),
        ([b"a", b"bc"], [b"a", b"b"], [(0, 0)]),
        ([], [], []),
        ([b""], [b""], []),
        ([b"a"], [], []),
    ],
)
def test_tokens_match_that_have_the_same_bytes_at_the_same_place(one, other, expected):
    assert pairs(one_to_one(one, other)) == expected
    assert [(j, i) for i, j in pairs(one_to_one(other, one))] == expected


def test_two_texts_are_an_error_that_shows_them():
    with pytest.raises(DataError, match="spell two texts: 'the cat' and 'the cow'"):
        one_to_one([b"the", b" cat"], [b"the", b" cow"])
    with pytest.raises(DataError, match=r"'x{30} … x{30}' and 'y'"):
        one_to_one([b"x" * 100], [b"y"])


def cuts(draw, data):
    places = sorted({0, len(data), *draw(st.lists(st.integers(0, len(data)), max_size=8))})
    return [data[a:b] for a, b in pairwise(places)]


@st.composite
def two_readings(draw):
    data = draw(st.binary(min_size=1, max_size=12))
    found = []
    for _ in range(2):
        reading = cuts(draw, data)
        for place in draw(st.lists(st.integers(0, len(reading)), max_size=3)):
            reading.insert(place, b"")
        found.append(reading)
    return found


@settings(max_examples=200, deadline=None, derandomize=True)
@given(two_readings())
def test_matches_are_those_of_comparing_each_with_each(readings):
    one, other = readings

    def spot(reading, at):
        start = sum(map(len, reading[:at]))
        return start, start + len(reading[at])

    expected = [
        (i, j)
        for i in range(len(one))
        for j in range(len(other))
        if one[i] and other[j] and spot(one, i) == spot(other, j)
    ]
    assert pairs(one_to_one(one, other)) == expected


# --- matches of a bridge ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_a_reading_spells_the_text_and_every_match_is_one_token_of_both(student, teacher):
    bridge = bridge_of(student, teacher)
    covered = 0
    for line in LINES[:5]:
        ids = [*bridge.student.spelling.encode(line.encode()), bridge.student.end]
        read = bridge.teacher_reading(ids)
        assert bridge.teacher.spelling.decode(read[:-1]) == line.encode()
        assert read[-1] == bridge.teacher.end
        assert bridge.student_reading(read) == ids
        i, j = bridge.matches(ids, read)
        assert (np.diff(i) > 0).all() and (np.diff(j) > 0).all()
        assert (i[-1], j[-1]) == (len(ids) - 1, len(read) - 1)
        partner = dict(zip(*(each.tolist() for each in bridge.shared), strict=True))
        mine, theirs = bridge.student.bytes_of(ids), bridge.teacher.bytes_of(read)
        for own, other in pairs((i, j)):
            assert partner[ids[own]] == read[other]
            assert mine[own] == theirs[other]
            assert b"".join(mine[:own]) == b"".join(theirs[:other])
        covered += len(i) / len(ids)
    assert covered / 5 > 0.2


def test_ends_match_behind_one_whole_text_alone():
    bridge = bridge_of("coarse", "fine")
    own, end = bridge.student.spelling.encode(b"the cat"), bridge.student.end
    read, its_end = bridge.teacher.spelling.encode(b"the cat"), bridge.teacher.end
    text = len(bridge.matches(own, read)[0])
    assert len(bridge.matches([*own, end], [*read, its_end])[0]) == text + 1
    assert len(bridge.matches([*own, end], read)[0]) == text
    assert len(bridge.matches(own, [*read, its_end])[0]) == text
    assert pairs(bridge.matches([end], [its_end])) == [(0, 0)]
    # An end behind a part of the text is not the end of the text.
    part = bridge.teacher.spelling.encode(b"the")
    assert len(part) < len(read)
    assert len(read) - 1 not in bridge.matches([*own, end], [*part, its_end])[1]
    assert pairs(bridge.matches([*own, end], [*part, its_end]))[-1][1] < len(part)


def test_an_end_within_a_text_is_no_end():
    bridge = bridge_of("coarse", "fine")
    own = bridge.student.spelling.encode(b"the cat")
    within = [own[0], bridge.student.end, *own[1:]]
    assert bridge.teacher_reading(within) == bridge.teacher_reading(own)
    assert bridge.student.end not in np.array(within)[bridge.matches(within, bridge.teacher_reading(within))[0]]


def test_a_token_that_text_is_not_cut_into_matches_its_partner_alone():
    """<0x74> of the student has the bytes of the teacher's t, and is another event than t."""
    bridge = bridge_of("sentencepiece", "fine")
    vocab = bridge.student.tokenizer.get_vocab()
    read = bridge.teacher.spelling.encode(b"t")
    assert pairs(bridge.matches([vocab["t"]], read)) == [(0, 0)]
    assert pairs(bridge.matches([vocab["<0x74>"]], read)) == []


def test_texts_that_differ_are_refused():
    bridge = bridge_of("coarse", "fine")
    with pytest.raises(DataError, match="two texts"):
        bridge.matches(bridge.student.spelling.encode(b"the cat"), bridge.teacher.spelling.encode(b"the mat"))


def test_any_of_several_ends_closes_a_reading_and_the_other_side_gets_the_one_that_counts():
    tokenizer = byte_level(320)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    eos, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    student = Side(tokenizer, len(tokenizer), Ends((eos, other), merged_into=other))
    bridge = Bridge(student, side("fine", "teacher"))
    text = student.spelling.encode(b"the cat")
    for end in (eos, other):
        read = bridge.teacher_reading([*text, end])
        assert read[-1] == bridge.teacher.end
        assert bridge.matches([*text, end], read)[0][-1] == len(text)
    assert bridge.student_reading(bridge.teacher_reading([*text, eos])) == [*text, other]
    assert eos not in bridge.shared[STUDENT]
    assert (other, bridge.teacher.end) in pairs(bridge.shared)


# --- what is shared --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_what_is_shared_has_the_same_bytes_and_each_token_one_partner(student, teacher):
    bridge = bridge_of(student, teacher)
    ids, others = bridge.shared
    assert (np.diff(ids) > 0).all()
    assert len(set(others.tolist())) == len(others)
    for own, other in pairs(bridge.shared):
        if own == bridge.student.end:
            assert other == bridge.teacher.end
        else:
            assert bridge.student.spelling.bytes_of[own] == bridge.teacher.spelling.bytes_of[other] != b""
    spelt = [{data for data in side.spelling.bytes_of if data} for side in bridge.sides]
    assert {bridge.student.spelling.bytes_of[own] for own in ids.tolist()} - {b""} == spelt[0] & spelt[1]


def marked(names):
    tokenizer = byte_level(320)
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


def bridge_with(marks, student=("<|im_start|>", "<|sys|>"), teacher=("<s_start>", "<s_sys>")):
    sides = (marked(list(student)), marked(list(teacher)))
    return Bridge(
        *(
            Side(each, len(each), Ends((each.eos_token_id,)), role)
            for each, role in zip(sides, ("student", "teacher"), strict=True)
        ),
        marks=marks,
    )


def test_marks_are_shared_where_a_person_names_them():
    plain, named = bridge_with({}), bridge_with({"<|im_start|>": "<s_start>"})
    ids = [
        bridge.tokenizer.convert_tokens_to_ids(name)
        for bridge, name in ((plain.student, "<|im_start|>"), (plain.teacher, "<s_start>"))
    ]
    assert tuple(ids) not in pairs(plain.shared)
    assert set(pairs(named.shared)) == {*pairs(plain.shared), tuple(ids)}
    think = [side.tokenizer.convert_tokens_to_ids("<think>") for side in plain.sides]
    assert tuple(think) in pairs(plain.shared)  # no special token: text


def test_a_mark_that_is_not_there_or_stands_for_two_is_refused():
    with pytest.raises(VocabularyError, match="student's tokenizer has no token '<oops>', which shared_marks names"):
        bridge_with({"<oops>": "<s_start>"})
    with pytest.raises(VocabularyError, match="teacher's tokenizer has no token '<oops>'"):
        bridge_with({"<|im_start|>": "<oops>"})
    with pytest.raises(VocabularyError, match="names the teacher's '<s_sys>' for two tokens"):
        bridge_with({"<|im_start|>": "<s_sys>", "<|sys|>": "<s_sys>"})


def test_a_mark_takes_a_token_from_the_text_that_it_was_shared_by():
    """The student's special token is the teacher's <think>, whatever the student's own text <think> is."""
    named = bridge_with({"<|sys|>": "<think>"})
    assert len(set(named.shared[TEACHER].tolist())) == len(named.shared[TEACHER])
    own = [named.student.tokenizer.convert_tokens_to_ids(name) for name in ("<|sys|>", "<think>")]
    assert own[0] in named.shared[STUDENT] and own[1] not in named.shared[STUDENT]


def test_ids_that_a_model_may_not_draw_are_not_shared():
    tokenizer = copy.deepcopy(tokenizer_of("coarse"))
    small = Side(tokenizer, 300, Ends((5,)))
    bridge = Bridge(small, side("coarse", "teacher"))
    assert bridge.shared[STUDENT].max() < 300
    assert (5, bridge.teacher.end) in pairs(bridge.shared)
    assert 5 not in bridge.shared[TEACHER]
    other = Bridge(side("coarse"), Side(tokenizer, len(tokenizer), Ends((6,)), "teacher"))
    assert other.teacher.bytes_of([6, 7, 10**6]) == [b"", other.teacher.spelling.bytes_of[7], b""]
    assert 6 not in other.shared[STUDENT]  # which is text to the student, and the end to the teacher
    assert (other.student.end, 6) in pairs(other.shared)


def test_nothing_in_common_is_refused():
    class Silent(Side):
        def __init__(self, own):
            super().__init__(own.tokenizer, own.vocab_size, own.ends, own.role)
            self.spelling.bytes_of[:] = [b""] * len(self.spelling.bytes_of)

    with pytest.raises(VocabularyError, match="not one token with the same bytes"):
        Bridge(side("coarse"), Silent(side("fine", "teacher")))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_with_equal_tokenizers_everything_matches_and_all_is_shared(name):
    tokenizer = tokenizer_of(name)
    marks = {token: token for token in tokenizer.all_special_tokens}
    bridge = Bridge(side(name), side(name, "teacher"), marks)
    everything = list(range(len(tokenizer)))
    assert [each.tolist() for each in bridge.shared] == [everything, everything]
    assert bridge.complete == (True, True)
    for line in LINES[:5]:
        ids = [*bridge.student.spelling.encode(line.encode()), bridge.student.end]
        assert bridge.teacher_reading(ids) == ids
        assert pairs(bridge.matches(ids, ids)) == [(at, at) for at in range(len(ids))]
    assert Bridge(side(name), side(name, "teacher")).complete == ((True, True) if len(marks) == 1 else (False, False))


def test_ends_that_are_not_one_event_are_not_all_that_may_be_drawn():
    tokenizer = byte_level(320)
    eos = tokenizer.eos_token_id
    sides = [Side(tokenizer, len(tokenizer), Ends((7, eos), merged), "student") for merged in (eos, None)]
    merged, apart = (Bridge(each, each) for each in sides)
    assert merged.complete == (True, True)
    assert apart.complete == (False, False)


# --- words for people ------------------------------------------------------------------------------------------------


def test_what_is_said_of_a_bridge_is_counted():
    bridge = bridge_of("coarse", "fine")
    text = "the answer sat"
    own, read = (side.spelling.encode(text.encode()) for side in bridge.sides)
    mine = [bridge.student.spelling.bytes_of[index] for index in own]
    matched = set(mine) & {bridge.teacher.spelling.bytes_of[index] for index in read}
    assert mine == [b"the", b" answer", b" sat"] and matched == {
        b"the",
        b" sat",
    }  # what the sentences below are made of
    said = bridge.describe(text)
    sizes = [sum(map(bool, side.spelling.bytes_of)) for side in bridge.sides]
    assert (
        said[0]
        == f"tokens of the student {sizes[0]}, of the teacher {sizes[1]}; {len(bridge.shared[0]) - 1} have the same bytes in both"
    )
    assert f"a text of 3 student tokens ({len(read)} of the teacher's) 67% match" in said[1]
    assert said[2] == "student tokens of it without a match: ' answer'"
