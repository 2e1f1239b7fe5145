"""A stand-in for vLLM's server over a tiny model: the same questions and answers, and the ways in which a server fails."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import PreTrainedModel

from switchkd.methods.sampling import gumbel_noise, keys_at, keys_tensor


class FakeServer:
    """Serves ``model`` at ``address``, as a ``kind`` of vLLM's.

    ``faults`` are the ways in which the next questions of a text are answered, one each: a status, or "half" (a body that breaks
    off), "cut" (half a body that counts itself as whole), "drop" (a connection that ends), "slow", "shape" (one row a text),
    "dtype", "nonsense". ``asked`` counts texts. One that generates is greedy, with our noise if it is ``keyed``.
    """

    def __init__(
        self, model: PreTrainedModel, root: str, kind: str = "pooling", longest: int = 256, name: str = "teacher"
    ):
        self.model, self.root, self.kind, self.longest, self.name = model, root, kind, longest, name
        self.faults: list = []
        self.normalised, self.keyed = False, True
        self.asked = 0
        self.lock = threading.Lock()
        self.port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Answer, at the same port as before."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_) -> None:
                pass

            def do_GET(self) -> None:
                card = {"id": outer.name, "root": outer.root, "max_model_len": outer.longest}
                self.answer(200, json.dumps({"data": [card]}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.reply(self, body)

            def answer(self, status: int, body: bytes, headers: dict | None = None, sent: int | None = None) -> None:
                self.send_response(status)
                for key, value in {**(headers or {}), "content-length": len(body)}.items():
                    self.send_header(key, str(value))
                self.end_headers()
                self.wfile.write(body[:sent])

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Gone, as if killed: no connection is taken any more, and those that are open answer nothing."""
        self.faults = ["drop"] * 10_000
        self.server.shutdown()
        self.server.server_close()

    def restart(self, model: PreTrainedModel | None = None) -> None:
        self.faults, self.model = [], model or self.model
        self.start()

    def reply(self, handler, body: dict) -> None:
        with self.lock:
            fault = self.faults.pop(0) if self.faults else None
        if fault == "drop":
            handler.close_connection = True
            handler.connection.close()
        elif isinstance(fault, int):
            handler.answer(fault, json.dumps({"error": {"message": f"told to say {fault}"}}).encode())
        elif fault == "nonsense":
            handler.answer(200, b"what?")
        elif handler.path != ("/pooling" if self.kind == "pooling" else "/v1/completions"):
            handler.answer(404, json.dumps({"detail": "Not Found"}).encode())
        elif body["model"] != self.name:
            handler.answer(
                404, json.dumps({"error": {"message": f"The model `{body['model']}` does not exist."}}).encode()
            )
        else:
            if fault == "slow":
                time.sleep(0.6)
            (self.pooling if self.kind == "pooling" else self.complete)(handler, body, fault)

    def complete(self, handler, body: dict, fault) -> None:
        prompt, noise = body["prompt"], body.get("vllm_xargs")
        with self.lock, torch.no_grad():
            self.asked += 1
            if "prompt_logprobs" in body:
                logs = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
                said = [None, *({str(t): {"logprob": float(logs[i, t])}} for i, t in enumerate(prompt[1:]))]
                choice = {"prompt_logprobs": said}
            else:
                choice = {"token_ids": self._written(prompt, body, noise if self.keyed else None)}
        handler.answer(200, json.dumps({"choices": [choice]}).encode())

    def _written(self, prompt: list[int], body: dict, noise: dict | None) -> list[int]:
        written: list[int] = []
        while len(written) < body["max_tokens"] and not set(written) & set(body["stop_token_ids"]):
            logits = self.model(torch.tensor([prompt + written])).logits[0, -1]
            if noise is not None:
                logits = logits[: noise["switchkd_vocab_size"]]
                key = (int(noise["switchkd_key"]) + noise["switchkd_start"] + len(written)) % 2**64
                drawn = gumbel_noise(keys_at(keys_tensor([key]), torch.tensor([0])), len(logits))[0]
                logits = logits + noise["switchkd_temperature"] * drawn
            written.append(int(logits.argmax()))
        return written

    def pooling(self, handler, body: dict, fault) -> None:
        texts, dtype = body["input"], getattr(torch, body["embed_dtype"])
        if any(not 0 < len(text) <= self.longest for text in texts):
            handler.answer(400, json.dumps({"error": {"message": "maximum context length"}}).encode())
            return
        items, parts, start = [], [], 0
        for index, text in enumerate(texts):
            with self.lock, torch.no_grad():
                self.asked += 1
                own = self.model.base_model(torch.tensor([text]), use_cache=False).last_hidden_state[0]
            own = torch.nn.functional.normalize(own, dim=1) if self.normalised else own
            own = own[-1:] if fault == "shape" else own
            own = own.to(torch.float16 if fault == "dtype" else dtype).contiguous()
            raw = own.view(torch.uint8).numpy().tobytes()
            item = {"index": index, "shape": list(own.shape), "start": start, "end": start + len(raw)}
            items.append(item | {"embed_dtype": body["embed_dtype"], "endianness": "little"})
            parts.append(raw)
            start += len(raw)
        whole = b"".join(parts)
        headers = {"metadata": json.dumps({"data": items, "model": self.name})}
        whole = whole[: len(whole) // 2] if fault == "cut" else whole  # by a proxy, which counts what it sends
        handler.answer(200, whole, headers, sent=len(whole) // 2 if fault == "half" else None)
        if fault == "half":
            handler.close_connection = True


@contextmanager
def serving(model: PreTrainedModel, root: str, **more):
    server = FakeServer(model, root, **more)
    try:
        yield server
    finally:
        server.stop()
