"""What runs in a trace reaches a process that lacks this package: the payload of a remote request, rebuilt and run there.

The payload is nnsight's own. A real server is the business of the tests marked `ndif`. Both sides are processes of their
own: the client because the tests' type checks wrap every function of the package, the server because it must lack it.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tiny import PROMPTS, build

CLIENT = """
import json, sys, torch, nnsight
from nnsight.modeling.transformers import TransformersModel
from nnsight.schema.request import RequestModel
from expertsteer_nnsight import Positions, SteeringPlan, SteeringVector

class Payload:
    def __call__(self, tracer):
        open(sys.argv[3], "wb").write(RequestModel.serialize(tracer))

folder, way, _, where, prompts = sys.argv[1:]
model, prompts = TransformersModel(folder, task="text-generation", dispatch=True), json.loads(prompts)
g = torch.Generator().manual_seed(0)
rows = SteeringVector(2, torch.randn(3, 32, generator=g), torch.tensor([1.0, -2.0, 3.0]), where=where)
plan = SteeringPlan([SteeringVector(1, torch.randn(32, generator=g), 2.0, 3.0, "add_keep_norm", where), rows])
plan = plan + SteeringPlan([SteeringVector(3, torch.randn(32, generator=g), 1.0, 3.0, "clamp", where)])
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

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("expertsteer_nnsight", "jaxtyping"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from nnsight.modeling.transformers import TransformersModel
from nnsight.schema.request import RequestModel
from nnsight.tracing.tracer import inc

folder, payload = sys.argv[1:]
model = TransformersModel(folder, task="text-generation", dispatch=True)
tracer = RequestModel.deserialize(open(payload, "rb").read(), model._remoteable_persistent_objects())
inc()
with torch.no_grad():
    tracer.execute(tracer.info.code)
assert not {"expertsteer_nnsight", "jaxtyping"} & set(sys.modules)
print(json.dumps(tracer.info.frame.f_locals["ids"].tolist()))
"""


def run(script, *arguments):
    done = subprocess.run([sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("where", ["all", "completion"])
@pytest.mark.parametrize("way", ["attach", "apply"])
def test_a_plan_survives_being_sent(way, where, tmp_path):
    model = build("llama", bos=True)
    model._module.save_pretrained(tmp_path / "tiny")
    model.tokenizer.save_pretrained(tmp_path / "tiny")
    for name, script in (("client", CLIENT), ("server", SERVER)):
        (tmp_path / f"{name}.py").write_text(script)
    payload = tmp_path / "payload"
    here = run(tmp_path / "client.py", tmp_path / "tiny", way, payload, where, json.dumps(PROMPTS[:3]))
    assert run(tmp_path / "server.py", tmp_path / "tiny", payload) == here
