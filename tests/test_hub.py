"""A saved folder is a complete Hub repository: it loads where kcfi is not installed, and saves itself again."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torchvision.transforms.functional import pil_to_tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import kcfi

ROOT = Path(__file__).parents[1]
TRAVELLING = sorted((ROOT / "modeling_kcfi").glob("*.py")) + sorted((ROOT / "processing").glob("*.py"))
CODE = {
    "configuration_kcfi.py",
    "modeling_kcfi.py",
    "key_change_perceiver.py",
    "change_detection_head.py",
    "processing_kcfi.py",
    "image_processing_kcfi.py",
    "pipeline_kcfi.py",
}

# Run by an interpreter that cannot import kcfi: load everything, answer, save, join two towers.
STRANGER = """
import sys
sys.modules["kcfi"] = None  # import kcfi fails
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder, work = sys.argv[1:]
trust = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trust)
model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust)
image_processor = AutoImageProcessor.from_pretrained(folder, **trust)
pair = [Image.open(f"{work}/before.png"), Image.open(f"{work}/after.png")]
inputs = processor(images=[pair], text=[processor.prompt()], return_tensors="pt")
captioner = pipeline("change-captioning", model=folder, **trust)
result = captioner(pair, max_new_tokens=5)
torch.save(
    {
        "modules": [type(part).__module__ for part in (config, model, processor, image_processor, captioner)],
        "caption": result["caption"],
        "mask": pil_to_tensor(result["mask"]),
        "score": torch.tensor(result["score"]),
        "pixels": image_processor([pair], return_tensors="pt")["pixel_values"],
        "tokens": model.generate(**inputs, max_new_tokens=5),
        "mask_logits": model(**inputs).mask_logits,
        "base": AutoModel.from_pretrained(folder, **trust).get_image_features(inputs["pixel_values"]).mask_logits,
    },
    f"{work}/answers.pt",
)
model.save_pretrained(f"{work}/again")
processor.save_pretrained(f"{work}/again")
towers = AutoModel.from_config(config.vision_config), AutoModelForCausalLM.from_pretrained(f"{work}/text")
joined = type(model).from_towers(config, *towers)
joined.save_pretrained(f"{work}/joined")
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def saved(work):
    """A tiny model and processor, saved; with the answers they give to a pair."""
    words = ["<pad>", "<end>", "<image>", *"This change features ? . house road".split()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    processor = kcfi.KCFIProcessor.from_towers(tokenizer, image_size=16, patch_size=4)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"model_type": "qwen2", "vocab_size": len(words), "num_key_value_heads": 2, **size}
    config = kcfi.KCFIConfig(
        vision_config={"model_type": "vit", "image_size": 16, "patch_size": 4, **size},
        text_config=text,
        image_token_id=processor.image_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**text)).save_pretrained(work / "text")
    model = kcfi.KCFIForConditionalGeneration(config).eval()
    model.save_pretrained(work / "model")
    processor.save_pretrained(work / "model")

    pair = [Image.effect_noise((40, 30), 60).convert("RGB") for _ in range(2)]
    for image, name in zip(pair, ("before", "after"), strict=True):
        image.save(work / f"{name}.png")
    inputs = processor(images=[pair], text=[processor.prompt()], return_tensors="pt")
    result = pipeline("change-captioning", model=model, processor=processor)(pair, max_new_tokens=5)
    return {
        "caption": result["caption"],
        "mask": pil_to_tensor(result["mask"]),
        "score": torch.tensor(result["score"]),
        "pixels": inputs["pixel_values"],
        "tokens": model.generate(**inputs, max_new_tokens=5),
        "mask_logits": model(**inputs).mask_logits,
        "base": model(**inputs).mask_logits,
    }


def test_the_folder_holds_safetensors_code_and_all_entries(work, saved):
    names = {file.name for file in (work / "model").iterdir()}
    assert names >= CODE | {"model.safetensors", "config.json", "processor_config.json", "chat_template.jinja"}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    config = json.loads((work / "model" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_kcfi.KCFIConfig",
        "AutoModel": "modeling_kcfi.KCFIModel",
        "AutoModelForImageTextToText": "modeling_kcfi.KCFIForConditionalGeneration",
    }
    processor = json.loads((work / "model" / "processor_config.json").read_text())
    assert processor["auto_map"]["AutoProcessor"] == "processing_kcfi.KCFIProcessor"
    assert processor["image_processor"]["auto_map"]["AutoImageProcessor"] == "image_processing_kcfi.KCFIImageProcessor"


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_with_kcfi_the_installed_classes_load_it(work, saved, trust_remote_code):
    folder, trust = work / "model", {"trust_remote_code": trust_remote_code}
    assert type(AutoConfig.from_pretrained(folder, **trust)) is kcfi.KCFIConfig
    assert type(AutoModel.from_pretrained(folder, **trust)) is kcfi.KCFIModel
    assert type(AutoModelForImageTextToText.from_pretrained(folder, **trust)) is kcfi.KCFIForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(folder, **trust)) is kcfi.KCFIProcessor
    assert type(AutoImageProcessor.from_pretrained(folder, **trust)) is kcfi.KCFIImageProcessor
    assert type(pipeline("change-captioning", model=str(folder), **trust)) is kcfi.ChangeCaptioningPipeline


def test_without_kcfi_the_folder_loads_itself_answers_the_same_and_saves_itself(work, saved, tmp_path):
    (tmp_path / "stranger.py").write_text(STRANGER)
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "stranger.py"), str(work / "model"), str(work)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]

    answers = torch.load(work / "answers.pt")
    assert all(module.startswith("transformers_modules.") for module in answers["modules"])
    assert answers["caption"] == saved["caption"] != ""
    for name in saved.keys() - {"caption"}:
        # another process may add in another order: the last bit may differ, tokens may not
        torch.testing.assert_close(answers[name], saved[name], rtol=1e-4, atol=1e-6, msg=name)
    for name in CODE:
        assert (work / "again" / name).read_bytes() == (work / "model" / name).read_bytes(), name
    for file, part in (("config.json", "auto_map"), ("processor_config.json", "auto_map")):
        again, first = (json.loads((work / folder / file).read_text()) for folder in ("again", "model"))
        assert again[part] == first[part]
    assert type(AutoModelForImageTextToText.from_pretrained(work / "joined")) is kcfi.KCFIForConditionalGeneration


def test_no_path_of_this_machine_is_saved(work, saved):
    for file in [*(work / "model").glob("*.json"), *(work / "joined").glob("*.json")]:
        assert str(work) not in file.read_text(), file


@pytest.mark.parametrize("file", TRAVELLING, ids=lambda file: file.name)
def test_travelling_files_import_their_neighbours_by_one_dot_and_nothing_of_kcfi(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, f"{file.name}:{node.lineno}"
            assert (file.parent / f"{node.module}.py").is_file(), f"{file.name}:{node.lineno}"
    # transformers reads imports by pattern, in docstrings too, and asks for every package before loading
    assert all((file.parent / f"{module}.py").is_file() for module in get_relative_imports(file))
    assert set(get_imports(file)) <= {
        *sys.stdlib_module_names, "PIL", "huggingface_hub", "numpy", "torch", "tqdm", "transformers",
    }  # fmt: skip


def test_travelling_files_have_names_of_their_own():
    names = [file.name for file in TRAVELLING if file.name != "__init__.py"]
    assert len(names) == len(set(names))


def test_the_folders_are_imported_below_kcfi_only():
    """`import modeling_kcfi` works in a checkout and gives other classes than `kcfi.modeling_kcfi`."""
    wrong = re.compile(r"^\s*(from|import)\s+(modeling_kcfi|processing|training|hub_configs)\b", re.MULTILINE)
    folders = ("kcfi", "modeling_kcfi", "processing", "training", "hub_configs", "tests", "benchmarks", "docs")
    files = [file for folder in folders for suffix in ("py", "md") for file in (ROOT / folder).rglob(f"*.{suffix}")]
    assert len(files) > len(TRAVELLING)
    assert [file for file in files if wrong.search(file.read_text())] == []
