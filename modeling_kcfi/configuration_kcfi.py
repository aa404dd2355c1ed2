"""KCFIConfig: the two towers and every setting that is part of the model."""

import copy
import functools
import inspect
import json
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

# Section III.B removes dropout from the vision tower; these are the names its probabilities have in transformers, and
# in timm's `model_args`.
DROPOUT_FIELDS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "drop_path_rate")
TIMM_DROPOUT = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")


class TowerGeometry(NamedTuple):
    """What KCFI must know of a vision tower, which transformers and timm keep in different places."""

    hidden_size: int
    patch_size: int  # side in pixels
    num_blocks: int
    image_size: int  # side in pixels that the position embeddings are made for
    any_size: bool = True  # takes images of other sizes without being told at construction


@functools.cache
def timm_geometry(architecture: str, model_args: str) -> TowerGeometry:
    """Geometry of a timm ViT, read off the model itself, since its config does not tell.

    Args:
        architecture: timm's name, for example "vit_tiny_patch16_224".
        model_args: JSON of the further arguments of `timm.create_model`.

    Raises:
        ValueError: the architecture is not a plain ViT (no list of blocks behind one patch embedding).
    """
    config = AutoConfig.for_model("timm_wrapper", architecture=architecture, model_args=json.loads(model_args))
    with torch.device("meta"):
        tower = AutoModel.from_config(config).timm_model
    if not (hasattr(tower, "blocks") and hasattr(tower, "patch_embed")):
        raise ValueError(
            f"timm architecture {architecture!r} is not a ViT: it has no `blocks` behind a `patch_embed`."
        )
    patch, size = tower.patch_embed.patch_size, tower.patch_embed.img_size
    return TowerGeometry(
        hidden_size=tower.embed_dim,
        patch_size=patch if isinstance(patch, int) else patch[0],
        num_blocks=len(tower.blocks),
        image_size=size[0],
        any_size=not hasattr(tower.patch_embed, "strict_img_size"),  # XCiT computes its position embeddings
    )


@functools.cache
def check_tower(vision_config: str, image_size: int) -> None:
    """Run one block of a vision tower of transformers on the meta device, where nothing is computed, and look at it.

    Many models have the fields of a ViT and are none: SigLIP2-NaFlex wants patches that are cut already, ViT-MAE drops
    most of them, SAM keeps them in a grid. Code that reads numbers out of tensors cannot run there: it is let through.

    Args:
        vision_config: its config as JSON.
        image_size: side in pixels of the images it is to read.

    Raises:
        ValueError: it does not turn an image into the states of its patches, with what it does instead.
    """
    config: Any = AutoConfig.for_model(**json.loads(vision_config))
    config.num_hidden_layers = 1
    patches = (image_size // config.patch_size) ** 2
    try:
        with torch.device("meta"), torch.no_grad():
            build: Any = MODEL_MAPPING[type(config)]
            tower = build(config).eval()
            asked = "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
            interpolation = {"interpolate_pos_encoding": True} if asked else {}
            pixels = torch.empty(2, 3, image_size, image_size)
            shape = tower(pixels, output_hidden_states=[1], **interpolation).hidden_states[1].shape
        fits = len(shape) == 3 and shape[0] == 2 and shape[1] >= patches and shape[2] == config.hidden_size
        problem = "" if fits else f"a block gives states of shape {tuple(shape)}"
    except Exception as error:  # whatever a model that is no ViT stumbles over
        unknown = "meta tensor" in str(error)
        problem = "" if unknown else f"it fails with {type(error).__name__}: {' '.join(str(error).split())}"
    if problem:
        raise ValueError(
            f"vision_config of type {config.model_type!r} cannot be the vision tower, which must turn two images of "
            f"{image_size} x {image_size} px into states of their {patches} patches, of shape (2, at least {patches}, "
            f"{config.hidden_size}): {problem}. Take a plain ViT (ViT, DeiT, BEiT, DINOv2, DINOv3, CLIP, SigLIP)."
        )


@strict
class KCFIConfig(PreTrainedConfig):
    r"""Configuration of the KCFI models; the defaults follow the text of the paper (arXiv 2409.12612).

    Args:
        vision_config: a plain ViT of transformers (ViT, DeiT, BEiT, CLIP, SigLIP, DINOv2, DINOv3) or a timm ViT
            through `timm_wrapper`; a tower that does not turn an image into states of its patches is refused. Its
            dropout probabilities are set to 0 (section III.B). Default: ViT-L/16 at 256 px.
        text_config: any causal language model. Default: Qwen2-1.5B.
        image_token_id: id of the `<image>` placeholder, inside the vocabulary of the language model.
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
        stage_projection_size: each stage is normalised and mapped to so many channels, the same way at both dates,
            before the dates are compared: a large tower then costs little behind it. None = stages as the tower gives
            them, as in the paper. Ours.
        visual_token_pooling: the language model reads the mean of so many by so many patches (1 = every patch);
            perceiver and head still see every patch. Ours, not the paper's.
        change_context: stage features put beside the change features, by channel, for the projector and the head:
            none, those of the after image, or of both. Ours, not the paper's.
        projector: "linear" (eq. 4) or "mlp2x_gelu" (authors' code).
        use_change_detection_head: predict a mask (Table IV, "CDH").
        num_change_classes: 2 (background, change) or 3 (background, road, building).
        head_hidden_size: width of the head between its two linear maps (eq. 5; 256 in the authors' code).
        tie_word_embeddings: output embeddings are the input embeddings; follows `text_config` when that ties them.
        text_model: Hub id or folder of the language model, where the weights beside this config leave it out (`kcfi
            push --text-model`): `from_pretrained` fetches it.
        text_model_revision: its commit.

    Raises:
        ValueError: a combination of settings that cannot work, with the reason.

    Example:
        >>> from kcfi import KCFIConfig
        >>> config = KCFIConfig(flow_residual="cross", num_change_classes=3)
        >>> config.vision_feature_layers, config.num_patches
        ([6, 12, 18, 24], 256)
    """

    model_type = "kcfi"
    # a plain Trainer gathers all else of the outputs, as tensors
    keys_to_ignore_at_inference = ["cache", "image_outputs"]  # noqa: RUF012 (as in all of transformers)
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

    vision_config: Any = None  # a dict or a config; always a config after construction, as text_config
    text_config: Any = None
    image_token_id: int = 151655  # "<|image_pad|>" of Qwen2's vocabulary
    image_size: int | None = None
    vision_feature_layers: list[int] | None = None
    visual_inputs: Literal["change", "bitemporal", "bitemporal_change"] = "change"
    use_key_change_perceiver: bool = True
    flow_residual: Literal["self", "cross"] = "self"
    flow_scope: Literal["stage", "stage_and_global"] = "stage"
    stage_projection_size: int | None = None
    visual_token_pooling: int = 1
    change_context: Literal["none", "after", "bitemporal"] = "none"
    projector: Literal["linear", "mlp2x_gelu"] = "linear"
    use_change_detection_head: bool = True
    num_change_classes: Literal[2, 3] = 2
    head_hidden_size: int = 256
    tie_word_embeddings: bool = False
    text_model: str | None = None
    text_model_revision: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.vision_config = vision = copy.deepcopy(self.vision_config)  # the caller's own stays as it is
        for name in DROPOUT_FIELDS:
            if getattr(vision, name, 0):
                setattr(vision, name, 0.0)
        if getattr(vision, "model_args", None):
            # timm writes the number of classes there too, where TimmWrapperModel of transformers 5.23 stumbles over it
            dropped = (*TIMM_DROPOUT, "num_classes")
            vision.model_args = {k: v for k, v in vision.model_args.items() if k not in dropped}
        if self.image_size is None:
            self.image_size = self.tower.image_size
        if self.vision_feature_layers is None:
            evenly = [self.tower.num_blocks * quarter / 4 for quarter in (1, 2, 3, 4)]
            self.vision_feature_layers = sorted({max(1, round(block)) for block in evenly})
        # as LLaVA: the language models save the flag in their own config
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        self.validate_architecture()  # `@strict` does it again, but wraps the ValueError in an error of its own
        if getattr(vision, "use_mask_token", False):
            vision.use_mask_token = False  # a parameter that nothing reads has no gradient, which stops DDP
        if vision.model_type == "timm_wrapper":
            vision.do_pooling = False
            if self.image_size != self.tower.image_size and not self.tower.any_size:
                # timm's name for interpolated position embeddings
                vision.model_args = {**(vision.model_args or {}), "dynamic_img_size": True}

    def validate_architecture(self) -> None:
        """Refuse what cannot work, at construction and before saving."""
        super().validate_architecture()
        layers, blocks = self.vision_feature_layers or [], self.tower.num_blocks
        if layers != sorted(set(layers)) or not layers or layers[0] < 1 or layers[-1] > blocks:
            raise ValueError(
                f"vision_feature_layers={layers} must be ascending block numbers between 1 and {blocks}, the number "
                "of blocks of the vision tower."
            )
        size, patch = self.image_size or 0, self.patch_size
        if size < patch or size % patch:
            raise ValueError(
                f"image_size={size} is not a multiple of the vision tower's patch size {patch}; the nearest is "
                f"{max(1, round(size / patch)) * patch}."
            )
        if self.vision_config.model_type != "timm_wrapper":
            check_tower(self.vision_config.to_json_string(use_diff=False), size)
        if self.stage_projection_size is not None and self.stage_projection_size < 1:
            raise ValueError(f"stage_projection_size={self.stage_projection_size} must be at least 1, or None.")
        if self.visual_token_pooling < 1 or size % self.visual_token_size:
            raise ValueError(
                f"visual_token_pooling={self.visual_token_pooling} does not divide the {size // patch} x "
                f"{size // patch} patches of an image (image_size={size}, patch size {patch})."
            )
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"image_token_id={self.image_token_id} is not in the language model's vocabulary of "
                f"{self.text_config.vocab_size} tokens."
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

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but a file does not choose how attention is computed: it might name code on the Hub."""

        def without_code(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            return {k: without_code(v) for k, v in value.items() if not str(k).endswith("_implementation")}

        return super().from_dict(without_code(config_dict), **kwargs)

    @property
    def tower(self) -> TowerGeometry:
        """Geometry of the vision tower.

        Raises:
            ValueError: not a ViT with square images and patches.
        """
        vision = self.vision_config
        if vision.model_type == "timm_wrapper":
            return timm_geometry(vision.architecture, json.dumps(vision.model_args or {}))
        fields = ("hidden_size", "patch_size", "num_hidden_layers", "image_size")
        values = {name: getattr(vision, name, None) for name in fields}
        if not all(isinstance(value, int) for value in values.values()):
            raise ValueError(
                f"vision_config of type {vision.model_type!r} is not a ViT with square images and patches, whose "
                f"{', '.join(fields)} are numbers: {values}."
            )
        return TowerGeometry(*(getattr(vision, name) for name in fields))

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.tower.patch_size

    @property
    def visual_token_size(self) -> int:
        """Side in pixels of the square that one placeholder stands for: the `patch_size` of the processor."""
        return self.patch_size * self.visual_token_pooling

    @property
    def num_patches(self) -> int:
        """Number N of patches of an image of `image_size`."""
        return ((self.image_size or self.tower.image_size) // self.patch_size) ** 2

    @property
    def num_image_tokens(self) -> int:
        """How many `<image>` tokens a prompt has (Fig. 7), each replaced by N features (with pooling: fewer)."""
        return {"change": 1, "bitemporal": 2, "bitemporal_change": 3}[self.visual_inputs]

    @property
    def last_block(self) -> int:
        """Number of the last block whose output is read; the vision tower ends there."""
        return max(self.vision_feature_layers or [self.tower.num_blocks])

    @property
    def num_stages(self) -> int:
        """Number L of stages, the blocks whose outputs are read."""
        return len(self.vision_feature_layers or [])

    @property
    def stage_channels(self) -> int:
        """Channels C of a stage as the dates are compared: the tower's, or those of `stage_projection_size`."""
        return self.stage_projection_size or self.tower.hidden_size

    @property
    def stage_width(self) -> int:
        """Channels L*C of the stages side by side."""
        return self.num_stages * self.stage_channels

    @property
    def change_width(self) -> int:
        """Channels of the change features as projector and head read them, context included."""
        return self.stage_width * {"none": 1, "after": 2, "bitemporal": 3}[self.change_context]

    @property
    def custom_pipelines(self) -> dict[str, Any]:
        """Where `pipeline(..., trust_remote_code=True)` finds the code of the `change-captioning` pipeline.

        Empty after `import kcfi`, which has registered it: `pipeline` would insist on the code beside the weights.
        """
        from transformers.pipelines import PIPELINE_REGISTRY  # all pipelines: not needed to read a config

        task = "change-captioning"
        if task in PIPELINE_REGISTRY.get_supported_tasks():
            return {}
        implementation = "pipeline_kcfi.ChangeCaptioningPipeline"
        return {task: {"impl": implementation, "pt": ["AutoModelForImageTextToText"], "type": "multimodal"}}

    @custom_pipelines.setter
    def custom_pipelines(self, value: Any) -> None:
        """Nothing: `Pipeline.save_pretrained` sets it, and files that it wrote hold it."""


__all__ = ["KCFIConfig"]
