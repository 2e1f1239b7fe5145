"""A vLLM server, asked over HTTP: what it serves, and what enters its model's output layer for every token of a text.

Stock vLLM, no patch: ``/v1/models``, and ``/pooling`` of one that was started with `POOLING_FLAGS`. What may pass (no answer, an
error of the server's own, half an answer) is asked again for a while; what does not pass is an error at once.
"""

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import httpx2
import torch
from torch import Tensor

from switchkd.base import signals
from switchkd.base.errors import ServerError, SwitchKDWarning

POOLING_FLAGS = """--runner pooling --convert embed --pooler-config '{"task":"token_embed","use_activation":false}'"""
# Requests that are under way at a time; vLLM puts their texts into one batch.
UNDER_WAY = 8
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Seconds between two tries, the first and the longest.
_PAUSES = 0.25, 15.0

# What a model's generation_config.json may have made the server's default.
_NEUTRAL = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}

Question = Callable[[httpx2.Client], Any]


def start_line(model: str) -> str:
    """The command that starts a server through which a teacher can be read."""
    return f"vllm serve {model} {POOLING_FLAGS}"


def writing_line(model: str) -> str:
    """The command that starts a server that writes as the teacher, with our noise; docs/server.md says where that is."""
    return f"vllm serve {model} --logits-processors switchkd_noise:KeyedNoise"


class Serves(NamedTuple):
    """What a server says that it serves: the model's name, its folder or hub name, and the most tokens of a text."""

    name: str
    root: str
    max_model_len: int


class Refused(ServerError):
    """The server says that the question is wrong; ``status`` is its number."""

    def __init__(self, words: str, status: int):
        super().__init__(words)
        self.status = status


class _Passing(Exception):
    """No answer, or half of one."""


@dataclass(frozen=True, eq=False)
class Server:
    """The server at an address such as ``http://host:8000``.

    ``patience`` are the seconds for which it is asked again where nothing comes back, ``timeout`` those that one answer may take.

    Raises of all methods:
        ServerError: no usable answer in that time, or one that says that the question is wrong (Refused).
        Stopped: a signal came while it was waited for.
    """

    address: str
    patience: float = 10.0
    timeout: float = 120.0

    def serves(self) -> Serves:
        """What it serves; of several models (adapters on a base) the first."""
        [answer] = self.ask([partial(self._once, method="GET", path="/v1/models", read=httpx2.Response.json)])
        try:
            card = answer["data"][0]
            return Serves(card["id"], card.get("root") or card["id"], int(card["max_model_len"]))
        except (LookupError, TypeError) as error:
            raise ServerError(
                f"{self.address} does not say which model it serves ({error!r}); is it vLLM? Start one: {start_line('MODEL')}"
            ) from error

    def hidden(self, model: str, texts: Sequence[Sequence[int]], dtype: torch.dtype) -> Question:
        """The question what enters the output layer of ``model`` at each token of every text: tensors ``[T, H]`` in ``dtype``.

        Texts are of one token or more. The numbers travel in ``dtype``: float32, bfloat16 or float16.
        """
        asked = {
            "model": model, "input": [list(text) for text in texts], "task": "token_embed", "use_activation": False,
            "encoding_format": "bytes", "embed_dtype": _DTYPES[dtype], "endianness": "little",
        }  # fmt: skip
        lengths = [len(text) for text in texts]
        read = partial(_states, lengths=lengths, dtype=dtype)
        return partial(self._once, method="POST", path="/pooling", body=asked, read=read)

    def written(
        self,
        model: str,
        prompt: Sequence[int],
        budget: int,
        ends: Sequence[int],
        noise: Mapping[str, str | int | float],
    ) -> Question:
        """The question how ``model`` goes on behind a prompt: its greedy token ids, ``budget`` of them or up to one of ``ends``.

        ``noise`` is for our logits processor (``switchkd_noise``), if the server has it: the greedy token is then a keyed draw.
        """
        asked = {
            "model": model, "prompt": list(prompt), "max_tokens": budget, "temperature": 0.0, "ignore_eos": True,
            "stop_token_ids": list(ends), "return_token_ids": True, "skip_special_tokens": False, "vllm_xargs": dict(noise),
            **_NEUTRAL,
        }  # fmt: skip
        return partial(self._once, method="POST", path="/v1/completions", body=asked, read=_token_ids)

    def log_likelihoods(self, model: str, text: Sequence[int]) -> Question:
        """The question of the log-probability of each token of a text behind those before it, ``[T - 1]``."""
        asked = {"model": model, "prompt": list(text), "max_tokens": 1, "prompt_logprobs": 0, **_NEUTRAL}
        read = partial(_log_likelihoods, text=text)
        return partial(self._once, method="POST", path="/v1/completions", body=asked, read=read)

    def ask(self, questions: Sequence[Question], under_way: int = UNDER_WAY) -> list[Any]:
        """The answers, in order; several questions are under way at a time, and what fails in passing is asked again."""
        answers: dict[int, Any] = {}
        pool, since, pause = ThreadPoolExecutor(under_way), time.monotonic(), _PAUSES[0]
        with self._client() as client:
            try:
                while left := [place for place in range(len(questions)) if place not in answers]:
                    futures = {place: pool.submit(questions[place], client) for place in left}
                    while wait(futures.values(), 0.1).not_done:
                        signals.check()
                    found, failed = {}, None
                    for place, future in futures.items():
                        try:
                            found[place] = future.result()
                        except _Passing as error:
                            failed = error
                    answers |= found
                    if found:
                        since, pause = time.monotonic(), _PAUSES[0]
                    if failed is not None:
                        pause = self._paused(failed, since, pause)
                return [answers[place] for place in range(len(questions))]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _paused(self, error: _Passing, since: float, pause: float) -> float:
        """Wait for the next try; returns how long to wait after that. Raises ServerError where patience ends."""
        if time.monotonic() - since + pause > self.patience:
            raise ServerError(
                f"{self.address} gives no usable answer ({error}), for {self.patience:g} seconds; start the server again, with the "
                "same model, or name its address"
            )
        if pause == _PAUSES[0]:
            words = f"{self.address} gives no usable answer ({error}); it is asked again for {self.patience:g} seconds"
            warnings.warn(words, SwitchKDWarning, stacklevel=4)
        end = time.monotonic() + pause
        while time.monotonic() < end:
            signals.check()
            time.sleep(0.05)
        return min(2 * pause, _PAUSES[1])

    def _once(
        self, client: httpx2.Client, method: str, path: str, read: Callable[[httpx2.Response], Any], body: Any = None
    ) -> Any:
        """What ``read`` makes of one answer."""
        try:
            answer = client.request(method, path, json=body)
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise _Passing(f"{type(error).__name__}: {error}") from error
        if answer.status_code < 300:
            try:
                return read(answer)
            except json.JSONDecodeError as error:
                raise ServerError(f"{self.address}{path} answers with something else than JSON; is it vLLM?") from error
        words = f"{answer.status_code}: {_words(answer)}"
        if answer.status_code >= 500 or answer.status_code == 429:
            raise _Passing(words)
        raise Refused(f"{self.address}{path} answers {words}", answer.status_code)

    def _client(self) -> httpx2.Client:
        try:
            # What proves who a server is takes a while to load, and serves none without a certificate.
            secure = self.address.startswith("https")
            return httpx2.Client(
                base_url=self.address, timeout=httpx2.Timeout(self.timeout, connect=10.0), verify=secure
            )
        except httpx2.InvalidURL as error:
            raise ServerError(f"{self.address} is no address ({error}); give one such as http://host:8000") from error


def _words(answer: httpx2.Response) -> str:
    """What an answer that is an error says."""
    try:
        said = answer.json()
        return str(said["error"]["message"] if "error" in said else said)[:500]
    except (ValueError, LookupError, TypeError):
        return answer.text[:500]


def _states(answer: httpx2.Response, lengths: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """The tensors of an answer of ``/pooling``, whose header says where each lies in its bytes, and of which shape."""
    try:
        items = sorted(json.loads(answer.headers["metadata"])["data"], key=lambda item: item["index"])
        parts = [(int(item["start"]), int(item["end"]), tuple(map(int, item["shape"]))) for item in items]
    except (ValueError, LookupError, TypeError) as error:
        raise ServerError(
            f"{answer.url} answers without the shapes of its tensors in a header ({error!r}); is it vLLM, 0.12 or later?"
        ) from error
    shapes, body = [shape for *_, shape in parts], answer.content
    if [shape[0] if len(shape) == 2 else 0 for shape in shapes] != list(lengths):
        raise ServerError(
            f"{answer.url} answers with shapes {shapes[:4]} for texts of {list(lengths[:4])} tokens, not with one row a token; "
            f"start the server with {POOLING_FLAGS}"
        )
    if any(end - start != shape[0] * shape[1] * dtype.itemsize for start, end, shape in parts):
        raise ServerError(f"{answer.url} answers in another dtype than {dtype}, which was asked for")
    if len(body) < parts[-1][1]:
        raise _Passing(f"{len(body)} bytes of an answer of {parts[-1][1]}")
    # A copy, which may be written to and outlives the answer.
    return [torch.frombuffer(bytearray(body[start:end]), dtype=dtype).view(shape) for start, end, shape in parts]


def _token_ids(answer: httpx2.Response) -> list[int]:
    try:
        return [int(token) for token in answer.json()["choices"][0]["token_ids"]]
    except (LookupError, TypeError) as error:
        raise ServerError(
            f"{answer.url} answers without token ids ({error!r}); a server that writes is vLLM, 0.12 or later: vllm serve MODEL"
        ) from error


def _log_likelihoods(answer: httpx2.Response, text: Sequence[int]) -> Tensor:
    try:
        said = answer.json()["choices"][0]["prompt_logprobs"][1:]
        return torch.tensor([own[str(token)]["logprob"] for own, token in zip(said, text[1:], strict=True)])
    except (LookupError, TypeError, ValueError) as error:
        raise ServerError(
            f"{answer.url} answers without the log-probabilities of a prompt ({error!r}); is it vLLM?"
        ) from error
