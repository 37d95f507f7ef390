"""What runs in a trace reaches a process that lacks this package: the payload of a remote request, rebuilt and run there.

The payload is nnsight's own. A real server is the business of the tests marked `ndif`. Both sides are processes of their
own: the client because the tests' type checks wrap every function of the package, the server because it must lack it.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny import PROMPTS, build

CLIENT = """
import json, sys, torch, nnsight
from nnsight.modeling.transformers import TransformersModel
from nnsight.schema.request import RequestModel
import expertsteer_nnsight as es
from expertsteer_nnsight import Positions, Remote, SteeringPlan, SteeringVector
from expertsteer_nnsight.measure.scoring import costs

class Payload:
    def __init__(self, path):
        self.path = path

    def __call__(self, tracer):
        open(self.path, "wb").write(RequestModel.serialize(tracer))

class Sent(Exception):
    pass

class Nowhere(Remote):
    "Writes the first job that the package itself sends, and gets no further."
    def backend(self, model, say=None):
        def write(tracer):
            Payload(Nowhere.path)(tracer)
            raise Sent
        return write

def sent(way, where, path):
    "What is computed here; the request that asks for the same is written to `path`."
    g = torch.Generator().manual_seed(0)
    rows = SteeringVector(2, torch.randn(3, 32, generator=g), torch.tensor([1.0, -2.0, 3.0]), where=where)
    plan = SteeringPlan([SteeringVector(1, torch.randn(32, generator=g), 2.0, 3.0, "add_keep_norm", where), rows])
    plan = plan + SteeringPlan([SteeringVector(3, torch.randn(32, generator=g), 1.0, 3.0, "clamp", where)])
    nowhere, Nowhere.path = Nowhere(), path
    if way in ("collect", "costs"):
        if way == "collect":
            found = es.collect(model, prompts, position="mean", progress=False)
            order = sorted(range(len(prompts)), key=lambda j: len(model.tokenizer(prompts[j])["input_ids"]))
            here = [found[i][order] for i in found]
            call = lambda: es.collect(model, prompts, position="mean", remote=nowhere, progress=False)
        else:
            arms = [SteeringPlan([SteeringVector(2, torch.randn(32, generator=g), s, where=where)]) for s in (1.0, 2.0)]
            here = costs(model, arms, prompts[:1])[0]
            call = lambda: costs(model, arms, prompts[:1], remote=nowhere)
        try:
            call()
        except Sent:
            return [h.tolist() for h in here]
    steered = plan.attach(model)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for backend in (None, Payload(path)):
        with torch.no_grad():
            if way == "attach":
                with steered.generate(prompts, **settings, backend=backend) as tracer:
                    ids = nnsight.save(tracer.result)
            else:
                with model.trace(prompts, backend=backend):
                    positions = Positions.read(model)
                    plan.apply(model, positions)
                    ids = nnsight.save(model.output.logits[:, -1].argmax(-1))
        if backend is None:
            here = ids.tolist()
    return here

folder, cases = sys.argv[1], json.loads(sys.argv[2])
model, prompts = TransformersModel(folder, task="text-generation", dispatch=True), json.loads(sys.argv[3])
print(json.dumps([sent(*case) for case in cases]))
"""

SERVER = """
import json, sys, torch

from nnsight.modeling.transformers import TransformersModel
from nnsight.schema.request import RequestModel
from nnsight.tracing.tracer import inc

ABSENT = {"expertsteer_nnsight", "jaxtyping", "einops", "sklearn", "scipy", "safetensors", "tqdm"}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def result(payload):
    tracer = RequestModel.deserialize(open(payload, "rb").read(), model._remoteable_persistent_objects())
    inc()
    with torch.no_grad():
        tracer.execute(tracer.info.code)
    assert not ABSENT & set(sys.modules)
    found = tracer.info.frame.f_locals
    return (found["kept"] if "kept" in found else found["found"][0][0] if "found" in found else found["ids"]).tolist()

model = TransformersModel(sys.argv[1], task="text-generation", dispatch=True)
# transformers imports some of these for itself
for name in [name for name in sys.modules if name.split(".")[0] in ABSENT]:
    del sys.modules[name]
sys.meta_path.insert(0, Absent())
print(json.dumps([result(payload) for payload in sys.argv[2:]]))
"""

CASES = [(w, p) for w in ("attach", "apply") for p in ("all", "completion")] + [
    ("collect", "all"),
    ("costs", "completion"),
]


def run(script, *arguments):
    done = subprocess.run([sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each case gives in the client, and in a process that lacks the package; one process of either does all."""
    folder = tmp_path_factory.mktemp("travel")
    model = build("llama", bos=True)
    model._module.save_pretrained(folder / "tiny")
    model.tokenizer.save_pretrained(folder / "tiny")
    for name, script in (("client", CLIENT), ("server", SERVER)):
        (folder / f"{name}.py").write_text(script)
    payloads = [str(folder / f"payload-{i}") for i in range(len(CASES))]
    cases = [(*case, payload) for case, payload in zip(CASES, payloads, strict=True)]
    here = run(folder / "client.py", folder / "tiny", json.dumps(cases), json.dumps(PROMPTS[:3]))
    there = run(folder / "server.py", folder / "tiny", *payloads)
    return dict(zip(CASES, zip(here, there, strict=True), strict=True))


@pytest.mark.parametrize(("way", "where"), CASES)
def test_what_is_sent_gives_the_same_where_the_package_is_absent(way, where, both):
    here, there = both[way, where]
    assert torch.allclose(torch.tensor(there), torch.tensor(here), atol=1e-5)
