"""Who imports whom: the rules of docs/architecture.md, read from the sources."""

import ast
import json
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

from kcfi.modeling_kcfi import KCFIConfig, change_detection_head
from kcfi.processing import image_processing_kcfi, processing_kcfi

ROOT = Path(__file__).parents[1]
PARTS = ("kcfi", "kcfi_cli", "modeling_kcfi", "processing", "training")

# Rooms from the ground up: a file imports from its own room and from rooms of lower floors.
FLOORS = (
    ("kcfi.modeling_kcfi", "kcfi.processing"),  # travel to the Hub
    ("kcfi.web",),
    ("kcfi",),
    ("kcfi.scenes",),
    ("kcfi.archives", "kcfi.demo"),
    ("kcfi.training.data",),
    ("kcfi.training.synthetic",),
    ("kcfi.training.materials",),
    ("kcfi.training.load", "kcfi.training.feature_cache"),
    ("kcfi.training.scoring", "kcfi.training.sharing"),
    ("kcfi.training",),  # one run
    ("kcfi.training.ablation_table", "kcfi.training.towers"),
    ("kcfi.training.ablate",),
    ("kcfi_cli",),
)


def modules(root=ROOT):
    """Every file of the project by its import name."""
    found = {}
    for part in PARTS:
        for path in [*root.glob(f"{part}.py"), *sorted((root / part).rglob("*.py"))]:
            if any(parent.is_symlink() for parent in path.parents if parent != root):
                continue  # links in kcfi/ to the folders beside it
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            found[name if part in ("kcfi", "kcfi_cli") else f"kcfi.{name}"] = path
    return found


LINKED = ("modeling_kcfi", "processing", "training")  # importing them so loads a file a second time


def imports(name, package, tree, known):
    """The files of the project that a file imports, also inside functions; of a package, what is taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            sources = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            sources = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for source in sources:
            assert source.split(".")[0] not in LINKED, f"{name}: import kcfi.{source}"
            parts = source.split(".")
            longest = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
            found = next((one for one in longest if one in known), None)
            if found:
                yield found


def tree_of(name, path):
    """The source of a file, without the line of `processing_kcfi` by which transformers copies the pipeline's file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if name == "kcfi.processing.processing_kcfi":
        tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    return tree


@cache
def graph(root=ROOT):
    """What every file imports, by import names."""
    known = modules(root)
    packages = {n: n if path.name == "__init__.py" else n.rpartition(".")[0] for n, path in known.items()}
    return {n: set(imports(n, packages[n], tree_of(n, path), known)) - {n} for n, path in known.items()}


def room(name):
    """The floor and the room of a file: the longest of `FLOORS` that its name begins with."""
    fitting = [
        (len(one), floor, one)
        for floor, rooms in enumerate(FLOORS)
        for one in rooms
        if name == one or name.startswith(f"{one}.")
    ]
    return max(fitting)[1:]


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_file_imports_from_its_own_room_and_from_lower_floors(name):
    floor, own = room(name)
    above = {other for other in graph()[name] if room(other)[1] != own and room(other)[0] >= floor}
    assert not above, f"{name} is on floor {floor}, and imports {', '.join(sorted(above))}"


@pytest.mark.parametrize(
    "line",
    [
        "from kcfi.training.trainer import KCFITrainer",
        "from kcfi.training import trainer",
        "import kcfi.training.trainer",
        "import kcfi.training.trainer as other",
        "from ..trainer import KCFITrainer",
        "from .. import trainer",
        "def later():\n    from kcfi.training import trainer",
        "if True:\n    from ..trainer import KCFITrainer",
    ],
)
def test_an_import_from_above_is_seen_however_it_is_written(line):
    found = set(imports("kcfi.training.data.pairs", "kcfi.training.data", ast.parse(line), graph()))
    assert "kcfi.training.trainer" in found and room("kcfi.training.trainer") > room("kcfi.training.data.pairs")


@pytest.mark.parametrize("line", ["from training.trainer import KCFITrainer", "import processing"])
def test_an_import_past_the_package_is_refused(line):
    with pytest.raises(AssertionError, match=r"import kcfi\."):
        list(imports("kcfi.models", "kcfi", ast.parse(line), graph()))


def test_every_folder_with_code_is_a_room_of_its_own():
    folders = {name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in modules().items()}
    assert folders <= {one for rooms in FLOORS for one in rooms}


def test_no_file_is_in_a_circle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_caption_imports_nothing_that_only_training_and_scoring_need(tmp_path):
    code = (
        "import json, sys; from kcfi_cli import main\n"
        "assert main(sys.argv[1:]) == 0; print(json.dumps(sorted(sys.modules)))"
    )
    pair = [str(ROOT / "kcfi" / "example" / f"{date}.png") for date in ("before", "after")]
    command = [sys.executable, "-c", code, "caption", *pair, "--output", str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = json.loads(process.stdout.splitlines()[-1])
    assert "kcfi.processing.describer_kcfi" in loaded and (tmp_path / "after_mask.png").is_file()
    needless = {"peft", "datasets", "evaluate", "pycocoevalcap", "torchmetrics", "onnx", "onnxscript", "openvino"}
    assert [name for name in loaded if name in needless or name.startswith("kcfi.training")] == []


def test_what_travels_to_the_hub_imports_nothing_of_the_project_but_files_beside_it():
    for name, others in graph().items():
        if room(name)[0] == 0:
            assert {room(other)[1] for other in others} <= {room(name)[1]}, name


def test_what_models_and_processors_both_must_know_is_the_same_though_they_import_nothing_of_each_other():
    assert change_detection_head.NO_LABEL == image_processing_kcfi.NO_LABEL
    counts = {name: KCFIConfig(visual_inputs=name).num_image_tokens for name in processing_kcfi.NUM_IMAGE_TOKENS}
    assert counts == processing_kcfi.NUM_IMAGE_TOKENS


def counts(root):
    """Floors of files, files in circles, files per folder, the longest function: for a look at the whole."""
    edges = {name: set(others) for name, others in graph(root).items()}
    reach = {name: set(others) for name, others in edges.items()}
    for middle in edges:
        for others in reach.values():
            if middle in others:
                others |= reach[middle]
    circles = sorted(name for name in edges if name in reach[name])
    height = {}

    def floor(name, above=()):
        if name not in height:
            below = [floor(one, (*above, name)) for one in edges[name] if one not in (*above, name)]
            height[name] = 1 + max(below, default=0)
        return height[name]

    folders, longest = {}, (0, "")
    for name, path in modules(root).items():
        if path.name != "__init__.py":
            folders.setdefault(path.parent.relative_to(root).as_posix(), []).append(name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                longest = max(longest, (node.end_lineno - node.lineno + 1, f"{name}.{node.name}"))
    return {
        "floors": max(floor(name) for name in edges),
        "files in circles": circles,
        "files per folder": {folder: len(names) for folder, names in folders.items()},
        "longest function": longest,
    }


if __name__ == "__main__":  # python tests/test_structure.py [CHECKOUT]
    for what, value in counts(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT).items():
        print(f"{what}: {value}")
