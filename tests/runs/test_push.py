"""To the Hub: a stand-in for it on loopback, which keeps what it is sent."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from made_up_recipe import RECIPE, recipe

from vitprune.recipe.schema import RecipeError
from vitprune.runs import apply as runs
from vitprune.runs import push as module
from vitprune.runs.apply import apply
from vitprune.runs.push import push
from vitprune.runtime import hub_upload

USER = {"name": "ada", "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}]}


class Hub(ThreadingHTTPServer):
    """Who is asking, and what was sent. role: of the token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.role, self.refuses = "write", set[str]()
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}


class Answer(BaseHTTPRequestHandler):
    """The few questions that an upload asks."""

    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None: ...

    def _say(self, content: object, code: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != "Bearer hf_good":
            return self._say({"error": "Invalid username or password."}, 401)
        return self._say({**USER, "auth": {"accessToken": {"role": self.server.role}}})

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"]))
        if any(part in self.path for part in self.server.refuses):
            return self._say({"error": "You don't have the rights"}, 403)
        if self.path.endswith("/repos/create"):
            self.server.created.append(json.loads(text))
            return self._say({"url": "https://huggingface.co/ada/vit", "name": "ada/vit"})
        if "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(text)["files"]]
            return self._say({"files": files})
        if self.path.endswith("/validate-yaml"):  # of the card
            return self._say({"errors": [], "warnings": []})
        assert "/commit/" in self.path
        for line in map(json.loads, text.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self._say(
            {"success": True, "commitOid": "0" * 40, "commitUrl": "https://huggingface.co/ada/vit/commit/0"}
        )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_good")
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(hub_upload, "HfApi", lambda: HfApi(endpoint=endpoint))
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    apply(recipe(folder, RECIPE.replace("[1, 4]", "[]")))
    return folder / "out"


def test_everything_goes_and_no_local_path(checkpoint: Path, hub: Hub) -> None:
    assert push(checkpoint, "ada/vit", private=True).endswith("/ada/vit")
    (created,) = hub.created
    assert created["name"] == "vit"
    assert created.get("private") is True or created.get("visibility") == "private"
    local = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert set(hub.files) == local
    assert hub.files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert hub.files["assets/images.png"][:4] == b"\x89PNG"
    for name, content in hub.files.items():
        assert str(checkpoint.parent).encode() not in content, name
    card, text = hub.files["README.md"].decode(), hub.files["recipe.yaml"].decode()
    assert 'from_pretrained("ada/vit")' in card
    assert "(assets/images.png)" in card
    assert "from_pretrained(&#34;ada/vit&#34;)" in hub.files["report.html"].decode()
    assert text.startswith("# made with vitprune")
    assert "checkpoint: ./checkpoint" in text


def test_a_run_pushes_what_it_made(tmp_path: Path, hub: Hub) -> None:
    apply(recipe(tmp_path, RECIPE.replace("[1, 4]", "[]"), "vit", "output.push_to_hub=lab/vit"))
    assert hub.files["README.md"] == (tmp_path / "out" / "README.md").read_bytes()
    assert 'from_pretrained("lab/vit")' in hub.files["README.md"].decode()


@pytest.mark.parametrize(
    ("repo", "role", "token", "said"),
    [
        ("ada/vit", "read", "hf_good", "the token may only read; log in with `hf auth login`"),
        ("ada/vit", "write", "hf_bad", "the Hub doesn't take the token"),
        ("bob/vit", "write", "hf_good", "ada is no member of bob; write for ada, lab"),
        ("club/vit", "write", "hf_good", "ada may only read in club"),
        ("vit", "write", "hf_good", "doesn't say whose it is; write user/name"),
        ("a/b/c", "write", "hf_good", "is no name for a repository"),
    ],
)
def test_what_can_not_be_written_is_said_before_the_run(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, repo: str, role: str, token: str, said: str
) -> None:
    hub.role = role
    monkeypatch.setenv("HF_TOKEN", token)

    def never(*arguments: object) -> None:
        raise AssertionError("the run began")

    monkeypatch.setattr(runs._Run, "load", never)
    with pytest.raises(RecipeError) as caught:
        apply(recipe(tmp_path, RECIPE, "vit", f"output.push_to_hub={repo}"))
    (problem,) = caught.value.problems
    assert problem.key == ("output", "push_to_hub")
    assert said in problem.text
    assert hub.created == []


def test_no_token_and_no_network(hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_upload, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    with pytest.raises(ValueError, match="the Hub can't be reached"):
        push(checkpoint, "ada/vit")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(checkpoint / "no-token"))
    with pytest.raises(ValueError, match="no token of the Hub is there; log in with `hf auth login`"):
        push(checkpoint, "ada/vit")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        push(checkpoint, "ada/vit")


def test_a_refused_upload_keeps_the_checkpoint(tmp_path: Path, hub: Hub) -> None:
    hub.refuses = {"/commit/"}
    with pytest.raises(OSError, match=r"ada/vit wasn't written to.*`vitprune push .*out ada/vit` tries again"):
        apply(recipe(tmp_path, RECIPE.replace("[1, 4]", "[]"), "vit", "output.push_to_hub=ada/vit"))
    hub.refuses = set()
    push(tmp_path / "out", "ada/vit")
    assert "model.safetensors" in hub.files


def test_only_what_apply_wrote(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder of a checkpoint that `vitprune apply` wrote"):
        module.push(tmp_path, "ada/vit")
