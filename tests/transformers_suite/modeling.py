"""A tiny LSM of every projector under transformers' own tests of models and configurations.

`tests/test_transformers_suite.py` puts this file where such tests stand: `tests/models/lsm/test_modeling_lsm.py`.
"""

import unittest
from unittest.mock import patch

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device

from modeling_lsm import LsmConfig, LsmForConditionalGeneration, LsmModel

from ... import test_modeling_common
from ...generation.test_utils import GenerationTesterMixin
from ...test_configuration_common import ConfigTester
from . import tiny


# The mixins look a model's kind up in transformers' own tables of names.
MODEL_MAPPING_NAMES[LsmConfig.model_type] = LsmModel.__name__
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[LsmConfig.model_type] = LsmForConditionalGeneration.__name__

random_ids = test_modeling_common.ids_tensor


class LsmModelTester:
    """Configuration and inputs of a tiny LSM, and the sizes that the mixins expect in its outputs."""

    batch_size = 7  # what the comparisons of attention implementations ask for; they would invent the other clips
    seq_length = 16
    mel_frames = 64
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    vocab_size = 99
    audio_token_id = 5  # low: the tests of resizing cut the vocabulary
    is_training = True

    def __init__(self, parent, projector_type: str):
        self.parent = parent
        self.projector_type = projector_type

    def get_config(self) -> LsmConfig:
        return LsmConfig(
            audio_config=tiny.whisper_config(vocab_size=20, max_source_positions=self.mel_frames // 2).to_dict(),
            text_config=tiny.llm_config(vocab_size=self.vocab_size, max_position_embeddings=64).to_dict(),
            audio_token_id=self.audio_token_id,
            projector_type=self.projector_type,
            projector_hidden_size=32,
            projector_num_attention_heads=4,
            window_size=8,
        )

    def random_ids(self, shape, vocab_size, **kwargs) -> torch.Tensor:
        """Random tokens of text: a placeholder would ask for audio."""
        ids = random_ids(shape, vocab_size, **kwargs)
        return ids.masked_fill(ids == self.audio_token_id, self.audio_token_id + 1)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        lengths = torch.tensor([64, 33, 32, 57, 1, 48, 64], device=torch_device)
        input_ids = self.random_ids([self.batch_size, self.seq_length], self.vocab_size)
        for row, count in enumerate(config.timing.audio_tokens(lengths).tolist()):
            input_ids[row, 1 : 1 + count] = self.audio_token_id
        shape = [self.batch_size, config.audio_config.num_mel_bins, self.mel_frames]
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "input_features": test_modeling_common.floats_tensor(shape),
            "input_features_mask": (torch.arange(self.mel_frames, device=torch_device) < lengths[:, None]).long(),
        }


class LsmModelTest(test_modeling_common.ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    """The window-level Q-Former."""

    all_model_classes = (LsmModel, LsmForConditionalGeneration)
    additional_model_inputs = ["input_features", "input_features_mask"]
    test_can_init_all_missing_weights_before_2023 = True  # our files do not say when they were written
    _is_composite = True
    projector_type = "qformer"

    def setUp(self):
        self.model_tester = LsmModelTester(self, self.projector_type)
        self.enterContext(patch.object(test_modeling_common, "ids_tensor", self.model_tester.random_ids))

    def test_config(self):
        config_tester = ConfigTester(self, LsmConfig, has_text_modality=False, window_size=8)
        config_tester.run_common_tests()


class LsmMlpModelTest(LsmModelTest):
    projector_type = "mlp"


class LsmConvModelTest(LsmModelTest):
    projector_type = "conv"


class LsmTransformerModelTest(LsmModelTest):
    projector_type = "transformer"
