"""Runs whose teacher is behind vLLM are the runs with the teacher here: `./run test-server` has vLLM in its own environment."""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
import torch
from test_served import ROWS, lines, settings
from tiny import byte_level_tokenizer, pair_on_disk, save_llama
from transformers import AutoModelForCausalLM

from switchkd.base.errors import ServerError
from switchkd.forward.server import POOLING_FLAGS
from switchkd.methods.policies import AdaSwitch
from switchkd.methods.policy import TEACHER
from switchkd.models.pair import load_pair
from switchkd.runs.distil import distil
from switchkd.teachers import asked
from switchkd.teachers.asked import text_reader

PYTHON = os.environ.get("SWITCHKD_VLLM", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs vLLM: ./run test-server")
NOISE = Path(asked.__file__).parent / "switchkd_noise.py"
# Sizes of heads that vLLM's attention has.
SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=2, head_dim=32)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """A pair of two random models whose next tokens differ by context, and its data."""
    folder = tmp_path_factory.mktemp("pair")
    names = pair_on_disk(folder)
    for seed, role in enumerate(("teacher", "student")):
        source = save_llama(folder / role, byte_level_tokenizer(), seed, 2 - seed, **SIZES)
        model = AutoModelForCausalLM.from_pretrained(source)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.15)
        model.save_pretrained(source)
    return names


@contextmanager
def vllm(model, folder, *flags):
    """A server of the model; its address, once it answers."""
    port, log = free_port(), folder / "log"
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONPATH": str(folder),
    }  # fmt: skip
    shutil.copy(NOISE, folder)
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "teacher",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8",
        "--enforce-eager", *flags,
    ]  # fmt: skip
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 540
        while not _answers(address):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def free_port():
    """One that nobody listens at."""
    for port in range(8750, 8800):
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port of 8750 to 8799 is free")


def _answers(address):
    try:
        return httpx2.get(f"{address}/v1/models", timeout=5).status_code == 200
    except httpx2.TransportError:
        return False


@pytest.fixture(scope="module")
def reads(names, tmp_path_factory):
    flags = [part.strip("'") for part in POOLING_FLAGS.split()]
    with vllm(names["teacher_model_name_or_path"], tmp_path_factory.mktemp("reads"), *flags) as address:
        yield address


@pytest.fixture(scope="module")
def writes(names, tmp_path_factory):
    flags = ["--logits-processors", "switchkd_noise:KeyedNoise"]
    with vllm(names["teacher_model_name_or_path"], tmp_path_factory.mktemp("writes"), *flags) as address:
        yield address


def test_states_are_those_of_the_model_here(reads, names):
    pairs = [
        load_pair(each, names["student_model_name_or_path"]) for each in (reads, names["teacher_model_name_or_path"])
    ]
    theirs, ours = (text_reader(pair.teacher, pair.vocab_size, pair.ends).hidden(ROWS) for pair in pairs)
    assert float((theirs - ours).norm() / ours.norm()) < 1e-5


@pytest.mark.parametrize("recipe", ["on_policy", "kd", "adaswitch", "seqkd"])
def test_a_run_is_the_run_with_the_teacher_here(reads, writes, names, tmp_path, recipe, monkeypatch):
    """That nothing is said of the writer's drafts, which would be an error here, says that its noise is ours."""
    found = {}
    rule = {"policy": AdaSwitch(window=2, ratio=1.05)} if recipe == "adaswitch" else {}
    for place in "here", "there":
        monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path / f"cache-{place}"))
        servers = {"teacher_model_name_or_path": reads, "teacher_writer": writes} if place == "there" else {}
        distil(settings(names | servers, recipe, tmp_path / place, **rule))
        found[place] = lines(tmp_path / place, "metrics.jsonl")
    if recipe in ("on_policy", "adaswitch"):
        here, there = (lines(tmp_path / place, "rollouts.jsonl") for place in ("here", "there"))
        for name in ("completion_ids", "speakers", "stop_reason"):
            assert [row[name] for row in here] == [row[name] for row in there]
        assert any(TEACHER in row["speakers"] for row in here) == (recipe == "adaswitch")
    for ours, theirs in zip(found["here"], found["there"], strict=True):
        assert [theirs[k] for k in ("loss", "grad_norm")] == pytest.approx(
            [ours[k] for k in ("loss", "grad_norm")], rel=1e-5
        )


def test_a_server_that_generates_alone_is_refused_with_the_command(writes, names):
    with pytest.raises(ServerError, match=r"404.*generate alone; start it with: vllm serve .* --runner pooling"):
        load_pair(writes, names["student_model_name_or_path"])


def test_a_server_that_reads_is_no_writer(reads, names):
    with pytest.raises(ServerError, match=r"404.*generates, beside the one that reads"):
        load_pair(reads, names["student_model_name_or_path"], teacher_writer=reads)
