"""Images, text and results of the KCFI models; this folder travels to the Hub with the weights."""

from .image_processing_kcfi import InputError, KCFIImageProcessor, KCFIImageProcessorPil
from .pipeline_kcfi import ChangeCaptioningPipeline
from .processing_kcfi import INSTRUCTIONS, KCFIProcessor

__all__ = [
    "INSTRUCTIONS",
    "ChangeCaptioningPipeline",
    "InputError",
    "KCFIImageProcessor",
    "KCFIImageProcessorPil",
    "KCFIProcessor",
]
