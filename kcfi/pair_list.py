"""Lists of pairs, as two folders or a manifest -> captions.csv and the pictures of each pair.

A row of the table, a line of the file, stands there once its pair is described, so a second call does what is missing;
a pair that cannot be read becomes a row with its error, which a second call tries again. Calls that write into one
folder must come one after the other.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from kcfi.pictures import save_pictures
from kcfi.processing import Describer, InputError
from kcfi.processing.describer_kcfi import Pair
from kcfi.processing.reading_kcfi import read_pair

TABLE = "captions.csv"
COLUMNS = ["name", "before", "after", "caption", "caption_box", "score", "changed_fraction", "changed_probability"]
COLUMNS += ["mask", "overlay", "heatmap", "regions", "model", "error"]
LISTS = ("caption_box", "regions")  # columns that hold JSON
IMAGES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".jp2"}


@dataclass(frozen=True)
class PairFiles:
    """The files of a pair, and the name that its row and its pictures get."""

    name: str
    before: Path
    after: Path


def find_pairs(before: str | Path, after: str | Path | None = None) -> list[PairFiles]:
    """The pairs of two folders, or of a manifest.

    Args:
        before: folder of the earlier images, or the manifest: a CSV file with the columns `before` and `after` (paths,
            relative to its own folder) and maybe `name`.
        after: folder of the later images, whose files have the names of their partners; None with a manifest.

    Returns:
        The pairs, by name in folders and as they stand in a manifest. A name is the file name of the after image
        without its extension, where the manifest gives none.

    Raises:
        FileNotFoundError: no such file or folder.
        InputError: images without a partner, no pairs, missing columns, or two pairs of one name.
    """
    before = Path(before)
    pairs = _manifest_pairs(before) if after is None else _folder_pairs(before, Path(after))
    if not pairs:
        raise InputError(f"{before}: no pairs in it.")
    names = [pair.name for pair in pairs]
    if len(set(names)) < len(names):
        name = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{before}: two pairs are called {name!r}; name them in a manifest (column `name`).")
    return pairs


def _manifest_pairs(manifest: Path) -> list[PairFiles]:
    with manifest.open(newline="", encoding="utf-8-sig") as file:  # as Excel writes it
        reader = csv.DictReader(file)
        rows, columns = list(reader), reader.fieldnames or []
    if not {"before", "after"} <= set(columns):
        raise InputError(f"{manifest}: needs the columns before and after; it has {', '.join(columns) or 'none'}.")
    pairs = []
    for number, row in enumerate(rows, start=2):
        name = row.get("name") or Path(row["after"] or "").stem
        if not (row["before"] and row["after"]) or Path(name).name != name:
            raise InputError(f"{manifest}, line {number}: needs before and after, and a name without a slash.")
        pairs.append(PairFiles(name, manifest.parent / row["before"], manifest.parent / row["after"]))
    return pairs


def _folder_pairs(before: Path, after: Path) -> list[PairFiles]:
    first, second = (
        {path.name: path for path in folder.iterdir() if path.suffix.lower() in IMAGES} for folder in (before, after)
    )
    alone = [str(path) for name, path in sorted({**first, **second}.items()) if not (name in first and name in second)]
    if alone:
        more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        raise InputError(f"Images without a partner of the same name: {', '.join(alone[:3])}{more}.")
    return [PairFiles(path.stem, path, second[name]) for name, path in sorted(first.items())]


def describe_list(
    describer: Describer,
    pairs: list[PairFiles],
    output: Path,
    model: str,
    regions: bool = False,
    heatmap: bool = False,
    **reading: Any,
) -> Iterator[dict[str, Any]]:
    """Describe pairs into OUTPUT/captions.csv, pictures beside it; other processes decode images where a GPU works.

    Args:
        describer: of the model.
        pairs: of `find_pairs`.
        output: folder; what an earlier call described there is not done again.
        model: name of the model, for the table.
        regions: also write a sentence for every changed region.
        heatmap: also draw the strength of the key change features.
        **reading: settings of `read_pair`.

    Yields:
        Rows of the table (`COLUMNS`; None where there is nothing), each once it stands in the file.

    Raises:
        InputError: the table of another model or of other images is there, or regions without a change detection head.
    """
    describer.describe_pairs([], regions)  # refuses regions without a head before anything is written
    output.mkdir(parents=True, exist_ok=True)
    done = _described(output / TABLE, pairs, model, regions, heatmap)
    todo = [pair for pair in pairs if pair.name not in done]
    # on a CPU the model has all cores at work; each worker holds an opened pair, which may be large
    idle = describer.model.device.type != "cpu" and len(todo) > describer.batch_size
    workers = min(4, (os.cpu_count() or 1) - 1) if idle else 0
    loader: Any = DataLoader(
        _Opened(todo, describer.reading(**reading)),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=1 if workers else None,
    )
    progress = tqdm(total=len(pairs), initial=len(pairs) - len(todo), desc="pairs", unit="pair")
    with (output / TABLE).open("a", newline="", encoding="utf-8") as file, progress:
        table = csv.DictWriter(file, COLUMNS)
        if not file.tell():
            table.writeheader()
        for batch in _batches(loader, describer):
            readable = [images for _, images in batch if not isinstance(images, str)]
            reports = iter(describer.describe_pairs(readable, regions))
            for files, images in batch:
                row: dict[str, Any] = {**dict.fromkeys(COLUMNS), **_identity(files), "model": model}
                if isinstance(images, str):
                    row["error"] = images
                else:
                    report = next(reports)
                    classes = describer.model.config.num_change_classes
                    paths = save_pictures(report, images[1], output, files.name, classes, heatmap)
                    caption = " ".join(report.caption.split())  # a row is a line
                    row |= {"caption": caption, "caption_box": report.caption_box, "score": report.score}
                    row |= {"changed_fraction": report.changed_fraction, **paths}
                    row["changed_probability"] = report.changed_probability
                    if regions:
                        row["regions"] = [vars(region) for region in report.regions]
                texts = {name: json.dumps(row[name]) for name in LISTS if row[name] is not None}
                table.writerow(row | texts)
                file.flush()
                progress.update()
                yield row


class _Opened(Dataset[tuple[PairFiles, Pair | str]]):
    """Pairs with their images, or with what is wrong with them."""

    def __init__(self, pairs: list[PairFiles], reading: dict[str, Any]) -> None:
        self.pairs, self.reading = pairs, reading

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[PairFiles, Pair | str]:
        files = self.pairs[index]
        try:
            return files, read_pair(files.before, files.after, **self.reading)
        except (OSError, InputError) as error:
            return files, " ".join(str(error).split())


def _batches(
    opened: Iterable[tuple[PairFiles, Pair | str]], describer: Describer
) -> Iterator[list[tuple[PairFiles, Pair | str]]]:
    """Pairs that fit into a tile, as many as the model takes at a time; larger ones alone."""
    batch: list[tuple[PairFiles, Pair | str]] = []
    for files, images in opened:
        alone = not isinstance(images, str) and not describer.fits(images[0])
        if batch and (alone or len(batch) == describer.batch_size):
            yield batch
            batch = []
        if alone:
            yield [(files, images)]
        else:
            batch.append((files, images))
    if batch:
        yield batch


def _identity(files: PairFiles) -> dict[str, str]:
    """The columns that say which pair a row describes."""
    return {"name": files.name, "before": os.path.abspath(files.before), "after": os.path.abspath(files.after)}


def _described(table: Path, pairs: list[PairFiles], model: str, regions: bool, heatmap: bool) -> set[str]:
    """Names that a table has all that is asked for; its other rows, and a last one that was cut off, are taken out.

    Raises:
        InputError: the table of another model or of other images, or no table of this kind.
    """
    if not table.exists():
        return set()
    data = table.read_bytes()
    whole = data[: data.rfind(b"\n") + 1].decode("utf-8")
    reader = csv.DictReader(io.StringIO(whole, newline=""))
    rows = list(reader)
    if whole and reader.fieldnames != COLUMNS:
        raise InputError(f"{table} is not a table of kcfi caption: choose another --output.")
    expected = {files.name: _identity(files) for files in pairs}
    for row in rows:
        if row["model"] != model:
            raise InputError(f"{table} was written by the model {row['model']}: choose another --output.")
        if expected.get(row["name"], row).items() - row.items():
            raise InputError(f"{table} describes other images as {row['name']!r}: choose another --output.")
    kept = [
        row for row in rows if not row["error"] and (row["regions"] or not regions) and (row["heatmap"] or not heatmap)
    ]
    if len(kept) < len(rows) or len(whole.encode()) < len(data):
        part = table.with_suffix(".part")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)
        part.replace(table)
    return {row["name"] for row in kept}
