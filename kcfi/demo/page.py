"""The page: what stands where, and which button calls what."""

from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

import kcfi
from kcfi.demo.answers import Answer, areas_html, describe_pair, sentence_html, views, without_folders
from kcfi.demo.limits import Limits
from kcfi.demo.runs import Runs
from kcfi.demo.shelf import Shelf
from kcfi.processing import Describer, InputError
from kcfi.web.limits import Refused
from kcfi.web.runs import Left

EXAMPLES = Path(kcfi.__file__).parent / "example"
PAIRS = {"": "A suburb on a field", "hall_": "A hall on a field", "streets_": "Houses along two streets"}  # by file
CREDITS = "Examples: Christchurch, imagery of Toitu Te Whenua Land Information New Zealand, CC BY 4.0, of the WHU set."
THRESHOLD = 0.5
SESSIONS = 500  # of which Gradio remembers what they look at
EMPTY = '<p class="empty">What changed will be told here.</p>'
GONE = "This answer is no longer kept: describe the pair again."


class Page:
    """What the buttons do.

    Args:
        describer: of a model with a change detection head.
        model: its name, as it is shown.
        limits: of the page.
        runs: end what takes too long, and what nobody waits for.
        scenes: folder for reports.
    """

    def __init__(self, describer: Describer, model: str, limits: Limits, runs: Runs, scenes: Path) -> None:
        self.describer, self.model, self.limits, self.runs, self.folder = describer, model, limits, runs, scenes
        self.answers: Shelf[Answer] = Shelf(limits.answer_megabytes)
        self.scenes: Shelf[Any] = Shelf(limits.stored_megabytes)

    def describe(
        self, before: str | None, after: str | None, threshold: float, masked: bool, request: gr.Request
    ) -> tuple[Any, ...]:
        """Two uploads -> sentence, slider, areas, and the name of the answer."""
        paths = _both(before, after)
        with _told(*paths), self.runs.run(request.session_hash):
            answer = describe_pair(self.describer, *paths, self.model)
        name = self.answers.put(answer)
        return sentence_html(answer), *self.show(answer, name, threshold, masked), name

    def recolour(self, name: str, threshold: float, masked: bool) -> tuple[Any, ...]:
        """Another threshold, or the mask on or off: the model is not asked again."""
        answer = self.answers.get(name)
        if answer is None:
            if name:
                gr.Warning(GONE)
            return gr.skip(), gr.skip()
        return self.show(answer, name, threshold, masked)

    def show(self, answer: Answer, name: str, threshold: float, masked: bool) -> tuple[Any, ...]:
        """Slider and areas."""
        link = f"/answers/{name}.zip?threshold={threshold:g}"
        return views(answer, threshold, masked), areas_html(answer, threshold, link)

    def describe_scene(self, before: str | None, after: str | None, request: gr.Request) -> str:
        """Two uploaded rasters -> the report."""
        from kcfi.demo.scene import describe_files, scene_html

        paths = _both(before, after)
        with _told(*paths), self.runs.run(request.session_hash) as check:
            scene = describe_files(self.describer, *paths, self.limits, self.folder, check)
        return scene_html(f"/scenes/{self.scenes.put(scene)}")

    def build(self) -> gr.Blocks:
        """The page with its queue."""
        with gr.Blocks(title="KCFI: what changed?", analytics_enabled=False, fill_width=False) as blocks:
            gr.Markdown(
                "# What changed?\nTwo aerial images of one place go in, the earlier and the later one; a sentence of "
                f"*what* changed and a mask of *where* come out. Model: {escape(self.model)}. It errs: look yourself.",
                elem_id="head",
            )
            with gr.Tab("Two images"):
                self._pair()
            with gr.Tab("Scene (GeoTIFF)"):
                self._scene()
        blocks.state_session_capacity = SESSIONS
        blocks.queue(max_size=self.limits.waiting, default_concurrency_limit=1, api_open=False)
        return blocks

    def _pair(self) -> None:
        """The tab of two images."""
        answer = gr.State("")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                with gr.Row(elem_classes="pair"):
                    before, after = (
                        gr.Image(
                            label=label,
                            elem_id=label.lower(),
                            type="filepath",
                            image_mode=None,
                            format="png",
                            sources=["upload", "clipboard"],
                            height=230,
                            min_width=140,
                        )
                        for label in ("Before", "After")
                    )
                run = gr.Button("Describe", variant="primary", elem_id="describe")
                gr.Markdown("Or one of these:")
                with gr.Row(elem_classes="examples"):
                    examples = {
                        name: gr.Button(text, elem_id=f"example-{name or 'suburb_'}", min_width=90)
                        for name, text in PAIRS.items()
                    }
            with gr.Column(scale=3, min_width=320):
                sentence = gr.HTML(EMPTY, elem_id="sentence")
                slider = gr.ImageSlider(
                    label="Before and after",
                    type="pil",
                    format="webp",
                    interactive=False,
                    elem_id="dates",
                    buttons=["fullscreen"],
                    max_height=560,
                )
                with gr.Row(elem_classes="controls"):
                    masked = gr.Checkbox(True, label="Show the mask", elem_id="masked", min_width=140, scale=1)
                    threshold = gr.Slider(
                        0.05,
                        0.95,
                        THRESHOLD,
                        step=0.05,
                        label="Mark what changed with a probability of at least",
                        elem_id="threshold",
                        min_width=220,
                        scale=3,
                        buttons=[],
                    )
                areas = gr.HTML(elem_id="areas")
        gr.Markdown(f"{self._taken()} {CREDITS}", elem_classes="small")
        colours = [slider, areas]
        model = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress_on": [sentence]}
        asked = ([before, after, threshold, masked], [sentence, *colours, answer])
        run.click(self.describe, *asked, api_name="describe", **model)
        for name, button in examples.items():
            filled = button.click(
                lambda name=name: _example(name), None, [before, after], api_visibility="private", queue=True
            )
            filled.success(self.describe, *asked, api_visibility="private", **model)
        gr.on(
            [threshold.input, masked.input],
            self.recolour,
            [answer, threshold, masked],
            colours,
            trigger_mode="always_last",
            concurrency_id="colours",
            concurrency_limit=2,
            show_progress="hidden",
            api_name="recolour",
        )

    def _scene(self) -> None:
        """The tab of two rasters."""
        if find_spec("rasterio") is None:
            gr.Markdown('Scenes need `pip install "kcfi[geo]"` where this page runs.')
            return
        gr.Markdown(
            "Two GeoTIFFs of one place in one CRS, as for `kcfi scene`, whose report comes out: a map of all changes, "
            "a sentence, an area and a probability for each, polygons and rasters for a GIS."
        )
        with gr.Row():
            before, after = (
                gr.File(
                    label=label,
                    elem_id=f"scene-{label.lower()}",
                    file_types=[".tif", ".tiff"],
                    type="filepath",
                    height=130,
                    min_width=260,
                )
                for label in ("Before", "After")
            )
        run = gr.Button("Describe the scene", variant="primary", elem_id="describe-scene")
        gr.Markdown(self._taken(), elem_classes="small")
        report = gr.HTML(EMPTY, elem_id="report")
        run.click(
            self.describe_scene,
            [before, after],
            report,
            concurrency_id="model",
            concurrency_limit=1,
            api_name="describe_scene",
        )

    def _taken(self) -> str:
        """The limits, in words."""
        limits = self.limits
        return (
            f"Up to {limits.megabytes:g} MB and {limits.megapixels:g} Mpx an image, {limits.seconds:g} s a run. "
            f"Nothing leaves the machine that serves this page, which keeps files for {limits.stored_seconds / 60:g} "
            "minutes."
        )


def _example(name: str) -> tuple[Image.Image, Image.Image]:
    """One of the example pairs."""
    before, after = (Image.open(EXAMPLES / f"{name}{date}.png") for date in ("before", "after"))
    return before, after


def _both(before: str | None, after: str | None) -> tuple[str, str]:
    """Both paths, or a message that one is missing."""
    if not before or not after:
        raise gr.Error("Give both images, the earlier and the later one.", print_exception=False)
    return before, after


@contextmanager
def _told(*paths: str) -> Iterator[None]:
    """What was wrong with the input, as a message of the page; the folders of this machine are left out."""
    try:
        yield
    except Left:
        raise gr.Error("Nobody waits for this answer any more.", print_exception=False) from None
    except (Refused, InputError) as error:
        status = f" (error {error.status})" if isinstance(error, Refused) else ""
        raise gr.Error(escape(without_folders(str(error), *paths)) + status, print_exception=False) from None
