"""The `change-captioning` pipeline: before/after pairs -> captions and masks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig, Pipeline
from transformers.utils import logging

from .image_processing_kcfi import NO_LABEL, image_size, unstack
from .processing_kcfi import INSTRUCTIONS, KCFIProcessor

logger = logging.get_logger(__name__)
LARGE = 2  # times the model's input: larger images lose too much when they are shrunk


class ChangeCaptioningPipeline(Pipeline):
    """Describe what changed between two images of one place, and mark where.

    Images are resized to the model's input, and much larger ones are warned of: `kcfi caption` cuts them into tiles.

    Example:
        >>> from transformers import pipeline
        >>> import kcfi  # registers the task
        >>> captioner = pipeline("change-captioning", model="folder-or-hub-id")
        >>> captioner(["before.png", "after.png"])
        {'caption': 'a house appears next to the road .', 'mask': <PIL.Image.Image ...>, 'changed_fraction': 0.031,
         'score': 0.87}
    """

    model: Any  # KCFIForConditionalGeneration; models and processors import nothing of each other
    processor: KCFIProcessor

    _load_processor = True  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=64)  # LEVIR-CC: at most 39 words

    def __call__(self, pairs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Caption one pair, or many.

        Args:
            pairs: `[before, after]`, a list of such pairs, or a data set or generator of them; PIL images, paths,
                arrays or tensors, also stacked (2, C, H, W) or (B, 2, C, H, W). Examples of KCFI's data sets (with
                `image_before`, `image_after`) count as pairs.
            **kwargs: `batch_size`, `instruction` (default: the first of Table I), and arguments of `generate()`.

        Returns:
            For one pair a dict, for a list a list of them, otherwise an iterator:
            `caption` (str);
            `mask`, a PIL image (mode L) of class ids at the input's size, 255 where the model did not look;
            `changed_fraction`, the share of pixels it looked at that are of a change class (both None without a change
            detection head);
            `score` (0 to 1), the geometric mean of the probabilities of the caption's tokens.
        """
        if isinstance(pairs, (list, tuple, np.ndarray, torch.Tensor)):
            pairs = unstack(pairs)
            one = len(pairs) == 2 and not any(isinstance(pair, (list, Mapping)) for pair in pairs)
            pairs = tuple(pairs) if one else pairs  # the base class reads a list as a batch
        return super().__call__(pairs, **kwargs)

    def _sanitize_parameters(
        self, instruction: str | None = None, **generate_kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return ({} if instruction is None else {"instruction": instruction}), generate_kwargs, {}

    def preprocess(self, input_: Any, instruction: str = INSTRUCTIONS[0]) -> dict[str, Any]:  # type: ignore[override]
        """A pair -> one row of model inputs and the input's size."""
        if isinstance(input_, Mapping):
            input_ = [input_["image_before"], input_["image_after"]]
        pair = self.processor.image_processor.fetch_images(input_)
        inputs = self.processor(images=[pair], text=[self.processor.prompt(instruction)], return_tensors="pt")
        height, width = image_size(pair[0])
        side = self.model.config.image_size
        if max(height, width) > LARGE * side:
            logger.warning_once(
                f"Images of {width} x {height} px are shrunk to the model's {side} px, and small objects in them are "
                "lost: crop them, or let `kcfi caption` (kcfi.captioning.Describer) cut them into tiles."
            )
        return {**inputs.to(self.dtype), "target_size": [(height, width)]}

    def _forward(self, input_tensors: dict[str, Any], **generate_kwargs: Any) -> Any:
        """Encode the pairs once, for the masks and for the captions."""
        target_size = input_tensors.pop("target_size")
        features = self.model.get_image_features(pixel_values=input_tensors.pop("pixel_values"))
        end_tokens = self.processor.generation_tokens
        output = self.model.generate(
            **input_tensors,
            mm_encoder_outputs={"image": features},
            **self._prepare_generate_kwargs(
                generate_kwargs, return_dict_in_generate=True, output_scores=True, **end_tokens
            ),
        )
        log_probabilities = self.model.compute_transition_scores(
            output.sequences, output.scores, output.get("beam_indices"), normalize_logits=True
        )
        tokens = output.sequences[:, input_tensors["input_ids"].shape[1] :]
        ends = torch.isin(tokens, torch.tensor(end_tokens["eos_token_id"], device=tokens.device)).int()
        written = ends.cumsum(dim=1) - ends == 0  # up to and with the first end token; padding follows
        score = (log_probabilities.masked_fill(~written, 0).sum(dim=1) / written.sum(dim=1)).exp()
        return {"tokens": tokens, "score": score, "mask_logits": features.mask_logits, "target_size": target_size}

    def postprocess(self, model_outputs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The tensors of one pair -> its result."""
        mask = changed_fraction = None
        if model_outputs["mask_logits"] is not None:
            (ids,) = self.processor.post_process_masks(model_outputs["mask_logits"], model_outputs["target_size"])
            mask = Image.fromarray(ids.numpy())
            changed_fraction = (ids[ids != NO_LABEL] > 0).float().mean().item()
        return {
            "caption": self.processor.post_process_image_text_to_text(model_outputs["tokens"])[0].rstrip(),
            "mask": mask,
            "changed_fraction": changed_fraction,
            "score": model_outputs["score"].item(),
        }

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save model and processor, with their code and this (the base class would save parts of the processor)."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


__all__ = ["ChangeCaptioningPipeline"]
