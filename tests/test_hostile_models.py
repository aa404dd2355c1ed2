"""Folders of models that were made to do harm: nothing of them is executed, and nothing outside of them is opened."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

EVIL = """from pathlib import Path
Path(__file__).with_name("executed").touch()
class Config: model_type = "evil"
class Model: pass
"""
NAMES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoImageProcessor")
CODE = {
    "auto_map": {name: "evil.Model" for name in (*NAMES, "AutoProcessor")} | {"AutoTokenizer": ["evil.Model"] * 2},
    "trust_remote_code": True,
    "custom_generate": "evil",
    "_attn_implementation": "evil/kernel",
}

# A hook that records what Python imports, opens and executes.
HOOK = """
import json, sys
EVENTS = ("pickle.find_class", "os.system", "os.exec", "subprocess.Popen", "socket.connect", "socket.getaddrinfo")
seen = []

def watch(event, arguments):
    if event == "import":
        seen.append([event, str(arguments[1] or arguments[0])])
    elif event == "open":
        seen.append([event, str(arguments[0])])
    elif event == "exec":
        seen.append([event, arguments[0].co_filename])
    elif event in EVENTS:
        seen.append([event, str(arguments)])
"""

# Loads each folder and asks it for its prompt.
WATCHED = (
    HOOK
    + """
from kcfi.models import load
from kcfi.processing import InputError

def answer(folder):
    try:
        load(folder, "cpu")[1].prompt()
    except InputError as error:
        return str(error)
    return "loaded"

first, *folders = sys.argv[1:]
load(first, "cpu")[1].prompt()  # whatever is imported when a model is loaded for the first time
sys.addaudithook(watch)
found = {}
for folder in folders:
    seen.clear()
    said = answer(folder)
    found[folder] = [said, list(seen)]
print(json.dumps(found))
"""
)


# Loads a folder with its own code, where kcfi cannot be imported.
TRUSTING = (
    HOOK
    + """
sys.modules["kcfi"] = None
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.addaudithook(watch)
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps([type(model).__module__, seen]))
"""
)


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def change(folder, name, *path, **values):
    """Put values into a JSON file, at a place in it."""
    content = inner = json.loads((folder / name).read_text())
    for key in path:
        inner = inner[key]
    inner.update(values)
    (folder / name).write_text(json.dumps(content))


def pickled(folder, name="pytorch_model.bin"):
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / name).write_bytes(pickle.dumps(Bomb(folder / "executed")))


def indexed(folder, file):
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def binary_index(folder):
    indexed(folder, "evil.bin")
    pickled(folder, "evil.bin")


def linked_code(folder):
    (folder.parent / "elsewhere.py").write_text(EVIL.replace("__file__", repr(str(folder / "evil.py"))))
    (folder / "evil.py").unlink()
    (folder / "evil.py").symlink_to(folder.parent / "elsewhere.py")
    change(folder, "config.json", **CODE)


def adapter(folder):
    settings = {"peft_type": "LORA", "base_model_name_or_path": "evil/x", "target_modules": ["q_proj"]}
    settings["auto_mapping"] = {"parent_library": "evil", "base_model_class": "Model"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(folder / "executed")))


def tokenizer_code(folder):
    change(folder, "tokenizer_config.json", tokenizer_class="EvilTokenizer", **CODE)


def processor_code(folder):
    change(folder, "processor_config.json", processor_class="EvilProcessor", **CODE)
    change(folder, "processor_config.json", "image_processor", image_processor_type="EvilImages", **CODE)


# What is done to the folder of a tiny model, and what is said of it then.
FOLDERS = {
    "pickled weights": (pickled, "no file named model.safetensors"),
    "code in the settings": (lambda folder: change(folder, "config.json", **CODE), "loaded"),
    "code of another type of model": (
        lambda folder: change(folder, "config.json", model_type="evil", **CODE),
        "custom code",
    ),
    "code in text_config": (lambda folder: change(folder, "config.json", "text_config", **CODE), "loaded"),
    "code in vision_config": (lambda folder: change(folder, "config.json", "vision_config", **CODE), "loaded"),
    "code of another type in text_config": (
        lambda folder: change(folder, "config.json", "text_config", model_type="evil", **CODE),
        "evil",
    ),
    "code behind a link": (linked_code, "loaded"),
    "an index of absolute paths": (
        lambda folder: indexed(folder, str(folder.parent / "outside.safetensors")),
        "own folder",
    ),
    "an index that leads out": (lambda folder: indexed(folder, "../outside.safetensors"), "own folder"),
    "an index of pickles": (binary_index, "own folder"),
    "an adapter in a pickle": (adapter, "adapter_model.safetensors"),
    "a tokenizer with code": (tokenizer_code, "custom code"),
    "a processor with code": (processor_code, ""),
    "generation with code": (lambda folder: change(folder, "generation_config.json", **CODE), "loaded"),
}


def watched(script, root, *folders):
    """What a script prints of some folders, run in `root` with a cache of its own and nobody to answer a question."""
    (root / "script.py").write_text(script)
    environment = {**os.environ, "HF_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, str(root / "script.py"), *map(str, folders)]
    options = {"cwd": root, "env": environment, "stdin": subprocess.DEVNULL}
    run = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def answers(detector, tmp_path_factory):
    """What each folder answers, and what Python did meanwhile, in one process without `trust_remote_code`."""
    root = tmp_path_factory.mktemp("hostile")
    for name, (harm, _) in FOLDERS.items():
        folder = root / name / "model"
        shutil.copytree(detector, folder)
        (folder / "evil.py").write_text(EVIL)
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(EVIL)
        harm(folder)
    found = watched(WATCHED, root, detector, *(root / name / "model" for name in FOLDERS))
    return {name: (root / name / "model", *found[str(root / name / "model")]) for name in FOLDERS}


def test_the_hook_sees_what_is_opened_and_executed(answers):
    folder, _, seen = answers["code in the settings"]
    assert ["open", str(folder / "config.json")] in seen


@pytest.mark.parametrize("name", FOLDERS)
def test_nothing_of_a_folder_is_executed_and_nothing_outside_of_it_opened(answers, name):
    folder, said, seen = answers[name]
    assert FOLDERS[name][1] in said and (said == "loaded") == (FOLDERS[name][1] == "loaded"), said
    assert not list(folder.rglob("executed")) and not list(folder.parent.rglob("executed"))
    for event, what in seen:
        own = str(folder.parent) in what
        if event == "open":
            assert not own or Path(what).suffix in (".json", ".jinja", ".safetensors"), what
            assert not own or Path(what).parent == folder, what
        elif event in ("import", "exec"):
            assert not own and "transformers_modules" not in what and Path(what).stem != "evil", what
        else:
            pytest.fail(f"{event}: {what}")


def test_with_trust_remote_code_only_the_files_of_the_folder_are_executed(detector, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(detector, folder)
    (folder / "evil.py").symlink_to(tmp_path / "elsewhere.py")
    (tmp_path / "elsewhere.py").write_text(EVIL)
    for part in ("text_config", "vision_config"):
        names = {name: "evil/other--evil.Model" for name in NAMES}
        change(folder, "config.json", part, auto_map=names, trust_remote_code=True)
    module, seen = watched(TRUSTING, tmp_path, folder)
    assert module.startswith("transformers_modules.") and not list(tmp_path.rglob("executed"))
    executed = {Path(what) for event, what in seen if event == "exec" and "transformers_modules" in what}
    own = {path.name: path.read_bytes() for path in folder.glob("*.py") if path.name != "evil.py"}
    copies = {path for path in executed if path.name != "__init__.py"}
    assert {path.name for path in copies} >= {"modeling_kcfi.py", "processing_kcfi.py"}
    assert all(path.read_bytes() == own[path.name] for path in copies)
    assert all(path.read_bytes() == b"" for path in executed - copies)
    assert not [what for event, what in seen if event not in ("open", "import", "exec")]
