"""Real surfaces, roofs and tiles for synthetic scenes, read from a library of `kcfi data materials`.

`LibraryMaterials` is a source of texture (`Materials`) for composed pairs, and of whole places for single-date
pairs. What a library holds and how it is cut stands in `materials.py`; nothing here writes to it.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kcfi.files import read_json
from kcfi.processing import InputError, refusing
from kcfi.processing.reading_kcfi import open_image
from kcfi.training.synthetic.painting import ROOFS
from kcfi.training.synthetic.textures import Array, ProceduralMaterials, TextureKind

# Labels of tiles beside LEVIR-MCI's road and building: free ground; no building, but whatever else; water or unknown
LAND, OPEN, KEEP_OFF = 0, 32, 64
VILLA_AREA = 1600  # px (400 m2): smaller footprints are villas, larger ones large buildings
SEAM = 12  # px over which neighbouring pieces of a mosaic are blended


@dataclass(frozen=True)
class Material:
    """An entry of a library.

    Attributes:
        file: Image below the library's folder, at 0.5 m/px.
        kind: A texture, "villa roof" or "large roof" (RGBA), or "tile".
        source: Name of the source.
        region: Region of the source; a region is in one split only.
        split: "train", "val" or "test".
        licence: Of the source.
        label: Of a labelled tile: file of its labels, `LAND`, `OPEN`, `KEEP_OFF`, 128 (road) or 255 (building).
        scene: Of an unlabelled tile: its class of scenes.
    """

    file: str
    kind: TextureKind | Literal["tile"]
    source: str
    region: str
    split: Literal["train", "val", "test"]
    licence: str
    label: str = ""
    scene: str = ""


class LibraryMaterials(ProceduralMaterials):
    """One split of a library; surfaces that it lacks are procedural. See `Materials`.

    Args:
        root: Folder that `kcfi data materials` wrote.
        split: Only materials of this split are used.

    Raises:
        FileNotFoundError: If there is no library.
        InputError: If its split is empty.
    """

    def __init__(self, root: str | Path, split: str = "train") -> None:
        self.root = Path(root)
        entries = _read_library(self.root)[1]
        self.entries = [entry for entry in entries if entry.split == split]
        if not self.entries:
            splits = ", ".join(sorted({entry.split for entry in entries})) or "nothing"
            raise InputError(
                f"{self.root} has no material of split '{split}', but {splits}: hold out a region in source.yaml"
            )
        self.by_kind: dict[str, list[Material]] = {}
        for entry in self.entries:
            self.by_kind.setdefault(entry.kind, []).append(entry)

    def texture(self, kind: TextureKind, size: int, rng: np.random.Generator) -> Image.Image:
        """A mosaic of pieces of one surface: one at random and those of its source most like it in colour."""
        entries = self.by_kind.get(kind)
        if not entries or kind in ROOFS.values():  # roofs are whole ones, see `roof`
            return super().texture(kind, size, rng)
        first = entries[int(rng.integers(len(entries)))]
        colours = np.stack([_mean_colour(str(self.root / entry.file)) for entry in entries])
        distance = np.abs(colours - _mean_colour(str(self.root / first.file))).sum(1)
        distance[[entry.source != first.source for entry in entries]] = np.inf
        alike = [int(i) for i in distance.argsort()[:6] if np.isfinite(distance[i])]
        pieces = [np.asarray(_open(str(self.root / entries[i].file)), np.float32) for i in alike]
        pieces = [piece - piece.mean((0, 1)) + pieces[0].mean((0, 1)) for piece in pieces]
        return Image.fromarray(mosaic(pieces, size, rng).round().clip(0, 255).astype(np.uint8))

    def roof(self, kind: TextureKind, rng: np.random.Generator) -> Image.Image | None:
        """See `Materials.roof`."""
        entries = self.by_kind.get(kind)
        return _open(str(self.root / entries[int(rng.integers(len(entries)))].file)) if entries else None

    def has_tiles(self, labelled: bool) -> bool:
        """Whether there are tiles with labels, or without."""
        return any(bool(entry.label) == labelled for entry in self.by_kind.get("tile", []))

    def tile(
        self, labelled: bool, size: int, rng: np.random.Generator, scene: str = ""
    ) -> tuple[Image.Image, NDArray[np.uint8] | None]:
        """A real place, `size` x `size` px, turned and mirrored; a mosaic where the tiles of the library are smaller.

        Args:
            labelled: Whether labels are wanted.
            size: Side in px.
            rng: Source of chance.
            scene: Class of scenes; "": any.

        Returns:
            RGB image, and labels (size, size) or None for a tile without. The seams of a mosaic are `KEEP_OFF`.

        Raises:
            ValueError: If the split has no such tile.
        """
        tiles = [e for e in self.by_kind.get("tile", []) if bool(e.label) == labelled and scene in ("", e.scene)]
        if not tiles:
            raise InputError(f"{self.root} has no {'labelled' if labelled else 'unlabelled'} tiles")
        first = tiles[int(rng.integers(len(tiles)))]
        alike = [e for e in tiles if (e.source, e.region, e.scene) == (first.source, first.region, first.scene)]
        others = [alike[int(i)] for i in rng.integers(0, len(alike), 5)]
        pieces = [self._window(first, size, rng)]
        if min(pieces[0].shape[:2]) < size:
            pieces += [self._window(entry, size, rng) for entry in others]
        # blended labels would be other labels: they are laid out by a second, sharp mosaic of the same pieces
        seed = int(rng.integers(2**31))
        place = mosaic(pieces, size, np.random.default_rng(seed))
        image = Image.fromarray(place[..., :3].round().clip(0, 255).astype(np.uint8))
        if not labelled:
            return image, None
        return image, mosaic(pieces, size, np.random.default_rng(seed), KEEP_OFF)[..., 3].round().astype(np.uint8)

    def _window(self, tile: Material, size: int, rng: np.random.Generator) -> Array:
        """A random window of at most `size` px: RGB and, of a labelled tile, its labels; (h, w, 3 or 4)."""
        image = _read(str(self.root / tile.file))
        x, y = (int(rng.integers(0, max(side - size, 0) + 1)) for side in image.size)
        box = (x, y, min(x + size, image.width), min(y + size, image.height))
        layers = [image, _read(str(self.root / tile.label))] if tile.label else [image]
        return np.dstack([np.asarray(layer.crop(box), np.float32) for layer in layers])


def attributions(root: str | Path) -> list[str]:
    """The sources of a library with their licences, to be named beside weights that were trained with it."""
    return _read_library(Path(root))[0]


def _read_library(root: Path) -> tuple[list[str], list[Material]]:
    """The content of materials.json: its sources with their licences, and the materials."""
    file = root / "materials.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist: make a library with `kcfi data materials --source DIR --output {root}`"
        )
    content = read_json(file)
    with refusing(f"{file} is not as `kcfi data materials` writes it"):
        entries = [Material(**entry) for entry in content["entries"]]
        if not all(isinstance(value, str) for entry in content["entries"] for value in entry.values()):
            raise InputError(f"{file}: expected texts alone in its entries")
        return [f"{source['name']} ({source['licence']})" for source in content["sources"]], entries


def _read(path: str) -> Image.Image:
    image = open_image(path)
    return image if image.mode in ("L", "RGBA") else image.convert("RGB")


@lru_cache(maxsize=4096)
def _open(path: str) -> Image.Image:
    """A texture or a roof: small, and used again and again."""
    return _read(path)


@lru_cache(maxsize=4096)
def _mean_colour(path: str) -> Array:
    return np.asarray(_open(path), np.float32).mean((0, 1))


def mosaic(pieces: list[Array], size: int, rng: np.random.Generator, seam: float | None = None) -> Array:
    """Lay out turned and mirrored pieces side by side with blended seams.

    Args:
        pieces: Images (h, w, channels), the first one in the first place; those behind it are drawn for the others.
        size: Side of the result in px.
        rng: Source of chance.
        seam: Cut in the middle of the seams instead of blending, and draw a line of this value along them; for labels.

    Returns:
        (size, size, channels), float32.
    """
    side = min(size, *(min(piece.shape[:2]) for piece in pieces))
    step = max(side - SEAM, 1)
    count = 1 if side == size else -(-(size - SEAM) // step)
    ramp = np.minimum(np.arange(1, side + 1), np.arange(side, 0, -1)).clip(max=SEAM + 1) / (SEAM + 1)
    if seam is not None:
        ramp = np.where(ramp > 0.5, 1, 1e-6)  # not 0: along the border of the mosaic there is nothing else
    weight = np.outer(ramp, ramp)[..., None].astype(np.float32)
    whole = count * step + side - step
    total, weights = np.zeros((whole, whole, pieces[0].shape[2]), np.float32), np.zeros((whole, whole, 1), np.float32)
    for row in range(count):
        for column in range(count):
            piece = pieces[0 if row + column == 0 else int(rng.integers(len(pieces)))]
            y, x = rng.integers(0, piece.shape[0] - side + 1), rng.integers(0, piece.shape[1] - side + 1)
            turned = np.rot90(piece[y : y + side, x : x + side], int(rng.integers(4)))
            turned = turned[:, ::-1] if rng.integers(2) else turned
            window = slice(row * step, row * step + side), slice(column * step, column * step + side)
            total[window] += weight * turned
            weights[window] += weight
    laid = total / weights
    if seam is not None:
        for middle in range(step + SEAM // 2, whole - SEAM, step):
            laid[middle - 1 : middle + 1] = laid[:, middle - 1 : middle + 1] = seam
    y, x = (int(rng.integers(0, whole - size + 1)) for _ in range(2))
    return laid[y : y + size, x : x + size].astype(np.float32)
