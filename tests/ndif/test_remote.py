"""What can be said of a remote model without a server; the rest is in `tests/ndif_server`."""

from __future__ import annotations

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from nnsight import CONFIG
from tiny import PROMPTS, build

import expertsteer_nnsight as es
from expertsteer_nnsight.ndif.host import Remote, RemoteFailure
from expertsteer_nnsight.ndif.http import message_of
from expertsteer_nnsight.states.forward import batches
from expertsteer_nnsight.states.shards import kept_until_done


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
    assert Remote("http://mine:8001", api_key="").key is None
    assert Remote("http://mine:8001", api_key="another-key\n").key == "another-key"
    with pytest.raises(ValueError, match="check how it was read") as error:
        Remote(api_key="secret\nkey")
    assert "secret" not in str(error.value)
    for wrong in ("local", "mine:8001", "", "http://"):
        with pytest.raises(ValueError, match="starts with http:// or https://, got"):
            Remote.of(wrong)
    with pytest.raises(Exception, match="remote"):
        Remote.of(7)


def test_a_model_without_a_hub_id_cannot_be_remote():
    with pytest.raises(ValueError, match="named by its hub id"):
        es.collect(build(), PROMPTS, remote="http://127.0.0.1:1", progress=False)


def test_a_remote_is_no_backend():
    with (
        pytest.raises(TypeError, match=r"backend=remote.backend\(model\)"),
        build().trace("a dog", backend=Remote("http://a:1")),
    ):
        pass


def test_a_dead_host_is_one_sentence(model, tmp_path, monkeypatch):
    monkeypatch.setenv("EXPERTSTEER_CACHE", str(tmp_path))
    with pytest.raises(RemoteFailure, match=r"http://127.0.0.1:1 was tried once .*refused.*check that the address"):
        es.collect(model, PROMPTS, remote=Remote("http://127.0.0.1:1", retries=0), progress=False)


def test_a_website_is_no_server(model, website, tmp_path, monkeypatch):
    monkeypatch.setenv("EXPERTSTEER_CACHE", str(tmp_path))
    with pytest.raises(RemoteFailure, match="but not as an NDIF server does: check the address"):
        es.collect(model, PROMPTS, remote=website, progress=False)


def test_the_message_of_a_traceback_is_told_whole():
    told = message_of(
        "Traceback (most recent call last):\n  File x\n    y\nRuntimeError: CUDA error: assert\n\nCompile with X.\n"
    )
    assert told == "RuntimeError: CUDA error: assert Compile with X"
    assert (
        message_of("Your job exceeded the execution\n timeout of 2s.")
        == "Your job exceeded the execution timeout of 2s"
    )
    assert message_of("") == "no message"


def test_a_state_of_a_model_is_told_for_what_it_is(model, monkeypatch):
    running = {"model_key": model.to_model_key(), "repo_id": "lab/tiny", "application_state": "RUNNING"}
    for payload, told in [
        ([running], "is running."),
        ([{**running, "application_state": "DEPLOYING"}], "is being deployed"),
        ([{**running, "model_key": "other", "task": "x"}], "with task 'x' and revision 'main' only"),
        ([{"repo_id": "lab/tiny", "deployment_level": "COLD"}], "is not in http://mine:1's list"),
        ([], "is not in http://mine:1's list"),
    ]:
        monkeypatch.setattr(Remote, "_get", lambda *_, p=payload: {"deployments": dict(enumerate(p))})
        assert told in Remote("http://mine:1")._state_of(model, model.to_model_key())


ELSEWHERE = """
import subprocess, sys, cloudpickle
import expertsteer_nnsight as es

def use():
    return es.collect.__module__, es.Remote.__module__

code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read())())"
subprocess.run([sys.executable, "-c", code], input=cloudpickle.dumps(use), check=True)
"""


def test_the_package_goes_to_other_processes_of_this_machine_as_it_is():
    # as joblib does it; here the tests' type checks wrap every function, which cannot be sent
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], capture_output=True, text=True)
    assert done.stdout.strip() == "('expertsteer_nnsight.states.collecting', 'expertsteer_nnsight.ndif.host')", (
        done.stderr
    )


def test_one_process_at_a_time_keeps_what_comes_back(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPERTSTEER_CACHE", str(tmp_path))
    with pytest.raises(KeyError), kept_until_done("a") as empty:
        empty.mkdir()
        raise KeyError
    assert not list((tmp_path / "unfinished").iterdir())
    with pytest.raises(KeyError), kept_until_done("a") as folder:
        folder.mkdir()
        (folder / "shard-0.safetensors").touch()
        with kept_until_done("a") as other:
            assert other is None
        raise KeyError
    assert folder.is_dir()
    with kept_until_done("a") as again:
        assert again == folder
    assert not folder.exists()
    monkeypatch.setenv("EXPERTSTEER_CACHE", "/proc/nothing")
    with kept_until_done("a") as none:
        assert none is None


def test_requests_hold_so_many_texts_and_tokens():
    lengths = [1, 2, 3, 10, 10, 40]
    assert batches(range(6), 2) == [[0, 1], [2, 3], [4, 5]]
    assert batches(range(6), 4, lengths, 20) == [[0, 1, 2], [3, 4], [5]]
    assert batches([], 4) == []
