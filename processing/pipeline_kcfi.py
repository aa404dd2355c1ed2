"""The `change-captioning` pipeline: before/after pairs -> captions and masks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig, Pipeline

from .describer_kcfi import LONGEST, ChangeReport, Describer
from .processing_kcfi import INSTRUCTIONS, KCFIProcessor
from .reading_kcfi import InputError, read_pair, unstack


class ChangeCaptioningPipeline(Pipeline):
    """Describe what changed between two images of one place, and mark where, in images of any size (`Describer`).

    Example:
        >>> from transformers import pipeline
        >>> import kcfi  # registers the task
        >>> captioner = pipeline("change-captioning", model="folder-or-hub-id")
        >>> captioner(["before.png", "after.png"])
        {'caption': 'a house appears next to the road .', 'caption_box': (0, 0, 256, 256),
         'mask': <PIL.Image.Image ...>, 'changed_fraction': 0.031, 'changed_probability': 0.98,
         'score': 0.87}
    """

    model: Any  # KCFIForConditionalGeneration; models and processors import nothing of each other
    processor: KCFIProcessor

    _load_processor = True  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=LONGEST)

    def __call__(self, pairs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Caption one pair, or many.

        Args:
            pairs: `[before, after]`, a list of such pairs, or a data set or generator of them; PIL images, paths,
                arrays or tensors, also stacked (2, C, H, W) or (B, 2, C, H, W). Examples of KCFI's data sets (with
                `image_before`, `image_after`) count as pairs.
            **kwargs: `batch_size`; `instruction` (default: the first of Table I); `regions` = True for a sentence per
                changed region; `tile` and `alarm_rate`, see `Describer`; `reading`, settings of `read_pair` as a dict;
                and arguments of `generate()`.

        Returns:
            For one pair a dict, for a list a list of them, otherwise an iterator:
            `caption` (str);
            `caption_box`, the part of the images (left, top, right, bottom in pixels) that it describes;
            `mask`, a PIL image (mode L) of class ids at the input's size, 255 where the model did not look;
            `changed_fraction`, the share of pixels it looked at that are of a change class, and `changed_probability`,
            that anything changed (all three None without a change detection head);
            `score` (0 to 1), the geometric mean of the probabilities of the caption's tokens (None where the mask
            spoke, see `Describer`);
            `regions`, if they were asked for: dicts with `box`, `pixels`, `caption`, `score` and `probability`,
            largest first.
        """
        if isinstance(pairs, (list, tuple, np.ndarray, torch.Tensor)):
            pairs = unstack(pairs)
            one = len(pairs) == 2 and not any(isinstance(pair, (list, Mapping)) for pair in pairs)
            pairs = tuple(pairs) if one else pairs  # the base class reads a list as a batch
        return super().__call__(pairs, **kwargs)

    def _sanitize_parameters(  # type: ignore[override]
        self,
        instruction: str | None = None,
        regions: bool | None = None,
        tile: int | None = None,
        alarm_rate: float | None = None,
        reading: Mapping[str, Any] | None = None,
        **generate_kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        describing = {"instruction": instruction, "regions": regions, "tile": tile, "alarm_rate": alarm_rate}
        forward = {name: value for name, value in describing.items() if value is not None}
        preprocess = {} if reading is None else {"reading": reading}
        return preprocess, {**forward, **generate_kwargs}, {} if regions is None else {"regions": regions}

    def preprocess(self, input_: Any, reading: Mapping[str, Any] | None = None) -> dict[str, Any]:  # type: ignore[override]
        """Open a pair, as the model sees it."""
        if isinstance(input_, Mapping):
            input_ = [input_["image_before"], input_["image_after"]]
        if not isinstance(input_, (list, tuple)) or len(input_) != 2:
            raise InputError(f"The pipeline takes before/after pairs of images, not {type(input_).__name__}.")
        return {"pairs": [read_pair(*input_, **self.processor.image_processor.reading(**(reading or {})))]}

    def _forward(  # type: ignore[override]
        self,
        input_tensors: dict[str, Any],
        instruction: str = INSTRUCTIONS[0],
        regions: bool = False,
        tile: int | None = None,
        alarm_rate: float | None = None,
        **generate_kwargs: Any,
    ) -> dict[str, Any]:
        """Describe the pairs of a batch."""
        settings = self._prepare_generate_kwargs(generate_kwargs)
        pairs = input_tensors["pairs"]
        batched = isinstance(pairs[0], list)  # the base class makes a list of the lists of `preprocess`
        pairs = [pair for (pair,) in pairs] if batched else pairs
        size = max(len(pairs), 8)
        describer = Describer(self.model, self.processor, tile, size, instruction, alarm_rate=alarm_rate, **settings)
        reports = describer.describe_pairs(pairs, regions)
        return {"reports": [[report] for report in reports] if batched else reports}

    def postprocess(self, model_outputs: Any, regions: bool = False) -> dict[str, Any]:  # type: ignore[override]
        """The report of one pair -> its result."""
        report: ChangeReport = model_outputs["reports"][0]
        result: dict[str, Any] = {
            "caption": report.caption,
            "caption_box": report.caption_box,
            "mask": None if report.mask is None else Image.fromarray(report.mask),
            "changed_fraction": report.changed_fraction,
            "changed_probability": report.changed_probability,
            "score": report.score,
        }
        if regions:
            result["regions"] = [vars(region) for region in report.regions]
        return result

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save model and processor, with their code and this (the base class would save parts of the processor)."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


__all__ = ["ChangeCaptioningPipeline"]
