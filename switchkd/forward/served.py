"""A teacher behind a vLLM server: in a pair it stands where a model would, and what it says of texts is asked over HTTP.

The server sends what enters its output layer; the layer itself, which makes distributions of that, is the only part of the model
that is here. Every answer holds a short text of our own beside what was asked, by which another model is found out at once.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

from switchkd.base.errors import CheckpointError, DataError, ModelError, ServerError
from switchkd.base.manifest import json_sha256, read_record
from switchkd.base.storage import cache_folder, write_file
from switchkd.forward.ends import NO_ENDS, Ends
from switchkd.forward.head import Head
from switchkd.forward.server import Refused, Server, Serves, start_line, writing_line
from switchkd.forward.twin import twin
from switchkd.runner.architecture import model_class

# Texts that are written at a time.
WRITING = 64
# Tokens of one request. Its answer has two or four bytes a token and hidden dimension.
REQUEST_TOKENS = 4096
# The text that every request holds beside its own: so many tokens, of ids that any vocabulary has.
_PROBE_TOKENS = 16
# Relative error of the probe that another batch, or another GPU, may explain: of a server in fp32, and in half precision.
_TOLERANCE = {True: 1e-3, False: 3e-2}
NO_TEXT = "the teacher is behind a server that reads and does not write: scores of its own text are left out"


@dataclass(frozen=True)
class OutputLayer:
    """The output layer of a model by itself, and the way from there to logits, of which ``Head`` tells."""

    linear: nn.Linear
    scale: float
    softcap: float | None


class ServedModel(nn.Module):
    """A model behind ``server``, of which the config, the output layer and where its texts end are known here.

    It is read through a `ServedReader` and never called. Its parameters are those of the output layer.

    Raises:
        ServerError: the server does not answer, or not with hidden states as they enter the output layer.
        ModelError: these do not fit the output layer.
    """

    _is_stateful = False

    def __init__(
        self,
        server: Server,
        serves: Serves,
        files: str,
        config: PretrainedConfig,
        generation_config: GenerationConfig,
        output: OutputLayer,
        tokenizer_sha256: str,
        writer: Server | None = None,
    ):
        super().__init__()
        self.server, self.serves, self.files = server, serves, files
        self.config, self.generation_config = config, generation_config
        self.linear, self.scale, self.softcap = output.linear, output.scale, output.softcap
        self._tokenizer_sha256 = tokenizer_sha256
        self.probe = self._first_probe()
        self.told_of_drafts = False  # whether it was said that the writer drafts badly
        self.writer, self._writes = writer, None if writer is None else self._checked(writer)
        self.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the output layer."""
        return self.linear.weight.dtype

    def get_output_embeddings(self) -> nn.Linear:
        """The output layer."""
        return self.linear

    def forward(self, *_: Any, **__: Any) -> Any:
        """There is nothing to be called."""
        raise ModelError(
            f"the teacher at {self.server.address} is read as a whole text at a time, and decides no single tokens"
        )

    def head(self, vocab_size: int, ends: Ends = NO_ENDS) -> Head:
        """The way from the server's states to logits of the first ``vocab_size`` ids."""
        return Head(self.linear, vocab_size, self.scale, self.softcap, ends)

    def hidden(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """What enters the output layer at each of the T tokens of every text, ``[T, H]`` each, on the host.

        Raises:
            ModelError: a text is longer than the server reads. ServerError: it does not answer, or with another model.
        """
        if (longest := max(map(len, texts))) > self.serves.max_model_len:
            raise ModelError(
                f"a text of {longest} tokens exceeds max_model_len {self.serves.max_model_len} of {self.server.address}; start it "
                f"with --max-model-len {longest} or more, or lower max_prompt_length, max_completion_length or max_new_tokens"
            )
        requests = [[*request, self._probe_ids] for request in _requests(texts)]
        questions = [self.server.hidden(self.serves.name, request, self._travels_in) for request in requests]
        answers = self.server.ask(questions)
        for answer in answers:
            self._check_probe(answer.pop())
        return [states for answer in answers for states in answer]

    def written(
        self,
        prompts: Sequence[Sequence[int]],
        budgets: Sequence[int],
        row_keys: Sequence[int],
        starts: Sequence[int],
        ends: Sequence[int],
        vocab_size: int,
        temperature: float,
    ) -> list[list[int]]:
        """How the writer goes on behind each prompt, in so many tokens at most or up to one of ``ends``: a draft.

        With our noise in the server these are the draws of the rows with these ``row_keys`` from the positions ``starts`` on.
        """
        assert self.writer is not None and self._writes is not None
        longest, questions = self._writes.max_model_len, []
        for prompt, budget, key, start in zip(prompts, budgets, row_keys, starts, strict=True):
            if len(prompt) >= longest:
                raise ModelError(
                    f"{self.writer.address} is to go on behind {len(prompt)} tokens, and its max_model_len is {longest}; start it "
                    "with a larger --max-model-len, or lower max_prompt_length or max_new_tokens"
                )
            # The key has more digits than a number of JSON is sure to keep.
            noise: dict[str, str | float] = {
                "key": str(key),
                "start": start,
                "temperature": temperature,
                "vocab_size": vocab_size,
            }
            own = {f"switchkd_{name}": value for name, value in noise.items()}
            questions.append(
                self.writer.written(self._writes.name, prompt, min(budget, longest - len(prompt)), ends, own)
            )
        return self.writer.ask(questions, WRITING)

    # --- which model it is ----------------------------------------------------------------------------------------

    @cached_property
    def sha256(self) -> str:
        """A checksum that stands for the weights: of tokenizer, config, output layer, name, length, and what the probe gives.

        What the probe gives is rounded otherwise from start to start. So the first that this machine has seen of a model is kept
        in the cache, and one that differs by rounding alone counts as that.
        """
        config = {k: v for k, v in self.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
        exact = json_sha256([
            self._tokenizer_sha256, config, _bytes_sha256(self.linear.weight), self.serves.name, self.serves.max_model_len
        ])  # fmt: skip
        file, own = cache_folder() / "servers" / f"{exact[:32]}.json", self.probe[-1].tolist()
        seen = _probes(file)
        for known in seen:
            if self._differs(torch.tensor(known), self.probe[-1]) <= self._tolerance:
                return json_sha256([exact, known])
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps({"probes": [*seen, own]}))
        return json_sha256([exact, own])

    def _first_probe(self) -> Tensor:
        """What the probe gives, ``[T, H]`` fp32, if the server sends what enters the output layer."""
        address, start = self.server.address, start_line(self.serves.root)
        question = self.server.hidden(self.serves.name, [self._probe_ids], torch.float32)
        try:
            [[probe]] = self.server.ask([question])
        except Refused as error:
            if error.status not in (400, 404, 405, 422):
                raise
            raise ServerError(
                f"{error}. A teacher is read through a pooling server, and this one seems to generate alone; start it with: {start}"
            ) from error
        if probe.shape[1] != self.linear.in_features:
            raise ModelError(
                f"{address} sends {probe.shape[1]} numbers a token, and the output layer in {self.files} takes "
                f"{self.linear.in_features}; name the folder of the model that is served: --teacher-files"
            )
        norms = probe.norm(dim=1)
        if not probe.isfinite().all():
            raise ServerError(f"{address} sends numbers that are not finite; check the weights and dtype of its model")
        if (norms - 1).abs().max() < 1e-2:
            raise ServerError(
                f"{address} sends normalised vectors, from which nothing can be told of the next token; start it with "
                f"use_activation false: {start}"
            )
        return probe

    @torch.no_grad()
    def _checked(self, writer: Server) -> Serves:
        """What the writer serves, if it says of the probe what the server's states and the output layer here say of it."""
        serves = writer.serves()
        try:
            [theirs] = writer.ask([writer.log_likelihoods(serves.name, self._probe_ids)])
        except Refused as error:
            raise ServerError(
                f"{error}. The teacher's writer is a server that generates, beside the one that reads; start it with: "
                f"{writing_line(self.serves.root)}"
            ) from error
        head = self.head(self.linear.out_features)
        logs = head.log_probs(head(self.probe[:-1].to(self.linear.weight.device))).cpu()
        ours = logs.gather(1, torch.tensor(self._probe_ids[1:]).unsqueeze(1))[:, 0]
        worst = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))
        if worst > _TOLERANCE[False]:
            raise ModelError(
                f"{writer.address} writes with another model than {self.server.address} reads, or {self.files} is of another: "
                f"log-probabilities of {len(ours)} tokens differ by {worst:.2g} (relative); serve one model by both"
            )
        return serves

    def _check_probe(self, found: Tensor) -> None:
        """Raise ServerError if an answer is not of the model that was there at first."""
        if (error := self._differs(self.probe, found.float())) > self._tolerance:
            raise ServerError(
                f"{self.server.address} serves another model than before: on the same {len(found)} tokens its states differ by "
                f"{error:.2g} (relative, rounding explains {self._tolerance:g}); start it again with the model that it had"
            )

    @staticmethod
    def _differs(known: Tensor, found: Tensor) -> float:
        return float((known - found).norm() / known.norm()) if known.shape == found.shape else float("inf")

    @cached_property
    def _tolerance(self) -> float:
        wide = self._travels_in == torch.float32 and not self.probe.equal(self.probe.bfloat16().float())
        return _TOLERANCE[wide]

    @cached_property
    def _probe_ids(self) -> list[int]:
        """The same tokens for every model of a vocabulary."""
        return [(7 * i * i + 3 * i + 5) % self.linear.out_features for i in range(_PROBE_TOKENS)]

    @property
    def _travels_in(self) -> torch.dtype:
        """The dtype in which states are sent: that of the output layer, fp32 at most."""
        return self.dtype if self.dtype.itemsize < 4 else torch.float32


class ServedReader:
    """A teacher behind a server as one that is asked what it says of texts."""

    def __init__(self, model: ServedModel, vocab_size: int, ends: Ends = NO_ENDS):
        self.model, self.head = model, model.head(vocab_size, ends)

    @torch.no_grad()
    def hidden(self, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """What enters the output layer before each of the N tokens of the rows' completions, ``[N, H]``.

        A row is the token ids of a prompt and its completion. The last token is not sent: nothing is asked behind it.
        """
        if not all(prompt for prompt, _ in rows):
            raise DataError("a text that the teacher is to read has no prompt; give it at least one token")
        read = [(prompt, completion) for prompt, completion in rows if completion]
        weight = self.head.linear.weight
        states = self.model.hidden([prompt + completion[:-1] for prompt, completion in read]) if read else []
        own = [each[-len(completion) :] for each, (_, completion) in zip(states, read, strict=True)]
        return torch.cat([weight.new_zeros(0, weight.shape[1]), *(each.to(weight) for each in own)])

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of the next token, ``[..., vocab_size]``, fp32 or wider."""
        return self.head.log_probs(self.head(hidden))


def output_law(config: PretrainedConfig) -> tuple[list[str], float, float | None]:
    """Of an architecture: where its output layer's weight may lie, most likely first; and scale and soft cap behind it.

    Found on a small random twin of it, on which it is also proved that nothing stands between the states that a server sends and
    the layer. Raises ModelError where something does, or where logits are more than a linear layer with scale or cap.
    """
    name = config.model_type
    try:
        small = twin(model_class(config), config)
    except ModelError:
        raise
    except Exception as error:  # it raises what it likes
        raise ModelError(
            f"{name}: the way to its logits cannot be proved on a small model of its kind ({error})"
        ) from error
    head = Head.of_states(small)
    modules = {id(module): where for where, module in small.named_modules()}
    inner, outer = small.get_input_embeddings(), small.get_output_embeddings()
    names = [modules[id(outer)], *([modules[id(inner)]] if small.config.get_text_config().tie_word_embeddings else [])]
    return names, head.scale, head.softcap


def _requests(texts: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """The texts in their order, in as few requests as `REQUEST_TOKENS` allows."""
    requests: list[list[Sequence[int]]] = [[]]
    for text in texts:
        if requests[-1] and sum(map(len, requests[-1])) + len(text) > REQUEST_TOKENS:
            requests.append([])
        requests[-1].append(text)
    return requests


def _probes(file: Path) -> list[list[float]]:
    """What this machine has seen of models of one kind; nothing where the file is damaged, which only means to begin anew."""
    try:
        found = read_record(file, dict[str, list[list[float]]])
        return found.get("probes", [])
    except CheckpointError:
        return []


def _bytes_sha256(tensor: Tensor) -> str:
    raw: np.ndarray = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(raw.data).hexdigest()
