"""What can be said of a remote model without a server; the rest is in `tests/ndif`."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from nnsight import CONFIG
from tiny import PROMPTS, build

import expertsteer_nnsight as es
from expertsteer_nnsight.activations import _cut
from expertsteer_nnsight.remote import Remote, RemoteFailure


class Named(type(build())):
    """A model whose key needs no hub."""

    def to_model_key(self):
        return "nnsight.modeling.transformers.TransformersModel:{}"


@pytest.fixture
def model():
    tiny = build()
    named = Named(tiny._module, tokenizer=tiny.tokenizer, task="text-generation")
    named.repo_id = "lab/tiny"
    return named


@pytest.fixture
def website():
    """A host that answers, but is no NDIF server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html></html>")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_what_remote_means(monkeypatch):
    monkeypatch.setattr(CONFIG.API, "HOST", "https://ndif.example")
    monkeypatch.setattr(CONFIG.API, "APIKEY", "a-secret-key")
    assert Remote.of(False) is None and Remote.of(None) is None
    assert Remote.of(True).address == "https://ndif.example" and Remote.of(True).key == "a-secret-key"
    mine = Remote("http://mine:8001/", api_key="another-key")
    assert Remote.of(mine) is mine and mine.address == "http://mine:8001" and mine.key == "another-key"
    assert Remote.of("http://mine:8001").address == mine.address
    assert "key" not in repr(mine) and "secret" not in repr(Remote())
    for wrong in ("local", "mine:8001"):
        with pytest.raises(ValueError, match="starts with http:// or https://, got"):
            Remote.of(wrong)
    with pytest.raises(Exception, match="remote"):
        Remote.of(7)


def test_a_model_without_a_hub_id_cannot_be_remote():
    with pytest.raises(ValueError, match="named by its hub id"):
        es.collect(build(), PROMPTS, remote="http://127.0.0.1:1", progress=False)


def test_a_dead_host_is_one_sentence(model, tmp_path, monkeypatch):
    monkeypatch.setenv("EXPERTSTEER_CACHE", str(tmp_path))
    with pytest.raises(RemoteFailure, match=r"http://127.0.0.1:1 was tried once .*refused.*check that the address"):
        es.collect(model, PROMPTS, remote=Remote("http://127.0.0.1:1", retries=0), progress=False)


def test_a_website_is_no_server(model, website, tmp_path, monkeypatch):
    monkeypatch.setenv("EXPERTSTEER_CACHE", str(tmp_path))
    with pytest.raises(RemoteFailure, match="but not as an NDIF server does: check the address"):
        es.collect(model, PROMPTS, remote=website, progress=False)


def test_requests_hold_so_many_texts_and_tokens():
    lengths = [1, 2, 3, 10, 10, 40]
    assert _cut(range(6), 2) == [[0, 1], [2, 3], [4, 5]]
    assert _cut(range(6), 4, lengths, 20) == [[0, 1, 2], [3, 4], [5]]
    assert _cut([], 4) == []
