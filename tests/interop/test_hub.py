"""Plans on the hub, against a server on this machine that answers as the hub does."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny
import torch

import expertsteer_nnsight as es
from expertsteer_nnsight.interop import hub
from expertsteer_nnsight.models.identity import ModelIdentity


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub's interface that huggingface_hub uses to make a repository, commit to it and read a file."""

    files: dict[str, dict[str, bytes]]
    asked: list[str]

    def log_message(self, *args):
        pass

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value):
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self):
        body, path = self._body(), self.path.split("?")[0]
        self.asked.append(path)
        if path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made.get('organization') or 'someone'}/{made['name']}"
            self.files.setdefault(name, {})
            self._json({"url": f"{self.server.address}/{name}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            asked = json.loads(body)["files"]
            self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").split("/commit/")[0]
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.files[name][value["path"]] = base64.b64decode(value["content"])
            self._json(
                {"success": True, "commitOid": "c" * 40, "commitUrl": f"{self.server.address}/{name}/commit/{'c' * 40}"}
            )
        else:
            self._answer(404)

    def do_GET(self):
        path = self.path.split("?")[0]
        name, _, rest = path.lstrip("/").partition("/resolve/")
        file = rest.partition("/")[2]
        if name not in self.files:
            self._answer(401, X_Error_Code="RepoNotFound")
        elif file not in self.files[name]:
            self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit="c" * 40)
        else:
            content = self.files[name][file]
            tag = hashlib.sha1(content).hexdigest()
            self._answer(200, content, X_Repo_Commit="c" * 40, ETag=f'"{tag}"')

    do_HEAD = do_GET


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.files, Hub.asked = {}, []
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield {"endpoint": server.address, "token": "hf_" + "x" * 30}
    server.shutdown()
    server.server_close()
    thread.join()


def plan(**info):
    v = es.SteeringVector(1, torch.randn(32, generator=torch.Generator().manual_seed(0)), 0.5, residual_norm=3.0)
    return es.SteeringPlan([v], ModelIdentity.of(tiny.tiny("llama")), info)


def test_a_plan_comes_back_from_the_hub_as_it_was_pushed(endpoint, tmp_path):
    mine = plan(expert={"id": "google/gemma-3-270m"}, note="a plan")
    url = mine.push_to_hub("someone/my-plan", **endpoint)
    assert url.endswith("someone/my-plan/commit/" + "c" * 40)
    assert set(Hub.files["someone/my-plan"]) == {"plan.safetensors", "README.md"}
    back = es.SteeringPlan.from_hub("someone/my-plan", cache_dir=tmp_path, **endpoint)
    assert torch.equal(back.vectors[0].direction, mine.vectors[0].direction)
    assert (back.vectors[0].strength, back.vectors[0].residual_norm, back.target) == (0.5, 3.0, mine.target)
    assert back.info["note"] == "a plan"
    mine.push_to_hub("someone/my-plan", **endpoint)  # again: the repository is there


def test_what_is_not_there_is_said_in_a_sentence(endpoint, tmp_path):
    plan().push_to_hub("someone/my-plan", **endpoint)
    with pytest.raises(ValueError, match=r"someone/my-plan has no other\.safetensors"):
        es.SteeringPlan.from_hub("someone/my-plan", filename="other.safetensors", cache_dir=tmp_path, **endpoint)
    Hub.files["someone/my-plan"]["plan.safetensors"] = b"no plan"
    with pytest.raises(ValueError, match="is not a safetensors file"):
        es.SteeringPlan.from_hub("someone/my-plan", cache_dir=tmp_path, **endpoint)


def test_a_name_or_a_hub_that_is_not_there_is_said_in_a_sentence():
    with pytest.raises(ValueError, match="is named owner/name, and 'me' is not"):
        plan().push_to_hub("me")
    with pytest.raises(RuntimeError, match=r"The hub at http://127\.0\.0\.1:9 cannot be reached"):
        plan().push_to_hub("me/mine", endpoint="http://127.0.0.1:9", token="hf_" + "x" * 30)


def test_the_card_tells_what_the_plan_is_and_what_was_measured():
    text = hub.card(plan(expert={"id": "google/gemma-3-270m"}), "someone/my-plan")
    assert text.startswith("---\n") and "# my-plan" in text and "`google/gemma-3-270m`" in text
    assert 'from_hub("someone/my-plan")' in text and "layer   1  add 0.5" in text
    assert "there is no receipt" in text
    arm = {
        "effect": 2.0, "interval": [1.5, 2.5], "effects": [2.0], "items": [2.0, 2.0], "n": 2, "draws": 1, "kl_p95": 1.0, "nll": 3.0,
        "wrong_way": 0.0, "layers": [[None, 1]], "agrees": [1.0, 0.0], "budget_met": True,
    }  # fmt: skip
    receipt = es.Receipt({"expert": arm}, {"nll": 2.5, "score": 0.0}, 1.0, "nats")
    measured = hub.card(plan(receipt=receipt.to_dict()), "someone/my-plan")
    assert "95 % interval" in measured and "1.5 to 2.5" in measured and "there is no receipt" not in measured


def test_a_plan_made_by_hand_has_a_card():
    assert "`gemma-3-270m`" in hub.card(plan(expert="gemma-3-270m"), "a/b")
    assert "come from" not in hub.card(plan(), "a/b")


def test_the_cards_header_is_what_the_hub_reads():
    from dataclasses import replace

    from huggingface_hub import ModelCard

    base = plan()
    named = es.SteeringPlan(base.vectors, replace(base.target, id="HuggingFaceTB/SmolLM2-135M-Instruct"))
    data = ModelCard(hub.card(named, "a/b")).data
    assert data.library_name == "expertsteer_nnsight" and data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "steering-vector" in data.tags
    # a folder's name is no id of the hub
    assert ModelCard(hub.card(base, "a/b")).data.base_model is None
