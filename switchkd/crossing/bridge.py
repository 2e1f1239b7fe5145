"""The bridge between a student and a teacher with another tokenizer: one text in two readings, and what the two vocabularies share.

Letters in shapes: C tokens that both have, n tokens of a reading.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from switchkd.base.errors import VocabularyError
from switchkd.crossing.boundaries import Beginnings, Boundaries, words
from switchkd.crossing.readings import one_to_one
from switchkd.crossing.spelling import PROBE, Spelling
from switchkd.forward.ends import Ends
from switchkd.methods.policy import STUDENT, TEACHER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Side:
    """How one model of a pair spells text: its tokenizer, the ids that it may draw, and those that end its texts.

    Where there are several ends, all of them are one event.
    """

    tokenizer: "PreTrainedTokenizerBase"
    vocab_size: int
    ends: Ends
    role: str = "student"

    @cached_property
    def spelling(self) -> Spelling:
        """The bytes of its tokens."""
        return Spelling(self.tokenizer, self.role)

    @property
    def end(self) -> int:
        """The id that stands for all of its ends."""
        return self.ends.ids[0] if self.ends.merged_into is None else self.ends.merged_into

    def ended(self, ids: Sequence[int]) -> bool:
        """Whether a completion has come to its end."""
        return bool(ids) and ids[-1] in self.ends.ids

    def bytes_of(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token, b"" for an end."""
        known, ends = self.spelling.bytes_of, self.ends.ids
        return [b"" if index in ends or index >= len(known) else known[index] for index in ids]


@dataclass(frozen=True, eq=False)
class Bridge:
    """Two sides of one pair, by STUDENT and TEACHER.

    ``marks`` are special tokens that mean the same on both sides, by their names there: student's name to teacher's.

    Raises:
        VocabularyError: a tokenizer changes text or cannot spell all of it, a mark is not there, or nothing is shared.
    """

    student: Side
    teacher: Side
    marks: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.shared[STUDENT]) < 2:
            raise VocabularyError("teacher and student have not one token with the same bytes; take another pair")

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.student, self.teacher

    # --- readings -------------------------------------------------------------------------------------------------

    def teacher_reading(self, student_ids: Sequence[int]) -> list[int]:
        """A completion as the teacher reads it: its bytes in the teacher's tokens, and the teacher's end behind them if it has one.

        It ends before the first byte that the teacher has no token for. Tokens without bytes are not there.
        """
        return self._reading(student_ids, self.student, self.teacher)

    def student_reading(self, teacher_ids: Sequence[int]) -> list[int]:
        """The same the other way."""
        return self._reading(teacher_ids, self.teacher, self.student)

    def _reading(self, ids: Sequence[int], own: Side, other: Side) -> list[int]:
        text = b"".join(own.bytes_of(ids))
        if missing := [at for at, byte in enumerate(text) if byte in other.spelling.missing]:
            return other.spelling.encode(text[: missing[0]])
        return other.spelling.encode(text) + [other.end] * own.ended(ids)

    def word(self, who: int, data: bytes) -> list[int]:
        """A word in the tokens of STUDENT or TEACHER, cut as it is where another word follows.

        Many tokenizers cut white space otherwise at the end of a text: of a blank line GPT-2's makes one token there, else two.
        """
        spelling = self.sides[who].spelling
        for following in (b"A", b"0", b".") if data[-1:].isspace() else ():
            if self.boundaries.between(data[-8:], following):
                ids = spelling.encode(data + following)[: -len(spelling.encode(following))]
                if spelling.decode(ids) == data:
                    return ids
        return spelling.encode(data)

    def matches(self, student_ids: Sequence[int], teacher_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Where two readings of one completion have one and the same shared token: its places in each, ``[n]`` ascending.

        Ends match where both readings have one behind the whole text. One may read the beginning of the text alone.
        Raises DataError where they spell two texts.
        """
        mine, theirs = self.student.bytes_of(student_ids), self.teacher.bytes_of(teacher_ids)
        left, right = one_to_one(mine, theirs)
        own, others = (np.asarray(ids, dtype=np.int64) for ids in (student_ids, teacher_ids))
        same = self._partner[own[left]] == others[right]
        left, right = left[same], right[same]
        whole = sum(map(len, mine)) == sum(map(len, theirs))
        if whole and self.student.ended(student_ids) and self.teacher.ended(teacher_ids):
            left, right = np.append(left, len(student_ids) - 1), np.append(right, len(teacher_ids) - 1)
        return left, right

    # --- what is shared -------------------------------------------------------------------------------------------

    @cached_property
    def shared(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that both have, ``[C]`` ids of the student, ascending, and of the teacher: equal bytes, marks, and the end."""
        mine, theirs = (side.spelling.ids for side in self.sides)
        same = mine.keys() & theirs.keys()
        # Of several with the same bytes, such as A and <0x41>, the ones that text is cut into are a pair, and then the others.
        pairs = {own: other for data in same for own, other in zip(mine[data], theirs[data], strict=False)}
        named = self._named
        pairs = {own: other for own, other in pairs.items() if other not in named.values()} | named
        pairs = {own: other for own, other in pairs.items() if self._drawn(own, other)}
        pairs[self.student.end] = self.teacher.end
        student = np.array(sorted(pairs), dtype=np.int64)
        return student, np.array([pairs[index] for index in student.tolist()], dtype=np.int64)

    @cached_property
    def _named(self) -> dict[int, int]:
        """The marks by their ids."""
        found = {self._mark(self.student, own): self._mark(self.teacher, other) for own, other in self.marks.items()}
        if len(set(found.values())) < len(found):
            twice = next(name for name in self.marks.values() if [*self.marks.values()].count(name) > 1)
            raise VocabularyError(
                f"shared_marks names the teacher's {twice!r} for two tokens of the student; it can mean the same as one alone"
            )
        return found

    def _drawn(self, own: int, other: int) -> bool:
        """Whether both models may draw the token as text."""
        both = zip((own, other), self.sides, strict=True)
        return all(index < side.vocab_size and index not in side.ends.ids for index, side in both)

    @staticmethod
    def _mark(side: Side, name: str) -> int:
        index = side.tokenizer.get_vocab().get(name)
        if index is None:
            raise VocabularyError(f"the {side.role}'s tokenizer has no token {name!r}, which shared_marks names")
        return index

    @cached_property
    def _partner(self) -> np.ndarray:
        """The teacher's id of each of the student's ids, -1 for none."""
        found = np.full(len(self.student.spelling.bytes_of) + self.student.vocab_size, -1, dtype=np.int64)
        found[self.shared[STUDENT]] = self.shared[TEACHER]
        found[self.student.end] = -1  # ends match by standing at the end
        return found

    @cached_property
    def complete(self) -> tuple[bool, bool]:
        """Whether all that student and teacher may draw is shared, but for ends that count as another one."""
        found = []
        for ids, side in zip(self.shared, self.sides, strict=True):
            others = () if side.ends.merged_into is None else side.ends.ids
            found.append({*ids.tolist(), *others} == set(range(side.vocab_size)))
        return found[STUDENT], found[TEACHER]

    # --- words ----------------------------------------------------------------------------------------------------

    @cached_property
    def boundaries(self) -> Boundaries:
        """Where a text may change hands."""
        return Boundaries(*(side.spelling for side in self.sides))

    @cached_property
    def beginnings(self) -> tuple[Beginnings, Beginnings]:
        """By STUDENT, TEACHER: which tokens begin a word."""
        student, teacher = (Beginnings(self.boundaries, side.spelling, side.ends.ids) for side in self.sides)
        return student, teacher

    @cached_property
    def unspelt(self) -> tuple[list[int], list[int]]:
        """By STUDENT, TEACHER: the tokens that the other model cannot spell; they are never drawn in a text of both."""
        found = []
        for side, other in (self.sides, self.sides[::-1]):
            known = side.spelling.bytes_of[: side.vocab_size]
            found.append([i for i, data in enumerate(known) if data and not other.spelling.spells(data)])
        return found[STUDENT], found[TEACHER]

    # --- words for people -----------------------------------------------------------------------------------------

    def describe(self, text: str = PROBE) -> list[str]:
        """What is shared, in sentences, with the matches of a text and examples of what does not match."""
        sizes = [sum(map(bool, side.spelling.bytes_of[: side.vocab_size])) for side in self.sides]
        count = len(self.shared[STUDENT]) - 1
        ids = [side.spelling.encode(text.encode()) for side in self.sides]
        places, _ = self.matches(*ids)
        spelt = self.student.bytes_of(ids[STUDENT])
        number = words(spelt, self.boundaries)
        apart = [
            repr(spelt[at].decode(errors="replace")) for at in sorted(set(range(len(spelt))) - set(places.tolist()))
        ]
        shown = ", ".join(dict.fromkeys(apart)) if apart else "none"
        return [
            f"tokens of the student {sizes[STUDENT]}, of the teacher {sizes[TEACHER]}; {count} have the same bytes in both",
            f"of a text of {len(spelt)} student tokens ({len(ids[TEACHER])} of the teacher's) {len(places) / len(spelt):.0%} match "
            f"one to one; it may change hands at {number} places, once in {len(spelt) / number:.2f} student tokens",
            f"student tokens of it without a match: {shown if len(shown) < 200 else shown[:200] + ' …'}",
        ]
