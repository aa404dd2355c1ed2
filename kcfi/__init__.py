"""KCFI: remote sensing image change captioning, native to Hugging Face Transformers.

`import kcfi` registers the Auto classes and the `change-captioning` pipeline.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.integrations import peft
from transformers.pipelines import PIPELINE_REGISTRY

from kcfi.modeling_kcfi import KCFIConfig, KCFIForConditionalGeneration, KCFIModel
from kcfi.models import embedded_model, load
from kcfi.processing import (
    ChangeCaptioningPipeline,
    Describer,
    KCFIImageProcessor,
    KCFIImageProcessorPil,
    KCFIProcessor,
)
from kcfi.towers import join_towers

# transformers 5.24.0 asks for a peft that is not released; the code behind the check is that of 5.23, which took 0.20
if peft.MIN_PEFT_VERSION == "0.22.0":
    peft.MIN_PEFT_VERSION = "0.20.0"

AutoConfig.register("kcfi", KCFIConfig)
AutoModel.register(KCFIConfig, KCFIModel)
AutoModelForImageTextToText.register(KCFIConfig, KCFIForConditionalGeneration)
AutoImageProcessor.register(
    KCFIConfig, image_processor_classes={"torchvision": KCFIImageProcessor, "pil": KCFIImageProcessorPil}
)
AutoProcessor.register(KCFIConfig, KCFIProcessor)
PIPELINE_REGISTRY.register_pipeline(
    "change-captioning",
    pipeline_class=ChangeCaptioningPipeline,
    pt_model=AutoModelForImageTextToText,
    type="multimodal",
)


__all__ = [
    "ChangeCaptioningPipeline",
    "Describer",
    "KCFIConfig",
    "KCFIForConditionalGeneration",
    "KCFIImageProcessor",
    "KCFIModel",
    "KCFIProcessor",
    "embedded_model",
    "join_towers",
    "load",
]
