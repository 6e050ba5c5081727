"""
Trains an LSM with TRL's `SFTTrainer`.

    python train_sft.py --model_name_or_path outputs/lsm --dataset outputs/augmented --output_dir outputs/sft

All arguments of `SFTConfig` and TRL's `ModelConfig` may be given, too, on the command line or in a YAML file:
`--config recipes/lora_8b.yaml`. Stopped at any moment and started again with the same command, it goes on from its
last checkpoint. On several GPUs: `torchrun --nproc_per_node 4 train_sft.py … --deepspeed ds_configs/zero1.json`, or
`accelerate launch` or `deepspeed` instead of `torchrun`.
"""

import logging
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig, SFTConfig, TrlParser, get_peft_config, get_quantization_config
from trl.trainer.utils import global_then_local_main_first

from modeling_lsm import LsmForConditionalGeneration, LsmProcessor
from modeling_lsm.augmentation import check_provenance, load_tasks
from modeling_lsm.data.collating import SpeechTextCollator
from modeling_lsm.data.loading import ask_for_transcriptions, load_rows, mix_rows
from modeling_lsm.data.preparing import prepare_rows, skip_unreadable
from modeling_lsm.data.sound_changes import AudioAugmentation
from modeling_lsm.files import claim_folder
from modeling_lsm.saving_lsm import published_bases
from modeling_lsm.slim_lsm import can_be_slim
from modeling_lsm.training import (
    FeatureCache,
    HeldOutAnswers,
    LsmTrainer,
    ScriptArguments,
    add_lora,
    align,
    check_arguments,
    describe_run,
    encoder_key,
    last_checkpoint,
    set_trained_parts,
)


logger = logging.getLogger(__name__)


def main(script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    check_arguments(script_args, training_args, model_args)
    state = training_args.distributed_state
    if is_deepspeed_zero3_enabled():
        import deepspeed

        # The model is spread over the processes when it is loaded.
        deepspeed.init_distributed(timeout=timedelta(seconds=training_args.ddp_timeout))
    set_seed(training_args.seed)

    # ---- the model ----
    quantization_config = get_quantization_config(model_args)
    if quantization_config is not None:
        # State-space mixers multiply by weights of some of their layers themselves.
        mixers = r"lsm\.language_model\..*\.(mamba|mixer)\.(x_proj|dt_proj|out_proj)"
        quantization_config.llm_int8_skip_modules = ["lsm.audio_tower", "lsm.projector", "lm_head", mixers]
    processor = LsmProcessor.from_pretrained(model_args.model_name_or_path, revision=model_args.model_revision)
    model = LsmForConditionalGeneration.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=quantization_config,
    )
    processor.check_matches(model.config)
    if not script_args.allow_foreign_targets and script_args.recipe != "vanilla":
        for dataset in script_args.dataset:
            check_provenance(dataset, model.config, model_args.model_name_or_path, processor.chat_template)
    lora_config = get_peft_config(model_args)
    if lora_config is not None:
        add_lora(model, lora_config)
    set_trained_parts(model, script_args.train)
    if training_args.bf16 and not training_args.deepspeed:
        for parameter in model.parameters():
            if parameter.requires_grad:  # small steps would be lost in bfloat16; DeepSpeed keeps copies of its own
                parameter.data = parameter.data.float()
    if training_args.push_to_hub:  # refused now rather than when the training has ended
        published_bases(model.config, slim=can_be_slim(model) and not script_args.whole_checkpoints)

    # ---- the data ----
    augment = make_augmentation(script_args)
    read = partial(read_rows, script_args, training_args, processor)
    with global_then_local_main_first():
        is_vanilla = script_args.recipe == "vanilla"
        sets = [read(name, script_args.split, is_vanilla, script_args.streaming) for name in script_args.dataset]
        sets += [read(name, script_args.split, True, script_args.streaming) for name in script_args.asr_dataset]
        rows = mix_rows(sets, script_args.dataset_weights or None, training_args.seed)
        held_out = None
        if script_args.held_out is not None:
            only_asr = is_vanilla or not script_args.dataset
            held_out = read(script_args.held_out, script_args.held_out_split, only_asr, streaming=False)
    feature_cache = None
    if script_args.feature_cache is not None:
        if not is_deepspeed_zero3_enabled():
            model.to(training_args.device)
        with torch.autocast(training_args.device.type, torch.bfloat16, enabled=training_args.bf16):
            feature_cache = FeatureCache(script_args.feature_cache, encoder_key(model, processor))
            for clips in filter(None, (rows, held_out)):
                feature_cache.build(
                    clips,
                    model,
                    processor,
                    process_index=training_args.process_index,
                    num_processes=training_args.world_size,
                    num_workers=training_args.dataloader_num_workers,
                )
        state.wait_for_everyone()

    # ---- training ----
    if state.is_main_process:  # not before the data has turned out to be usable
        run = describe_run(script_args, training_args, model_args, model)
        claim_folder(Path(training_args.output_dir), "run.json", run)
    state.wait_for_everyone()
    if script_args.align_steps > 0:
        align(
            model,
            processor,
            one_row_per_clip(rows),
            output_dir=training_args.output_dir,
            steps=script_args.align_steps,
            batch_size=script_args.align_batch_size,
            learning_rate=script_args.align_learning_rate,
            held_out_rows=held_out and one_row_per_clip(held_out),
            feature_cache=feature_cache,
            bf16=training_args.bf16,
            num_workers=training_args.dataloader_num_workers,
            seed=training_args.seed,
            device=training_args.device,
        )
    # The trainer would upload files of its own at every save.
    push_to_hub, training_args.push_to_hub = training_args.push_to_hub, False
    end_tokens = model.generation_config.eos_token_id
    collator = SpeechTextCollator(
        processor,
        training_args.max_length,
        end_tokens,
        augment=augment,
        feature_cache=feature_cache,
        with_transcript=script_args.distill_weight > 0,
    )
    trainer = LsmTrainer(
        model=model,
        args=training_args,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=processor,
        data_collator=collator,
        projector_learning_rate=script_args.projector_learning_rate,
        distill_weight=script_args.distill_weight,
        max_batch_tokens=script_args.max_batch_tokens,
        slim=not script_args.whole_checkpoints,
    )
    if script_args.answer_steps > 0:
        trainer.add_callback(
            HeldOutAnswers(trainer, held_out, script_args.answer_steps, with_wer=script_args.answer_wer)
        )
    trainer.train(
        resume_from_checkpoint=training_args.resume_from_checkpoint or last_checkpoint(training_args.output_dir)
    )

    trainer.save_state()
    trainer.save_model()
    if push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()


def read_rows(
    script_args: ScriptArguments,
    training_args: SFTConfig,
    processor: LsmProcessor,
    source: str,
    split: str,
    as_transcription: bool,
    streaming: bool,
) -> Dataset | IterableDataset:
    """The rows of a dataset, without those that cannot be read; if asked for, they all ask for transcripts."""
    columns = ("audio", "text") if as_transcription else ("instruction", "target")
    rows = load_rows(source, split, script_args.dataset_config, streaming=streaming, columns=columns)
    if as_transcription:
        rows = ask_for_transcriptions(rows, load_tasks(["transcription"], target_language="")[0].instructions)
    slowest_speed = min([1.0, *script_args.augment_speed])
    if streaming:
        return skip_unreadable(rows, processor, script_args.max_unreadable, slowest_speed)
    return prepare_rows(
        rows,
        processor,
        training_args.max_length,
        script_args.max_unreadable,
        training_args.dataset_num_proc,
        slowest_speed,
    )


def one_row_per_clip(rows: Dataset) -> Dataset:
    """The rows with speech and its words, each clip once, however many targets it has."""
    words = rows["text"][:]
    first = {clip: row for row, clip in reversed(list(enumerate(rows["audio_hash"][:]))) if clip and words[row]}
    if not first:
        raise ValueError("--align_steps needs the transcripts of the clips, in a column `text`; no row has one.")
    return rows.select(sorted(first.values()))


def make_augmentation(script_args: ScriptArguments) -> AudioAugmentation | None:
    """The changes that are made to the training audio, if any are asked for."""
    settings = {
        "speed": script_args.augment_speed,
        "level_db": script_args.augment_level_db,
        "noise_snr_db": script_args.augment_noise_snr_db,
        "noise_dir": script_args.augment_noise_dir,
        "spec_augment": script_args.augment_spec,
    }
    settings = {name: setting for name, setting in settings.items() if setting}
    return AudioAugmentation(**settings) if settings else None


def make_parser() -> TrlParser:
    """The parser of the command line, with defaults that suit the machine and the data."""
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    has_gpu = torch.accelerator.is_available()
    parser.set_defaults(
        use_cpu=not has_gpu,
        bf16=has_gpu,
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        ddp_timeout=24 * 3600,  # seconds; the first process reads all clips while the others wait
    )
    return parser


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_float32_matmul_precision("high")
    main(*make_parser().parse_args_and_config())
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()  # a process that exits with it may abort
