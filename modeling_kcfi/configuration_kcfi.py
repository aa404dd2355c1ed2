"""KCFIConfig: the two towers and every setting that is part of the model."""

import functools
import json
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

# Section III.B removes dropout from the vision tower; these are the names its probabilities have in transformers.
DROPOUT_FIELDS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "drop_path_rate")


@functools.cache
def timm_geometry(architecture: str, model_args: str) -> tuple[int, int, int, int]:
    """Width, patch size, number of blocks and native side of a timm ViT, which its config does not tell.

    Args:
        architecture: timm's name, for example "vit_tiny_patch16_224".
        model_args: JSON of the further arguments of `timm.create_model`.

    Raises:
        ValueError: the architecture is not a plain ViT (no list of blocks behind one patch embedding).
    """
    import timm
    import torch

    with torch.device("meta"):
        tower = timm.create_model(architecture, pretrained=False, num_classes=0, **json.loads(model_args))
    if not (hasattr(tower, "blocks") and hasattr(tower, "patch_embed")):
        raise ValueError(
            f"timm architecture {architecture!r} is not a ViT: it has no `blocks` behind a `patch_embed`."
        )
    return tower.embed_dim, tower.patch_embed.patch_size[0], len(tower.blocks), tower.patch_embed.img_size[0]


@strict
class KCFIConfig(PreTrainedConfig):
    r"""Configuration of the KCFI models; the defaults follow the text of the paper (arXiv 2409.12612).

    Args:
        vision_config: any ViT of transformers (ViT, CLIP, SigLIP, DINOv2) or a timm ViT through `timm_wrapper`. Its
            dropout probabilities are set to 0 (section III.B). Default: ViT-L/16 at 256 px.
        text_config: any causal language model. Default: Qwen2-1.5B.
        image_token_id: id of the `<image>` placeholder in the vocabulary of the language model.
        image_size: side in pixels of the images fed to the tower, a multiple of the patch size; position embeddings
            are interpolated where it is not the tower's own. None = the tower's own.
        vision_feature_layers: numbers of the blocks whose outputs are read (1 = first block), ascending. None = four
            evenly spaced ones, the last block included.
        visual_inputs: what replaces `<image>` (Fig. 7): "change" = the change features (1 image token per prompt),
            "bitemporal" = before then after (2), "bitemporal_change" = before, after, change (3).
        use_key_change_perceiver: compare the dates by the flow-based perceiver (Table IV, "CFE"); otherwise by the
            plain absolute difference.
        flow_residual: "self" = warped minus own date (eq. 3), "cross" = warped minus the other date (authors' code).
        flow_scope: "stage" = a flow net per stage; "stage_and_global" = one more over all stages, whose residuals are
            added (authors' code).
        change_context: stage features put beside the change features, by channel, for the projector and the head:
            none, those of the after image, or of both. Ours, not the paper's.
        projector: "linear" (eq. 4) or "mlp2x_gelu" (authors' code).
        use_change_detection_head: predict a mask (Table IV, "CDH").
        num_change_classes: 2 (background, change) or 3 (background, road, building).
        head_hidden_size: width of the head between its two linear maps (eq. 5; 256 in the authors' code).
        tie_word_embeddings: output embeddings are the input embeddings; follows `text_config` when that ties them.

    Raises:
        ValueError: a combination of settings that cannot work, with the reason.

    Example:
        >>> from kcfi import KCFIConfig
        >>> config = KCFIConfig(flow_residual="cross", num_change_classes=3)
        >>> config.vision_feature_layers, config.num_patches
        ([6, 12, 18, 24], 256)
    """

    model_type = "kcfi"
    sub_configs_defaults = {  # noqa: RUF012 (a class variable in every composite config of transformers)
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="vit",
            init_kwargs={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 256,
                "patch_size": 16,
            },
        ),
        "text_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="qwen2",
            init_kwargs={
                "vocab_size": 151936,
                "hidden_size": 1536,
                "intermediate_size": 8960,
                "num_hidden_layers": 28,
                "num_attention_heads": 12,
                "num_key_value_heads": 2,
                "tie_word_embeddings": True,
            },
        ),
    }

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    image_token_id: int = 151655  # "<|image_pad|>" of Qwen2's vocabulary
    image_size: int | None = None
    vision_feature_layers: list[int] | None = None
    visual_inputs: Literal["change", "bitemporal", "bitemporal_change"] = "change"
    use_key_change_perceiver: bool = True
    flow_residual: Literal["self", "cross"] = "self"
    flow_scope: Literal["stage", "stage_and_global"] = "stage"
    change_context: Literal["none", "after", "bitemporal"] = "none"
    projector: Literal["linear", "mlp2x_gelu"] = "linear"
    use_change_detection_head: bool = True
    num_change_classes: Literal[2, 3] = 2
    head_hidden_size: int = 256
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in DROPOUT_FIELDS:
            if getattr(self.vision_config, name, 0):
                setattr(self.vision_config, name, 0.0)
        if self.vision_config.model_type == "siglip_vision_model":
            self.vision_config.vision_use_head = False  # a pooler nobody reads has no gradient, which stops DDP
        if self.vision_config.model_type == "timm_wrapper":
            self.vision_config.do_pooling = False
        if self.image_size is None:
            self.image_size = self.vision_native_size
        if self.vision_feature_layers is None:
            blocks = self.vision_num_blocks
            self.vision_feature_layers = sorted({max(1, round(blocks * quarter / 4)) for quarter in (1, 2, 3, 4)})
        # as LLaVA: the language models save the flag in their own config
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings

    def validate_architecture(self) -> None:
        """Refuse what cannot work; called by `@strict` after every construction."""
        super().validate_architecture()
        layers, blocks = self.vision_feature_layers, self.vision_num_blocks
        if layers != sorted(set(layers)) or not layers or layers[0] < 1 or layers[-1] > blocks:
            raise ValueError(
                f"vision_feature_layers={layers} must be ascending block numbers between 1 and {blocks}, the number of "
                "blocks of the vision tower."
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of the vision tower's patch size {self.patch_size}; "
                f"the nearest is {max(1, round(self.image_size / self.patch_size)) * self.patch_size}."
            )
        if self.change_context != "none" and self.visual_inputs != "change":
            raise ValueError(
                f"change_context={self.change_context!r} widens the change features, but with "
                f"visual_inputs={self.visual_inputs!r} one projector also serves the plain stage features: set "
                "change_context='none' or visual_inputs='change'."
            )
        if self.use_key_change_perceiver and self.visual_inputs == "bitemporal" and not self.use_change_detection_head:
            raise ValueError(
                "Nothing reads the key change features: visual_inputs='bitemporal' gives the language model the plain "
                "features and the change detection head is off. Set use_key_change_perceiver=False (Table IV's "
                "baseline) or switch the head on."
            )

    @property
    def _timm(self) -> tuple[int, int, int, int] | None:
        if self.vision_config.model_type != "timm_wrapper":
            return None
        return timm_geometry(self.vision_config.architecture, json.dumps(self.vision_config.model_args or {}))

    @property
    def vision_hidden_size(self) -> int:
        """Width C of the vision tower."""
        return self._timm[0] if self._timm else self.vision_config.hidden_size

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self._timm[1] if self._timm else self.vision_config.patch_size

    @property
    def vision_num_blocks(self) -> int:
        """Number of blocks of the vision tower."""
        return self._timm[2] if self._timm else self.vision_config.num_hidden_layers

    @property
    def vision_native_size(self) -> int:
        """Side in pixels that the tower's position embeddings are made for."""
        return self._timm[3] if self._timm else self.vision_config.image_size

    @property
    def num_patches(self) -> int:
        """Number N of patches of an image of `image_size`."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_image_tokens(self) -> int:
        """How many `<image>` tokens a prompt has (Fig. 7), each replaced by N features."""
        return {"change": 1, "bitemporal": 2, "bitemporal_change": 3}[self.visual_inputs]

    @property
    def stage_width(self) -> int:
        """Channels L*C of the stages side by side."""
        return len(self.vision_feature_layers) * self.vision_hidden_size

    @property
    def change_width(self) -> int:
        """Channels of the change features as projector and head read them, context included."""
        return self.stage_width * {"none": 1, "after": 2, "bitemporal": 3}[self.change_context]


__all__ = ["KCFIConfig"]
