"""Two GeoTIFFs -> a report of `kcfi scene` in a folder that is deleted with its answer."""

import shutil
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from kcfi.demo.answers import without_folders
from kcfi.demo.limits import Limits, check_tiff
from kcfi.models import public_name
from kcfi.processing import Describer
from kcfi.scenes import WORK, describe_scene
from kcfi.scenes.describe import RESOLUTION
from kcfi.scenes.grid import scene_grid
from kcfi.scenes.reading import open_raster
from kcfi.scenes.writers import write_findings
from kcfi.web.limits import check_pixels


@dataclass(frozen=True)
class Scene:
    """A described scene.

    Args:
        folder: with the files of the report, nothing else.
        owner: of the folder.
    """

    folder: Path
    owner: "TemporaryDirectory[str]"

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def close(self) -> None:
        """Delete the report."""
        self.owner.cleanup()


def describe_files(
    describer: Describer, before: str, after: str, limits: Limits, parent: Path, check: Callable[[], None]
) -> Scene:
    """Describe two rasters as `kcfi scene` does.

    Args:
        describer: of a model with a change detection head.
        before: path of the earlier raster.
        after: path of the later one.
        limits: of the page; its pixels are those of the grid on which the dates are compared.
        parent: folder for that of the report.
        check: called between the steps; what it raises ends the run, and nothing is left of it.

    Raises:
        InputError: dates that cannot be compared.
        Refused: a raster that is no GeoTIFF, or one or a grid that is too large.
    """
    for path in (before, after):
        check_tiff(path, limits)
    resolution = describer.processor.ground_sampling_distance or RESOLUTION
    with ExitStack() as stack:
        sources = [stack.enter_context(open_raster(path)) for path in (before, after)]
        grid = scene_grid(sources, resolution)
        check_pixels(grid.width, grid.height, limits, f"A scene (at {resolution:g} m/px)")
    owner: TemporaryDirectory[str] = TemporaryDirectory(dir=parent)
    try:
        output = Path(owner.name)
        found = describe_scene([before, after], output, describer, between=check)
        check()
        # written again with the files' names alone: where they lay on the server is nobody's business
        dates = tuple(replace(date, path=Path(date.path).name) for date in found.dates)
        warnings = tuple(without_folders(text, before, after) for text in found.warnings)
        settings = {**found.settings, "model": public_name(found.settings["model"])}
        told = replace(found, dates=dates, warnings=warnings, settings=settings)
        write_findings(told, output / WORK, output)
        shutil.rmtree(output / WORK)
    except BaseException:
        owner.cleanup()
        raise
    return Scene(output, owner)


def scene_html(link: str) -> str:
    """The report's own page in a frame that can do nothing but show it, and links: to it alone, and to all files."""
    return (
        f'<iframe title="Report of the scene" sandbox="allow-scripts" src="{link}/report.html"></iframe>'
        f'<a class="download" href="{link}/report.html" target="_blank" rel="noopener">Open the report alone</a>'
        f'<a class="download" href="{link}.zip" download>Download all as a zip</a>'
    )


def write_zip(scene: Scene, to: IO[bytes]) -> None:
    """The files of the report."""
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(scene.folder.iterdir()):
            archive.write(path, path.name)
