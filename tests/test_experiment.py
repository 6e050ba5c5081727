"""The experiment's text and speech: where sentences come from, and who speaks them."""

import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from piper import SynthesisConfig

from demo.fetch_models import fetch_speech_model, fetch_text_model
from experiments.tiny import speak
from experiments.tiny.speak import make_clip, plan_clips, speak_split
from experiments.tiny.voices import KOKORO_LENGTH_STEP, KOKORO_VOICES_FILE, VOICES, KokoroVoice, load_voice
from experiments.tiny.wordnet import as_saying, as_sentence, read_definitions, read_examples
from experiments.tiny.write_sentences import (
    DEFINITIONS_FILE,
    FOR_TRAINING,
    SIZES,
    SPLITS,
    WORDNET_FILE,
    choose_sentences,
    fill,
    read_requests,
    read_rows,
    split_of,
    write_sentences,
)
from modeling_lsm import LsmForConditionalGeneration, LsmProcessor
from modeling_lsm.augmentation import load_tasks
from modeling_lsm.evaluation import word_error_rate
from modeling_lsm.evaluation.systems import LsmSystem
from tests import tiny


ROOT = Path(__file__).parent.parent


# WordNet's examples


def sentence_of(text: str, part_of_speech: str = "noun", tokens: int = 1) -> str | None:
    return as_sentence(part_of_speech, text, lambda word: tokens)


@pytest.mark.parametrize(
    "part_of_speech, text, sentence",
    [
        ("adv", "he worked quietly at home", "He worked quietly at home."),
        ("noun", "the bakery on the corner is closed", "The bakery on the corner is closed."),
        ("verb", "Focus the light on this image", "Focus the light on this image."),
        ("adj", "how old is your sister?", "How old is your sister?"),
        ("noun", "yesterday i've lost my keys", "Yesterday I've lost my keys."),
    ],
)
def test_examples_that_are_sentences_become_sentences(part_of_speech, text, sentence):
    assert sentence_of(text, part_of_speech) == sentence


@pytest.mark.parametrize(
    "text",
    [
        "a beautiful lousy play",  # no verb
        "the man who was late again",  # its verb is a clause's
        "the old house he had bought",
        "they met in 1984 at the station",
        "he met J. Smith at the station",
        "she works for the IBM company",
        "he said `never again' to them",
        "he was late",  # too short
        "we shall never surrender, said the man to the " + "very " * 12 + "old general",
        "she saw Mr Smith at the station",
    ],
)
def test_examples_that_nobody_would_say_are_left_out(text):
    assert sentence_of(text) is None


def test_rare_words_are_left_out():
    assert sentence_of("the protoplasms were flocculated", tokens=2) is not None
    assert sentence_of("the protoplasms were flocculated", tokens=3) is None


@pytest.fixture
def wordnet_dir(tmp_path):
    """WordNet's files with a licence at the head of each, and four entries in two of them."""
    entries = {
        "noun": [
            "00001740 03 n 01 New_York 0 000 | a city in the state of that name",
            "00001741 03 n 02 living_thing 0 ebb 0 001 @ 00001740 n 0000 | a (rather) gradual  decline; less and less",
        ],
        "verb": ['00001740 29 v 01 breathe 0 | draw air; "I breathe"; "Breathe!"  '],
        "adj": ["00001740 00 a 0a " + "able(p) 0 " * 10 + "| having skill: much of it"],
        "adv": [],
    }
    for part_of_speech, lines in entries.items():
        (tmp_path / f"data.{part_of_speech}").write_text("\n".join(['  1 This software "is | provided"', *lines]))
    return tmp_path


def test_examples_are_read_out_of_the_glosses(wordnet_dir):
    assert read_examples(wordnet_dir) == [("verb", "I breathe"), ("verb", "Breathe!")]


def test_definitions_are_read_out_of_the_glosses(wordnet_dir):
    assert read_definitions(wordnet_dir) == [
        ("ebb", "a gradual decline"),
        ("breathe", "draw air"),
        ("able", "having skill"),
    ]


@pytest.mark.parametrize(
    "definition, saying",
    [
        ("a gradual decline", "A gradual decline, or ebb."),
        ("decline", None),  # too short
        ("to decline " * 6, None),
        ("a decline in 1984", None),
        ("a decline of the IBM company", None),
        ("a decline of (some) kind", None),
        ("", None),
    ],
)
def test_definitions_become_something_to_say(definition, saying):
    assert as_saying("ebb", definition, lambda word: 1) == saying
    assert as_saying("ebb", definition, lambda word: 3) is None  # nobody knows these words


@pytest.mark.parametrize("file, count, words", [(WORDNET_FILE, 16_000, 10_000), (DEFINITIONS_FILE, 25_000, 25_000)])
def test_the_files_of_wordnet_sentences_keep_the_rules(file, count, words):
    sentences = file.read_text(encoding="utf-8").splitlines()
    assert len(sentences) > count
    assert len({sentence.lower() for sentence in sentences}) == len(sentences)
    pattern = re.compile(r"[A-Z][A-Za-z' ,-]+[.?!]")
    assert [sentence for sentence in sentences if not pattern.fullmatch(sentence)] == []
    assert len({word for sentence in sentences for word in re.findall(r"[a-z']+", sentence.lower())}) > words


# Templates


def test_a_template_is_filled_with_every_combination():
    slots = {"thing": ["lamp", "apple"], "place": ["hall", "attic"]}
    assert sorted(fill("Put a {thing} in the {place}.", slots)) == [
        "Put a lamp in the attic.",
        "Put a lamp in the hall.",
        "Put an apple in the attic.",
        "Put an apple in the hall.",
    ]


def test_a_template_never_says_the_same_word_twice():
    slots = {"city": ["Rome", "Paris"], "city2": ["Rome", "Paris"]}
    assert sorted(fill("Is {city} bigger than {city2}?", slots)) == [
        "Is Paris bigger than Rome?",
        "Is Rome bigger than Paris?",
    ]


def test_a_template_with_many_combinations_does_not_crowd_out_the_others():
    slots = {"a": [f"a{i}" for i in range(100)], "b": [f"b{i}" for i in range(100)]}
    texts = fill("{a} and {b}", slots)
    assert texts == fill("{a} and {b}", slots)
    assert len(set(texts)) == len(texts) < 500
    assert len({text.split()[0] for text in texts}) > 50


def test_questions_and_commands_can_be_spoken_as_they_are_written():
    requests = read_requests()
    texts = requests["question"] + requests["command"]
    assert len(texts) > 8_000
    assert [text for text in texts if not re.fullmatch(r"[A-Z][A-Za-z' ,]+[.?]", text)] == []
    assert all(text.endswith("?") for text in requests["question"])
    assert not any(text.endswith("?") for text in requests["command"])
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", text) for text in texts)


# Parts


@pytest.mark.parametrize("size", SIZES)
def test_parts_have_their_size_and_share_no_sentence(size):
    chosen = choose_sentences(size)
    assert {split: len(sentences) for split, sentences in chosen.items()} == SIZES[size]
    heard = [" ".join(re.findall(r"[a-z']+", s.text.lower())) for split in SPLITS for s in chosen[split]]
    assert len(set(heard)) == len(heard)
    for split, sentences in chosen.items():
        sources = Counter(sentence.source for sentence in sentences)
        only_to_hear = {"definition"} if split == "words" else set()
        assert set(sources) == {"wordnet", "question", "command"} | only_to_hear
        assert sources["wordnet"] + sources["definition"] > len(sentences) / 2


def test_smaller_sizes_are_parts_of_larger_ones():
    for smaller, larger in itertools.pairwise(choose_sentences(size) for size in ("smoke", "small", "full")):
        for split in ("train", "validation", "test"):
            assert set(smaller[split]) < set(larger[split])


def test_the_part_of_a_sentence_depends_on_its_words_alone():
    texts = WORDNET_FILE.read_text(encoding="utf-8").splitlines()[:2000]
    assert all(split_of(text) == split_of(text.upper().replace(".", "?")) for text in texts)
    shares = Counter(map(split_of, texts))
    assert 0.02 < shares["validation"] / 2000 < 0.08 and 0.02 < shares["test"] / 2000 < 0.08


def test_sentences_are_repeatable_and_change_with_the_seed(tmp_path):
    write_sentences("smoke", tmp_path / "first")
    write_sentences("smoke", tmp_path / "again")
    write_sentences("smoke", tmp_path / "other", seed=1)
    for split in SPLITS:
        first, again, other = (
            (tmp_path / run / f"sentences-{split}.jsonl").read_bytes() for run in ("first", "again", "other")
        )
        assert first == again != other
        rows = read_rows(tmp_path / "other" / f"sentences-{split}.jsonl")
        assert all(split_of(row["text"]) == ("train" if split in FOR_TRAINING else split) for row in rows)


def test_a_size_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="'huge'"):
        choose_sentences("huge")


# Voices and clips


def test_no_voice_is_heard_in_training_and_held_out():
    assert set(VOICES["warm_up"]) | set(VOICES["words"]) < set(VOICES["train"])
    for one, other in itertools.combinations(("train", "validation", "test"), 2):
        assert not set(VOICES[one]) & set(VOICES[other])
    assert len(VOICES["train"]) >= 3
    for shares in VOICES.values():
        assert sum(shares.values()) == pytest.approx(1)


def test_every_kokoro_voice_has_its_styles():
    names = {name.removeprefix("kokoro-") for shares in VOICES.values() for name in shares if "kokoro" in name}
    with np.load(KOKORO_VOICES_FILE) as styles:
        assert names == set(styles.files)


def test_kokoro_styles_are_interpolated_between_lengths():
    voice = KokoroVoice.__new__(KokoroVoice)
    voice.styles = np.array([[0.0, 1.0], [8.0, 1.0], [24.0, 1.0]], dtype=np.float32)
    for length, expected in ((0, 0), (4, 4), (8, 8), (10, 12), (16, 24), (99, 24)):
        np.testing.assert_allclose(voice.style(length), [[expected, 1]])
    assert KOKORO_LENGTH_STEP == 8


ROWS = [{"text": f"This is sentence {word}.", "source": "wordnet"} for word in ("one", "two", "three", "four", "five")]


def test_clips_are_planned_from_sentence_and_seed_alone(tmp_path):
    plan = plan_clips(ROWS, "train", tmp_path)
    assert plan == plan_clips(ROWS, "train", tmp_path)
    assert plan[3:] == plan_clips(ROWS[3:], "train", tmp_path)
    assert plan != plan_clips(ROWS, "train", tmp_path, seed=1)
    assert len({clip.path for clip in plan}) == len({clip.delivery for clip in plan}) == len(ROWS)


def test_clips_that_would_sound_otherwise_are_other_files(tmp_path, monkeypatch):
    before = plan_clips(ROWS, "train", tmp_path)
    monkeypatch.setitem(speak.VOICES, "train", {"joe": 1.0})
    for clip, other in zip(before, plan_clips(ROWS, "train", tmp_path), strict=True):
        assert (clip.path == other.path) == (clip.voice == other.voice and clip.delivery == other.delivery)
    assert any(clip.voice != "joe" for clip in before)


def test_voices_speak_as_often_as_they_should(tmp_path):
    rows = [{"text": f"Sentence {i}", "source": "wordnet"} for i in range(1000)]
    clips = plan_clips(rows, "train", tmp_path)
    counts = Counter(clip.voice for clip in clips)
    assert set(counts) == set(VOICES["train"])
    assert counts["joe"] / 1000 == pytest.approx(VOICES["train"]["joe"], abs=0.06)
    noisy = [clip for clip in clips if clip.delivery.snr_db < 25]
    assert len(noisy) / 1000 == pytest.approx(0.25, abs=0.06)


class SineVoice:
    """Stands in for a voice: a second of a tone, whatever the sentence."""

    def synthesize(self, sentence, settings):
        times = np.arange(22_050, dtype=np.float32) / 22_050
        yield SimpleNamespace(audio_float_array=np.sin(2 * np.pi * 300 * times), sample_rate=22_050)


@pytest.fixture
def in_this_process(monkeypatch):
    """Clips are spoken here, by a tone, and counted."""
    made = []

    class Pool:
        def __init__(self, workers):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

        def imap_unordered(self, function, clips):
            return map(function, clips)

    def count_and_make(clip):
        made.append(clip.text)
        make_clip(clip)

    monkeypatch.setattr(speak.multiprocessing, "get_context", lambda method: SimpleNamespace(Pool=Pool))
    monkeypatch.setattr(speak, "_voice", lambda name: SineVoice())
    monkeypatch.setattr(speak, "make_clip", count_and_make)
    return made


def test_speaking_goes_on_where_it_was_interrupted(tmp_path, in_this_process):
    speak_split(ROWS[:4], "train", tmp_path)
    manifest = speak_split(ROWS, "train", tmp_path)
    assert in_this_process == [row["text"] for row in ROWS]  # each one once

    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [row["text"] for row in rows] == [row["text"] for row in ROWS]
    for row in rows:
        info = soundfile.info(tmp_path / row["audio"])
        assert (info.samplerate, info.channels, info.format) == (16_000, 1, "FLAC")
        assert row["duration"] == pytest.approx(info.duration, abs=0.01)
        assert row["voice"] in VOICES["train"] and 0.8 < row["speed"] < 1.25
    assert not list(tmp_path.rglob("*.partial"))


def test_the_same_clip_is_spoken_the_same_way(tmp_path, in_this_process):
    first, again = (speak_split(ROWS, "test", tmp_path / run) for run in ("first", "again"))
    assert first.read_bytes() == again.read_bytes()
    for row in read_rows(first):
        assert (first.parent / row["audio"]).read_bytes() == (again.parent / row["audio"]).read_bytes()


# With the real voices


@pytest.mark.slow
@pytest.mark.parametrize("name", ["joe", "kokoro-af_heart", "kokoro-bm_george"])
def test_real_voices_repeat_themselves(name):
    settings = SynthesisConfig(length_scale=1.0, noise_scale=0.0, noise_w_scale=0.0)
    first, again = (next(iter(load_voice(name).synthesize("He will call you back.", settings))) for _ in range(2))
    np.testing.assert_array_equal(first.audio_float_array, again.audio_float_array)
    assert 1 < len(first.audio_float_array) / first.sample_rate < 4


@pytest.mark.slow
def test_the_whole_experiment_with_a_tiny_llm(tmp_path):
    """`make experiment SCALE=smoke`, with real voices, the real Whisper, and an LLM small enough to be quick."""
    run, sentences = tmp_path / "run", choose_sentences("smoke")
    tiny.save_llm_of_words([sentence.text for part in sentences.values() for sentence in part], tmp_path / "llm")
    command = ["make", "-f", "experiments/tiny/Makefile", "SCALE=smoke", f"RUN={run}", f"PYTHON={sys.executable}"]
    command += [f"SPEECH_MODEL={fetch_speech_model()}", f"TEXT_MODEL={tmp_path / 'llm'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    results = json.loads((run / "results" / "results.json").read_text())
    systems = {"lsm", "vanilla", "cascade", "text"}
    assert results["figures"]["synthetic"]["transcription"]["wer"].keys() == systems
    assert results["figures"]["real"]["transcription"]["wer"].keys() == systems
    assert systems < results["bias"]["collapse"].keys()
    assert {name: arm["steps"] for name, arm in results["training"].items()} == {"self_powered": 20, "vanilla": 20}
    assert results["warm_up"]["step"] == 20
    report = (run / "results" / "README.md").read_text()
    for plot in re.findall(r"\]\((.+\.png)\)", report):
        assert (run / "results" / plot).read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in (run / "results" / "checkpoint" / "config.json").read_text()
    model = LsmForConditionalGeneration.from_pretrained(
        run / "results" / "checkpoint", base_folders={"speech": fetch_speech_model(), "text": tmp_path / "llm"}
    )
    trained = LsmForConditionalGeneration.from_pretrained(run / "self_powered")
    for weight, other in zip(model.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-5)  # published in half precision

    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0 and "Nothing to be done" in again.stdout


@pytest.mark.slow
def test_the_published_checkpoint_hears_as_published(librivox):
    """Its weights, in half precision, come to the word error rate that `results.json` has for the real recordings."""
    folder = ROOT / "experiments" / "tiny" / "results"
    bases = {"speech": fetch_speech_model(), "text": fetch_text_model()}
    model = LsmForConditionalGeneration.from_pretrained(folder / "checkpoint", base_folders=bases)
    system = LsmSystem(model, LsmProcessor.from_pretrained(folder / "checkpoint"), batch_size=8)
    instruction = load_tasks(["transcription"], target_language="")[0].instructions[0]
    rows = [{"audio": str(clip.path), "instruction": instruction} for clip in librivox]
    answers = system.answer(rows, max_new_tokens=64)
    published = json.loads((folder / "results.json").read_text())["figures"]["real"]["transcription"]["wer"]["lsm"]
    assert word_error_rate(answers, [clip.text for clip in librivox]) == pytest.approx(published["value"], abs=0.1)
