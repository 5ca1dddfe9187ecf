"""A compressor goes to a hub and comes back: the real client, over HTTP, against a hub of a few repositories."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pic_rag.compression.compressor import Compressor
from pic_rag.config import PicConfig


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as pushing a folder and loading it back needs."""

    commits: dict[str, list[tuple[str, dict[str, bytes]]]]  # repository: its (commit, files), oldest first
    uploads: dict[str, bytes]  # sha256: content

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.commits.setdefault(name, [("0" * 40, {})])
            self._json({"url": f"{self._address}/{name}"})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", self.path):
            kinds = {True: "lfs", False: "regular"}
            files = [
                {"path": path, "uploadMode": kinds[path.endswith(".safetensors")], "shouldIgnore": False}
                for path in (file["path"] for file in json.loads(body)["files"])
            ]
            self._json({"files": files})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**thing, "actions": {"upload": {"href": f"{self._address}/lfs/{thing['oid']}"}}}
                for thing in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", self.path):
            self._json({"commitUrl": f"{self._address}/{match[1]}/commit/x", "commitOid": self._commit(match[1], body)})
        else:
            self._json({})  # validates a model card

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.uploads[hashlib.sha256(content).hexdigest()] = content
        self._json({})

    def do_GET(self):
        match = re.match(r"(?:/api/models)?/([^/]+/[^/?]+)(?:/(revision|tree|resolve)/([^/?]+)/?([^?]*))?", self.path)
        name, action, revision, path = match.groups()
        if name not in self.commits:
            return self._json({}, 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        heads = dict(self.commits[name]) | {"main": None}
        if (revision or "main") not in heads:
            return self._json({}, 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        commit, files = self.commits[name][-1]
        if revision not in (None, "main"):
            commit, files = revision, heads[revision]
        headers = {"X-Repo-Commit": commit}
        if action == "tree":
            listed = [
                {"type": "file", "path": path, "size": len(files[path]), "oid": _oid(files[path])} for path in files
            ]
            return self._json(listed)
        if action != "resolve":
            return self._json({"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]})
        if path not in files:
            return self._json({}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
        return self._send(files[path], 200, {**headers, "ETag": f'"{_oid(files[path])}"'})

    do_HEAD = do_GET

    def _commit(self, name, body):
        files = dict(self.commits[name][-1][1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.uploads[value["oid"]]
        commit = hashlib.sha1(body).hexdigest()
        self.commits[name].append((commit, files))
        return commit

    @property
    def _address(self):
        return f"http://{self.headers['Host']}"

    def _json(self, value, status=200, headers=()):
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **dict(headers)})

    def _send(self, content, status, headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def _oid(content):
    return hashlib.sha1(content).hexdigest()


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"commits": {}, "uploads": {}}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run(code, port, home, offline="0"):
    """Run code with a hub and an empty cache of its own; what it prints, as JSON."""
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "HF_HUB_OFFLINE": offline}
    own |= {"HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1"}
    code = f"""import json
from huggingface_hub import HfApi
from pic_rag import Compressor, Generator, PicConfig

def complaint(name):
    try:
        Compressor.from_pretrained(name)
    except FileNotFoundError as error:
        return str(error)

loading = {{"device": "cpu", "dtype": "float32"}}
{code}"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **own}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


WRITE = """
HfApi().create_repo("lab/tiny")
HfApi().upload_folder(repo_id="lab/tiny", folder_path={folder!r})
first, second = (Compressor.from_base("lab/tiny", config=PicConfig(slots_per_chunk=n), **loading) for n in (4, 2))
addresses = [compressor.push_to_hub("lab/pic") for compressor in (first, second)]
print(json.dumps([addresses, first.fingerprint, second.fingerprint]))"""

READ = """
loaded = [Compressor.from_pretrained(name, **loading).fingerprint for name in ("lab/pic@{commit}", "lab/pic")]
absent = [complaint(name) for name in ("lab/nothing", "lab/pic@no-such-revision", "pic lab")]
print(json.dumps([*loaded, Generator.from_pretrained("lab/tiny", **loading).model_id, *absent]))"""


@pytest.mark.slow
def test_a_compressor_and_its_generator_go_to_a_hub_and_come_back(hub, tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path / "tiny")
    tiny_tokenizer.save_pretrained(tmp_path / "tiny")
    addresses, *pushed = run(WRITE.format(folder=str(tmp_path / "tiny")), hub.server_port, tmp_path / "writer")
    assert addresses == [f"http://127.0.0.1:{hub.server_port}/lab/pic"] * 2
    assert any(path.endswith("compressor.safetensors") for path in hub.RequestHandlerClass.commits["lab/pic"][-1][1])
    commit = hub.RequestHandlerClass.commits["lab/pic"][1][0]
    first, second, generator, *absent = run(READ.format(commit=commit), hub.server_port, tmp_path / "reader")
    assert [first, second] == pushed
    assert first != second
    here = Compressor.from_base(tiny_model, tiny_tokenizer, PicConfig(lora_rank=0)).generator.id
    assert generator == f"lab/tiny@{here.rpartition('@')[2]}"
    for name, said in zip(("lab/nothing", "lab/pic@no-such-revision", "pic lab"), absent, strict=True):
        assert f"must be a folder or a hub id, got {name!r}: there is no such folder, and the hub answered: " in said
        assert "Check the spelling and the network, or leave it out" in said


@pytest.mark.parametrize(
    ("offline", "reason"),
    [
        ("1", "outgoing traffic has been disabled"),
        pytest.param("0", "ConnectError", marks=pytest.mark.slow),  # the client tries again and again first
    ],
)
def test_without_a_network_the_error_says_so(tmp_path, offline, reason):
    said = run("print(json.dumps(complaint('lab/pic')))", 9, tmp_path, offline)
    assert re.search(f"got 'lab/pic': .*{reason}.*Check the spelling and the network", said)
