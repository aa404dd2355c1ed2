"""What `tests/fuzz.py` tries: for every reader its valid files, how they are changed, and what reads the changed file.

A function of `READERS` gets a new folder and answers with its `Seeds`. What is optional or slow is imported in it.
"""

import contextlib
import gzip
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tests import mutate

SIDE = 20  # px


class Seeds(NamedTuple):
    """Valid files by name, what changes them, and what reads a file of such a name."""

    files: dict[str, bytes]
    mutate: mutate.Mutator
    read: Callable[[Path], Any]


def colours(bands: int = 3, dtype: Any = np.uint8) -> Any:
    """(SIDE, SIDE, bands) of noise."""
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (SIDE, SIDE, bands), dtype)
    return values[..., 0] if bands == 1 else values


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """A file of PIL."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read_as_image(path: Path) -> None:
    """As a mask, by chosen bands, and as an image, which answers."""
    from kcfi.processing import InputError
    from kcfi.processing.reading_kcfi import read_image
    from kcfi.training.data.pairs import class_ids, read_mask

    with contextlib.suppress(InputError):
        class_ids(read_mask(path), "change", str(path))
    with contextlib.suppress(InputError):
        read_image(path, bands=[1, 2, 3], stretch=[2, 98])
    read_image(path)


def png(folder: Path) -> Seeds:
    image, exif = Image.fromarray(colours()), Image.Exif()
    exif[0x0112] = 6
    kinds = {mode: image.convert(mode) for mode in ("RGB", "L", "1", "P", "LA", "RGBA")}
    files = {f"{mode}.png": saved(one, "PNG") for mode, one in kinds.items()}
    files["clear.png"] = saved(kinds["P"], "PNG", transparency=3)
    files["turned.png"] = saved(image, "PNG", exif=exif)
    files["deep.png"] = saved(Image.fromarray(colours(1, np.uint16)), "PNG")
    return Seeds(files, mutate.png, read_as_image)


def jpeg(folder: Path) -> Seeds:
    image, exif = Image.fromarray(colours()), Image.Exif()
    exif[0x0112] = 8
    files = {f"{mode}.jpg": saved(image.convert(mode), "JPEG") for mode in ("RGB", "L", "CMYK")}
    files["turned.jpg"] = saved(image, "JPEG", exif=exif, progressive=True)
    files["wavelets.jp2"] = saved(image, "JPEG2000")
    files["other.webp"], files["other.gif"] = saved(image, "WEBP"), saved(image, "GIF")
    return Seeds(files, mutate.raw, read_as_image)


def tiff(folder: Path) -> Seeds:
    image = Image.fromarray(colours())
    files = {f"{how}.tif": saved(image, "TIFF", compression=how) for how in ("raw", "tiff_lzw", "tiff_adobe_deflate")}
    files["alpha.tif"] = saved(image.convert("RGBA"), "TIFF")
    files["deep.tif"] = saved(Image.fromarray(colours(1, np.uint16)), "TIFF")
    return Seeds(files, mutate.tiff, read_as_image)


def rasters(folder: Path) -> dict[str, bytes]:
    """GeoTIFFs as satellites' images come."""
    from tests.kcfi.scenes.conftest import save_raster

    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "plain": (colours(), {}),
        "wide": (colours(4, np.uint16), {"nodata": 0, "compress": "deflate"}),
        "tiled": (
            colours(4),
            {"tiled": True, "blockxsize": 16, "blockysize": 16, "photometric": "RGB", "ALPHA": "YES"},
        ),
        "floats": (colours(3).astype(np.float32) / 255, {"interleave": "band", "compress": "lzw"}),
    }
    for name, (values, profile) in kinds.items():
        save_raster(folder / f"{name}.tif", values, **profile)
    return {f"{name}.tif": (folder / f"{name}.tif").read_bytes() for name in kinds}


def geotiff(folder: Path) -> Seeds:
    return Seeds(rasters(folder), mutate.tiff, read_as_image)


def scene(folder: Path) -> Seeds:
    from kcfi.scenes.describe import describe_dates
    from kcfi.scenes.grid import scene_grid
    from kcfi.scenes.reading import Layer, open_raster
    from kcfi.scenes.registration import estimate_shift

    files = rasters(folder)
    good = folder / "good.tif"
    good.write_bytes(files["plain.tif"])

    def read(path: Path) -> None:
        with open_raster(good) as first, open_raster(path) as second:
            grid = scene_grid([first, second], 0.5, reproject=True)
            layers = [Layer(source, grid, [1, 2, 3], nodata=7) for source in (first, second)]
            estimate_shift(*layers, grid)
            describe_dates([good, path], [first, second], layers, ())
            layers[1].read((0, 0, min(grid.width, 64), min(grid.height, 64)))
            layers[1].overview(64)

    return Seeds(files, mutate.tiff, read)


def captions_file() -> bytes:
    """Two pairs as LevirCCcaptions.json has them."""
    entries = [
        {
            "filename": f"{name}.png",
            "split": "test",
            "changeflag": number,
            "imgid": number,
            "sentences": [{"raw": f" sentence {n} .", "tokens": ["sentence", str(n)]} for n in range(5)],
        }
        for number, name in enumerate("ab")
    ]
    return json.dumps({"images": entries, "dataset": "LEVIR-CC"}).encode()


def captions(folder: Path) -> Seeds:
    from kcfi.training.data.levir_cc import LevirCCDataset

    for name in ("A", "B", "label"):
        (folder / "images/test" / name).mkdir(parents=True)
        for file in "ab":
            Image.new("L", (8, 6)).save(folder / "images/test" / name / f"{file}.png")

    def read(path: Path) -> None:
        place = folder / f"LevirCCcaptions{''.join(path.suffixes)}"
        shutil.copyfile(path, place)
        try:
            pairs = LevirCCDataset(folder, "test")
            print(json.dumps([pairs[index]["captions"] for index in range(len(pairs))], ensure_ascii=False))
        finally:
            place.unlink()

    def change(content: bytes, chance: Random) -> bytes:
        return (mutate.gzipped_json if content[:2] == b"\x1f\x8b" else mutate.json_text)(content, chance)

    return Seeds({"c.json": captions_file(), "c.json.gz": gzip.compress(captions_file())}, change, read)


def predictions(folder: Path) -> Seeds:
    from kcfi.training.scoring.metrics import score_file

    references = folder / "LevirCCcaptions.json"
    references.write_bytes(captions_file())
    content = json.dumps({"a.png": "a house appears .", "b.png": "no change ."}).encode()
    return Seeds({"p.json": content}, mutate.json_text, lambda path: score_file(path, references, meteor=False))


def results(folder: Path) -> Seeds:
    from kcfi.modeling_kcfi import KCFIConfig
    from kcfi.training.scoring import metrics
    from kcfi.training.sharing.model_card import model_card, read_results

    state = {"log_history": [], "global_step": 1, "epoch": 1.0, "best_metric": None}
    config, masks = KCFIConfig(), metrics.MaskScores("change")
    masks.update(np.eye(4, dtype=np.uint8), np.ones((4, 4), np.uint8))
    about = {"model": "kcfi-tiny", "dataset": "synthetic", "split": "test", "meteor": False}
    content = metrics.results(["a b .", "c ."], [["a b ."], ["c ."]], [True, False], **about, mask=masks.compute())
    return Seeds(
        {"results.json": json.dumps(content).encode()},
        mutate.json_text,
        lambda path: model_card("me/x", config, "", state, read_results(path)),
    )


def shards(folder: Path) -> Seeds:
    import pyarrow
    import pyarrow.parquet

    from kcfi.training.data.shards import FEATURES, ShardDataset

    picture = {"bytes": saved(Image.fromarray(colours()), "PNG"), "path": "a.png"}
    mask = {"bytes": saved(Image.new("L", (SIDE, SIDE), 255), "PNG"), "path": None}
    row = {"image_before": picture, "image_after": picture, "mask": mask, "captions": ["x ."], "changed": True}
    buffer = io.BytesIO()
    rows = [{**row, "filename": f"{n}.png", "split": "train"} for n in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, FEATURES.arrow_schema), buffer)

    def read(path: Path) -> None:
        pairs = ShardDataset(str(path.parent), "train")
        for index in range(len(pairs)):
            pairs[index]

    return Seeds({"train-00000-of-00001.parquet": buffer.getvalue()}, mutate.parquet, read)


def lists(folder: Path) -> Seeds:
    """Lists of pairs: CSV, parquet, and a STAC collection with an item."""
    import pyarrow
    import pyarrow.parquet

    from kcfi.archives.pairs import find_pairs

    rows = [{"name": name, "before": f"A/{name}.png", "after": f"B/{name}.png"} for name in "ab"]
    rows.append({"name": "far", "before": "memory://A/c.tif", "after": "memory://B/c.tif"})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    lines = ["name,before,after", *(",".join(row.values()) for row in rows)]
    about = {"stac_version": "1.0.0", "id": "town", "description": "Two dates."}
    extent = {"spatial": {"bbox": [[0, 0, 1, 1]]}, "temporal": {"interval": [["2020-01-01T00:00:00Z", None]]}}
    links = [{"rel": "item", "href": "./item.json", "type": "application/geo+json"}]
    collection = {"type": "Collection", **about, "license": "CC0-1.0", "extent": extent, "links": links}
    assets = {date: {"href": f"./{date}.tif", "type": "image/tiff"} for date in ("before", "after")}
    item = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": "north",
        "geometry": {"type": "Point", "coordinates": [0, 0]},
        "bbox": [0, 0, 1, 1],
        "properties": {"datetime": "2020-01-01T00:00:00Z"},
        "links": [{"rel": "collection", "href": "./collection.json"}],
        "assets": assets,
    }
    files = {
        "pairs.csv": "\n".join(lines).encode("utf-8-sig"),
        "pairs.parquet": buffer.getvalue(),
        "collection.json": json.dumps(collection).encode(),
        "item.json": json.dumps(item).encode(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)

    def change(content: bytes, chance: Random) -> bytes:
        if content.startswith(b"PAR1"):
            return mutate.parquet(content, chance)
        return (mutate.json_text if content.startswith(b"{") else mutate.raw)(content, chance)

    def read(path: Path) -> None:
        place = folder / path.name
        shutil.copyfile(path, place)
        try:
            find_pairs(folder / "collection.json" if path.name == "item.json" else place)
        finally:
            place.write_bytes(files[path.name])

    return Seeds(files, change, read)


def recipe(folder: Path) -> Seeds:
    from kcfi.training.arguments import parse_recipe

    text = """base: debug
dataset: synthetic
model_settings: {"flow_residual": "cross", "num_change_classes": 3}
vision_config: {"model_type": "vit", "hidden_size": 32}
learning_rate: 0.0001
num_train_epochs: 1
output_dir: "runs/x"
report_to: ["none"]
pair_mix: {"drawn": 1}
dwa: "step"
lora: {"r": 8}
columns: {"image_before": "A"}
save_total_limit: null
"""
    return Seeds({"recipe.yaml": text.encode()}, mutate.yaml_text, lambda path: parse_recipe(path, starts=False))


def ablations(folder: Path) -> Seeds:
    from kcfi.training.ablation_table import RECIPES, read_set

    return Seeds({"set.yaml": (RECIPES / "ablations.yaml").read_bytes()}, mutate.yaml_text, read_set)


def source(folder: Path) -> Seeds:
    from kcfi.training.materials.sources import read_source

    (folder / "images").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "images/north_1.png")
    text = """name: "My town"
licence: "CC-BY-4.0"
metres_per_pixel: 0.3
images: "images"
legend: {"building": [255, 0, 0]}
regions: "([a-z]+)_"
val: ["north"]
"""

    def read(path: Path) -> None:
        shutil.copyfile(path, folder / "source.yaml")
        read_source(folder, ["grass"]).places()

    return Seeds({"source.yaml": text.encode()}, mutate.yaml_text, read)


def footprints(folder: Path) -> Seeds:
    from kcfi.training.materials.geotiff import read_footprints

    ring = [[0, 0], [0, 1], [1, 1], [0, 0]]
    features = [{"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}}]
    crs = {"type": "name", "properties": {"name": "EPSG:32650"}}
    content = json.dumps({"type": "FeatureCollection", "crs": crs, "features": features}).encode()

    def read(path: Path) -> None:
        read_footprints.cache_clear()
        read_footprints(path)

    return Seeds({"f.geojson": content}, mutate.json_text, read)


def materials(folder: Path) -> Seeds:
    from kcfi.training.synthetic.material_library import LibraryMaterials, attributions

    Image.new("RGB", (16, 16)).save(folder / "grass.png")
    about = {"source": "made up", "licence": "CC0-1.0", "region": "x", "split": "train"}
    entries = [{"file": "grass.png", "kind": "grass", **about}]
    content = {"sources": [{"name": "made up", "licence": "CC0-1.0", "images": 1}], "entries": entries}

    def read(path: Path) -> None:
        shutil.copyfile(path, folder / "materials.json")
        LibraryMaterials(folder).texture("grass", 8, np.random.default_rng(0))
        attributions(folder)

    return Seeds({"materials.json": json.dumps(content).encode()}, mutate.json_text, read)


def archive(folder: Path) -> Seeds:
    from kcfi.training.data.archive import unpacked

    (folder / "beside").mkdir()
    plain, packed = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(plain, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/LevirCCcaptions.json", captions_file())
        file.writestr("x/images/test/A/a.png", saved(Image.fromarray(colours()), "PNG"))
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        entry = tarfile.TarInfo("LevirCCcaptions.json")
        entry.size = len(captions_file())
        tar.addfile(entry, io.BytesIO(captions_file()))
    files = {"a.zip": plain.getvalue(), "a.tar.gz": packed.getvalue(), "a.tar": gzip.decompress(packed.getvalue())}

    def read(path: Path) -> None:
        with unpacked(path, folder / "beside"):
            pass

    return Seeds(files, mutate.raw, read)


def energy(folder: Path) -> Seeds:
    from kcfi.training.sharing.model_card import read_energy

    head = "duration,energy_consumed,emissions,region,country_name,gpu_model,cpu_model"
    return Seeds({"emissions.csv": f"{head}\n3600,0.5,0.1,here,there,,cpu\n".encode()}, mutate.raw, read_energy)


def question(folder: Path) -> Seeds:
    from kcfi.scenes.questions import parse

    texts = (
        "how many buildings appeared in the north-east?",
        "where is the largest new road larger than 500 m2?",
        "what happened at 117.305, 31.212?",
    )
    files = {f"{number}.txt": text.encode() for number, text in enumerate(texts)}
    return Seeds(files, mutate.raw, lambda path: parse(path.read_text(errors="replace"), ["road", "building"]))


def report(folder: Path) -> Seeds:
    from kcfi.scenes.answers import ask
    from kcfi.scenes.writers import write_findings
    from tests.kcfi.scenes.conftest import five, write_work

    findings = five()
    write_findings(findings, write_work(findings, folder / "work"), folder / "report")
    files = {name: (folder / "report" / name).read_bytes() for name in ("summary.json", "changes.gpkg", "mask.tif")}

    def change(content: bytes, chance: Random) -> bytes:
        return (mutate.json_text if content.startswith((b'{"', b"{\n")) else mutate.raw)(content, chance)

    def read(path: Path) -> None:
        place = folder / "report" / path.name
        shutil.copyfile(path, place)
        try:
            ask(folder / "report", "how many buildings appeared in the north-east?")
            ask(folder / "report", "where is the largest change at 400010, 3499990?")
        finally:
            place.write_bytes(files[path.name])

    return Seeds(files, change, read)


def model(folder: Path, names: Sequence[str]) -> Seeds:
    """The folder of a tiny model, one of its files changed: loaded as every command does, and asked for its prompt."""
    from kcfi.models import load
    from tests.conftest import save_detector

    save_detector(folder / "model")
    files = {name: (folder / "model" / name).read_bytes() for name in names}

    def change(content: bytes, chance: Random) -> bytes:
        if content.startswith((b'{"', b"{\n")):
            return mutate.json_text(content, chance)
        return (mutate.safetensors if content[8:9] == b"{" else mutate.raw)(content, chance)

    def read(path: Path) -> None:
        place = folder / "model" / path.name
        shutil.copyfile(path, place)
        try:
            load(str(folder / "model"), "cpu")[1].prompt()
        finally:
            place.write_bytes(files[path.name])

    return Seeds(files, change, read)


# How many changed files of each reader one run tries.
READERS: dict[str, tuple[int, Callable[[Path], Seeds]]] = {
    "captions": (1000, captions),
    "predictions": (600, predictions),
    "results": (600, results),
    "materials": (600, materials),
    "footprints": (600, footprints),
    "source": (600, source),
    "energy": (500, energy),
    "question": (300, question),
    "archive": (600, archive),
    "report": (400, report),
    "png": (1200, png),
    "jpeg": (700, jpeg),
    "tiff": (700, tiff),
    "geotiff": (700, geotiff),
    "scene": (500, scene),
    "shards": (500, shards),
    "lists": (600, lists),
    "ablations": (200, ablations),
    "recipe": (200, recipe),
    "config": (200, partial(model, names=["config.json", "generation_config.json"])),
    "weights": (200, partial(model, names=["model.safetensors"])),
    "processor": (150, partial(model, names=["processor_config.json", "chat_template.jinja"])),
    "tokenizer": (150, partial(model, names=["tokenizer.json", "tokenizer_config.json"])),
}
