"""KCFIProcessor: a before/after pair and an instruction -> model inputs, and the model's outputs -> results."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import AddedToken, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .calibration_kcfi import Calibration
from .image_processing_kcfi import KCFIImageProcessor
from .reading_kcfi import InputError, refusing, unstack

if TYPE_CHECKING:  # transformers saves the files named in such lines: the pipeline travels with the processor
    from .pipeline_kcfi import ChangeCaptioningPipeline  # noqa: F401

# Table I, without the <image> token in front. Training draws one per sample, evaluation takes the first.
INSTRUCTIONS = (
    "This represents the change features of geographic targets extracted from remote sensing images. Does this "
    "feature contain any information about changes in the geographic targets? If so, please describe the "
    "change information.",
    "These are the change characteristics of geographic targets derived from remote sensing images. Do these "
    "features reflect any changes in the geographic targets? If yes, please provide details on the changes.",
    "These are the geographic target change features extracted from remote sensing images. Do these features "
    "indicate any changes in the geographic targets? If so, please describe the changes.",
    "This is the change information of geographic targets extracted from remote sensing images. Does this "
    "information reveal any changes in the geographic targets? If so, please describe the changes.",
    "Here are the change features of geographic targets pulled from remote sensing images. Do these features "
    "suggest any changes in the geographic targets? If they do, please describe the nature of those changes.",
)

VisualInputs = Literal["change", "bitemporal", "bitemporal_change"]
NUM_IMAGE_TOKENS = {"change": 1, "bitemporal": 2, "bitemporal_change": 3}  # Fig. 7
SPARE_TOKEN = re.compile(
    r"[<\[].*(unused|reserved).*[>\]]"
)  # "<unused0>", "[unused1]", "<|reserved_special_token_2|>"

# What a message holds: its <image> tokens, COUNT for each pair of image entries, then its text.
CONTENT = """\
{%- macro content_of(message) -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- set images = message['content'] | selectattr('type', 'equalto', 'image') | list | length -%}
{%- if images % 2 -%}
{{- raise_exception('A before/after pair needs two image entries, this message has ' ~ images ~ '.') -}}
{%- endif -%}
{{- 'IMAGE' * (images // 2 * COUNT) -}}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
# No system turn that was not asked for, and no line break behind the last turn: a prompt is a prefix of its dialogue.
CHATML = """\
{%- for message in messages -%}
{{- ('' if loop.first else '\\n') + '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- content_of(message) + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- content_of(message) + '<|im_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n<|im_start|>assistant\\n' -}}{%- endif -%}
"""
PLAIN = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- content_of(message) -}}{{- eos_token -}}{%- endgeneration -%}
{{- '' if loop.last else '\\n' -}}
{%- else -%}
{{- content_of(message) + '\\n' -}}
{%- endif -%}
{%- endfor -%}
"""


def has_chat_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer speaks ChatML (Qwen2, SmolLM2)."""
    return {"<|im_start|>", "<|im_end|>"} <= tokenizer.get_added_vocab().keys()


def build_chat_template(tokenizer: PreTrainedTokenizerBase, image_token: str, num_image_tokens: int) -> str:
    r"""KCFI's chat template in the tokenizer's dialect (Jinja).

    ChatML if the tokenizer has its tokens, otherwise plain: `instruction \n answer eos`. The tokenizers' own templates
    are not used: some refuse lists of images and text (SmolLM2), some add a system turn (Qwen2).

    Args:
        tokenizer: decides the dialect.
        image_token: placeholder of the image features.
        num_image_tokens: how many of them stand for a pair.
    """
    content = CONTENT.replace("IMAGE", image_token).replace("COUNT", str(num_image_tokens))
    return content + (CHATML if has_chat_tokens(tokenizer) else PLAIN)


def group_pairs(images: Any) -> list[list[Any]]:
    """Images as they may come with text -> a flat list of [before, after].

    Args:
        images: a list of pairs, or of a list per text with the images of its pairs (before, after, before, after,
            ...), empty for a text without; or these images in one flat list. Stacked arrays count as lists.

    Raises:
        InputError: a list with an odd number of images.
    """
    images = unstack(images)
    nested = isinstance(images, list) and any(isinstance(group, list) for group in images)
    groups = [_flatten(group) for group in images] if nested else [_flatten(images)]
    counts = [len(group) for group in groups]
    if any(count % 2 for count in counts):
        raise InputError(
            f"Beside text, images come as before/after pairs, [[before, after], ...]; got lists of {counts} images."
        )
    return [group[first : first + 2] for group in groups for first in range(0, len(group), 2)]


def _flatten(images: Any) -> list[Any]:
    return [image for group in images for image in _flatten(group)] if isinstance(images, list) else [images]


class KCFIProcessor(ProcessorMixin):
    """Image processor and tokenizer of a KCFI model, in one.

    A pair of images stands behind one, two or three `<image>` tokens of a prompt, each of which becomes as many
    placeholders as an image has patches; the model replaces them by features.

    Args:
        image_processor: a `KCFIImageProcessor`.
        tokenizer: of the language model. If it has no `image_token`, that is added as a special token; if it has no
            padding token, its end token serves (padding is masked, so nothing else changes). It pads on the left, as
            generation needs.
        chat_template: Jinja template of prompts; None = `build_chat_template`.
        patch_size: side in pixels of the square that one placeholder stands for: that of the vision tower's patches,
            times `visual_token_pooling` (`KCFIConfig.visual_token_size`).
        visual_inputs: what replaces `<image>` (`KCFIConfig.visual_inputs`): "change" (1 token), "bitemporal" (2) or
            "bitemporal_change" (3).
        image_token: the placeholder.
        tile_size: side in pixels of the images that the model was trained on; `Describer` cuts larger ones into tiles
            of it. None = that to which the image processor resizes. Training sets it.
        ground_sampling_distance: m per pixel of these images; None = not known.
        calibration: fields of a `Calibration`, as `kcfi calibrate` measures them; None = probabilities as the model
            gives them.

    Example:
        >>> inputs = processor(images=[[before, after]], text=[processor.prompt()], return_tensors="pt")
        >>> tokens = model.generate(**inputs, **processor.generation_tokens)[:, inputs["input_ids"].shape[1] :]
        >>> processor.post_process_image_text_to_text(tokens)
        ['a house appears next to the road .']
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        patch_size: int = 16,
        visual_inputs: VisualInputs = "change",
        image_token: str = "<image>",
        tile_size: int | None = None,
        ground_sampling_distance: float | None = None,
        calibration: Mapping[str, Any] | None = None,
    ) -> None:
        if visual_inputs not in NUM_IMAGE_TOKENS:
            raise InputError(f"visual_inputs={visual_inputs!r} is not one of {', '.join(NUM_IMAGE_TOKENS)}.")
        if image_token not in tokenizer.get_added_vocab():
            tokenizer.add_tokens(AddedToken(image_token, special=True, normalized=False))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        self.patch_size = patch_size
        self.visual_inputs = visual_inputs
        self.tile_size = tile_size
        self.ground_sampling_distance = ground_sampling_distance
        self.calibration = calibration
        Calibration(**(calibration or {}))  # refuses other fields
        self.num_image_tokens = NUM_IMAGE_TOKENS[visual_inputs]
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if chat_template is None:
            chat_template = build_chat_template(tokenizer, image_token, self.num_image_tokens)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_towers(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
        image_size: int = 256,
        patch_size: int = 16,
        visual_inputs: VisualInputs = "change",
        shortest_edge: int | None = None,
    ) -> "KCFIProcessor":
        """Build the processor of a model that is put together from two pretrained towers.

        Comes before the model, whose `image_token_id` is this processor's. Where the tokenizer has a spare token, that
        becomes the placeholder and the language model's embeddings stay as they are.

        Args:
            tokenizer: of the language model; changed in place, see the class.
            image_mean: of the vision tower's own image processor, per channel, for values from 0 to 1.
            image_std: the same.
            image_size: side in pixels of the tower's input.
            patch_size: side in pixels of the square that one placeholder stands for, see the class.
            visual_inputs: as `KCFIConfig.visual_inputs`.
            shortest_edge: resize the shorter side to this and crop the centre of `image_size` (the `released` preset);
                None = resize the whole image to `image_size`.
        """
        image_processor = KCFIImageProcessor(
            size=image_size if shortest_edge is None else {"shortest_edge": shortest_edge},
            do_center_crop=shortest_edge is not None,
            crop_size=image_size,
            image_mean=list(image_mean),
            image_std=list(image_std),
        )
        vocabulary = tokenizer.get_vocab()
        spare = sorted(filter(SPARE_TOKEN.fullmatch, vocabulary), key=vocabulary.__getitem__)
        image_token = next((token for token in ("<image>", "<|image_pad|>", *spare) if token in vocabulary), "<image>")
        return cls(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            visual_inputs=visual_inputs,
            image_token=image_token,
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, and the code beside the settings: the folder loads where kcfi is not installed.

        The code of the `change-captioning` pipeline is among it.
        """
        self.register_for_auto_class()
        self.image_processor.register_for_auto_class()
        files = super().save_pretrained(*args, **kwargs)
        vars(self).pop("auto_map")  # belongs to the file: a processor that was loaded has none
        return files

    @property
    def num_patches(self) -> int:
        """Placeholders per `<image>`: the squares of `patch_size` of an image as the tower gets it."""
        settings = self.image_processor
        return self._count_patches(settings.crop_size if settings.do_center_crop else settings.size)

    def _count_patches(self, size: Any) -> int:
        return (size["height"] // self.patch_size) * (size["width"] // self.patch_size)

    @property
    def end_token(self) -> str:
        """What ends a caption: `<|im_end|>` in ChatML, otherwise the tokenizer's end token.

        Raises:
            ValueError: the tokenizer has neither; a model trained without would never stop.
        """
        if has_chat_tokens(self.tokenizer):
            return "<|im_end|>"
        if self.tokenizer.eos_token is None:
            raise InputError("The tokenizer has no end token: set `tokenizer.eos_token`.")
        return self.tokenizer.eos_token

    @property
    def generation_tokens(self) -> dict[str, Any]:
        """Arguments of `generate()`: the tokens that end a caption, and the padding behind it."""
        ends = {self.tokenizer.convert_tokens_to_ids(self.end_token), self.tokenizer.eos_token_id} - {None}
        return {"eos_token_id": sorted(ends), "pad_token_id": self.tokenizer.pad_token_id}

    def prompt(self, instruction: str = INSTRUCTIONS[0], caption: str | None = None) -> str:
        """The text for one pair: `<image>` tokens, instruction and, if given, the answer with its end token.

        Without `caption` the text ends where the answer begins, so it is a prefix of the text with `caption`.
        """
        content: Any = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": instruction}]
        with refusing("The chat template saved with this model cannot be used"):
            prompt = self.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return prompt if caption is None else prompt + caption + self.end_token

    def encode_prompt(self, instruction: str = INSTRUCTIONS[0]) -> list[int]:
        """Token ids of `prompt(instruction)` with the placeholders expanded, as calling the processor gives them."""
        text = self.prompt(instruction).replace(self.image_token, self.image_token * self.num_patches)
        return self.tokenizer(text)["input_ids"]

    def encode_caption(self, caption: str) -> list[int]:
        """Token ids of an answer and its end token, to be appended to those of a prompt."""
        return self.tokenizer(caption + self.end_token, add_special_tokens=False)["input_ids"]

    def prepare_inputs_layout(  # type: ignore[override]
        self, images: Any = None, text: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Open images; beside text they form pairs (`group_pairs`), alone they are what the image processor takes."""
        if images is not None:  # the base class would read them by the saved settings
            images = self.image_processor.fetch_images(images, **{**kwargs, **kwargs.get("images_kwargs", {})})
        images, text, videos, audio = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        if images is not None and text is not None:
            images = group_pairs(images) or None
        return images, text, videos, audio

    def validate_inputs(  # type: ignore[override]
        self, images: Any = None, text: Any = None, **kwargs: Any
    ) -> None:
        """Check that the prompts hold `num_image_tokens` `<image>` tokens for every pair.

        Raises:
            ValueError: nothing given, text that is not text, or another number of tokens.
        """
        if text is None:
            super().validate_inputs(images=images, **kwargs)
            return
        if not all(isinstance(sample, str) for sample in text):
            raise InputError("`text` must be a string or list of strings.")
        tokens, pairs = sum(sample.count(self.image_token) for sample in text), len(images or [])
        if tokens != pairs * self.num_image_tokens:
            raise InputError(
                f"The total number of {self.image_token} tokens in the prompts should be the same as the number of "
                f"inputs they stand for: {self.num_image_tokens} per pair with visual_inputs={self.visual_inputs!r}. "
                f"Found {tokens} tokens and {pairs} pairs; `processor.prompt()` writes the tokens."
            )

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        inputs = self.image_processor(images, **kwargs)
        count = len(inputs["pixel_values"]) * self.num_image_tokens
        return inputs, [self.replace_image_token(inputs, index) for index in range(count)]

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """The placeholders of one `<image>` token; `image_idx` counts these tokens over all pairs."""
        height, width = image_inputs["pixel_values"][image_idx // self.num_image_tokens].shape[-2:]
        return self.image_token * self._count_patches({"height": height, "width": width})

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """Placeholders per pair; `image_sizes` has one (height, width) per pair. For inference servers (vLLM)."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens * self.num_patches] * len(image_sizes),
            num_image_patches=[1] * len(image_sizes),
        )

    @property
    def unused_input_names(self) -> list[str]:
        """What tokenizers may return and the model does not take."""
        return ["token_type_ids"]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Generated token ids (B, T), without the prompt -> captions.

        Only spaces in front are cut: with this method the `image-text-to-text` pipeline decodes the prompt, which ends
        in a line break, and the prompt with its answer, to take the one from the other.
        """
        texts = self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return [text.lstrip() for text in texts]

    def post_process_masks(
        self, mask_logits: torch.Tensor, target_sizes: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """Mask logits (B, classes, H, W) -> class id maps of the input's size; see `KCFIImageProcessor`."""
        return self.image_processor.post_process_masks(mask_logits, target_sizes)


__all__ = ["INSTRUCTIONS", "KCFIProcessor"]
