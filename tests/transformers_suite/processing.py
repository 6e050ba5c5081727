"""The LSM's processor under transformers' own tests of processors.

`tests/test_transformers_suite.py` puts this file where such tests stand: `tests/models/lsm/test_processing_lsm.py`.
"""

import unittest
from inspect import unwrap
from unittest.mock import patch

from transformers import WhisperFeatureExtractor

from modeling_lsm import LsmProcessor
from modeling_lsm.composing import read_chat_template

from ...test_processing_common import ProcessorTesterMixin
from . import tiny


CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] %}{{ call['function'] | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class LsmProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    """Clips padded to the encoder's 30 s, as Whisper's feature extractor does."""

    processor_class = LsmProcessor
    encoder_padding = "max_length"

    # The mixin asks for librosa, with which transformers decodes; `LsmProcessor` decodes by itself.
    test_chat_template_audio_sampling_rate = unwrap(ProcessorTesterMixin.test_chat_template_audio_sampling_rate)

    def test_apply_chat_template_tool_calls_no_content(self):
        # Unless it is told otherwise, `LsmProcessor` gives tensors; the mixin expects lists.
        apply = LsmProcessor.apply_chat_template
        with patch.object(
            LsmProcessor, "apply_chat_template", lambda *args, **kwargs: apply(*args, **kwargs).tolist()
        ):
            super().test_apply_chat_template_tool_calls_no_content()

    @classmethod
    def _setup_feature_extractor(cls):
        return WhisperFeatureExtractor(feature_size=80)

    @classmethod
    def _setup_tokenizer(cls):
        return tiny.make_processor().tokenizer

    @classmethod
    def prepare_processor_dict(cls):
        tokenizer = tiny.make_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        return {
            "chat_template": read_chat_template(None, tokenizer),
            "window_size": 8,
            "encoder_padding": cls.encoder_padding,
        }


class LsmProcessorOfUnpaddedClipsTest(LsmProcessorTest):
    """Clips at their own duration."""

    encoder_padding = "longest"

    @unittest.skip("Whisper's feature extractor pads to 30 s; this mode does not.")
    def test_subprocessor_defaults_3_audio(self):
        pass
