"""`sltrain-export --push`, against a server on this machine that answers as the Hub does and keeps what is uploaded."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import yaml

import sltrain
from sltrain.commands import export as command
from sltrain.commands.train import run_command as train

TOKEN = "hf_right"


class Hub(ThreadingHTTPServer):
    """Repositories by name: {"private": bool, "files": {name: content}}. Files named *.safetensors are uploaded as the
    Hub wants large files: their content to a storage first, then their hash in the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict] = {}
        self.storage: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self._start()
        if path == "/api/whoami-v2":
            return self._answer({"name": "ada", "type": "user", "orgs": []})
        repo = self.server.repos.get("/".join(path.split("/")[3:5]))
        if repo is None:
            return self._answer({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})
        if "/tree/" in path:
            entries = [{"type": "file", "path": name, "size": len(c), "oid": "0"} for name, c in repo["files"].items()]
            return self._answer(entries)
        return self._answer({"id": "x", "private": repo["private"], "siblings": [], "sha": "0", "tags": []})

    def do_PUT(self) -> None:
        self.server.storage[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        path = self._start()
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid credentials"}, 401)
        if path.endswith("/commit/main"):
            return self._commit("/".join(path.split("/")[3:5]))
        body = json.loads(self._body())
        if path == "/api/repos/create":
            if body.get("organization") not in (None, "ada"):
                return self._answer({"error": f"You don't have the right to create in {body['organization']}"}, 403)
            name = f"ada/{body['name']}"
            new = {"private": body.get("visibility") == "private", "files": {".gitattributes": b"x"}}
            status = 409 if name in self.server.repos else 200
            self.server.repos.setdefault(name, new)
            return self._answer({"url": f"{self.server.url}/{name}"}, status)
        if path == "/api/validate-yaml":
            yaml.safe_load(body["content"].split("---\n")[1])
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in path:
            modes = [
                (file["path"], "lfs" if file["path"].endswith(".safetensors") else "regular") for file in body["files"]
            ]
            return self._answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]})
        assert path.endswith(".git/info/lfs/objects/batch"), path
        actions = [
            {**item, "actions": {"upload": {"href": f"{self.server.url}/storage/{item['oid']}"}}}
            for item in body["objects"]
        ]
        self._answer({"transfer": "basic", "objects": actions})

    def _commit(self, name: str) -> None:
        files = self.server.repos[name]["files"]
        for line in map(json.loads, self._body().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.storage[value["oid"]]
                assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self._answer({"commitUrl": f"{self.server.url}/{name}/commit/1", "commitOid": "1", "pullRequestUrl": None})

    def _start(self) -> str:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if self.command == "GET" and self.headers.get("authorization") != f"Bearer {TOKEN}":
            path = "/refused"
        return path

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, content: object, status: int = 200, **headers: str) -> None:
        if self.path.startswith("/api/whoami") and self.headers.get("authorization") != f"Bearer {TOKEN}":
            content, status = {"error": "Invalid credentials"}, 401
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The server, and a user who is logged in there."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # its storage is another protocol
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def run(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pushed") / "run"
    arguments = [*tiny, "max_steps=1", f"run_dir={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sltrain-train", *arguments])
        assert train(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    output = run.with_name("exported")
    assert command.run_command([str(run), "--output", str(output), "--license", "mit"]) == 0
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def push(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capfd.readouterr()
    code = command.run_command([str(argument) for argument in arguments])
    return int(code), *capfd.readouterr()


def test_every_file_of_the_export_arrives(
    run: Path, hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "small"
    arguments = [run, "--output", output, "--format", "compressed", "--license", "cc-by-4.0", "--push", "ada/small"]
    code, out, err = push(capfd, *arguments)
    assert code == 0 and f"{hub.url}/ada/small" in out, err
    repo = hub.repos["ada/small"]
    assert repo["files"] == contents(output) | {".gitattributes": b"x"} and not repo["private"]
    assert "modeling_sltrain.py" in repo["files"] and "model.safetensors" in repo["files"]
    assert yaml.safe_load(repo["files"]["README.md"].decode().split("---\n")[1])["license"] == "cc-by-4.0"


def test_a_folder_exported_before_replaces_the_weights_that_were_there(
    folder: Path, hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    old = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}", "notes.md": b"mine"}
    hub.repos["ada/model"] = {"private": True, "files": dict(old)}
    code, out, err = push(capfd, folder, "--push", "ada/model", "--private")
    assert code == 0, err
    assert hub.repos["ada/model"]["files"] == contents(folder) | {"notes.md": b"mine"}


def test_from_python(run: Path, hub: Hub, tmp_path: Path) -> None:
    sltrain.export(run, tmp_path / "model", push="ada/python", private=True)
    assert (
        hub.repos["ada/python"]["private"]
        and contents(tmp_path / "model").items() <= hub.repos["ada/python"]["files"].items()
    )
    with pytest.raises(sltrain.Error, match="USER/NAME"):
        sltrain.export(run, tmp_path / "other", push="model")


def test_private_is_private(folder: Path, hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    assert push(capfd, folder, "--push", "ada/new", "--private")[0] == 0
    assert hub.repos["ada/new"]["private"]
    hub.repos["ada/open"] = {"private": False, "files": {}}
    code, _, err = push(capfd, folder, "--push", "ada/open", "--private")
    assert_refused(code, err, "ada/open", "public", "--private")
    assert not hub.repos["ada/open"]["files"]


def assert_refused(code: int, err: str, *words: str) -> None:
    assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1, err
    for word in words:
        assert word in err, err


BAD = {  # typed after the run and its --output, words of the line
    "no user": (["--push", "model"], ["model", "USER/NAME"]),
    "three names": (["--push", "a/b/c"], ["a/b/c", "USER/NAME"]),
    "a space": (["--push", "ada/my model"], ["ada/my model", "USER/NAME"]),
    "dots": (["--push", "ada/a..b"], ["ada/a..b"]),
    "an address": (["--push", "https://huggingface.co/ada/x"], ["https://huggingface.co/ada/x", "USER/NAME"]),
    "private alone": (["--private"], ["--private", "--push"]),
    "no name": (["--push"], ["--push"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_costs_no_export(
    case: str, run: Path, hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags, words = BAD[case]
    code, _, err = push(capfd, run, "--output", tmp_path / "new", *flags)
    assert_refused(code, err, *words)
    assert list(tmp_path.iterdir()) == [] and not hub.asked


@pytest.mark.parametrize(
    ("token", "words"), [(None, ["no token", "hf auth login"]), ("hf_wrong", ["Invalid", "HF_TOKEN"])]
)
def test_a_token_that_is_missing_or_wrong_costs_no_export(
    token: str | None,
    words: list[str],
    run: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    code, _, err = push(capfd, run, "--output", tmp_path / "new", "--push", "ada/new")
    assert_refused(code, err, *words)
    assert list(tmp_path.iterdir()) == [] and not hub.repos


def test_somebody_elses_name_and_a_hub_that_is_away(
    run: Path, hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = push(capfd, run, "--output", tmp_path / "model", "--push", "bob/model")
    assert_refused(code, err, "bob", f"sltrain-export {tmp_path}/model --push bob/model")
    assert (tmp_path / "model" / "model.safetensors").exists()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, _, err = push(capfd, tmp_path / "model", "--push", "ada/model")
    assert_refused(code, err, "ada/model")


def test_what_is_uploaded_as_it_is(
    run: Path, folder: Path, tmp_path: Path, hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _, err = push(capfd, folder, "--push", "ada/x", "--license", "mit")
    assert_refused(code, err, "--license", str(folder))
    code, _, err = push(capfd, run, "--push", "ada/x")
    assert_refused(code, err, "--output")
    code, _, err = push(capfd, tmp_path / "gone", "--push", "ada/x")
    assert_refused(code, err, "gone does not exist")
    (tmp_path / "config.json").write_text("{}")
    code, _, err = push(capfd, tmp_path, "--push", "ada/x")
    assert_refused(code, err, "not exported by sltrain")
    assert not hub.repos
