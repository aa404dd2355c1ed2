"""The KCFI models: two dates of one place -> a sentence of what changed and a mask of where.

Letters: B pairs, L stages, C width of the vision tower, h x w grid of patches, N = h * w, D width of the language
model, T tokens, H x W pixels. Where shapes of image tokens say N, it is N / p^2 with `visual_token_pooling` p.
"""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MultimodalBaseModelOutputWithPast,
    MultimodalCausalLMOutputWithPast,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, torch_compilable_check
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .change_detection_head import ChangeDetectionHead, mask_loss
from .configuration_kcfi import KCFIConfig
from .key_change_perceiver import KeyChangePerceiver, flatten_stages

CHUNK = 1024  # positions scored at a time in training: 0.6 GB of logits in fp32 with the 152k tokens of Qwen2
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

# images (B, 2, 3, H, W) -> stage features before and after, and the tower's own output
StageCache = Callable[..., tuple[list[torch.Tensor], list[torch.Tensor], Any]]

# config.json's entries for `trust_remote_code=True`: which class of which file each Auto class loads
AUTO_MAP = {
    "AutoConfig": "configuration_kcfi.KCFIConfig",
    "AutoModel": "modeling_kcfi.KCFIModel",
    "AutoModelForImageTextToText": "modeling_kcfi.KCFIForConditionalGeneration",
}


@dataclass
class KCFIImageFeatures(BaseModelOutputWithPooling):
    r"""What the pairs give to the language model and to the user.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, 2 * S, C)`): last states of the vision tower, those of the
            before image and then those of the after image, S each (patches, class and register tokens).
        pooler_output (`list[torch.Tensor]`): per pair the `(num_image_tokens * N, D)` features that replace its
            `<image>` placeholders.
        hidden_states, attentions: of the vision tower, for both dates (`2B` rows: before, after, before, ...).
        change_features (`torch.Tensor` of shape `(B, N, L*C)`): key change features (with context: wider).
        mask_logits (`torch.Tensor` of shape `(B, num_change_classes, H, W)`): None without a head.
    """

    pooler_output: list[torch.Tensor] = None  # type: ignore[assignment]
    change_features: torch.Tensor | None = None
    mask_logits: torch.Tensor | None = None


@dataclass
class KCFIModelOutputWithPast(MultimodalBaseModelOutputWithPast):
    r"""Output of `KCFIModel`.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, T, D)`): last states of the language model.
        cache, hidden_states, attentions: of the language model.
        image_outputs (`KCFIImageFeatures`): of the pairs; its `pooler_output` replaced `<image>`. None without pixels.
        mask_logits (`torch.Tensor` of shape `(B, num_change_classes, H, W)`): None without pixels or head.
    """

    mask_logits: torch.Tensor | None = None


@dataclass
class KCFICausalLMOutputWithPast(MultimodalCausalLMOutputWithPast):
    r"""Output of `KCFIForConditionalGeneration`.

    Args:
        loss (`torch.Tensor` of shape `()`): sum of the losses below that could be computed, equal weights.
        logits (`torch.Tensor` of shape `(B, T, vocabulary)`): next-token scores; None with `skip_logits`.
        cache, hidden_states, attentions: of the language model.
        image_outputs (`KCFIImageFeatures`): of the pairs; its `pooler_output` replaced `<image>`. None without pixels.
        caption_loss (`torch.Tensor` of shape `()`): eq. 8, given `labels`; 0 when they are -100 everywhere.
        mask_loss (`torch.Tensor` of shape `()`): eq. 9, given `mask_labels`.
        mask_logits (`torch.Tensor` of shape `(B, num_change_classes, H, W)`): class scores per pixel.
    """

    caption_loss: torch.Tensor | None = None
    mask_loss: torch.Tensor | None = None
    mask_logits: torch.Tensor | None = None


def load_tower(kind: Any, name: str, **options: Any) -> PreTrainedModel:
    """`kind.from_pretrained(name)`, from safetensors alone and without code of its own.

    A pickle may run the code of whoever made it, and so does a folder with Python files.

    Raises:
        OSError: the model is not there, or not as safetensors; with the way out.
    """
    try:
        tower: PreTrainedModel = kind.from_pretrained(name, use_safetensors=True, trust_remote_code=False, **options)
        return tower
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise OSError(
            f"{name} has no weights as safetensors, and others (pytorch_model.bin) are pickles, which may run code of "
            f"whoever made them. If you trust them, write them anew beside the other files of the model: "
            f"`{kind.__name__}.from_pretrained({name!r}).save_pretrained(FOLDER)`, and give FOLDER. ({error})"
        ) from error


def check_index(folder: Path) -> None:
    """Refuse an index of weights that names other files than safetensors beside it; transformers opens what it names.

    Raises:
        ValueError: names one of them.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index} names {name!r}: expected safetensors files of its own folder.")


def trim_tower(tower: PreTrainedModel, last_block: int) -> PreTrainedModel:
    """Take away what nothing reads: blocks behind the last one, final norm (section III.B), pooler, mask token.

    They cost time, and parameters without a gradient stop DDP.
    """
    backbone: Any = getattr(tower, "timm_model", tower)
    lists = [part for part in backbone.modules() if isinstance(part, nn.ModuleList | nn.Sequential)]
    blocks = getattr(backbone, "blocks", None) or max(lists, key=len)  # timm has a name for them
    del blocks[last_block:]
    if hasattr(backbone, "cls_attn_blocks"):  # XCiT: the class token comes in behind the blocks
        del backbone.cls_attn_blocks[:]
        parameter_to_buffer(backbone, "cls_token")
    for part in backbone.modules():
        if isinstance(getattr(part, "mask_token", None), nn.Parameter):  # DINOv3, DINOv2 with registers
            parameter_to_buffer(part, "mask_token")
    for name in ("layernorm", "post_layernorm", "rms_norm", "norm", "fc_norm", "pooler", "attn_pool", "head"):
        if isinstance(getattr(backbone, name, None), nn.Module):
            setattr(backbone, name, nn.Identity())
    maybe_install_capturing_hooks(tower)  # of hidden states; left to the first forward, that could not be compiled
    return tower


def parameter_to_buffer(module: nn.Module, name: str) -> None:
    """Keep a tensor that the code of a tower names but no output depends on, without a gradient to wait for."""
    tensor = module.get_parameter(name).detach()
    if tensor.is_meta:  # not so buffers of a model that vLLM builds, which stay where they are made
        tensor = torch.zeros(tensor.shape)
    delattr(module, name)
    module.register_buffer(name, tensor)


class KCFIStageProjection(nn.Module):
    """Stages of one date, L maps (B, C_tower, h, w) -> L maps (B, C, h, w), `KCFIConfig.stage_projection_size`.

    A layer norm without weights (the linear map behind it has them), a linear map and a GELU per stage.
    """

    def __init__(self, config: KCFIConfig) -> None:
        super().__init__()
        width, channels = config.tower.hidden_size, config.stage_channels
        self.linears = nn.ModuleList([nn.Linear(width, channels) for _ in range(config.num_stages)])

    def forward(self, stages: list[torch.Tensor]) -> list[torch.Tensor]:
        """See the class."""
        maps = []
        for linear, stage in zip(self.linears, stages, strict=True):
            rows = stage.movedim(1, -1)  # (B,h,w,C_tower)
            maps.append(F.gelu(linear(F.layer_norm(rows, rows.shape[-1:]))).movedim(-1, 1))
        return maps


class KCFIProjector(nn.Module):
    """Features (B, N, C_in) -> embeddings (B, N, D) of the language model (eq. 4), scattered over `<image>`.

    With `visual_token_pooling` p the features are first averaged over p x p patches: (B, N / p^2, D).
    """

    def __init__(self, config: KCFIConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.pooling = config.visual_token_pooling
        self.linear_1 = nn.Linear(config.change_width, width)
        self.linear_2 = nn.Linear(width, width) if config.projector == "mlp2x_gelu" else None

    def forward(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """See the class; `grid` is (h, w) with h * w = N."""
        if self.pooling > 1:
            maps = features.transpose(1, 2).unflatten(2, grid)
            features = F.avg_pool2d(maps, self.pooling).flatten(2).transpose(1, 2)
        hidden = self.linear_1(features.contiguous())  # rows, as the kernels want them that vLLM has for CPUs
        if self.linear_2 is not None:
            hidden = self.linear_2(F.gelu(hidden))
        return hidden


@auto_docstring
class KCFIPreTrainedModel(PreTrainedModel):
    config: KCFIConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True

    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    auto_class = "AutoModel"  # the one that loads this class

    def __init__(self, config: KCFIConfig) -> None:
        super().__init__(config)
        if config.text_model:  # fetched by from_pretrained
            self._keys_to_ignore_on_load_missing = [r"language_model\.", r"lm_head\."]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, *args: Any, use_safetensors: bool = True, **kwargs: Any
    ) -> Self:
        """As in transformers, but weights in a pickle are refused; a language model left out is fetched.

        Raises:
            ValueError: an index names other files than safetensors of its folder; or the language model that was left
                out cannot be put where it is to lie: on disk, or quantised.
        """
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        check_index(Path(source or "", kwargs.get("subfolder") or ""))
        loaded: Any = super().from_pretrained(*args, use_safetensors=use_safetensors, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
        if model.config.text_model:
            model._fetch_text_model(model.config.text_model, {k: v for k, v in kwargs.items() if k in HUB_OPTIONS})
        return cast(Self, loaded)

    def _fetch_text_model(self, source: str, hub_options: dict[str, Any]) -> None:
        """Copy the weights of a language model; from then on the model is whole, and saved as a whole."""
        base: Any = self.base_model
        if getattr(self, "is_quantized", False) or any(weight.is_meta for weight in base.language_model.parameters()):
            raise ValueError(
                f"This checkpoint leaves out its language model ({source}), which can be loaded neither quantised nor "
                "onto the disk: load it without, `save_pretrained` it, and load that folder."
            )
        revision = self.config.text_model_revision
        fetched: Any = load_tower(AutoModelForCausalLM, source, revision=revision, dtype=self.dtype, **hub_options)
        base.language_model.load_state_dict(fetched.base_model.state_dict())
        if self is not base:
            self.get_output_embeddings().load_state_dict(fetched.get_output_embeddings().state_dict())
        self.config.text_model = self.config.text_model_revision = None

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        if self.config.vision_config.model_type == "timm_wrapper":  # timm has a switch of its own
            base: Any = self.base_model
            base.vision_tower.timm_model.set_grad_checkpointing(enable)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, and the code beside the weights: the folder loads where kcfi is not installed."""
        self.config.auto_map = dict(AUTO_MAP)  # transformers would name the saved class alone
        self.register_for_auto_class(self.auto_class)
        super().save_pretrained(*args, **kwargs)


@auto_docstring(
    custom_intro="""
    The vision tower, the key change perceiver, the projector, the change detection head and the language model
    without its output layer.
    """
)
class KCFIModel(KCFIPreTrainedModel):
    def __init__(self, config: KCFIConfig) -> None:
        super().__init__(config)
        self.vision_tower = trim_tower(AutoModel.from_config(config.vision_config), config.last_block)
        self.stage_projection = KCFIStageProjection(config) if config.stage_projection_size else None
        self.key_change_perceiver = KeyChangePerceiver(config) if config.use_key_change_perceiver else None
        self.projector = KCFIProjector(config)
        self.change_detection_head = ChangeDetectionHead(config) if config.use_change_detection_head else None
        self.language_model = AutoModel.from_config(config.text_config)
        self.stage_cache: StageCache | None = None
        self.patch_size = config.patch_size
        self.token_size = config.visual_token_size
        # CLIP, SigLIP and ViT refuse other sizes than their own unless asked; DINOv2 needs no asking
        asked = "interpolate_pos_encoding" in inspect.signature(self.vision_tower.forward).parameters
        self.interpolation = {"interpolate_pos_encoding": True} if asked else {}
        self.post_init()

    def get_stage_features(
        self, pixel_values: torch.Tensor, **kwargs: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
        """What the shared tower says of both dates (eq. 1), from `stage_cache` where one is set, and its projection.

        `stage_cache` is a hook for a tower that does not change: a function (no module) that is called as
        `encode_dates` and gives equal features.

        Args:
            pixel_values: (B, 2, 3, H, W), before then after.
            **kwargs: for the tower, for example `output_attentions`.

        Returns:
            Stage features before and after, two lists of L maps (B, C, h, w), taken before the final norm and without
            class or register tokens; and the tower's own output.
        """
        encode = self.encode_dates if self.stage_cache is None else self.stage_cache
        before, after, outputs = encode(pixel_values, **kwargs)
        return *self.project(before, after), outputs

    def project(
        self, before: list[torch.Tensor], after: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Stages of both dates as the tower gives them -> as they are compared, see `stage_projection_size`."""
        if self.stage_projection is None:
            return before, after
        return self.stage_projection(before), self.stage_projection(after)

    def encode_dates(
        self, pixel_values: torch.Tensor, **kwargs: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
        """Run the shared tower on both dates: what `get_stage_features` reads, with its arguments, uncached.

        Raises:
            ValueError: shape other than (B, 2, 3, H, W), or sides that the patch size (times the pooling of the visual
                tokens) does not divide.
        """
        patch = self.patch_size
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            raise ValueError(f"pixel_values must be pairs, (B, 2, 3, H, W), not {tuple(pixel_values.shape)}.")
        height, width = pixel_values.shape[-2:]
        if height % self.token_size or width % self.token_size:
            raise ValueError(
                f"pixel_values of {height} x {width} px do not divide into squares of {self.token_size} px."
            )
        images = pixel_values.flatten(0, 1).to(self.vision_tower.dtype)  # (2B,3,H,W)
        layers = self.config.vision_feature_layers or []
        if self.config.vision_config.model_type == "timm_wrapper":
            # timm counts blocks from 0 and returns a compact list of maps
            outputs = self.vision_tower(images, output_hidden_states=[layer - 1 for layer in layers])
            maps = list(outputs.hidden_states)
        else:
            kwargs["output_hidden_states"] = kwargs.get("output_hidden_states") or layers
            outputs = self.vision_tower(images, **self.interpolation, **kwargs)
            grid = (height // patch, width // patch)
            states = [outputs.hidden_states[layer][:, -grid[0] * grid[1] :] for layer in layers]  # (2B,N,C), no CLS
            maps = [state.transpose(1, 2).unflatten(2, grid) for state in states]
        return [stage[0::2] for stage in maps], [stage[1::2] for stage in maps], outputs

    def get_change_features(self, before: list[torch.Tensor], after: list[torch.Tensor]) -> torch.Tensor:
        """Stage features of both dates, two lists of L maps (B, C, h, w) -> change features (B, N, change_width)."""
        if self.key_change_perceiver is not None:
            change = self.key_change_perceiver(before, after)
        else:
            change = (flatten_stages(after) - flatten_stages(before)).abs()
        context = {"none": (), "after": (after,), "bitemporal": (before, after)}[self.config.change_context]
        return torch.cat([change, *(flatten_stages(stages) for stages in context)], dim=-1)

    @can_return_tuple
    @auto_docstring(custom_intro="Encodes pairs: features for the language model, key change features, mask logits.")
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[Any, ...] | KCFIImageFeatures:
        r"""
        pixel_values (`torch.Tensor` of shape `(B, 2, 3, H, W)`):
            Pairs of images, before then after.
        """
        before, after, outputs = self.get_stage_features(pixel_values, **kwargs)
        features = self.compare(before, after, (pixel_values.shape[-2], pixel_values.shape[-1]))
        return KCFIImageFeatures(
            last_hidden_state=outputs.last_hidden_state.unflatten(0, (-1, 2)).flatten(1, 2),
            hidden_states=outputs.hidden_states,
            attentions=getattr(outputs, "attentions", None),
            **features,
        )

    def compare(
        self, before: list[torch.Tensor], after: list[torch.Tensor], size: tuple[int, int]
    ) -> KCFIImageFeatures:
        """Everything behind the vision tower that comes before the language model.

        Where the features of both dates are equal, nothing changed: a region of a pair is described alone by giving
        the after maps the before map's values outside of it.

        Args:
            before: stage features, L maps (B, C, h, w), of `get_stage_features`.
            after: the same of the later date.
            size: height and width of the mask logits in pixels.

        Returns:
            Image features without the vision tower's own states.
        """
        change = self.get_change_features(before, after)
        inputs = [] if self.config.visual_inputs == "change" else [flatten_stages(before), flatten_stages(after)]
        if self.config.visual_inputs != "bitemporal":
            inputs.append(change)
        grid = before[0].shape[-2:]
        embeddings = torch.cat([self.projector(features, grid) for features in inputs], dim=1)
        mask_logits = None
        if self.change_detection_head is not None:
            mask_logits = self.change_detection_head(change, grid, size)
        return KCFIImageFeatures(pooler_output=list(embeddings), change_features=change, mask_logits=mask_logits)

    def get_placeholder_mask(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """Positions (B, T, 1) of the `<image>` placeholders, checked against the number of features.

        Raises:
            ValueError: the numbers of placeholders and of features differ.
        """
        if input_ids is None:
            token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            placeholders = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            placeholders = input_ids == self.config.image_token_id
        tokens, features = placeholders.sum(), image_features.shape[0]
        torch_compilable_check(
            tokens == features,
            f"Image features and image tokens do not match, tokens: {tokens}, features: {features}",
        )
        return placeholders.unsqueeze(-1).to(inputs_embeds.device)

    @can_return_tuple
    @auto_docstring
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(  # type: ignore[misc]  # TransformersKwargs names position_ids too
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, KCFIImageFeatures] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Any, ...] | KCFIModelOutputWithPast:
        r"""
        pixel_values (`torch.Tensor` of shape `(B, 2, 3, H, W)`):
            Pairs of images, before then after.
        mm_encoder_outputs (`dict`, *optional*):
            `{"image": output of get_image_features}`: pairs that are already encoded, instead of `pixel_values`.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image = (mm_encoder_outputs or {}).get("image")
        if image is None and pixel_values is not None:
            image = self.get_image_features(pixel_values=pixel_values, return_dict=True)
        if image is not None:
            features = torch.cat(list(image.pooler_output), dim=0).to(inputs_embeds.device, inputs_embeds.dtype)
            placeholders = self.get_placeholder_mask(input_ids, inputs_embeds, features)
            inputs_embeds = inputs_embeds.masked_scatter(placeholders, features)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return KCFIModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=image,
            mask_logits=None if image is None else image.mask_logits,
        )


def check_output_layer(language_model: PreTrainedModel) -> None:
    """Refuse a language model whose logits are not a plain linear map of its last state: KCFI would change them.

    Args:
        language_model: a causal language model with its output layer.

    Raises:
        ValueError: a bias, scaled or soft-capped logits, or a last state of another width than the embeddings.
    """
    head, config = language_model.get_output_embeddings(), language_model.config
    plain = isinstance(head, nn.Linear) and head.bias is None and head.in_features == config.hidden_size
    if plain:
        with torch.no_grad():
            tokens = torch.arange(min(8, config.vocab_size))[None]
            states = language_model.base_model(tokens).last_hidden_state
            plain = torch.allclose(head(states), language_model(tokens).logits, atol=1e-4)
    if not plain:
        raise ValueError(
            f"The logits of {language_model.name_or_path} ({config.model_type}) are not a plain linear map of its "
            "last state (a bias, scaling, soft-capping or another width), which KCFI needs: choose another language "
            "model."
        )


def chunked_caption_loss(
    lm_head: nn.Module, states: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int
) -> torch.Tensor:
    """Eq. 8 without the logits of all positions, the largest tensor of training: `CHUNK` of them at a time.

    Args:
        lm_head: states of width D -> logits.
        states: (B, T, D), last states of the language model.
        labels: (B, T) ids of the tokens at these positions, -100 where nothing is learned.
        num_items: what the sum over the tokens is divided by.

    Returns:
        The loss, in fp32. With several chunks the backward pass computes the logits again.
    """
    states, labels = states[:, :-1].flatten(0, 1), labels[:, 1:].flatten()

    def score(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = lm_head(states).float()
        return F.cross_entropy(logits, labels.to(logits.device), ignore_index=-100, reduction="sum")

    chunks = list(zip(states.split(CHUNK), labels.split(CHUNK), strict=True))
    if len(chunks) == 1:
        total = score(states, labels)
    else:
        total = torch.stack([checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks]).sum()
    return total / (num_items.to(total.device) if torch.is_tensor(num_items) else num_items)


@auto_docstring(
    custom_intro="""
    The KCFI model: captions of what changed between two dates, and masks of where.
    """
)
class KCFIForConditionalGeneration(KCFIPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    auto_class = "AutoModelForImageTextToText"
    # Trainer then divides by the accumulation, and ranks average: both losses are means over the micro-batches. Else
    # it would count the tokens of the whole step for the caption loss, and add up the mask losses.
    accepts_loss_kwargs = False

    def __init__(self, config: KCFIConfig) -> None:
        super().__init__(config)
        self.model = KCFIModel(config)
        # hook: the function (no module) that computes the caption loss of `skip_logits`; a fused kernel may replace it
        self.caption_loss_function: Callable[..., torch.Tensor] = chunked_caption_loss
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)  # GPT-2: "...wte"
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    @classmethod
    def from_towers(
        cls, config: KCFIConfig, vision_tower: PreTrainedModel, language_model: PreTrainedModel
    ) -> "KCFIForConditionalGeneration":
        """Put two towers into a model; perceiver, projector and head start from random weights.

        `kcfi.join_towers` loads the towers, and makes config and processor to match.

        Args:
            config: of the model, with the configs of these towers.
            vision_tower: a ViT; it becomes part of the model, without what nothing reads.
            language_model: a causal language model with embeddings for `config.image_token_id`; likewise.

        Returns:
            The model, in evaluation mode and of the language model's dtype. Of its generation settings only the
            special tokens stay: it decodes greedily, without the penalties that instruct models ship.

        Raises:
            ValueError: the language model's logits are not a plain linear map of its last state.
        """
        check_output_layer(language_model)
        with torch.device("meta"):  # so that the towers are not allocated twice
            model = cls(config)
        parts = ("stage_projection", "key_change_perceiver", "projector", "change_detection_head")
        for part in (getattr(model.model, name) for name in parts):
            if part is not None:
                part.to_empty(device="cpu").to(language_model.dtype).apply(model._init_weights)
        tower: Any = trim_tower(vision_tower, config.last_block)
        model.model.vision_tower = tower.to(language_model.dtype)
        model.model.language_model = language_model.base_model
        model.lm_head = language_model.get_output_embeddings()
        model.tie_weights()
        special = {name: getattr(language_model.generation_config, name) for name in SPECIAL_TOKENS}
        model.generation_config = GenerationConfig(do_sample=False, **special)
        return model.eval()

    def get_output_embeddings(self) -> nn.Module:
        """The output layer of the language model."""
        return self.lm_head

    @auto_docstring
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[Any, ...] | KCFIImageFeatures:
        r"""
        pixel_values (`torch.Tensor` of shape `(B, 2, 3, H, W)`):
            Pairs of images, before then after.
        """
        return self.model.get_image_features(pixel_values=pixel_values, **kwargs)

    @can_return_tuple
    @auto_docstring
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(  # type: ignore[misc]  # TransformersKwargs names position_ids too
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        mask_labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, KCFIImageFeatures] | None = None,
        skip_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Any, ...] | KCFICausalLMOutputWithPast:
        r"""
        pixel_values (`torch.Tensor` of shape `(B, 2, 3, H, W)`):
            Pairs of images, before then after.
        mask_labels (`torch.Tensor` of shape `(B, H, W)`, *optional*):
            Class ids, 255 = no label. A pair without a mask has 255 everywhere and adds nothing to the loss.
        mm_encoder_outputs (`dict`, *optional*):
            `{"image": output of get_image_features}`: pairs that are already encoded, instead of `pixel_values`.
        skip_logits (`bool`, *optional*, defaults to `False`):
            With `labels`, compute the caption loss without the logits of all positions, the largest tensor of
            training, and return none.

        Example:

        ```python
        >>> from PIL import Image
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor
        >>> import kcfi

        >>> folder = kcfi.embedded_model()
        >>> model = AutoModelForImageTextToText.from_pretrained(folder)
        >>> processor = AutoProcessor.from_pretrained(folder)
        >>> pair = [Image.open("before.png"), Image.open("after.png")]
        >>> inputs = processor(images=[pair], text=[processor.prompt()], return_tensors="pt")
        >>> caption = processor.decode(model.generate(**inputs)[0, inputs.input_ids.shape[1] :])
        ```"""
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)

        logits = caption_loss = detection_loss = None
        if labels is not None and kwargs.get("num_items_in_batch") is None:
            # the mean over the learned tokens; without one, for pairs without a caption, 0 and no division by it
            kwargs["num_items_in_batch"] = (labels[:, 1:] != -100).sum().clamp(min=1)
        if skip_logits and labels is not None:
            caption_loss = self.caption_loss_function(self.lm_head, states, labels, kwargs["num_items_in_batch"])
        else:
            logits = self.lm_head(states)
            if labels is not None:  # eq. 8
                caption_loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
                )
        if mask_labels is not None and outputs.mask_logits is not None:
            detection_loss = mask_loss(outputs.mask_logits, mask_labels)
        losses: list[Any] = [loss for loss in (caption_loss, detection_loss) if loss is not None]

        return KCFICausalLMOutputWithPast(
            loss=sum(losses[1:], losses[0]) if losses else None,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
            caption_loss=caption_loss,
            mask_loss=detection_loss,
            mask_logits=outputs.mask_logits,
        )


__all__ = ["KCFIForConditionalGeneration", "KCFIModel", "KCFIPreTrainedModel"]
