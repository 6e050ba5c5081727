"""Backends of augmentation: against a local server that misbehaves, a stand-in for vLLM, and a real server."""

import json
import os
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from transformers import AutoConfig

from modeling_lsm import make_chat
from modeling_lsm.augmentation import backends
from modeling_lsm.augmentation.backends import OpenAIBackend, TransformersBackend, VllmBackend
from modeling_lsm.augmentation.generation import Answer, generate_targets
from modeling_lsm.augmentation.prompts import Prompter
from modeling_lsm.composing import compose
from tests import tiny


PROMPTS = [(f"Repeat {number}.", f"speech {number}") for number in range(12)]
TINY = "tiny-llm"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


class Reply(NamedTuple):
    """What a `FakeServer` does with a request instead of answering it: a body of `None` drops the connection."""

    status: int = 200
    body: str | None = ""
    headers: dict[str, str] = {}
    delay: float = 0.0


def completion(content: str | None, finish_reason: str = "stop", **kwargs) -> str:
    choices = [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}]
    return json.dumps({"choices": choices, "usage": {"completion_tokens": 7}, **kwargs})


class FakeServer(ThreadingHTTPServer):
    """
    A real HTTP server of the model `TINY` that answers with the prompt's last word.

    Its first answers are the replies in `faults`, if there are any. It keeps the requests and counts how many were
    under way at a time.
    """

    daemon_threads = True

    def __init__(self, port: int = 0):
        self.faults: list[Reply] = []
        self.model_faults: list[Reply] = []
        self.delay = 0.0
        self.served = [TINY, "another"]
        self.requests: list[dict] = []
        self.times: list[float] = []
        self.keys: set[str] = set()
        self.under_way = self.most_under_way = 0
        self.lock = Lock()
        super().__init__(("127.0.0.1", port), Handler)
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept open, as those of real servers are

    def log_message(self, *args) -> None:
        """Nothing: the test's output is not a server's log."""

    def do_GET(self) -> None:
        models = json.dumps({"object": "list", "data": [{"id": model} for model in self.server.served]})
        faults = self.server.model_faults
        self.send(faults.pop(0) if faults else Reply(body=models))

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request)
            self.server.times.append(time.monotonic())
            self.server.keys.add(self.headers["Authorization"])
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
            answer = Reply(body=completion(request["messages"][0]["content"].split()[-1]), delay=self.server.delay)
            reply = self.server.faults.pop(0) if self.server.faults else answer
        time.sleep(reply.delay)
        with self.server.lock:
            self.server.under_way -= 1
        self.send(reply)

    def send(self, reply: Reply) -> None:
        if reply.body is None:
            self.close_connection = True
            return
        body = reply.body.encode()
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(backends, "FIRST_DELAY", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = FakeServer()
    yield server
    server.stop()


def make_backend(server: FakeServer, **kwargs) -> OpenAIBackend:
    return OpenAIBackend(server.url, **{"model": TINY, "max_new_tokens": 20, "patience": 0.5, **kwargs})


def expected(prompts: list[tuple[str, str]]) -> list[Answer]:
    return [Answer(transcript.split()[-1], True, 7) for _, transcript in prompts]


def test_requests_are_explicit(server, caplog):
    seen = []
    with caplog.at_level("INFO"):
        assert make_backend(server).answer(PROMPTS[:1], seen.append) == seen == expected(PROMPTS[:1])
    assert server.requests == [
        {
            "model": TINY,
            "messages": [{"role": "user", "content": "Repeat 0.\n\nspeech 0"}],
            "temperature": 0,
            "max_tokens": 20,
        }
    ]
    assert not caplog.records, "one line per request would bury all others"


def test_no_prompts_no_requests(server):
    assert make_backend(server).answer([]) == [] and server.requests == []


@pytest.mark.parametrize("concurrency", [1, 4])
def test_concurrency_is_bounded_and_order_kept(server, concurrency):
    server.delay = 0.05
    server.faults = [Reply(delay=0.3, body=completion("0"))]  # the first to be asked is the last to be answered
    seen = []
    assert make_backend(server, concurrency=concurrency).answer(PROMPTS, seen.append) == expected(PROMPTS)
    assert server.most_under_way == concurrency
    assert sorted(seen) == sorted(expected(PROMPTS))
    assert (seen == expected(PROMPTS)) == (concurrency == 1)


@pytest.mark.parametrize(
    "fault",
    [
        Reply(status=429, body="{}"),
        Reply(status=408, body="{}"),
        Reply(status=409, body="{}"),
        Reply(status=500, body="{}"),
        Reply(status=503, body="<html>starting</html>", headers={"Content-Type": "text/html"}),
        Reply(body=None),
        Reply(body='{"choices": [{"mess'),
        Reply(body="<html>Bad gateway</html>", headers={"Content-Type": "text/html"}),
        Reply(body='["a list"]'),
    ],
    ids=["429", "408", "409", "500", "503", "dropped", "damaged", "html", "list"],
)
def test_what_may_pass_is_tried_again(server, fault, caplog):
    server.faults = [fault] * 5
    server.model_faults = [fault]
    assert make_backend(server, concurrency=3).answer(PROMPTS) == expected(PROMPTS)
    assert len(server.requests) == len(PROMPTS) + 5
    assert 2 <= len(caplog.records) <= 6, "one warning for each request that failed, not for each try"
    assert server.url in caplog.text


def test_slow_requests_are_tried_again(server):
    server.faults = [Reply(delay=1.0, body=completion("too late"))]
    assert make_backend(server, timeout=0.3).answer(PROMPTS[:2]) == expected(PROMPTS[:2])
    assert len(server.requests) == 3


def test_retry_after_is_honoured(server):
    server.faults = [Reply(status=429, body="{}", headers={"Retry-After": "1"})]
    assert make_backend(server).answer(PROMPTS[:1]) == expected(PROMPTS[:1])
    assert 1.0 <= server.times[1] - server.times[0] < 3.0


@pytest.mark.parametrize(
    ("value", "seconds"), [("7", 7), ("0.5", 0.5), ("Thu, 01 Jan 2099 00:00:00 GMT", 1e9), ("soon", 0), (None, 0)]
)
def test_retry_after_as_number_or_date(value, seconds):
    found = backends.retry_after({} if value is None else {"retry-after": value})
    assert found > seconds if seconds == 1e9 else found == seconds


def test_server_may_restart(server):
    """It is gone for a while, midway, and comes back on the same port."""
    server.delay = 0.02
    port, restarted = server.server_port, []

    def restart(answer: Answer) -> None:
        if not restarted:
            restarted.append(True)
            server.faults = [Reply(body=None)] * 100  # connections that are still open
            Thread(target=come_back).start()

    def come_back() -> None:
        server.stop()
        time.sleep(0.5)
        restarted.append(FakeServer(port))

    assert make_backend(server, concurrency=2).answer(PROMPTS, restart) == expected(PROMPTS)
    assert restarted[1].requests
    restarted[1].stop()


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_refusals_fail_at_once(server, status):
    server.faults = [Reply(status=status, body='{"error": {"message": "The prompt is too long."}}')] * 100
    with pytest.raises(ValueError, match=rf"{server.url} refused .*{status}.*The prompt is too long.*Check"):
        make_backend(server, concurrency=2).answer(PROMPTS)
    assert len(server.requests) <= 4


def test_patience_runs_out(server):
    server.faults = [Reply(status=503, body='{"error": {"message": "Loading."}}')] * 1000
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=rf"{server.url} .*0.01 minutes.*503.*Loading.*start this command again"):
        make_backend(server, patience=0.01).answer(PROMPTS)
    assert time.monotonic() - start < 3


def test_no_patience_for_a_retry_after_beyond_it(server):
    server.faults = [Reply(status=429, body="{}", headers={"Retry-After": "3600"})]
    with pytest.raises(ConnectionError, match="429"):
        make_backend(server).answer(PROMPTS[:1])


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(ConnectionError, match=rf"127.0.0.1:{port}/v1 did not answer"):
        OpenAIBackend(f"http://127.0.0.1:{port}/v1", TINY, 20, patience=0.01).answer(PROMPTS)


def test_another_model_is_refused(server):
    with pytest.raises(ValueError, match=r"does not serve 'other', but 'tiny-llm', 'another'. Start"):
        make_backend(server, model="other").answer(PROMPTS)
    server.served = []
    with pytest.raises(ValueError, match="but nothing"):
        make_backend(server).answer(PROMPTS)
    assert server.requests == []


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (completion(" text\n", usage=None), Answer("text", True, 0)),
        (completion("cut", "length"), Answer("cut", False, 7)),
        (completion(None), Answer("", True, 7)),
        (completion("", choices=[]), Answer("", False, 7)),
        (completion("", choices=None), Answer("", False, 7)),
    ],
    ids=["no usage", "length", "no content", "no choices", "null choices"],
)
def test_odd_answers(server, body, answer):
    server.faults = [Reply(body=body)]
    assert make_backend(server).answer(PROMPTS[:1]) == [answer]


def test_api_key(server, monkeypatch, caplog):
    with caplog.at_level("DEBUG"):
        make_backend(server).answer(PROMPTS[:1])
        monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
        make_backend(server).answer(PROMPTS[:1])
        make_backend(server, api_key="from-argument").answer(PROMPTS[:1])
    assert server.keys == {"Bearer none", "Bearer from-environment", "Bearer from-argument"}
    assert "from-" not in caplog.text


def test_urls_without_a_scheme_are_refused():
    with pytest.raises(ValueError, match="'localhost:8000'; expected one like 'http://localhost:8000/v1'"):
        OpenAIBackend("localhost:8000", TINY, 20)


def prompter(processor) -> Prompter:
    return Prompter(processor.tokenizer, processor.chat_template)


@pytest.mark.parametrize("package", ["openai", "vllm"])
def test_missing_packages(package, processor, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        if package == "vllm":
            VllmBackend("llm", prompter(processor), 20)
        else:
            OpenAIBackend("http://localhost:8000/v1", TINY, 20)


def test_vllm_calls_with_a_stand_in(processor, monkeypatch):
    """What vLLM is called with, and what is made of its outputs. The stand-in generates nothing."""
    calls = {}

    class LLM:
        def __init__(self, **kwargs):
            calls["engine"] = kwargs

        def get_default_sampling_params(self):
            return SimpleNamespace(repetition_penalty=1.1)

        def generate(self, prompts, settings, use_tqdm):
            calls.update(prompts=[prompt["prompt_token_ids"] for prompt in prompts], settings=settings)
            words = [f" {number}{tiny.END}" for number in range(len(prompts))]
            for word, finish_reason in zip(words, ["stop", "length", "stop"], strict=True):
                ids = processor.tokenizer(word)["input_ids"]
                yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason=finish_reason)])

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=dict))
    backend = VllmBackend("some-llm", prompter(processor), 20, gpu_memory_utilization=0.5)
    seen = []
    answers = backend.answer(PROMPTS[:3], seen.append)

    assert calls["engine"] == {"model": "some-llm", "gpu_memory_utilization": 0.5}
    assert calls["settings"] == {
        "temperature": 0,
        "max_tokens": 20,
        "repetition_penalty": 1.1,
        "detokenize": False,
    }
    chats = [make_chat(instruction, transcript=transcript) for instruction, transcript in PROMPTS[:3]]
    assert calls["prompts"] == [tiny.ask(processor, chat)["input_ids"][0].tolist() for chat in chats]
    assert answers == seen == [Answer("0", True, 3), Answer("1", False, 3), Answer("2", True, 3)]


def test_transformers(model, processor):
    seen = []
    backend = TransformersBackend(model, prompter(processor), max_new_tokens=5, batch_tokens=200)
    answers = backend.answer(PROMPTS, seen.append)
    assert answers == generate_targets(model, prompter(processor), PROMPTS, max_new_tokens=5, batch_tokens=200)
    assert sorted(answers) == sorted(seen) and len(answers) == len(PROMPTS)


class TransformersServe:
    """`transformers serve` on a port of its own, with a Hub cache that holds one model."""

    def __init__(self, model: Path, folder: Path):
        snapshot = folder / "hub" / f"models--{SMOLLM2.replace('/', '--')}" / "snapshots" / "0123456789abcdef"
        snapshot.parent.mkdir(parents=True)
        snapshot.symlink_to(model)
        (snapshot.parent.parent / "refs").mkdir()
        (snapshot.parent.parent / "refs" / "main").write_text(snapshot.name)
        with socket.create_server(("127.0.0.1", 0)) as unused:
            self.port = unused.getsockname()[1]
        self.environment = {**os.environ, "HF_HOME": str(folder), "OMP_NUM_THREADS": "2"}
        self.log = folder / "log.txt"
        self.start()

    def start(self) -> None:
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "transformers.cli.transformers", "serve", SMOLLM2]
                + ["--port", str(self.port), "--host", "127.0.0.1", "--device", "cpu"],
                env=self.environment,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.mark.slow
def test_real_server_killed_midway(real_speech_model, real_text_model, librivox, tmp_path, monkeypatch):
    """Nothing is padded, here or there, and both compute in float32: greedy answers are the same to the letter."""
    monkeypatch.setattr(backends, "LONGEST_DELAY", 2.0)
    instructions = ["What is this about?", "Translate into French.", "Name three keywords."]
    prompts = [(instruction, clip.text) for clip in librivox[:2] for instruction in instructions]
    model, processor = compose(str(real_speech_model), str(real_text_model))
    assert AutoConfig.from_pretrained(real_text_model).dtype == model.dtype, "what the server computes in"
    here = TransformersBackend(model, prompter(processor), max_new_tokens=16, batch_tokens=1).answer(prompts)

    server = TransformersServe(real_text_model, tmp_path)
    seen = []

    def kill_midway(answer: Answer) -> None:
        seen.append(answer)
        if len(seen) == 2:
            server.kill()
            server.start()

    try:
        backend = OpenAIBackend(f"http://127.0.0.1:{server.port}/v1", SMOLLM2, 16, concurrency=2, patience=2)
        there = backend.answer(prompts, kill_midway)
    finally:
        server.kill()
    assert len(seen) == len(prompts)
    assert [answer[:2] for answer in there] == [answer[:2] for answer in here], "texts, and which of them are finished"
