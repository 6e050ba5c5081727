"""A large speech-text model in the Hugging Face way: Whisper encoder, window-level Q-Former, causal LLM."""

from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_lsm import AudioTiming, LsmConfig, LsmProjectorConfig
from .modeling_lsm import LsmForConditionalGeneration, LsmModel, LsmPreTrainedModel
from .pipeline_lsm import TASK, LsmPipeline
from .processing_lsm import AUDIO_TOKEN, LsmProcessor, load_waveform, make_chat
from .projectors_lsm import PROJECTORS
from .speech_encoder_lsm import LsmSpeechEncoder


__version__ = "0.1.0"

AutoConfig.register(LsmConfig.model_type, LsmConfig)
AutoModel.register(LsmConfig, LsmModel)
AutoModelForMultimodalLM.register(LsmConfig, LsmForConditionalGeneration)
AutoProcessor.register(LsmConfig, LsmProcessor)
if TASK not in PIPELINE_REGISTRY.supported_tasks:
    PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=LsmPipeline, pt_model=AutoModelForMultimodalLM)

# So that saved checkpoints carry this code and say where each class is.
LsmConfig.register_for_auto_class()
LsmModel.register_for_auto_class("AutoModel")
LsmForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")
LsmProcessor.register_for_auto_class()

__all__ = [
    "AUDIO_TOKEN",
    "PROJECTORS",
    "AudioTiming",
    "LsmConfig",
    "LsmForConditionalGeneration",
    "LsmModel",
    "LsmPipeline",
    "LsmPreTrainedModel",
    "LsmProcessor",
    "LsmProjectorConfig",
    "LsmSpeechEncoder",
    "load_waveform",
    "make_chat",
]
