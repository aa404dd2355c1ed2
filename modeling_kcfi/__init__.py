"""The KCFI models and their configuration; this folder travels to the Hub with the weights."""

from .configuration_kcfi import KCFIConfig
from .modeling_kcfi import KCFIForConditionalGeneration, KCFIModel, KCFIPreTrainedModel

__all__ = ["KCFIConfig", "KCFIForConditionalGeneration", "KCFIModel", "KCFIPreTrainedModel"]
