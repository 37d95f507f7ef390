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
    def __call__(self, tracer):
        open(sys.argv[3], "wb").write(RequestModel.serialize(tracer))

class Sent(Exception):
    pass

class Nowhere(Remote):
    "Writes the first job that the package itself sends, and gets no further."
    def backend(self, model, say=None):
        def write(tracer):
            Payload()(tracer)
            raise Sent
        return write

folder, way, _, where, prompts = sys.argv[1:]
model, prompts = TransformersModel(folder, task="text-generation", dispatch=True), json.loads(prompts)
g = torch.Generator().manual_seed(0)
rows = SteeringVector(2, torch.randn(3, 32, generator=g), torch.tensor([1.0, -2.0, 3.0]), where=where)
plan = SteeringPlan([SteeringVector(1, torch.randn(32, generator=g), 2.0, 3.0, "add_keep_norm", where), rows])
plan = plan + SteeringPlan([SteeringVector(3, torch.randn(32, generator=g), 1.0, 3.0, "clamp", where)])
if way in ("collect", "costs"):
    if way == "collect":
        found = es.collect(model, prompts, position="mean", progress=False)
        here = [found[i][sorted(range(len(prompts)), key=lambda j: len(model.tokenizer(prompts[j])["input_ids"]))] for i in found]
        call = lambda: es.collect(model, prompts, position="mean", remote=Nowhere(), progress=False)
    else:
        arms = [SteeringPlan([SteeringVector(2, torch.randn(32, generator=g), s, where=where)]) for s in (1.0, 2.0)]
        here = costs(model, arms, prompts[:1])[0]
        call = lambda: costs(model, arms, prompts[:1], remote=Nowhere())
    try:
        call()
    except Sent:
        print(json.dumps([h.tolist() for h in here]))
    sys.exit()
steered = plan.attach(model)
settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
for backend in (None, Payload()):
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
        print(json.dumps(ids.tolist()))
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

folder, payload = sys.argv[1:]
model = TransformersModel(folder, task="text-generation", dispatch=True)
# transformers imports some of these for itself
for name in [name for name in sys.modules if name.split(".")[0] in ABSENT]:
    del sys.modules[name]
sys.meta_path.insert(0, Absent())
tracer = RequestModel.deserialize(open(payload, "rb").read(), model._remoteable_persistent_objects())
inc()
with torch.no_grad():
    tracer.execute(tracer.info.code)
assert not ABSENT & set(sys.modules)
found = tracer.info.frame.f_locals
found = found["kept"] if "kept" in found else found["found"][0][0] if "found" in found else found["ids"]
print(json.dumps(found.tolist()))
"""


def run(script, *arguments):
    done = subprocess.run([sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("way", "where"),
    [(w, p) for w in ("attach", "apply") for p in ("all", "completion")]
    + [("collect", "all"), ("costs", "completion")],
)
def test_what_is_sent_gives_the_same_where_the_package_is_absent(way, where, tmp_path):
    model = build("llama", bos=True)
    model._module.save_pretrained(tmp_path / "tiny")
    model.tokenizer.save_pretrained(tmp_path / "tiny")
    for name, script in (("client", CLIENT), ("server", SERVER)):
        (tmp_path / f"{name}.py").write_text(script)
    payload = tmp_path / "payload"
    here = run(tmp_path / "client.py", tmp_path / "tiny", way, payload, where, json.dumps(PROMPTS[:3]))
    there = run(tmp_path / "server.py", tmp_path / "tiny", payload)
    assert torch.allclose(torch.tensor(there), torch.tensor(here), atol=1e-5)
