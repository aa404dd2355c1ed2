"""KCFI: remote sensing image change captioning, native to Hugging Face Transformers.

`import kcfi` registers the Auto classes.
"""

from importlib.resources import files

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from kcfi.modeling_kcfi import KCFIConfig, KCFIForConditionalGeneration, KCFIModel

AutoConfig.register("kcfi", KCFIConfig)
AutoModel.register(KCFIConfig, KCFIModel)
AutoModelForImageTextToText.register(KCFIConfig, KCFIForConditionalGeneration)


def embedded_model() -> str:
    """Folder of `kcfi-tiny`, the model that is installed with the package."""
    return str(files("kcfi.hub_configs") / "kcfi-tiny")


__all__ = ["KCFIConfig", "KCFIForConditionalGeneration", "KCFIModel", "embedded_model"]
