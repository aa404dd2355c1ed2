"""Pairs of georeferenced images -> a report of each, and what the table says of it (extra `geo`)."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kcfi.archives.fetch import fetch, reason
from kcfi.archives.job import WORK, Job
from kcfi.processing import Describer, InputError
from kcfi.scenes.describe import describe_scene
from kcfi.scenes.summary import coverage, size

REPORT = "report.html"
MOST_BYTES = 1 << 36  # of a date that is fetched: 64 GiB


def describe_scenes(
    rows: Sequence[dict[str, Any]], describer: Describer, job: Job, output: Path
) -> Iterator[dict[str, Any]]:
    """Write the report of each pair as OUTPUT/NAME; a scene that was stopped goes on where it was.

    Args:
        rows: `name`, `before` and `after` of each.
        describer: of the model.
        job: with the settings of `describe_scene`.
        output: folder for the reports.

    Yields:
        For each pair, in their order, columns of `blocks.SCENES`: those that were found, or `error`.
    """
    for row in rows:
        name = row["name"]
        fetched = output / WORK / "fetched" / name
        copies = {fetched / date: row[date] for date in ("before", "after")}
        try:
            dates = [fetch(source, place, MOST_BYTES) for place, source in copies.items()]
            found = describe_scene(dates, output / name, describer, **(job.scene or {}))
        except (OSError, InputError) as error:
            yield {"error": reason(error, copies)}
        else:
            totals = size(found, found.changes)
            yield {
                "caption": found.caption,
                "changes": totals["count"],
                "area_m2": totals["area_m2"],
                "coverage": coverage(found),
                "report": f"{name}/{REPORT}",
            }
        shutil.rmtree(fetched, ignore_errors=True)
