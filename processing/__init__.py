"""Images, text and results of the KCFI models; this folder travels to the Hub with the weights."""

from .describer_kcfi import ChangeReport, Describer, Region
from .image_processing_kcfi import NO_LABEL, KCFIImageProcessor, KCFIImageProcessorPil
from .pipeline_kcfi import ChangeCaptioningPipeline
from .processing_kcfi import INSTRUCTIONS, KCFIProcessor
from .reading_kcfi import InputError, refusing

__all__ = [
    "INSTRUCTIONS",
    "NO_LABEL",
    "ChangeCaptioningPipeline",
    "ChangeReport",
    "Describer",
    "InputError",
    "KCFIImageProcessor",
    "KCFIImageProcessorPil",
    "KCFIProcessor",
    "Region",
    "refusing",
]
