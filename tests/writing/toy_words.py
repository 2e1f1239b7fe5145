"""Two toy models with toy tokenizers, the law of what they write together by its definition, and the law of what a loop writes.

The first is a recursion over the definition in plain Python that shares no code with the package but the rules and their
divergences. The second runs the loop once on every path of noise: a key's noise is uniform, a draw inverts the law's cumulative sum
at it, and each token that it may give is a path of its own, with the share of the noise that gives it. A key that is asked again
has the noise that is left of it.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import torch
from tiny import TabularModel
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from switchkd.crossing.bridge import Bridge, Side
from switchkd.decoding.settings import DecodeSettings
from switchkd.forward.ends import Ends
from switchkd.methods.policy import STUDENT, TEACHER
from switchkd.writing import turns

LEAST_MASS, LEAST_REST = 0.01, 1.2e-7
PROMPTS = [[1]], [[0]]


@dataclass(frozen=True)
class Tokens:
    """A byte-level vocabulary: single bytes first, in the order of ``alphabet``, then merges, then the ends."""

    alphabet: bytes
    merges: tuple[tuple[bytes, bytes], ...]
    ends: tuple[str, ...] = ("<end>",)

    @property
    def known(self) -> list[bytes]:
        """The bytes of each id, b"" for ends."""
        single = [bytes([byte]) for byte in self.alphabet]
        return [*single, *(left + right for left, right in self.merges), *(b"" for _ in self.ends)]

    def encode(self, word: bytes) -> tuple[int, ...]:
        """Byte pair encoding: of all neighbours that merge, those of the lowest rank first, from the left."""
        parts = [bytes([byte]) for byte in word]
        while ranked := [
            (self.merges.index(pair), at) for at, pair in enumerate(pairwise(parts)) if pair in self.merges
        ]:
            _, at = min(ranked)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return tuple(self.known.index(part) for part in parts)

    def side(self, role: str) -> Side:
        shown = bytes_to_unicode()
        names = ["".join(shown[byte] for byte in data) for data in self.known if data]
        merges = [tuple("".join(shown[byte] for byte in part) for part in pair) for pair in self.merges]
        backend = Tokenizer(models.BPE({name: at for at, name in enumerate(names)}, merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in self.ends])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=self.ends[-1])
        ids = tuple(range(len(names), len(names) + len(self.ends)))
        return Side(tokenizer, len(tokenizer), Ends(ids, ids[-1] if len(ids) > 1 else None), role)


def _alphabet(first: bytes, without: bytes = b"") -> bytes:
    return first + bytes(byte for byte in range(256) if byte not in first + without)


@dataclass(frozen=True)
class Toy:
    """Two vocabularies, and of each the tokens that its model may write."""

    student: Tokens
    teacher: Tokens
    written: tuple[tuple[bytes, ...], tuple[bytes, ...]]
    long_words: bool = False  # whether the models at times see hardly any word's end
    name: str = ""

    @property
    def sides(self) -> tuple[Tokens, Tokens]:
        return self.student, self.teacher

    def used(self, who: int) -> list[int]:
        tokens = self.sides[who]
        ends = [len(tokens.known) - 1 - at for at in range(len(tokens.ends))]
        return [*(tokens.known.index(data) for data in self.written[who]), *ends]

    def model(self, who: int) -> TabularModel:
        return TwoBack(self, who)


@cache
def law_of(toy: Toy, who: int, before: int, last: int) -> tuple[float, ...]:
    """A model's law behind its last two tokens: a few tokens, and at times one that is hardly ever written."""
    chance = random.Random(f"{toy.name} {who} {before} {last}")
    used, known = toy.used(who), toy.sides[who].known
    weights = {token: chance.uniform(0.5, 3.0) for token in chance.sample(used, chance.choice((3, 3, 4)))}
    if chance.random() < 0.5:
        weights.setdefault(chance.choice(used), 0.004 * sum(weights.values()))
    if toy.long_words and chance.random() < 0.5:
        weights = {
            token: weight * (1.0 if known[token][:1] in b"ab" and known[token] else 0.002)
            for token, weight in weights.items()
        }
    return tuple(weights.get(index, 0.0) / sum(weights.values()) for index in range(len(known)))


@cache
def bridge_of(toy: Toy) -> Bridge:
    return Bridge(toy.student.side("student"), toy.teacher.side("teacher"))


class TwoBack(TabularModel):
    """Its law depends on the last two tokens."""

    def __init__(self, toy: Toy, who: int):
        super().__init__([law_of(toy, who, 0, 0)])
        self.toy, self.who = toy, who

    def forward(self, input_ids, logits_to_keep=0, **_):
        (ids,) = input_ids.tolist()
        law = law_of(self.toy, self.who, ids[-2] if len(ids) > 1 else -1, ids[-1])
        return SimpleNamespace(logits=torch.tensor([[law]], dtype=torch.float64).log())


_E = "é".encode()
TOYS = {
    "letters": Toy(
        Tokens(_alphabet(b"ab "), ((b"a", b"b"), (b" ", b"a"), (b" ", b"b"))),
        Tokens(_alphabet(b"b a"), ((b"b", b"b"), (b"b", b"a"), (b" ", b"a"))),
        ((b"a", b"b", b" a", b" b", b"ab"), (b"a", b"b", b" ", b" a", b"ba", b"bb")),
    ),
    # Words of several tokens, and characters of two bytes; the student has two ends, which are one event.
    "characters": Toy(
        Tokens(_alphabet(b"ab "), ((b"a", b"b"), (b" ", b"a")), ("<end>", "<stop>")),
        Tokens(_alphabet(b"b a"), ((b" ", b"a"), (_E[:1], _E[1:]), (b"b", b"b"))),
        ((b"a", b"b", b" ", _E[:1], _E[1:]), (b"a", b" ", b" a", b"bb", _E)),
    ),
    # A control character that the teacher has no token for, and one that the student has none for.
    "unspelt": Toy(
        Tokens(_alphabet(b"ab \x01", b"\x02"), ((b"a", b"b"), (b"b", b"\x01"))),
        Tokens(_alphabet(b"a b\x02", b"\x01"), ((b" ", b"a"), (b"b", b"a"))),
        ((b"a", b" ", b"ab", b"\x01", b"b\x01"), (b"a", b" ", b"b", b"\x02", b"ba")),
    ),
    "long words": Toy(
        Tokens(_alphabet(b"ab "), ((b"a", b"b"), (b" ", b"a"), (b"b", b"b"))),
        Tokens(_alphabet(b"b a"), ((b"a", b"a"), (b"b", b"a"), (b" ", b"b"))),
        ((b"a", b" ", b" a", b"ab"), (b"a", b"b", b" ", b"aa")),
        long_words=True,
    ),
}
TOYS = {name: replace(toy, name=name) for name, toy in TOYS.items()}


# --- the definition -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A text up to a place where it may change hands."""

    ids: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    text: bytes = b""
    seen: tuple[tuple[int, float, float], ...] = ()  # by student token: who wrote it, divergence, threshold


@dataclass
class Definition:
    """The law of what a toy's models write, ``outcomes``: (student ids, teacher ids, speakers, stop reason) to probability.

    ``seen`` has what the rule compared in each of them. ``places`` counts those at which the rule was, and was not asked.
    """

    toy: Toy
    settings: DecodeSettings
    outcomes: Counter = field(default_factory=Counter)
    seen: dict = field(default_factory=dict)
    places: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self.policy = self.settings.policy
        self.place(Written(), self.policy.init(1), 0, None, None, 1.0)

    # One step each.

    def place(self, written, state, asked, writer, token, chance):
        """Who writes the next word; ``token`` is what ``writer`` would begin it with."""
        laws = [self.law(who, written.ids[who]) for who in (STUDENT, TEACHER)]
        words = [self.beginning(who, laws[who], written.text) for who in (STUDENT, TEACHER)]
        read = [bool(each) for each in self.policy.reads(state)]
        other = STUDENT if writer == TEACHER else TEACHER
        if written.text and read[other] and words[other][1] < LEAST_MASS:
            self.places["not asked"] += 1
            return self.begin(written, state, asked, writer, token, (math.nan, math.nan), chance)
        self.places["asked"] += 1
        logs = [self.compared(who, words[who][0]) for who in (STUDENT, TEACHER)]
        decision = self.policy.step(state, *logs, torch.tensor([asked]))
        speaker = int(decision.speaker)
        state = self.policy.spoke(decision.state, decision.speaker)
        said = float(decision.divergence), float(decision.thresholds)
        if speaker == writer and token is not None:
            return self.begin(written, state, asked + 1, speaker, token, said, chance)
        for drawn, share in self.shaped(words[speaker][0]).items():
            self.begin(written, state, asked + 1, speaker, drawn, said, chance * share)

    def begin(self, written, state, asked, speaker, token, said, chance):
        if token in self.ends(speaker):
            ids = tuple((*ids, max(self.ends(who))) for who, ids in enumerate(written.ids))
            return self.finish(replace(written, ids=ids, seen=(*written.seen, (speaker, *said))), "eos", chance)
        self.go_on(written, state, asked, speaker, (token,), said, chance)

    def go_on(self, written, state, asked, writer, word, said, chance):
        data = b"".join(self.toy.sides[writer].known[token] for token in word)
        readings = (word, self.toy.teacher.encode(data)) if writer == STUDENT else (self.toy.student.encode(data), word)
        ids = tuple(have + new for have, new in zip(written.ids, readings, strict=True))
        seen = (*written.seen, (writer, *said), *[(writer, math.nan, math.nan)] * (len(readings[STUDENT]) - 1))
        closed = Written(ids, written.text + data, seen)
        if max(map(len, ids)) >= self.settings.max_new_tokens:
            return self.finish(self.cut(closed), "length", chance)
        for token, share in self.shaped(self.law(writer, written.ids[writer] + word)).items():
            if token in self.ends(writer) or self.boundary(closed.text, self.toy.sides[writer].known[token]):
                self.place(closed, state, asked, writer, token, chance * share)
            else:
                self.go_on(written, state, asked, writer, (*word, token), said, chance * share)

    def cut(self, written):
        """The student's reading up to the budget, and the teacher's of the same bytes: its own tokens as far as they go."""
        budget = self.settings.max_new_tokens
        student, teacher = written.ids
        text = b"".join(self.toy.student.known[token] for token in student[:budget])
        whole = max(
            n
            for n in range(len(teacher) + 1)
            if text.startswith(b"".join(self.toy.teacher.known[token] for token in teacher[:n]))
        )
        rest = text[sum(len(self.toy.teacher.known[token]) for token in teacher[:whole]) :]
        return Written((student[:budget], teacher[:whole] + self.toy.teacher.encode(rest)), text, written.seen[:budget])

    def finish(self, written, reason, chance):
        outcome = (*written.ids, tuple(who for who, *_ in written.seen), reason)
        self.outcomes[outcome] += chance
        self.seen[outcome] = [said for _, *said in written.seen]

    # What they are made of.

    def ends(self, who):
        tokens = self.toy.sides[who]
        return range(len(tokens.known) - len(tokens.ends), len(tokens.known))

    def law(self, who, ids):
        """Token to probability, with all ends at one id and nothing that the other cannot spell."""
        prompt = tuple(PROMPTS[who][0])
        before, last = (-1, *prompt, *ids)[-2:]
        law = dict(enumerate(law_of(self.toy, who, before, last)))
        ends = self.ends(who)
        law[max(ends)] = sum(law.pop(end) for end in ends)
        known, others = self.toy.sides[who].known, self.toy.sides[1 - who].alphabet
        return _shares({token: p for token, p in law.items() if p > 0 and set(known[token]) <= set(others)})

    def boundary(self, text, token):
        """Between two characters that no token of either vocabulary has beside each other."""
        pair = text[-1:] + token[:1]
        return (
            any(map(_is_character, (text[-1:], text[-2:])))
            and not 0x80 <= token[0] < 0xC0
            and not any(pair in data for side in self.toy.sides for data in side.known)
        )

    def beginning(self, who, law, text):
        """The law of a word's first token, and how much of the law that was."""
        if not text:
            return law, 1.0
        known, ends = self.toy.sides[who].known, self.ends(who)
        kept = {token: p for token, p in law.items() if token in ends or self.boundary(text, known[token])}
        return _shares(kept), sum(kept.values())

    def compared(self, who, law):
        """The law's logarithm on the tokens that both have, and one place for all else."""
        mine, theirs = self.toy.sides[who].known, self.toy.sides[1 - who].known
        shared = {data: law.get(token, 0.0) for token, data in enumerate(mine) if data and data in theirs}
        shared[b""] = law.get(max(self.ends(who)), 0.0)
        rest = max(1.0 - sum(shared.values()), LEAST_REST)
        return torch.tensor([[*(p for _, p in sorted(shared.items())), rest]], dtype=torch.float64).log()

    def shaped(self, law):
        """What is drawn from: at the temperature, the fewest tokens whose probability reaches top_p."""
        temperature, top_p = self.settings.temperature, self.settings.top_p
        if temperature == 0:
            return {max(law, key=law.get): 1.0}
        law = _shares({token: p ** (1 / temperature) for token, p in law.items()})
        kept, mass = {}, 0.0
        for token, p in sorted(law.items(), key=lambda item: -item[1]):
            if mass < top_p:
                kept[token] = p
            mass += p
        return _shares(kept)


def _is_character(data):
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


def _shares(law):
    whole = sum(law.values())
    return {token: p / whole for token, p in law.items()}


# --- all paths of noise through a loop ----------------------------------------------------------------------------


class Paths:
    """Runs a loop on every path of its noise."""

    def __init__(self):
        self.open, self.outcomes, self.rollouts = [()], Counter(), {}

    def explore(self, run):
        """``run()`` makes one rollout from ``draw``."""
        while self.open:
            self.choices, self.at, self.chance, self.left = self.open.pop(), 0, 1.0, {}
            rollout = run()
            outcome = (
                tuple(rollout.completion_ids),
                tuple(rollout.teacher_completion_ids),
                tuple(rollout.speakers),
                rollout.stop_reason,
            )
            self.outcomes[outcome] += self.chance
            self.rollouts[outcome] = rollout
        return self

    def draw(self, log_probs, noise, temperature=1.0):
        """Inverts the law at what is left of the key's noise; ``noise`` is the key itself."""
        if temperature == 0:
            return log_probs.argmax(-1)
        low, high = self.left.get(key := int(noise), (0.0, 1.0))
        law = (log_probs[0] / temperature).softmax(-1)
        tops = law.cumsum(-1).tolist()
        options = []
        for token in law.nonzero()[:, 0].tolist():
            part = max(low, tops[token - 1] if token else 0.0), min(high, tops[token])
            if part[1] - part[0] > 1e-13:
                options.append((token, part))
        if self.at == len(self.choices):
            self.open += [(*self.choices, other) for other in range(1, len(options))]
            self.choices = (*self.choices, 0)
        token, self.left[key] = options[self.choices[self.at]]
        self.at += 1
        self.chance *= (self.left[key][1] - self.left[key][0]) / (high - low)
        return torch.tensor([token])


def loop_law(toy, settings, loop=turns):
    """What the reference loop of a module, `turns` or a mutant of it, writes with its noise."""
    paths, bridge = Paths(), bridge_of(toy)
    pair = toy.model(STUDENT), toy.model(TEACHER)
    kept = loop.gumbel_noise, loop.draw
    loop.gumbel_noise, loop.draw = (lambda keys, _: keys), paths.draw
    try:
        return paths.explore(lambda: loop.decode_turns_reference(loop.TurnJob.of(bridge, *pair, *PROMPTS, settings))[0])
    finally:
        loop.gumbel_noise, loop.draw = kept
