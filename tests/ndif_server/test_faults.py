"""Dead hosts, lost jobs, wrong keys: success after retry, or one clear sentence, and nothing that was collected is lost."""

from __future__ import annotations

import math
import os
import shutil
import threading
import time

import nnsight
import pytest
import torch
from lab import TINY, hub_folder

import expertsteer_nnsight as es
from expertsteer_nnsight.ndif.host import Remote, RemoteFailure
from expertsteer_nnsight.states.shards import shard_index

TEXTS = es.example("general")[:300]


@pytest.fixture(autouse=True)
def once(actor):
    if actor != "process":
        pytest.skip("once is enough")


def sentence(error) -> str:
    told = str(error.value)
    assert "\n" not in told and told.endswith(".") and len(told) < 600
    return told


class Meanwhile(threading.Thread):
    """Does something to the server once `ready()`, while the main thread waits for a job."""

    def __init__(self, ready, do):
        super().__init__(daemon=True)
        self.ready, self.do, self.error = ready, do, None
        self.start()

    def run(self):
        try:
            while not self.ready():
                time.sleep(0.05)
            self.do()
        except Exception as error:
            self.error = error

    def done(self):
        self.join(300)
        assert self.error is None and not self.is_alive()


def same(found, near, texts):
    local = es.collect(near, texts, progress=False)
    return all(torch.allclose(found[i], local[i], atol=1e-4) for i in local)


def test_the_api_dies_and_comes_back_during_a_collect(models, stack, tmp_path):
    far, near = models(TINY)
    es.collect(far, TEXTS[:1], remote=True, progress=False)

    shards, finished = tmp_path / "states", []

    def restart():
        stack("kill", "api")
        time.sleep(2)
        finished.append(len(list(shards.glob("shard-*"))))
        stack("restart", "api")

    fault = Meanwhile(lambda: len(list(shards.glob("shard-*"))) >= 3, restart)
    found = es.collect(far, TEXTS, batch_size=5, cache=shards, remote=True, progress=False)
    fault.done()
    assert 3 <= finished[0] < 60  # it was dead with jobs to come
    assert sorted(i for shard in shards.glob("shard-*") for i in shard_index(shard)) == list(range(300))
    assert same(found, near, TEXTS)


def test_the_api_dies_while_a_job_goes_on(models, stack):
    """The model stays busy with the lost job, and refuses the same job until that has ended."""
    far, _ = models(TINY)
    started, told = threading.Event(), []

    def say(text):
        told.append(text)
        if text == "running":
            started.set()

    def restart():
        stack("kill", "api")
        stack("restart", "api")

    remote = Remote()
    backend = remote.backend(far, say)
    fault = Meanwhile(started.is_set, restart)
    with far.trace("hello", backend=backend):
        norm = far.model.layers[1].output.norm()
        time.sleep(25)
        norm = nnsight.save(norm)
    fault.done()
    print("\n", told)
    assert float(norm) > 0 and any("busy" in text for text in told)


def test_ray_dies_during_a_job(models, stack):
    far, _ = models(TINY)
    started = threading.Event()

    def restart():
        time.sleep(2)
        stack("kill", "ray")
        time.sleep(1)
        stack("restart", "ray")

    states = []

    def say(text):
        states.append(text)
        if text == "running":
            started.set()

    remote = Remote(retries=12, timeout=600)
    backend = remote.backend(far, say)
    fault = Meanwhile(started.is_set, restart)
    with far.trace("hello", backend=backend):
        time.sleep(8)
        norm = nnsight.save(far.model.layers[1].output.norm())
    fault.done()
    print("\n", states)
    assert float(norm) > 0 and remote.traffic.jobs >= 2


@pytest.mark.parametrize("named", [True, False])
def test_what_was_collected_is_there_after_a_failure(named, models, stack, tmp_path):
    far, near = models(TINY)
    cache = {"cache": tmp_path / "states"} if named else {}
    folder = tmp_path / ("states" if named else "cache/unfinished")
    remote = Remote(retries=1)
    fault = Meanwhile(lambda: len(list(folder.rglob("shard-*"))) >= 3, lambda: stack("kill", "api"))
    try:
        with pytest.raises(RemoteFailure, match="was tried 2 times without success") as error:
            es.collect(far, TEXTS, batch_size=10, remote=remote, progress=False, **cache)
        sentence(error)
        fault.done()
    finally:
        stack("restart", "api")
    kept = len(list(folder.rglob("shard-*")))
    assert kept >= 3 and f"{10 * kept} of 300 texts are kept" in str(error.value)
    again = Remote()
    found = es.collect(far, TEXTS, batch_size=20, remote=again, progress=False, **cache)
    assert again.traffic.jobs == math.ceil((300 - 10 * kept) / 20)
    assert same(found, near, TEXTS)
    assert named or not list(folder.rglob("shard-*"))


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://nowhere.invalid"])
def test_a_wrong_host(address, models):
    far, _ = models(TINY)
    start = time.time()
    with pytest.raises(RemoteFailure, match="check that the address is right") as error:
        es.collect(far, TEXTS[:2], remote=address, progress=False)
    assert address in sentence(error) and time.time() - start < 60


def test_a_host_that_is_no_ndif_server(models):
    far, _ = models(TINY)
    with pytest.raises(RemoteFailure, match="but not as an NDIF server does"):
        es.collect(far, TEXTS[:2], remote=os.environ["HF_ENDPOINT"], progress=False)


def test_a_corrected_fit_is_not_held_to_the_failed_one(models):
    far, near = models(TINY)
    pairs = es.example("sentiment_pairs")[:12]
    recipe = es.ExpertSteer.recommended(n_pairs=1, band=(0.0, 1.0))
    dead = Remote("http://127.0.0.1:1", retries=0)
    with pytest.raises(RemoteFailure, match="was tried once without success"):
        recipe.fit(far, near, pairs, TEXTS[:40], remote_expert=dead, progress=False)
    recipe.set_params(position="mean")
    assert recipe.fit(far, near, pairs, TEXTS[:40], remote_expert=True, progress=False).layers


def test_a_server_that_asks_for_a_key(models, stack):
    far, _ = models(TINY)
    key = stack("auth", "on").split()[-1]
    try:
        for wrong in ("", "00000000-0000-0000-0000-000000000000", "no-such-key"):
            with pytest.raises(RemoteFailure, match="set NDIF_API_KEY") as error:
                es.collect(far, TEXTS[:2], remote=Remote(api_key=wrong), progress=False)
            assert not wrong or wrong not in sentence(error)
        found = es.collect(far, TEXTS[:2], remote=Remote(api_key=key), progress=False)
        assert found.n_texts == 2 and key not in repr(Remote(api_key=key))
    finally:
        stack("auth", "off")


def test_an_unknown_model(models):
    far, near = models(TINY)
    far = type(far)(TINY, task="text-generation")
    far.repo_id = "lab/nothing-of-the-kind"
    with pytest.raises(RemoteFailure, match="hub does not tell of a model 'lab/nothing-of-the-kind'") as error:
        es.collect(far, TEXTS[:2], remote=True, progress=False)
    sentence(error)
    nameless = type(near)(near._module, tokenizer=near.tokenizer, task="text-generation")
    nameless.repo_id = None
    with pytest.raises(ValueError, match="named by its hub id"):
        es.collect(nameless, TEXTS[:2], remote=True, progress=False)


def test_a_model_that_the_server_cannot_load(models):
    whole, broken = hub_folder() / TINY, hub_folder() / "lab" / "broken"
    without = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(whole, broken, ignore=without, dirs_exist_ok=True)
    try:
        far = type(models(TINY)[0])("lab/broken", task="text-generation")
        with pytest.raises(RemoteFailure) as error:
            es.collect(far, TEXTS[:2], remote=Remote(retries=1, timeout=60), progress=False)
        assert "unable to load this model" in sentence(error)
    finally:
        shutil.rmtree(broken)


def test_a_request_larger_than_the_server_takes(models):
    far, _ = models(TINY)
    large = torch.randint(-(2**31), 2**31, (150_000_000,), dtype=torch.int32)
    remote = Remote()
    with pytest.raises(
        RemoteFailure, match=r"the request has 6\d\d MB, which may be more than the server takes"
    ) as error:
        with far.trace("hello", backend=remote.backend(far)):
            nnsight.save(far.model.layers[1].output.sum() + large[0])
    assert "smaller tensors" in sentence(error)
    es.collect(far, TEXTS[:2], remote=True, progress=False)


def test_a_limit_on_waiting(models):
    far, _ = models(TINY)
    start = time.time()
    with pytest.raises(RemoteFailure, match=r"No result from .* in 2 s .*RUNNING") as error:
        with far.trace("hello", backend=Remote(timeout=2).backend(far)):
            time.sleep(10)
            nnsight.save(far.model.layers[1].output.sum())
    assert time.time() - start < 8
    assert "Remote(timeout=...)" in sentence(error)


def test_the_servers_limit_on_running(models, stack):
    far, _ = models(TINY)
    stack("restart", "ray", "--set", "NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS=2")
    try:
        remote, told = Remote(), []
        with pytest.raises(RemoteFailure, match=r"exceeded the execution timeout.*batch_size=") as error:
            with remote.explained("Sleeping", "batch_size="):
                with far.trace("hello", backend=remote.backend(far, told.append)):
                    time.sleep(6)
                    nnsight.save(far.model.layers[1].output.sum())
        assert sentence(error).startswith("Sleeping failed on http") and told.count("running") == 1, told
    finally:
        stack("restart", "ray")


def test_a_jobs_own_error_is_sent_once(models):
    far, _ = models(TINY)
    remote = Remote()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        with far.trace("hello", backend=remote.backend(far)):
            nnsight.save(far.model.layers[1].output.sum() / (1 // 0))
    assert remote.traffic.jobs == 1
    with pytest.raises(Exception, match="Cannot invoke while the model is already running") as caught:
        with far.generate(max_new_tokens=2, backend=remote.backend(far)) as tracer:
            with tracer.invoke("hello"):
                with tracer.invoke("there"):
                    nnsight.save(far.model.layers[1].output.sum())
    assert "with tracer.invoke('there')" in str(caught.value)
    assert remote.traffic.jobs == 2
    plan = es.SteeringPlan([es.SteeringVector(1, torch.ones(32), 1.0)])
    model = plan.attach(es.SteeringPlan([es.SteeringVector(3, torch.ones(2, 32), 1.0)]).attach(far))
    with pytest.raises(RemoteFailure, match=r"failed on .*2 rows, but the batch has 3") as error:
        es.collect(model, TEXTS[:3], remote=remote, progress=False)
    sentence(error)
    assert remote.traffic.jobs == 3
