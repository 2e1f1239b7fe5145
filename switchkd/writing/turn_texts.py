"""A text that two models with different tokenizers write in turns of words: its two readings, and who writes."""

import math
from dataclasses import dataclass, field

from switchkd.crossing.bridge import Bridge
from switchkd.decoding.rollouts import Rollout
from switchkd.decoding.rows import not_finite
from switchkd.methods.policy import STUDENT, TEACHER
from switchkd.methods.sampling import Use, noise_key


@dataclass
class TurnText:
    """One prompt on its way to a rollout.

    Both readings of finished words, ``student_ids`` and ``teacher_ids``, spell one text. ``word`` are tokens of the one who is
    writing (None: nobody yet), which the other reads once the word has ended. ``turns`` counts the places at which the rule was
    asked. ``clock`` counts bytes written, and 1 for a token without any: it keys the noise.
    """

    bridge: Bridge
    id: int
    prompts: tuple[list[int], list[int]]  # by STUDENT, TEACHER
    budget: int
    seed: int = 0
    writer: int | None = None
    student_ids: list[int] = field(default_factory=list)
    teacher_ids: list[int] = field(default_factory=list)
    word: list[int] = field(default_factory=list)
    spelt: bytes = b""  # of the word
    tail: bytes = b""  # the end of the text, its last character at least
    clock: int = 0
    turns: int = 0
    words: int = 0
    said: tuple[float, float] = (math.nan, math.nan)  # divergence and threshold at the word's beginning
    speakers: list[int] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    thresholds: list[float] = field(default_factory=list)
    stop_reason: str = ""
    error: str | None = None

    def anew(self) -> "TurnText":
        """The same prompt, of which nothing is written yet."""
        same = self.bridge, self.id, self.prompts, self.budget, self.seed
        return TurnText(*same, stop_reason=self.stop_reason, error=self.error)

    def ids(self, who: int) -> list[int]:
        """The prompt and the completion as a model reads it; of the word, those of the writer alone."""
        return self.prompts[who] + self.reading(who) + (self.word if who == self.writer else [])

    def reading(self, who: int) -> list[int]:
        """The finished words as a model reads them."""
        return (self.student_ids, self.teacher_ids)[who]

    def key(self, who: int) -> int:
        """Of the noise of the next token, if ``who`` draws it."""
        return noise_key(self.seed, self.id, self.clock, Use.TOKEN if who == STUDENT else Use.TEACHER)

    def begins(self, token: int) -> bool:
        """Whether a token of the writer begins a word."""
        assert self.writer is not None
        return self.bridge.beginnings[self.writer].begins(self.tail, token)

    def begin(self, token: int, speaker: int, divergence: float, threshold: float) -> None:
        """The first token of a word, behind a word that was closed."""
        self.writer, self.word, self.spelt, self.said = speaker, [], b"", (divergence, threshold)
        self.words += 1
        side = self.bridge.sides[speaker]
        if token in side.ends.ids:
            self.student_ids.append(self.bridge.student.end)
            self.teacher_ids.append(self.bridge.teacher.end)
            self._note(1)
            self.stop_reason = "eos"
        else:
            self.go_on(token)

    def go_on(self, token: int) -> None:
        """The next token of a word."""
        assert self.writer is not None
        data = self.bridge.sides[self.writer].spelling.bytes_of[token]
        self.word.append(token)
        self.spelt, self.tail = self.spelt + data, (self.tail + data)[-8:]
        self.clock += max(len(data), 1)
        if self._is_full():
            self.close()
            self._cut()
            self.stop_reason = "length"

    def close(self) -> None:
        """The word has ended, if there is one: the other reads it in its own tokens."""
        if self.writer is None:
            return
        read = self._read_by_other()
        self.student_ids += self.word if self.writer == STUDENT else read
        self.teacher_ids += read if self.writer == STUDENT else self.word
        self._note(len(self.word if self.writer == STUDENT else read))
        self.word, self.spelt = [], b""

    def _read_by_other(self) -> list[int]:
        assert self.writer is not None
        return self.bridge.word(1 - self.writer, self.spelt)

    def _note(self, tokens: int) -> None:
        """Who wrote the last tokens of the student's reading, and what was seen at the first of them."""
        assert self.writer is not None
        rest = [math.nan] * (tokens - 1)
        self.speakers += [self.writer] * tokens
        self.divergences += [self.said[0], *rest][:tokens]
        self.thresholds += [self.said[1], *rest][:tokens]

    def _is_full(self) -> bool:
        """Whether one of the readings has as many tokens as the budget. (A reading has at most one token a byte.)"""
        mine, theirs = (
            (self.student_ids, self.teacher_ids) if self.writer == STUDENT else (self.teacher_ids, self.student_ids)
        )
        if len(mine) + len(self.word) >= self.budget:
            return True
        return len(theirs) + len(self.spelt) >= self.budget and len(theirs) + len(self._read_by_other()) >= self.budget

    def _cut(self) -> None:
        """Cut the student's reading to the budget, and what the teacher reads of the last word with it."""
        over = len(self.student_ids) - self.budget
        if over <= 0:
            return
        kept = self.bridge.student.spelling.decode(self.student_ids[:-over])
        before = self.bridge.teacher.spelling.decode(self.teacher_ids)
        while not kept.startswith(before):
            dropped = self.teacher_ids.pop()
            before = before[: len(before) - len(self.bridge.teacher.spelling.bytes_of[dropped])]
        self.teacher_ids += self.bridge.teacher.spelling.encode(kept[len(before) :])
        for each in (self.student_ids, self.speakers, self.divergences, self.thresholds):
            del each[-over:]

    def stop(self, reason: str, error: str) -> None:
        """The text cannot be written, or go on."""
        self.stop_reason, self.error = reason, error

    def fail(self, who: int) -> None:
        """The logits of a model are not finite where the text stands; where both models' are not, the student is named."""
        if self.stop_reason:
            return
        self.stop(*not_finite("teacher" if who == TEACHER else "student", self.id, len(self.student_ids)))

    def rollout(self, teacher: str = "") -> Rollout:
        """The text as it stands; of a word that is being written, nothing."""
        return Rollout(
            self.id, self.prompts[STUDENT], self.student_ids[:], self.speakers[:], self.divergences[:], self.thresholds[:],
            self.stop_reason, self.error, teacher_prompt_ids=self.prompts[TEACHER],
            teacher_completion_ids=self.teacher_ids[:], teacher=teacher,
        )  # fmt: skip
