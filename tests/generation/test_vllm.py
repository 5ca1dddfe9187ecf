"""The generator on a vLLM server: what is sent, what is read back, and what happens when the server fails.

Failures come from a real HTTP server in a thread that is told what to answer. That answers are those of the model in
process is shown on a real vLLM server, by the tests marked `vllm`: `pytest -m vllm tests/generation/test_vllm.py`
starts one with `.ci/vllm-server $PIC_RAG_VLLM_VENV`, or uses `$PIC_RAG_VLLM_URL`, which must compute in float32.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import json
import multiprocessing
import os
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as TextStream
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import pic_rag
from pic_rag.cli import main
from pic_rag.compression.compressor import Compressor
from pic_rag.config import PicConfig
from pic_rag.generation.answering import Generation
from pic_rag.generation.generator import Generator
from pic_rag.generation.vllm.generator import VLLMGenerator
from pic_rag.generation.vllm.serve import serve_arguments, served_names
from pic_rag.generation.vllm.wire import PASS_THROUGH, encode_rows
from pic_rag.handles import UnknownHandleError
from pic_rag.memory import Memory, hash_text
from pic_rag.models.backbone import ModelRef
from pic_rag.models.checkpoint import Checkpoint
from pic_rag.prompts import rag_messages
from pic_rag.questions import read_questions

pytest.importorskip("openai")

ROOT = Path(__file__).parents[2]
READER = "+00112233445566aa"
END = "<|im_end|>"

Reply = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """Answers `/v1/models` as vLLM does, and every chat request with the server's next reply."""

    server: WireServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        cards = [{"id": name, "object": "model", "max_model_len": 512} for name in self.server.names]
        self.send_json({"object": "list", "data": cards})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request)
            reply = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
        reply(self, request)

    def send_json(self, body: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the test's standard error."""


class WireServer(ThreadingHTTPServer):
    """Listens on a free port of this machine; `replies` are used up one by one, the last one again and again."""

    daemon_threads = True

    def __init__(self, names: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.names = names
        self.tokenizer = tokenizer
        self.requests: list[dict[str, Any]] = []
        self.replies: list[Reply] = []
        self.lock = threading.Lock()
        self.gone = threading.Event()  # a client closed its connection before the end of a stream

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def rows(self, request: dict[str, Any]) -> list[int]:
        """Token ids of a request's text, and a placeholder's for each row of a memory."""
        rows: list[int] = []
        for part in request["messages"][0]["content"]:
            if part["type"] == "text":
                rows += self.tokenizer(part["text"], add_special_tokens=False).input_ids
            else:
                rows += [len(self.tokenizer)] * len(decode_rows(part["data"]))
        return rows


def answer(token_ids: Sequence[int], finish_reason: str | None = "stop") -> Reply:
    """The answer as vLLM sends it, in one piece or token by token, for a prompt it read as it was meant."""

    def reply(handler: Handler, request: dict[str, Any]) -> None:
        read = handler.server.rows(request)
        if not request["stream"]:
            choice = {"index": 0, "token_ids": list(token_ids), "finish_reason": finish_reason}
            return handler.send_json({"prompt_token_ids": read, "choices": [choice]})
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Connection", "close")
        handler.end_headers()
        chunks: list[dict[str, Any]] = [{"prompt_token_ids": read, "choices": [{"index": 0}]}]
        chunks += [{"choices": [{"index": 0, "token_ids": [token_id]}]} for token_id in token_ids]
        if finish_reason:
            chunks.append({"choices": [{"index": 0, "finish_reason": finish_reason}]})
        try:
            for chunk in chunks:
                handler.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                handler.wfile.flush()
                time.sleep(0.005)
        except OSError:
            handler.server.gone.set()
        handler.close_connection = True
        return None

    return reply


def fail(status: int, message: str = "no") -> Reply:
    return lambda handler, request: handler.send_json({"error": {"message": message, "code": status}}, status)


def hang_up(handler: Handler, request: dict[str, Any]) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def decode_rows(data: str) -> torch.Tensor:
    """As vLLM reads them."""
    return torch.load(io.BytesIO(base64.b64decode(data, validate=True)), weights_only=True)


@pytest.fixture(scope="module")
def folder(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> Generator:
    """The same model in process."""
    return Generator.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def checkpoint(folder: Path, plain: Generator) -> Checkpoint:
    """Of a compressor whose memories need a reader."""
    ref = ModelRef(str(folder), plain.model_id + READER)
    return Checkpoint(PicConfig(), ModelRef(str(folder), plain.model_id), ref, weights={})


@pytest.fixture
def server(checkpoint: Checkpoint, tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[WireServer]:
    server = WireServer(served_names(checkpoint.generator.id), tiny_tokenizer)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def generator(server: WireServer, checkpoint: Checkpoint) -> VLLMGenerator:
    return VLLMGenerator.connect(server.url, checkpoint, retries=2, timeout_s=10)


@pytest.fixture(scope="module")
def memory(plain: Generator, checkpoint: Checkpoint) -> Memory:
    ids = torch.tensor(plain.tokenizer("Paris is the capital of France.").input_ids)
    return Memory(
        embeddings=plain.model.get_input_embeddings()(ids).detach(),
        text_tokens=len(ids), ratio=1, fingerprint="f" * 64, source_hash=hash_text("Paris"),
        generator=checkpoint.generator.id,
    )  # fmt: skip


def read(stream: TextStream[str, None, Generation]) -> tuple[list[str], Generation]:
    """The pieces of a stream and what it returns."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as done:
            return pieces, done.value


def ids_of(generator: VLLMGenerator, text: str) -> list[int]:
    return generator.tokenizer(text).input_ids


def test_a_prompt_travels_as_its_text_and_the_rows_of_its_memories(
    server: WireServer, generator: VLLMGenerator, memory: Memory
) -> None:
    server.replies = [answer(ids_of(generator, "yes" + END))]
    prompt = [{"role": "user", "content": f"Read {memory.handle} and {{{{ 1 + 1 }}}}\n {memory.handle}"}]
    [generation] = generator.generate(prompt, [memory])
    parts = server.requests[0]["messages"][0]["content"]
    sent = [part["text"] if part["type"] == "text" else memory.handle for part in parts]
    assert "".join(sent) == generator.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    rows = [decode_rows(part["data"]) for part in parts if part["type"] == "prompt_embeds"]
    assert len(rows) == 2
    assert all(torch.equal(read, memory.embeddings) for read in rows)
    assert (generation.text, generation.finish_reason) == ("yes", "stop")
    assert generation.prompt_tokens == len(server.rows(server.requests[0]))
    assert generation.memory_tokens == 2 * memory.memory_tokens


def test_the_template_writes_parts_down_as_they_are(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["  <|im_start|>user\n", "{{ x }}{% if %}\n\n", " end \n"]
    message = {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}
    assert tiny_tokenizer.apply_chat_template([message], chat_template=PASS_THROUGH, tokenize=False) == "".join(texts)


def test_rows_of_a_large_tensor_travel_without_it() -> None:
    large = torch.randn(10_000, 64)
    assert len(encode_rows(large[:2])) < 4_000
    assert torch.equal(decode_rows(encode_rows(large[:2])), large[:2])


def test_the_reader_is_asked_for_prompts_with_memories_and_the_model_itself_for_others(
    server: WireServer, generator: VLLMGenerator, memory: Memory
) -> None:
    server.replies = [answer(ids_of(generator, "a" + END))]
    generator.generate(["Who?", f"{memory.handle} Who?"], [memory])
    assert [request["model"] for request in server.requests] == list(server.names)
    assert server.names[1] == server.names[0] + READER


def test_what_the_server_counts_as_the_answer_is_read_as_in_process(
    server: WireServer, generator: VLLMGenerator
) -> None:
    server.replies = [answer(ids_of(generator, "one ST"), "length")]
    cut, whole = (generator.generate("?", stop=stop, max_new_tokens=6)[0] for stop in (["ST"], ["STOP"]))
    assert (cut.text, cut.finish_reason, cut.completion_tokens) == ("one ", "stop", 6)
    assert (whole.text, whole.finish_reason) == ("one ST", "length")
    assert server.requests[0]["stop"] == ["ST"]


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_an_answer_that_the_server_ends_earlier_is_ended_here(
    finish_reason: str, server: WireServer, generator: VLLMGenerator
) -> None:
    server.replies = [answer(ids_of(generator, "so far, S"), finish_reason)]
    whole = generator.generate("?", stop=["STOP"])[0]
    assert (whole.text, whole.finish_reason) == ("so far, S", finish_reason)
    assert "".join(generator.stream("?", stop=["STOP"])) == "so far, S"


def test_a_stream_gives_the_pieces_of_the_whole_answer(server: WireServer, generator: VLLMGenerator) -> None:
    server.replies = [answer(ids_of(generator, "Grüße, all of you" + END))]
    pieces, generation = read(generator.stream("?", stop=["you"]))
    assert server.requests[0]["stream"]
    assert pieces[:4] == ["G", "r", "ü", "ß"]
    assert "".join(pieces) == "Grüße, all of "
    assert generation == generator.generate("?", stop=["you"])[0]


def test_an_abandoned_stream_is_hung_up_on(server: WireServer, generator: VLLMGenerator) -> None:
    server.replies = [answer(ids_of(generator, "x" * 2000))]
    stream = generator.stream("?", max_new_tokens=400)
    assert next(stream) == "x"
    stream.close()
    assert server.gone.wait(10)


@pytest.mark.parametrize("failure", [fail(503), fail(429), fail(500), hang_up])
def test_a_server_that_fails_is_asked_again(failure: Reply, server: WireServer, generator: VLLMGenerator) -> None:
    server.replies = [failure, failure, answer(ids_of(generator, "at last" + END))]
    assert generator.generate("?")[0].text == "at last"
    assert len(server.requests) == 3


def test_a_server_that_goes_on_failing_is_given_up(server: WireServer, generator: VLLMGenerator) -> None:
    server.replies = [fail(503, "overloaded")]
    with pytest.raises(ConnectionError, match="overloaded"):
        generator.generate("?")
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("status", "error"), [(400, ValueError), (404, ValueError), (401, PermissionError), (403, PermissionError)]
)
def test_a_request_that_is_refused_is_not_sent_again(
    status: int, error: type[Exception], server: WireServer, generator: VLLMGenerator
) -> None:
    server.replies = [fail(status, "the reason")]
    with pytest.raises(error, match="the reason"):
        generator.generate("?")
    assert len(server.requests) == 1


def test_a_stream_that_breaks_off_is_an_error_and_no_answer(server: WireServer, generator: VLLMGenerator) -> None:
    server.replies = [answer(ids_of(generator, "half an ans"), finish_reason=None)]
    stream = generator.stream("?")
    assert next(stream) == "h"
    with pytest.raises(ConnectionError, match="must finish its answer"):
        list(stream)


def test_one_failure_of_many_ends_the_others(server: WireServer, generator: VLLMGenerator) -> None:
    server.replies = [answer(ids_of(generator, "a" + END)), fail(400, "this one"), answer(ids_of(generator, "a" + END))]
    with pytest.raises(ValueError, match="this one"):
        generator.generate(["?"] * 8)
    server.replies = server.replies[-1:]
    assert generator.generate("?")[0].text == "a"


def test_a_server_that_reads_other_tokens_is_found_out(server: WireServer, generator: VLLMGenerator) -> None:
    def other(handler: Handler, request: dict[str, Any]) -> None:
        handler.send_json({"prompt_token_ids": [1, 2], "choices": [{"token_ids": [5], "finish_reason": "stop"}]})

    server.replies = [other]
    with pytest.raises(ValueError, match="must read the prompt's 4 rows as they are meant, got 2"):
        generator.generate("Who?")
    server.replies = [lambda handler, _: handler.send_json({"choices": [{}]})]  # as of a server that is no vLLM
    with pytest.raises(ValueError, match="must read the prompt's 4 rows as they are meant, got 0"):
        generator.generate("Who?")


@pytest.mark.parametrize("body", [{"error": {"message": "engine dead"}}, "engine dead", ["engine dead"]])
def test_an_answer_of_another_form_is_shown(body: Any, server: WireServer, generator: VLLMGenerator) -> None:
    server.replies = [lambda handler, _: handler.send_json(body)]
    for ask in (generator.generate, lambda prompt: list(generator.stream(prompt))):
        with pytest.raises((ValueError, ConnectionError)):
            ask("Who?")
    with pytest.raises(ValueError, match="must be that of a vLLM server, .* without choices: .*engine dead"):
        generator.generate("Who?")


def test_an_answer_that_is_cut_is_a_connection_error(server: WireServer, generator: VLLMGenerator) -> None:
    def cut(handler: Handler, _: object) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "12")
        handler.end_headers()
        handler.wfile.write(b'{"choices": ')

    server.replies = [cut]
    with pytest.raises(ConnectionError, match="must answer in JSON"):
        generator.generate("Who?")


def test_a_page_for_people_is_no_vllm_server(server: WireServer, checkpoint: Checkpoint, monkeypatch) -> None:
    def page(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/html")
        handler.send_header("Content-Length", "15")
        handler.end_headers()
        handler.wfile.write(b"<p>Log in</p>\n\n")

    monkeypatch.setattr(Handler, "do_GET", page)
    with pytest.raises(ValueError, match="url must be that of a vLLM server, got .*no list of models"):
        VLLMGenerator.connect(server.url, checkpoint)
    with pytest.raises(ValueError, match="url must begin with http:// or https://, got 'localhost:8000'"):
        VLLMGenerator.connect("localhost:8000", checkpoint)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_connects_anew(server: WireServer, generator: VLLMGenerator) -> None:
    server.replies = [answer(ids_of(generator, "yes" + END))]
    assert generator.generate("?")[0].text == "yes"
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    child = context.Process(target=lambda: said.put(generator.generate("?")[0].text))
    child.start()
    assert said.get(timeout=30) == "yes"
    child.join(30)
    assert generator.generate("?")[0].text == "yes"


def test_nothing_wrong_is_sent(server: WireServer, generator: VLLMGenerator, memory: Memory) -> None:
    wrong = [
        (dataclasses.replace(memory, embeddings=torch.zeros(3, 8)), "hidden 8"),
        (dataclasses.replace(memory, embeddings=memory.embeddings * float("nan")), "must be finite"),
        (dataclasses.replace(memory, generator="another@0011"), "made for 'another@0011'"),
    ]
    for bad, rule in wrong:
        with pytest.raises(ValueError, match=rule):
            generator.generate(["fine", bad.handle], [bad])
    with pytest.raises(UnknownHandleError):
        generator.generate(memory.handle)
    with pytest.raises(ValueError, match="context of 512 tokens"):  # the server's, which is less than the model's
        generator.generate("x" * 500, max_new_tokens=100)
    assert server.requests == []


def test_a_server_that_serves_other_models_is_refused(server: WireServer, checkpoint: Checkpoint) -> None:
    server.names = ["llama"]
    with pytest.raises(ValueError, match=r"must serve '.*', got \['llama'\]. Start it with `pic-rag serve`"):
        VLLMGenerator.connect(server.url, checkpoint)
    by_name = VLLMGenerator.connect(server.url, checkpoint, generator="llama", reader="llama")
    assert by_name.model_id == checkpoint.generator.id


def test_no_server_is_a_connection_error(server: WireServer, checkpoint: Checkpoint) -> None:
    server.server_close()
    with pytest.raises(ConnectionError, match="must be that of a vLLM server that answers"):
        VLLMGenerator.connect(server.url, checkpoint, retries=0)


async def test_coroutines_wait_together_and_a_cancelled_one_hangs_up(
    server: WireServer, generator: VLLMGenerator, memory: Memory
) -> None:
    together = threading.Barrier(32, timeout=20)
    reply = answer(ids_of(generator, "a" + END))

    def all_at_once(handler: Handler, request: dict[str, Any]) -> None:
        together.wait()  # answers none before all have come
        reply(handler, request)

    server.replies = [all_at_once]
    asked = [generator.agenerate(f"{memory.handle} {number}?", [memory]) for number in range(32)]
    assert [generation.text for [generation] in await asyncio.gather(*asked)] == ["a"] * 32

    server.replies = [answer(ids_of(generator, "x" * 2000))]
    stream = generator.astream("?", max_new_tokens=400)
    assert await anext(stream) == "x"
    await stream.aclose()
    assert await asyncio.to_thread(server.gone.wait, 10)


async def test_an_asynchronous_stream_ends_with_the_generation(server: WireServer, generator: VLLMGenerator) -> None:
    server.replies = [answer(ids_of(generator, "a bc" + END))]
    *pieces, generation = [item async for item in generator.astream("?")]
    assert pieces == ["a", " ", "b", "c"]
    assert isinstance(generation, Generation)
    assert generation == generator.generate("?")[0]


async def test_a_generator_in_process_can_be_awaited_too(plain: Generator) -> None:
    prompts = ["Who?", "What?"]
    expected = plain.generate(prompts, max_new_tokens=4)
    assert await plain.agenerate(prompts, max_new_tokens=4) == expected
    assert await plain.agenerate(prompts, max_new_tokens=4, batch_size=1) == expected
    with pytest.raises(ValueError, match="batch_size must be a whole number of 1 or more, got 0"):
        await plain.agenerate(prompts, batch_size=0)
    *pieces, generation = [item async for item in plain.astream("Who?", max_new_tokens=4)]
    assert generation == plain.generate("Who?", max_new_tokens=4)[0]
    assert "".join(str(piece) for piece in pieces) == generation.text


def test_what_serves_a_compressor_is_named_by_its_weights(
    checkpoint: Checkpoint, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = serve_arguments(checkpoint)
    assert arguments[arguments.index("--served-model-name") + 1] == served_names(checkpoint.generator.id)[0]
    assert "--enable-lora" not in arguments  # this one has no reader to load
    other = dataclasses.replace(checkpoint, generator=ModelRef(str(folder), "tiny@0000000000000000"))
    with pytest.raises(ValueError, match="which the compressor makes memories for"):
        serve_arguments(other)


def test_memories_read_at_spread_positions_are_refused_before_anything_is_started(checkpoint: Checkpoint) -> None:
    spread = dataclasses.replace(
        checkpoint, config=dataclasses.replace(checkpoint.config, generator_positions="spread")
    )
    for use in (VLLMGenerator.connect, VLLMGenerator.offline, serve_arguments):
        with pytest.raises(ValueError, match="generator_positions must be contiguous for vLLM, got 'spread'"):
            use(checkpoint=spread)


@pytest.mark.embedded
def test_serve_prints_the_command_of_the_shipped_compressor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--print", "--", "--port", "8001"]) == 0
    command = capsys.readouterr().out
    shipped = Checkpoint.load()
    assert f"--lora-modules {shipped.generator.id}={shipped.reader}" in command
    assert command.rstrip().endswith("--port 8001")


OFFLINE = """
import json, sys
from pathlib import Path
from pic_rag import Memory, VLLMGenerator

if __name__ == "__main__":  # vLLM starts its engine in a process of its own
    folder = Path(sys.argv[1])
    memories = [Memory.from_bytes(path.read_bytes()) for path in folder.glob("*.memory")]
    generator = VLLMGenerator.offline(dtype="float32", enforce_eager=True, max_num_seqs=8, max_model_len=2048)
    asked = json.loads((folder / "asked.json").read_text())
    answers = generator.generate(asked, memories, max_new_tokens=24)
    streamed = list(generator.stream(asked[0], memories, max_new_tokens=24))
    (folder / "answers.json").write_text(json.dumps([[a.token_ids for a in answers], streamed]))
"""


@pytest.fixture(scope="module")
def venv() -> Path:
    folder = os.environ.get("PIC_RAG_VLLM_VENV")
    if folder is None:
        pytest.skip("PIC_RAG_VLLM_VENV must name a folder for vLLM's environment, which .ci/vllm-server makes")
    return Path(folder)


@pytest.fixture(scope="module")
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real vLLM server that computes in float32."""
    if given := os.environ.get("PIC_RAG_VLLM_URL"):
        yield given
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [ROOT / ".ci" / "vllm-server", request.getfixturevalue("venv")]
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)], stdout=output, stderr=output
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path, deadline_s: float = 900.0) -> None:
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
        except OSError:
            time.sleep(1)
        else:
            return
    raise TimeoutError(log.read_text(errors="replace")[-3000:])


@pytest.fixture(scope="module")
def connected(url: str) -> VLLMGenerator:
    return VLLMGenerator.connect(url, dtype="float32")


@pytest.fixture(scope="module")
def in_process() -> Generator:
    return Generator.from_checkpoint(Checkpoint.load(), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def asked() -> tuple[list[list[dict[str, str]]], list[Memory]]:
    """The ten questions of the demo, each at two ratios: prompts and the memories they name."""
    compressor = Compressor.from_pretrained(device="cpu", dtype="float32")
    questions = list(read_questions(Path(pic_rag.__file__).parent / "demo" / "questions.jsonl"))
    prompts, memories = [], []
    for ratio in (4, 16):
        for question in questions:
            read = compressor.compress([context.document for context in question.contexts], ratio=ratio)
            prompts.append(rag_messages(question.question, [memory.handle for memory in read]))
            memories += read
    return prompts, memories


@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_greedy_answers_from_memories_are_those_of_the_model_in_process(
    connected: VLLMGenerator, in_process: Generator, asked: tuple[list[Any], list[Memory]]
) -> None:
    prompts, memories = asked
    expected = in_process.generate(prompts, memories, max_new_tokens=24)
    assert connected.generate(prompts, memories, max_new_tokens=24) == expected


@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_text_is_answered_by_the_plain_model_of_the_server(connected: VLLMGenerator, in_process: Generator) -> None:
    prompts = [
        "The capital of France is",
        [{"role": "user", "content": "Name a river.\n\n  [x] {{ y }}"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Why?"}]}],
    ]
    assert connected.generate(prompts, max_new_tokens=24) == in_process.generate(prompts, max_new_tokens=24)


@pytest.mark.vllm
@pytest.mark.timeout(1200)
async def test_streams_and_32_coroutines_give_the_answers_of_a_batch(
    connected: VLLMGenerator, asked: tuple[list[Any], list[Memory]]
) -> None:
    prompts, memories = asked
    settings: dict[str, Any] = {"max_new_tokens": 16, "stop": ["."]}
    batch = connected.generate(prompts, memories, **settings)
    assert read(connected.stream(prompts[0], memories, **settings)) == (
        list(connected.stream(prompts[0], memories, **settings)),
        batch[0],
    )
    many = [prompts[number % len(prompts)] for number in range(32)]
    answers = await asyncio.gather(*(connected.agenerate(prompt, memories, **settings) for prompt in many))
    assert [generation for [generation] in answers] == [batch[number % len(prompts)] for number in range(32)]


@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_a_seed_repeats_a_draw_on_the_server(connected: VLLMGenerator, asked: tuple[list[Any], list[Memory]]) -> None:
    prompts, memories = asked
    draws = [
        connected.generate(prompts[0], memories, temperature=1.5, seed=seed, max_new_tokens=24)[0].token_ids
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_the_server_keeps_the_prefix_of_memories_it_has_read(
    connected: VLLMGenerator, asked: tuple[list[Any], list[Memory]]
) -> None:
    _, memories = asked
    shown = [memory.handle for memory in memories[:20]]
    for question in ("Who?", "Which one of them?"):
        [generation] = connected.generate(rag_messages(question, shown), memories, max_new_tokens=1)
    assert generation.cached_tokens >= generation.memory_tokens - 128  # vLLM keeps whole blocks


@pytest.mark.vllm
@pytest.mark.timeout(1200)
def test_vllm_in_process_gives_the_answers_of_transformers_in_process(
    venv: Path, in_process: Generator, asked: tuple[list[Any], list[Memory]], tmp_path: Path
) -> None:
    prompts, memories = asked
    for number, memory in enumerate(memories):
        (tmp_path / f"{number}.memory").write_bytes(memory.to_bytes())
    kept = [Memory.from_bytes((tmp_path / f"{number}.memory").read_bytes()) for number in range(len(memories))]
    mixed = [*prompts[::2], "The capital of France is"]
    (tmp_path / "asked.json").write_text(json.dumps(mixed))
    (tmp_path / "offline.py").write_text(OFFLINE)
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [venv / "bin" / "python", tmp_path / "offline.py", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    token_ids, streamed = json.loads((tmp_path / "answers.json").read_text())
    expected = in_process.generate(mixed, kept, max_new_tokens=24)
    assert token_ids == [generation.token_ids for generation in expected]
    assert "".join(streamed) == expected[0].text
    assert len(streamed) > 1
