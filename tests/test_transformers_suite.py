"""transformers' own tests of models, configurations and processors, run on tiny LSMs of every projector.

transformers' source distribution holds them as mixins; `tests/transformers_suite` derives from these. They run in a
process of their own, in the folders that they expect, where `tests` is transformers' package and not this one.

Not run: what the source distribution lacks, `GenerationTesterMixin` (our own tests generate with every family, and in
every way) and `ExportTesterMixin`; and `PipelineTesterMixin`, which knows no task with audio and text and takes tiny
models of transformers' own families from the Hub.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
import transformers

from demo.download import fetch_source


ROOT = Path(__file__).parent.parent
REQUIREMENT = "transformers==5.23.0"
SHA256 = "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71"

# Where transformers keeps a model's tests.
OURS = {
    "transformers_suite/modeling.py": "tests/models/lsm/test_modeling_lsm.py",
    "transformers_suite/processing.py": "tests/models/lsm/test_processing_lsm.py",
    "tiny.py": "tests/models/lsm/tiny.py",
}
# What the mixins import and the source distribution lacks.
STAND_INS = {
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/utils/test_configuration_utils.py": "config_common_kwargs = {}  # of no use to configs with sub-configs\n",
    # The mixins take recordings from the Hub.
    "utils/fetch_hub_objects_for_ci.py": (
        "import os\n\n\n"
        "def url_to_local_path(url):\n"
        "    return os.environ['LSM_TEST_CLIP'] if 'audio' in url else url\n"
    ),
}

MODEL_CLASSES = {"LsmModelTest", "LsmMlpModelTest", "LsmConvModelTest", "LsmTransformerModelTest"}
PROCESSOR_CLASSES = {"LsmProcessorTest", "LsmProcessorOfUnpaddedClipsTest"}

# Every test that is skipped, under the reason that transformers gives for it.
MODEL_SKIPS = {
    # There is no GPU, and no kernel for one, in the pinned environment.
    "test requires accelerator": [
        "test_can_load_with_device_context_manager",
        "test_can_load_with_global_device_set",
        "test_cpu_offload",
        "test_disk_offload_bin",
        "test_disk_offload_safetensors",
        "test_flex_attention_with_grads",
        "test_resize_embeddings_untied_with_deepspeed",
        "test_resize_tokens_embeddings_with_deepspeed",
        "test_sdpa_can_compile_dynamic",
        "test_sdpa_can_dispatch_on_flash",
    ],
    "test requires multiple accelerators": [
        "test_model_parallelism",
        "test_resize_embeddings_untied_with_deepspeed_multi_gpu",
        "test_resize_tokens_embeddings_with_deepspeed_multi_gpu",
    ],
    "test requires MPS": ["test_flash_attn_kernels_mps_inference_equivalence"],
    "test requires the kernels library": [
        "test_flash_attn_kernels_inference_equivalence",
        "test_kernels_can_load_without_crashing",
    ],
    "test requires Flash Attention": [
        "test_flash_attn_2_can_compile_with_attention_mask_None_without_graph_break",
        "test_flash_attn_2_can_dispatch_composite_models",
        "test_flash_attn_2_fp32_ln",
        "test_flash_attn_2_from_config",
        "test_flash_attn_2_inference_equivalence",
        "test_flash_attn_2_inference_equivalence_right_padding",
    ],
    "test requires Flash Attention 3": [
        "test_flash_attn_3_can_dispatch_composite_models",
        "test_flash_attn_3_from_config",
        "test_flash_attn_3_inference_equivalence",
        "test_flash_attn_3_inference_equivalence_right_padding",
    ],
    "test requires Flash Attention 4": [
        "test_flash_attn_4_can_dispatch_composite_models",
        "test_flash_attn_4_from_config",
        "test_flash_attn_4_inference_equivalence",
        "test_flash_attn_4_inference_equivalence_right_padding",
    ],
    "test is slow": ["test_torch_compile_for_training"],  # and needs an accelerator
    # An LSM has sub-configs, which other tests look at, and its head is that of a decoder.
    "LsmModel does not support SDPA": ["test_sdpa_can_dispatch_non_composite_models"],
    "No sequence-to-sequence language modeling head to check": ["test_encoder_decoder_loss_no_double_shift"],
    # The LLM of these tests is a Llama: no experts, no sliding window, rotary positions for the whole head.
    "LsmModel does not support grouped_mm": [
        "test_eager_matches_batched_and_grouped_inference_0_fp16",
        "test_eager_matches_batched_and_grouped_inference_1_fp32",
        "test_eager_matches_batched_and_grouped_inference_2_bf16",
    ],
    "This model has no sparse experts.": ["test_moe_models_record_router_logits"],
    "This model has no `output_router_logits` in its config.": ["test_output_router_logits_from_config"],
    "Model does not support sliding window mask": ["test_sliding_window_mask"],
    "This model does not have partial rope supported": ["test_model_rope_with_partial_rotation"],
    "Model does not have position embeddings": ["test_resize_position_vector_embeddings"],
    "<class 'modeling_lsm.modeling_lsm.LsmModel'> has no axial RoPE layer defined.": ["test_vision_axial_rope"],
    # No part is kept in float32, and no weight is renamed while it is loaded.
    **{
        f"{name} class has no _keep_in_fp32_modules or _keep_in_fp32_modules_strict attribute defined": [
            "test_keep_in_fp32_modules"
        ]
        for name in ("LsmModel", "LsmForConditionalGeneration")
    },
    **{
        f"{name} has no _keep_in_fp32_modules nor _keep_in_fp32_modules_strict attribute defined": [
            "test_keep_in_fp32_modules_exist"
        ]
        for name in ("LsmModel", "LsmForConditionalGeneration")
    },
    **{
        f"No conversion found for <class 'modeling_lsm.modeling_lsm.{name}'>": [
            "test_can_load_from_already_mapped_keys",
            "test_reverse_loading_mapping",
        ]
        for name in ("LsmModel", "LsmForConditionalGeneration")
    },
}
PROCESSOR = "<class 'modeling_lsm.processing_lsm.LsmProcessor'>"
OF_KWARGS = (
    "doubly_passed_kwargs",
    "kwargs_overrides_default_subprocessor_kwargs",
    "overlapping_text_image_kwargs_handling",
    "structured_kwargs_nested_from_dict",
    "subprocessor_defaults_preserved_by_kwargs",
    "unstructured_kwargs",
    "unstructured_kwargs_batched",
)
PROCESSOR_SKIPS = {
    # An LSM sees no images and no videos.
    f"image_processor attribute not present in {PROCESSOR}": [
        "test_apply_chat_template_image_0",
        "test_apply_chat_template_image_1",
        "test_args_overlap_kwargs",
        "test_subprocessor_defaults_1_images",
        *(f"test_{name}_0_images" for name in OF_KWARGS),
    ],
    f"video_processor attribute not present in {PROCESSOR}": [
        "test_apply_chat_template_decoded_video_0",
        "test_apply_chat_template_video_0",
        "test_apply_chat_template_video_1",
        "test_subprocessor_defaults_2_videos",
        *(f"test_{name}_1_videos" for name in OF_KWARGS),
    ],
    f"{PROCESSOR} doesn't support images with text.": ["test_processor_text_has_no_visual"],
    "Processor doesn't accept videos at input": ["test_apply_chat_template_video_frame_sampling"],
    # Names without a test behind them (those with parameters run) and one about videos.
    "test requires librosa": ["test_apply_chat_template_audio"],
    "test requires Torchcodec": [
        "test_apply_chat_template_decoded_video",
        "test_apply_chat_template_video",
        "test_chat_template_audio_from_video",
    ],
    # A helper that vLLM's backend for transformers' own models calls.
    "Processor doesn't support `_get_num_multimodal_tokens` yet": [
        "test_get_num_multimodal_tokens_matches_processor_call",
        "test_get_num_multimodal_tokens_matches_processor_call_audio",
        "test_get_num_multimodal_tokens_matches_processor_call_video",
        "test_replacement_offsets",
    ],
}
UNPADDED_SKIPS = {
    "Whisper's feature extractor pads to 30 s; this mode does not.": ["test_subprocessor_defaults_3_audio"]
}


class Report(NamedTuple):
    """What became of the tests."""

    run: dict[str, set[str]]  # class → names of its tests
    failed: list[str]
    skipped: dict[str, set[tuple[str, str]]]  # class → (test, reason)
    output: str


def lay_out(archive: Path, folder: Path) -> None:
    """Unpack transformers' tests into `folder` and put ours among them."""
    with tarfile.open(archive) as file:
        members = [member for member in file if re.match(r"[^/]+/tests/", member.name)]
        file.extractall(folder, members, filter="data")
    (unpacked,) = folder.iterdir()
    shutil.move(unpacked / "tests", folder)
    for source, target in OURS.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "tests" / source, folder / target)
    for target, text in STAND_INS.items():
        assert not (folder / target).exists(), f"{REQUIREMENT} holds {target} by now: remove its stand-in"
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / target).write_text(text, encoding="utf-8")
    for package in {path.parent for path in (folder / "tests").rglob("*.py")} | {folder / "tests/models"}:
        (package / "__init__.py").touch()


def read_report(path: Path, output: str) -> Report:
    """Read pytest's XML."""
    run, failed, skipped = defaultdict(set), [], defaultdict(set)
    for case in ElementTree.parse(path).iter("testcase"):
        name, test = case.get("classname").rpartition(".")[2], case.get("name")
        run[name].add(test)
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{name}.{test}")
        skipped[name] |= {(test, skip.get("message")) for skip in case.iter("skipped")}
    return Report(run, failed, skipped, output)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Report:
    folder = tmp_path_factory.mktemp("transformers")
    lay_out(fetch_source(REQUIREMENT, SHA256), folder)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT))),
        "TRANSFORMERS_TEST_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "LSM_TEST_CLIP": str(next((ROOT / "tests" / "fixtures" / "librivox").glob("*.flac"))),
    }
    options = ["--rootdir=.", "-p", "no:cacheprovider", "--disable-warnings", "--tb=short", "--junitxml=report.xml"]
    command = [sys.executable, "-m", "pytest", *options, "-q", "tests/models/lsm"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stdout[-5000:] + result.stderr[-5000:]
    return read_report(folder / "report.xml", result.stdout)


def flat(*tables: dict[str, list[str]]) -> set[tuple[str, str]]:
    """`(test, reason)` of every skip in the tables."""
    return {(test, reason) for table in tables for reason, tests in table.items() for test in tests}


def test_the_suite_is_that_of_the_pinned_transformers():
    assert REQUIREMENT in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert f"transformers=={transformers.__version__}" == REQUIREMENT


@pytest.mark.slow
def test_transformers_own_tests_pass(report):
    assert report.run.keys() == MODEL_CLASSES | PROCESSOR_CLASSES
    assert {name: len(tests) for name, tests in report.run.items()} == {
        **dict.fromkeys(MODEL_CLASSES, 158),
        **dict.fromkeys(PROCESSOR_CLASSES, 67),
    }
    assert report.failed == [], report.output[-20_000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODEL_CLASSES | PROCESSOR_CLASSES))
def test_every_skip_is_listed_with_its_reason(name, report):
    if name in MODEL_CLASSES:
        expected = flat(MODEL_SKIPS)
    elif name == "LsmProcessorOfUnpaddedClipsTest":
        expected = flat(PROCESSOR_SKIPS, UNPADDED_SKIPS)
    else:
        expected = flat(PROCESSOR_SKIPS)
    assert report.skipped[name] == expected
