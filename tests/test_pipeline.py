"""The pipeline: every way to call it, streaming, its refusals, and what it saves and publishes."""

import json
import re
import sys
from itertools import count
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import soundfile
import torch
from datasets import Audio, Dataset
from huggingface_hub import ModelCard
from transformers import GenerationConfig, TextIteratorStreamer
from transformers.pipelines.pt_utils import KeyDataset

from modeling_lsm import LsmForConditionalGeneration, LsmPipeline, LsmProcessor, make_chat, pipeline_lsm
from modeling_lsm.card_lsm import model_card
from tests import tiny
from tests.tiny import noise


TEXT = "Transcribe the speech."
SHORT = {"max_new_tokens": 6}
FILES = {
    "README.md",
    "assembling_lsm.py",
    "audio_files_lsm.py",
    "audio_lsm.py",
    "card_lsm.py",
    "chat_template.jinja",
    "config.json",
    "configuration_lsm.py",
    "fetching_lsm.py",
    "fingerprints.py",
    "first_release_lsm.py",
    "generation_config.json",
    "generation_lsm.py",
    "language_model_lsm.py",
    "model.safetensors",
    "modeling_lsm.py",
    "pipeline_lsm.py",
    "placeholders_lsm.py",
    "processing_lsm.py",
    "processor_config.json",
    "projectors_lsm.py",
    "questions_lsm.py",
    "resampling_lsm.py",
    "saving_lsm.py",
    "signals_lsm.py",
    "slim_lsm.py",
    "speech_encoder_lsm.py",
    "tokenizer.json",
    "tokenizer_config.json",
}


def answer(pipe, chat, **kwargs) -> str:
    """What the model says to `chat`, without the pipeline's help."""
    inputs = tiny.ask(pipe.processor, chat)
    sequences = pipe.model.generate(**inputs, **{**SHORT, **kwargs})
    return pipe.processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture
def clips() -> list:
    return [noise(0.4, 1), noise(31, 2), noise(2.2, 3)]


class TestCalls:
    def test_one_clip_in_every_form(self, pipe, tmp_path):
        clip = noise(1, 4)
        path = tmp_path / "clip.wav"
        soundfile.write(path, clip, 16_000, subtype="FLOAT")
        expected = [{"generated_text": answer(pipe, make_chat(TEXT, audio=clip))}]
        assert expected != [{"generated_text": ""}]
        for source in (
            clip,
            str(path),
            path,
            path.read_bytes(),
            (clip, 16_000),
            {"array": clip, "sampling_rate": 16_000},
            {"path": str(path), "bytes": None},
        ):
            assert pipe(source, text=TEXT, **SHORT) == expected
        assert pipe(audio=clip, text=TEXT, **SHORT) == expected
        assert pipe(clip, text=TEXT, sampling_rate=16_000, **SHORT) == expected
        assert pipe(clip, text=TEXT, generate_kwargs=SHORT) == expected

    def test_sampling_rate_of_a_bare_array(self, pipe):
        clip = tiny.tone(440, 1, 8_000)
        expected = answer(pipe, make_chat(TEXT, audio=(clip, 8_000)))
        assert pipe(clip, text=TEXT, sampling_rate=8_000, **SHORT) == [{"generated_text": expected}]
        assert pipe([clip], text=TEXT, sampling_rate=8_000, **SHORT) == [[{"generated_text": expected}]]

    def test_many_clips(self, pipe, clips):
        expected = [[{"generated_text": answer(pipe, make_chat(TEXT, audio=clip))}] for clip in clips]
        assert pipe(clips, text=TEXT, **SHORT) == expected
        assert len({str(one) for one in expected}) > 1

    def test_an_instruction_for_each_clip(self, pipe, clips):
        texts = ["Transcribe.", "Translate into French.", "Who speaks?"]
        expected = [
            [{"generated_text": answer(pipe, make_chat(text, audio=clip))}]
            for text, clip in zip(texts, clips, strict=True)
        ]
        assert pipe(clips, text=texts, **SHORT) == expected

    def test_many_instructions_for_one_clip(self, pipe, clips):
        texts = ["Transcribe.", "Translate into French."]
        expected = [[{"generated_text": answer(pipe, make_chat(text, audio=clips[0]))}] for text in texts]
        assert pipe(clips[0], text=texts, **SHORT) == expected

    def test_text_alone(self, pipe):
        questions = ["What is a window?", "And a door?"]
        expected = [
            [{"generated_text": answer(pipe, [{"role": "user", "content": question}])}] for question in questions
        ]
        assert pipe(text=questions[0], **SHORT) == expected[0]
        assert pipe(text=questions, **SHORT) == expected

    def test_chats(self, pipe, clips):
        chats = [
            make_chat("Transcribe.", audio=clips[0]),
            [{"role": "user", "content": "No speech."}],
            [
                *make_chat("And this?", audio=clips[2], target="Something."),
                {"role": "user", "content": [{"type": "text", "text": "Again?"}]},
            ],
        ]
        texts = [answer(pipe, chat) for chat in chats]
        full = [
            [{"generated_text": [*chat, {"role": "assistant", "content": text}]}]
            for chat, text in zip(chats, texts, strict=True)
        ]
        # A chat holds arrays, and those compare elementwise: compare what is written.
        assert repr(pipe(chats, **SHORT)) == repr(full)
        assert repr(pipe(chats[0], **SHORT)) == repr(full[0])
        assert repr(pipe(text=chats[1], **SHORT)) == repr(full[1])
        assert pipe(chats, return_full_text=False, **SHORT) == [[{"generated_text": text}] for text in texts]
        assert pipe(chats[2], return_full_text=False, **SHORT) == [{"generated_text": texts[2]}]
        assert pipe(clips[0], text="Transcribe.", return_full_text=True, **SHORT) == [{"generated_text": texts[0]}]

    def test_an_answered_chat_goes_on(self, pipe, clips):
        chat = pipe(make_chat("Transcribe.", audio=clips[0]), **SHORT)[0]["generated_text"]
        assert [message["role"] for message in chat] == ["user", "assistant"]
        chat = [*chat, {"role": "user", "content": "Why?"}]
        assert pipe(chat, return_full_text=False, **SHORT) == [{"generated_text": answer(pipe, chat)}]

    @pytest.mark.parametrize("batch_size", [2, 3, 16])
    def test_batch_size_changes_no_answer(self, pipe, clips, batch_size):
        chats = [
            *(make_chat(TEXT, audio=clip) for clip in clips),
            [{"role": "user", "content": "A question without any speech, and a long one at that."}],
            [
                {
                    "role": "user",
                    "content": [{"type": "audio", "audio": clips[1]}, {"type": "audio", "audio": clips[0]}],
                }
            ],
        ]
        options = {"return_full_text": False, "max_new_tokens": 12}
        assert pipe(chats, batch_size=batch_size, **options) == pipe(chats, **options)
        assert pipe(clips, text=TEXT, batch_size=batch_size, **SHORT) == pipe(clips, text=TEXT, **SHORT)

    def test_batch_size_of_the_pipeline(self, model, processor, clips, monkeypatch):
        pipe = LsmPipeline(model=model, processor=processor, device="cpu", batch_size=2)
        sizes = []
        generate = model.generate

        def record(**kwargs):
            sizes.append(len(kwargs["input_ids"]))
            return generate(**kwargs)

        monkeypatch.setattr(model, "generate", record)
        pipe(clips, text=TEXT, **SHORT)
        pipe(clips, text=TEXT, batch_size=3, **SHORT)
        assert sizes == [2, 1, 3]

    @pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"do_sample": True, "top_k": 1}], ids=["beams", "sampling"])
    def test_several_answers_each(self, pipe, clips, kwargs):
        answers = pipe(clips, text=TEXT, num_return_sequences=3, batch_size=3, **kwargs, **SHORT)
        assert [len(candidates) for candidates in answers] == [3, 3, 3]
        for clip, candidates in zip(clips, answers, strict=True):
            assert candidates == pipe(clip, text=TEXT, num_return_sequences=3, **kwargs, **SHORT)
        if "top_k" in kwargs:
            greedy = pipe(clips, text=TEXT, **SHORT)
            assert answers == [one * 3 for one in greedy]

    def test_no_clips_no_answers(self, pipe):
        assert pipe([], text=TEXT) == []

    def test_length_of_answers(self, pipe):
        """256 tokens unless someone says otherwise: the pipeline when it was made, or else the call."""
        pipe.model.generation_config.eos_token_id = None
        lengths = []
        generate = pipe.model.generate

        def record(**kwargs):
            sequences = generate(**kwargs)
            lengths.append(sequences.shape[1] - kwargs["input_ids"].shape[1])
            return sequences

        pipe.model.generate = record
        pipe(noise(0.1), text="?", eos_token_id=None)
        short = LsmPipeline(model=pipe.model, processor=pipe.processor, device="cpu", max_new_tokens=3)
        short(noise(0.1), text="?")
        short(noise(0.1), text="?", max_new_tokens=5)
        assert lengths == [256, 3, 5]

    def test_streaming(self, pipe):
        clip = noise(2, 6)
        # Letters and spaces, drawn by lot: a streamer hands out whole words.
        letters = pipe.tokenizer("abcdefg   ")["input_ids"]
        others = [token for token in range(264) if token not in letters]
        kwargs = {"do_sample": True, "top_k": 0, "suppress_tokens": others, "max_new_tokens": 30}
        torch.manual_seed(5)
        expected = pipe(clip, text=TEXT, **kwargs)[0]["generated_text"]
        torch.manual_seed(5)
        streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
        results = []
        thread = Thread(target=lambda: results.append(pipe(clip, text=TEXT, streamer=streamer, **kwargs)), daemon=True)
        thread.start()
        pieces = list(streamer)
        thread.join(timeout=60)
        assert "".join(pieces) == expected == results[0][0]["generated_text"]
        assert len([piece for piece in pieces if piece]) > 1


class TestManyQuestions:
    """What other pipelines take. A list or tuple gives a list, all else an iterator that reads as it is read."""

    @pytest.fixture
    def recordings(self, clips, tmp_path) -> list[str]:
        paths = [str(tmp_path / f"{index}.wav") for index in range(len(clips))]
        for path, clip in zip(paths, clips, strict=True):
            soundfile.write(path, clip, 16_000, subtype="FLOAT")
        return paths

    @pytest.fixture
    def expected(self, pipe, clips) -> list:
        return pipe(clips, text=TEXT, **SHORT)

    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_a_generator_is_read_a_batch_at_a_time(self, pipe, batch_size):
        read = []

        def endless():
            for seed in count():
                read.append(seed)
                yield noise(0.3, seed)

        answers = pipe(endless(), text=TEXT, batch_size=batch_size, **SHORT)
        assert iter(answers) is answers
        for number in range(4):
            assert next(answers) == pipe(noise(0.3, number), text=TEXT, **SHORT)
            assert len(read) == number // batch_size * batch_size + batch_size

    def test_datasets(self, pipe, recordings, expected):
        rows = Dataset.from_list([{"audio": path, "words": "?"} for path in recordings])
        rows = rows.cast_column("audio", Audio(decode=False))
        kinds = {
            "key dataset": KeyDataset(rows, "audio"),
            "column": rows["audio"],
            "rows": rows,
            "stream of rows": rows.to_iterable_dataset(),
            "stream's column": rows.to_iterable_dataset()["audio"],
            "map": map(Path, recordings),
        }
        for name, given in kinds.items():
            answers = pipe(given, text=TEXT, batch_size=2, **SHORT)
            assert not isinstance(answers, list), name
            assert list(answers) == expected, name

    def test_a_dataset_is_read_as_it_is_answered(self, pipe, recordings):
        class Recordings(torch.utils.data.Dataset):
            read = []

            def __len__(self):
                return len(recordings)

            def __getitem__(self, index):
                self.read.append(index)
                return recordings[index]

        answers = pipe(Recordings(), text=TEXT, **SHORT)
        next(answers)
        assert Recordings.read == [0]

    @pytest.mark.parametrize("kind", ["list", "dataset", "generator"])
    def test_workers_read(self, pipe, recordings, expected, kind):
        rows = Dataset.from_dict({"audio": recordings})
        given = {"list": recordings, "dataset": KeyDataset(rows, "audio"), "generator": (path for path in recordings)}
        workers = 1 if kind == "generator" else 2
        assert list(pipe(given[kind], text=TEXT, num_workers=workers, batch_size=2, **SHORT)) == expected

    def test_tuples_are_lists(self, pipe, clips, expected):
        assert pipe(tuple(clips), text=TEXT, **SHORT) == expected
        assert pipe(tuple((clip, 16_000) for clip in clips), text=(TEXT,) * 3, **SHORT) == expected
        chats = tuple(tuple(make_chat(TEXT, audio=clip)) for clip in clips)
        assert pipe(chats, return_full_text=False, **SHORT) == expected
        assert pipe(chats[0], return_full_text=False, **SHORT) == expected[0]

    def test_items_with_an_instruction_of_their_own(self, pipe, clips, expected):
        items = [{"audio": clip, "text": TEXT, "id": "a row's other columns"} for clip in clips]
        assert pipe(items[0], **SHORT) == expected[0]
        assert pipe(items, **SHORT) == expected
        assert list(pipe(iter(items), batch_size=3, **SHORT)) == expected
        assert pipe([{"audio": clip} for clip in clips], text=TEXT, **SHORT) == expected
        assert pipe({"text": "A window?"}, **SHORT) == pipe(text="A window?", **SHORT)
        clip = tiny.tone(440, 1, 8_000)
        told = pipe({"audio": clip, "text": TEXT, "sampling_rate": 8_000}, **SHORT)
        assert told == pipe(clip, text=TEXT, sampling_rate=8_000, **SHORT)

    def test_streams_of_chats_and_of_texts(self, pipe, clips, expected):
        chats = [make_chat(TEXT, audio=clip) for clip in clips]
        assert repr(list(pipe(iter(chats), **SHORT))) == repr(pipe(chats, **SHORT))
        texts = ["What is a window?", "And a door?"]
        assert list(pipe(text=iter(texts), **SHORT)) == pipe(text=texts, **SHORT)
        assert list(pipe(clips[0], text=iter(texts), **SHORT)) == pipe(clips[0], text=texts, **SHORT)
        assert list(pipe(iter(clips), text=[TEXT] * 3, **SHORT)) == expected
        assert list(pipe((clip for clip in ()), text=TEXT)) == []

    def test_refusals(self, pipe, clips):
        with pytest.raises(ValueError, match=r"two instructions, 'Say.' for all and 'it said' in an item.*KeyDataset"):
            pipe([{"audio": clips[0], "text": "it said"}], text="Say.")
        with pytest.raises(ValueError, match="is shorter than"):
            list(pipe(iter(clips), text=["a", "b"], **SHORT))
        with pytest.raises(ValueError, match="no instruction"):
            list(pipe(iter(clips)))
        with pytest.raises(ValueError, match="an instruction of type int"):
            pipe(clips[0], text=7)


class TestTemplates:
    TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "Looks up.", "parameters": {}}}]
    TEMPLATE = (
        "{% if tools %}tools: {{ tools | tojson }}{% endif %}{% for document in documents or [] %}{{ document.text }}"
        "{% endfor %}{% if enable_thinking %}think {{ effort }}{% endif %}"
    )

    @pytest.fixture
    def talkative(self, model) -> LsmPipeline:
        tokenizer = tiny.make_tokenizer()
        tokenizer.chat_template = self.TEMPLATE + tokenizer.chat_template
        return LsmPipeline(model=model, processor=tiny.make_processor(tokenizer), device="cpu")

    def prompts(self, pipe, monkeypatch) -> list[str]:
        """Where the prompts of all calls to come can be read."""
        prompts, generate = [], pipe.model.generate

        def record(input_ids, **kwargs):
            prompts.extend(pipe.processor.batch_decode(input_ids))
            return generate(input_ids=input_ids, **kwargs)

        monkeypatch.setattr(pipe.model, "generate", record)
        return prompts

    def test_arguments_reach_the_template(self, talkative, monkeypatch):
        prompts = self.prompts(talkative, monkeypatch)
        documents = [{"title": "A", "text": "the first document"}]
        for kwargs in (
            {},
            {"tools": self.TOOLS},
            {"documents": documents},
            {"enable_thinking": True, "chat_template_kwargs": {"effort": "hard"}},
        ):
            talkative(noise(0.3), text=TEXT, **kwargs, **SHORT)
        plain, tools, documents, thinking = prompts
        assert "tools" not in plain and "think" not in plain
        assert '"look_up"' in tools and "the first document" in documents and "think hard" in thinking

    def test_of_the_pipeline_and_of_a_call(self, model, talkative, monkeypatch):
        pipe = LsmPipeline(model=model, processor=talkative.processor, device="cpu", enable_thinking=True)
        prompts = self.prompts(pipe, monkeypatch)
        pipe(noise(0.3), text=TEXT, **SHORT)
        pipe(noise(0.3), text=TEXT, tools=self.TOOLS, **SHORT)
        pipe(noise(0.3), text=TEXT, enable_thinking=False, **SHORT)
        assert ["think" in prompt for prompt in prompts] == [True, True, False]
        assert ["look_up" in prompt for prompt in prompts] == [False, True, False]

    def test_a_tools_answer(self, talkative):
        chat = [
            *make_chat("Look it up.", audio=noise(0.3)),
            {"role": "assistant", "content": None, "tool_calls": []},
            {"role": "tool", "content": "a window"},
        ]
        talkative.processor.chat_template = talkative.processor.chat_template.replace(
            "message['content'] +", "(message['content'] or 'nothing') +"
        )
        (answered,) = talkative(chat, tools=self.TOOLS, **SHORT)
        assert [message["role"] for message in answered["generated_text"]] == [
            "user",
            "assistant",
            "tool",
            "assistant",
        ]

    def test_arguments_of_the_processor(self, pipe, monkeypatch):
        prompts = self.prompts(pipe, monkeypatch)
        pipe(noise(0.3), text=TEXT, processor_kwargs={"pad_to_multiple_of": 512}, **SHORT)
        assert prompts[0].startswith("<pad><pad>")

    def test_a_misspelt_argument_is_an_error(self, pipe):
        with pytest.raises(ValueError, match="max_new_token"):
            pipe(noise(0.3), text=TEXT, max_new_token=3)


class TestFinalMessages:
    def chats(self, clip) -> list[list[dict]]:
        whole = make_chat("Say.", audio=clip, target="It says that")
        return [whole, [whole[0], {"role": "assistant", "content": "It says that"}]]

    def test_an_answer_goes_on_from_them(self, pipe, clips):
        for chat in self.chats(clips[0]):
            kwargs = {"add_generation_prompt": False, "continue_final_message": True}
            inputs = tiny.ask(pipe.processor, chat, **kwargs)
            assert pipe.processor.decode(inputs["input_ids"][0]).endswith("assistant\nIt says that")
            sequences = pipe.model.generate(**inputs, **SHORT)
            text = pipe.processor.decode(sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert text
            assert pipe(chat, return_full_text=False, **SHORT) == [{"generated_text": text}]
            (full,) = pipe(chat, **SHORT)
            user, assistant = full["generated_text"]
            assert repr(user) == repr(chat[0])
            content = assistant["content"]
            assert (content if isinstance(content, str) else content[-1]["text"]) == "It says that" + text
            assert "It says that" in repr(chat) and text not in repr(chat)

    def test_unless_told_otherwise(self, pipe, clips):
        for chat in self.chats(clips[0]):
            (full,) = pipe(chat, continue_final_message=False, **SHORT)
            text = answer(pipe, chat)
            assert full["generated_text"][1:] == [chat[1], {"role": "assistant", "content": text}]

    @pytest.mark.parametrize("batch_size", [2, 5])
    def test_beside_others_in_a_batch(self, pipe, clips, batch_size):
        chats = [make_chat("Say.", audio=clips[2]), *self.chats(clips[0]), [{"role": "user", "content": "No speech."}]]
        assert repr(pipe(chats, batch_size=batch_size, **SHORT)) == repr(pipe(chats, **SHORT))
        kwargs = {"num_beams": 2, "num_return_sequences": 2, "return_full_text": False, **SHORT}
        assert pipe(chats, batch_size=batch_size, **kwargs) == pipe(chats, **kwargs)


class TestAnswers:
    @pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2, "num_return_sequences": 2}])
    def test_output_objects(self, pipe, clips, kwargs):
        wanted = {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True}
        plain = pipe(clips, text=TEXT, batch_size=3, **kwargs, **SHORT)
        assert pipe(clips, text=TEXT, batch_size=3, **wanted, **kwargs, **SHORT) == plain
        pipe.model.generation_config.return_dict_in_generate = True
        assert pipe(clips[0], text=TEXT, **kwargs, **SHORT) == plain[0]

    def test_tokens(self, pipe, clips):
        # Letters end answers, at another length each.
        ends = pipe.tokenizer("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")["input_ids"]
        kwargs = {"eos_token_id": ends, "max_new_tokens": 12}
        alone = [pipe(clip, text=TEXT, return_tensors=True, **kwargs)[0]["generated_token_ids"] for clip in clips]
        together = pipe(clips, text=TEXT, return_tensors=True, batch_size=3, **kwargs)
        assert len({len(tokens) for tokens in alone}) > 1
        assert all(
            torch.equal(one["generated_token_ids"], tokens) for (one,), tokens in zip(together, alone, strict=True)
        )
        texts = pipe(clips, text=TEXT, batch_size=3, skip_special_tokens=False, **kwargs)
        assert [one["generated_text"] for (one,) in texts] == pipe.processor.batch_decode(alone)
        with pytest.raises(ValueError, match="`return_full_text` is mutually exclusive with `return_tensors`"):
            pipe(clips[0], text=TEXT, return_tensors=True, return_full_text=True)

    def test_stop_sequence(self, pipe, clips):
        letters = pipe.tokenizer("abcdefgh")["input_ids"]
        kwargs = {"suppress_tokens": [token for token in range(264) if token not in letters], "max_new_tokens": 12}
        text = pipe(clips[1], text=TEXT, **kwargs)[0]["generated_text"]
        (stopped,) = pipe(clips[1], text=TEXT, stop_sequence=text[2:4], **kwargs)
        assert stopped["generated_text"] == text[: text.index(text[2:4]) + 2] != text

    def test_a_generation_config(self, pipe, clips):
        """It takes the place of what the pipeline was made with, not of the limit on an answer's length."""
        pipe = LsmPipeline(model=pipe.model, processor=pipe.processor, device="cpu", max_new_tokens=3, num_beams=2)
        pipe.model.generation_config.eos_token_id = None
        config = GenerationConfig(num_beams=1)
        tokens = pipe(clips[0], text=TEXT, generation_config=config, return_tensors=True)[0]["generated_token_ids"]
        assert len(tokens) == 256
        assert config.max_new_tokens is None
        config.max_new_tokens = 5
        tokens = pipe(clips[0], text=TEXT, generation_config=config, return_tensors=True)[0]["generated_token_ids"]
        assert len(tokens) == 5


class TestContext:
    def make_pipe(self, **llm) -> LsmPipeline:
        model, processor = tiny.make_pair(text_config=tiny.llm_config(**llm).to_dict())
        return LsmPipeline(model=model, processor=processor, device="cpu")

    def test_a_prompt_that_is_too_long(self, monkeypatch):
        pipe = self.make_pipe(max_position_embeddings=200)
        monkeypatch.setattr(pipe.model, "generate", None)
        inputs = tiny.ask(pipe.processor, make_chat(TEXT, audio=noise(60)))
        audio = (inputs["input_ids"] == pipe.model.config.audio_token_id).sum()
        message = rf"prompt has {inputs['input_ids'].numel()} tokens, of which {audio} are audio.*holds 200 .*shorter"
        for given in (noise(60), [noise(1), noise(60)]):
            with pytest.raises(ValueError, match=message):
                pipe(given, text=TEXT, batch_size=2)

    def test_one_that_leaves_room_for_an_answer(self, monkeypatch):
        prompt = tiny.ask(tiny.make_processor(), make_chat(TEXT, audio=noise(1)))["input_ids"].numel()
        with pytest.raises(ValueError, match="longer context"):
            self.make_pipe(max_position_embeddings=prompt)(noise(1), text=TEXT, max_new_tokens=1)
        warnings = []
        monkeypatch.setattr(pipeline_lsm.logger, "warning_once", warnings.append)
        pipe = self.make_pipe(max_position_embeddings=prompt + 4)
        # Shorter beside it, so that its row is padded: that is no reason to refuse.
        pipe([noise(0.1), noise(1)], text=TEXT, batch_size=2, max_new_tokens=4)
        assert not warnings
        pipe(noise(1), text=TEXT, max_new_tokens=5)
        assert len(warnings) == 1 and f"context of {prompt + 4} tokens" in warnings[0]

    def test_an_llm_that_has_none(self):
        model = tiny.make_model()
        del model.config.text_config.max_position_embeddings
        pipe = LsmPipeline(model=model, processor=tiny.make_processor(), device="cpu")
        assert pipe(noise(1), text=TEXT, **SHORT)


class TestRefusals:
    def test_no_instruction(self, pipe):
        with pytest.raises(ValueError, match=r'no instruction.*pipe\(clip, text="Transcribe it\."\)'):
            pipe(noise(1))
        with pytest.raises(ValueError, match="no instruction"):
            pipe()

    def test_counts_that_differ(self, pipe):
        with pytest.raises(ValueError, match="2 clips and 3 instructions. Pass one instruction, or one for each clip"):
            pipe([noise(1), noise(1)], text=["a", "b", "c"])

    def test_chat_and_text(self, pipe):
        chat = make_chat("Say.", audio=noise(1))
        for given in (chat, [chat, chat]):
            with pytest.raises(ValueError, match="A chat holds its own instruction: pass either a chat, or `audio`"):
                pipe(given, text="Transcribe.")

    def test_no_processor(self, model):
        with pytest.raises(ValueError, match="got no processor; pass `processor=`"):
            LsmPipeline(model=model, device="cpu")

    def test_another_models_processor(self, model):
        with pytest.raises(ValueError, match="disagree on timing"):
            LsmPipeline(model=model, processor=tiny.make_processor(window_size=20), device="cpu")

    def test_bad_audio_is_named(self, pipe, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no audio file '.*gone\.flac'"):
            pipe([noise(1), tmp_path / "gone.flac"], text=TEXT)


class TestSaving:
    def test_content_of_the_folder(self, tiny_checkpoint):
        assert {path.name for path in tiny_checkpoint.iterdir()} == FILES
        config = json.loads((tiny_checkpoint / "config.json").read_text())
        assert config["auto_map"] == {
            "AutoConfig": "configuration_lsm.LsmConfig",
            "AutoModelForMultimodalLM": "modeling_lsm.LsmForConditionalGeneration",
        }
        assert config["custom_pipelines"] == {
            "audio-text-to-text": {"impl": "pipeline_lsm.LsmPipeline", "pt": ["AutoModelForMultimodalLM"]}
        }
        processor = json.loads((tiny_checkpoint / "processor_config.json").read_text())
        assert processor["auto_map"] == {"AutoProcessor": "processing_lsm.LsmProcessor"}

    def test_code_is_the_packages_own(self, tiny_checkpoint):
        package = Path(__file__).parents[1] / "modeling_lsm"
        shipped = sorted(path.name for path in tiny_checkpoint.glob("*.py"))
        assert shipped == sorted(name for name in FILES if name.endswith(".py"))
        for name in shipped:
            assert (tiny_checkpoint / name).read_text() == (package / name).read_text()

    def test_shipped_code_needs_nothing_but_transformers_and_torch(self, tiny_checkpoint):
        allowed = {"transformers", "torch", "numpy", "huggingface_hub", "safetensors"} | sys.stdlib_module_names
        for path in tiny_checkpoint.glob("*.py"):
            modules = re.findall(r"^(?:from|import) ([a-z_0-9]+)", path.read_text(), re.MULTILINE)
            assert set(modules) <= allowed, path.name

    def test_reload(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path / "lsm")
        reloaded = LsmPipeline(
            model=LsmForConditionalGeneration.from_pretrained(tmp_path / "lsm"),
            processor=LsmProcessor.from_pretrained(tmp_path / "lsm"),
            device="cpu",
        )
        chats = [make_chat(TEXT, audio=noise(seconds)) for seconds in (0.2, 3)]
        options = {"return_full_text": False, "max_new_tokens": 12}
        assert reloaded(chats, **options) == pipe(chats, **options)

    def test_model_arguments_are_passed_on(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path, max_shard_size="50KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1

    def test_publishing_is_one_commit_of_everything(self, pipe, monkeypatch):
        calls = []

        class Api:
            def __init__(self, token=None):
                calls.append(("token", token))

            def create_repo(self, repo_id, private=None, exist_ok=False):
                calls.append(("create", repo_id, private, exist_ok))
                return SimpleNamespace(repo_id=f"someone/{repo_id}")

            def create_branch(self, repo_id, branch, exist_ok):
                assert exist_ok
                calls.append(("branch", repo_id, branch))

            def upload_folder(self, repo_id, folder_path, commit_message, revision, **_):
                calls.append(("upload", repo_id, commit_message, revision))
                files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
                calls.append(files)
                return SimpleNamespace(commit_url="https://hub.example/commit/1")

        monkeypatch.setattr("modeling_lsm.saving_lsm.HfApi", Api)
        url = pipe.push_to_hub("tiny-lsm", commit_message="Publish", private=True, token="t", revision="v1")
        *steps, files = calls
        assert url == "https://hub.example/commit/1"
        assert steps == [
            ("token", "t"),
            ("create", "tiny-lsm", True, True),
            ("branch", "someone/tiny-lsm", "v1"),
            ("upload", "someone/tiny-lsm", "Publish", "v1"),
        ]
        assert set(files) == FILES
        card = files["README.md"].decode()
        assert 'model="someone/tiny-lsm"' in card and "\n# tiny-lsm\n" in card
        assert b"someone/tiny-lsm" not in files["config.json"]


class TestCard:
    BASES = {
        "speech": {"id": "openai/whisper-tiny.en", "revision": "abc", "license": "apache-2.0"},
        "text": {"id": "someone/llm", "revision": None, "license": "apache-2.0"},
    }

    @pytest.mark.parametrize("trained", [[], ["projector"], ["projector", "llm"], ["encoder", "projector", "llm"]])
    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    def test_parameter_counts(self, tied, trained):
        text_config = tiny.llm_config(tie_word_embeddings=tied).to_dict()
        model = tiny.make_model(text_config=text_config, base_models=self.BASES, trained_parts=trained)
        # Counted on weights as they are stored, each memory once.
        sizes = {"encoder": 0, "projector": 0, "llm": 0}
        seen = set()
        for name, tensor in model.state_dict().items():
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                part = "encoder" if ".audio_tower." in name else "projector" if ".projector." in name else "llm"
                sizes[part] += tensor.numel()
        assert sizes["llm"] == sum(p.numel() for p in model.lsm.language_model.parameters())
        card = model_card(model, "someone/lsm")
        rows = dict(zip(sizes, re.findall(r"^\| .* \| ([\d,]+) \| (yes|no) \|$", card, re.MULTILINE), strict=True))
        assert rows == {part: (f"{size:,}", "yes" if part in trained else "no") for part, size in sizes.items()}
        total, trained_total = re.search(r"\*\*total\*\*.*\*\*([\d,]+)\*\* \| \*\*([\d,]+)\*\*", card).groups()
        assert total == f"{sum(sizes.values()):,}"
        assert trained_total == f"{sum(sizes[part] for part in trained):,}"
        assert ("**Not trained yet**" in card) is (not trained)

    def test_metadata(self):
        card = ModelCard(model_card(tiny.make_model(base_models=self.BASES), "someone/lsm"))
        assert card.data.base_model == ["openai/whisper-tiny.en", "someone/llm"]
        assert card.data.license == "apache-2.0"
        assert card.data.pipeline_tag == "audio-text-to-text"
        assert card.data.library_name == "transformers"
        assert "needs `transformers>=5.19`" in " ".join(card.text.split())
        assert "openai/whisper-tiny.en | apache-2.0 |" in card.text and "someone/llm | apache-2.0 |" in card.text

    def test_licences_that_differ_are_told_but_not_chosen(self):
        bases = {**self.BASES, "text": {"id": "someone/llm", "license": "llama2"}}
        card = ModelCard(model_card(tiny.make_model(base_models=bases), "lsm"))
        assert card.data.license is None
        assert "| apache-2.0 |" in card.text and "| llama2 |" in card.text

    def test_unknown_bases(self):
        card = ModelCard(model_card(tiny.make_model(), "lsm"))
        assert card.data.base_model is None and card.data.license is None
        assert card.text.count("| unknown | – |") == 2

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({}, "qformer projector turns every 0.34 s into 1 vector"),
            ({"window_size": 50, "num_queries": 3}, "qformer projector turns every 1.00 s into 3 vector"),
            ({"projector_type": "conv", "window_size": 8}, "conv projector turns every 0.16 s into 1 vector"),
        ],
    )
    def test_description(self, settings, words):
        assert words in " ".join(model_card(tiny.make_model(**settings), "lsm").split())
