"""Scenes: two or more large georeferenced images of one place -> polygons of change with sentences, and a report."""

from importlib.util import find_spec

from kcfi.processing import InputError

NEEDED = ("rasterio", "shapely", "geopandas", "pyogrio", "rio_cogeo", "morecantile", "pystac", "jinja2")

if missing := [name for name in NEEDED if find_spec(name) is None]:
    raise InputError(f'Scenes need {", ".join(missing)}: pip install "kcfi[geo]"')

from kcfi.scenes.describe import WORK, describe_scene  # noqa: E402
from kcfi.scenes.findings import Findings  # noqa: E402

__all__ = ["WORK", "Findings", "describe_scene"]
