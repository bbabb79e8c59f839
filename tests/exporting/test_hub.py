"""An export is uploaded to a stand-in of the Hugging Face hub, and taken from there as an adapter by name."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import pytest
from conftest import listing
from exported import noisy_adapter

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP API as uploading and downloading a model takes."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, value=None, code=200, headers=(), body=None):
        body = json.dumps(value).encode() if body is None else body
        self.send_response(code)
        for name, content in headers:
            self.send_header(name, content)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        state, path, body = self.server.state, urlparse(self.path).path, self.body()
        state["calls"].append(path)
        if state["refuse"]:
            return self.answer({"error": "the owner has no right to write"}, 403)
        if path == "/api/repos/create":
            state["token"] = self.headers.get("Authorization")
            return self.answer({"url": f"http://{self.headers['Host']}/me/mine", "id": "me/mine"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            kind = lambda name: "lfs" if name.endswith(".safetensors") else "regular"  # noqa: E731
            files = [{"path": f["path"], "uploadMode": kind(f["path"]), "shouldIgnore": False} for f in asked]
            return self.answer({"files": files, "commitOid": COMMIT})
        if path.endswith("/info/lfs/objects/batch"):
            objects = []
            for item in json.loads(body)["objects"]:
                upload = {"href": f"http://{self.headers['Host']}/lfs/{item['oid']}", "header": {}}
                objects.append({**item, "actions": {"upload": upload}})
            headers = [("Content-Type", "application/vnd.git-lfs+json")]
            return self.answer({"transfer": "basic", "objects": objects}, headers=headers)
        if path.endswith("/commit/main"):
            for line in body.decode().splitlines():
                record = json.loads(line)
                if record["key"] == "file":
                    state["files"][record["value"]["path"]] = base64.b64decode(record["value"]["content"])
                elif record["key"] == "lfsFile":
                    state["files"][record["value"]["path"]] = state["lfs"][record["value"]["oid"]]
            url = f"http://{self.headers['Host']}/me/mine/commit/{COMMIT}"
            return self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url})
        return self.answer({"error": "unknown"}, 404)

    def do_PUT(self):
        content = self.body()
        self.server.state["lfs"][hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_GET(self):
        state, path = self.server.state, unquote(urlparse(self.path).path)
        state["calls"].append(path)
        if path.startswith("/api/models/me/mine"):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in state["files"].items()]
            info = {"id": "me/mine", "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            if "/tree/" in path:
                info = [
                    {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for n, c in state["files"].items()
                ]
            return self.answer(info, headers=[("X-Repo-Commit", COMMIT)])
        name = path.split("/resolve/")[-1].partition("/")[2]
        if name not in state["files"]:
            return self.answer({}, 404, [("X-Error-Code", "EntryNotFound"), ("X-Repo-Commit", COMMIT)])
        content = state["files"][name]
        etag = hashlib.sha256(content).hexdigest()
        return self.answer(body=content, headers=[("ETag", f'"{etag}"'), ("X-Repo-Commit", COMMIT)])

    do_HEAD = do_GET


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.state = {"files": {}, "lfs": {}, "calls": [], "token": None, "refuse": False}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def environment(hub, tmp_path):
    return {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_standin",
        "HF_HOME": str(tmp_path / "home"),
    }


def test_an_upload_comes_back_by_name(hub, small_folder, start, finish, tmp_path):
    noisy_adapter(small_folder, tmp_path / "adapter")
    there, out = environment(hub, tmp_path), tmp_path / "out"
    pushed = finish(
        start("export", "--adapter", tmp_path / "adapter", "--out", out, "--push-to-hub", "me/mine", **there)
    )
    assert pushed.code == 0 and "uploaded: " in pushed.out, pushed
    assert hub.state["token"] == "Bearer hf_standin"
    local = {name: content for name, content in listing(out).items() if content is not None}
    assert hub.state["files"] == local
    assert 'from_pretrained("me/mine", trust_remote_code=True)' in local["README.md"].decode()

    options = ["--prompt", "the cat", "--max-new-tokens", "4", "--plan", "quadratic:1", "--json"]
    done = finish(start("generate", "--model", small_folder, "--adapter", "me/mine", *options, **there))
    assert done.code == 0, done
    assert not any("model.safetensors" in call for call in hub.state["calls"] if "/resolve/" in call)


def test_a_hub_that_refuses_and_one_that_is_not_there_are_one_line(hub, small_folder, start, finish, tmp_path):
    noisy_adapter(small_folder, tmp_path / "adapter")
    hub.state["refuse"] = True
    there = environment(hub, tmp_path)
    command = ["export", "--adapter", tmp_path / "adapter", "--push-to-hub", "me/mine", "--out"]
    refused = start(*command, tmp_path / "a", **there)
    unreachable = start(*command, tmp_path / "b", **{**there, "HF_ENDPOINT": "http://127.0.0.1:9"})
    for ended in (finish(refused), finish(unreachable)):
        assert ended.code == 2 and len(ended.errors) == 1 and "--push-to-hub me/mine" in ended.errors[0], ended
        assert "Traceback" not in ended.err
