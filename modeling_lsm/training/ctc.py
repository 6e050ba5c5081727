"""Recognition of words by a projector alone: CTC, with the LLM's input embeddings for labels."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from ..modeling_lsm import LsmForConditionalGeneration
from ..processing_lsm import LsmProcessor, load_waveform
from ..projectors_lsm import length_mask
from ..speech_encoder_lsm import LsmSpeechEncoder


BLANK = 0
# Where CTC says "nothing new here", the LLM gets what a text has for something left out, and reads over it: with as
# many of them between the tokens of a sentence as a clip has blanks, SmolLM2-135M repeats the sentence at a loss of
# 1.0 nat per token (0.5 without any; 1.7 with zero vectors, 3.6 with the mean of all embeddings in their place).
FILLER = "_"
BEFORE_SPEECH = "\n\n"  # what `make_chat` puts before the transcript, whose first word has no space before it
MAX_SHARE_TOO_LONG = 0.05
PULL = 0.3  # weight of the distance to what is recognized, beside CTC's loss
# So many of the labels that a batch does not have stand for all of these. With 9,000 labels a step takes half as long,
# and 120 of them end at a word error rate of 0.42 instead of 0.40.
NUM_OTHER_LABELS = 1500


class EmbeddingCtcHead(nn.Module):
    """
    Log-probabilities of CTC's labels from the distances of a vector to their embeddings, the blank's being zero.

    With `-scale / 2 * |vector - embedding|²` as energy, what a softmax leaves of it is
    `scale * (vector · embedding - |embedding|² / 2)`, and 0 for the blank.

    Args:
        embeddings (`torch.Tensor` of shape `(labels, hidden_size)`):
            Input embeddings of the LLM. The first is that of the filler, where blanks go in the end.
    """

    def __init__(self, embeddings: torch.Tensor):
        super().__init__()
        self.register_buffer("embeddings", embeddings, persistent=False)
        self.register_buffer("energies", embeddings.pow(2).sum(-1) / 2, persistent=False)
        # To begin with, a word is about 10 nats from zero, and so from the blank.
        self.log_scale = nn.Parameter((10.0 / self.energies[1:].mean()).log())

    def sample(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Chooses what to tell `labels` from: a sample of the others, which weighs as much as all that it stands for
        (sampled softmax, [Jean et al., 2015](https://huggingface.co/papers/1412.2007)).

        Returns:
            The chosen labels in ascending order, the blank not among them, and the logarithms of their weights.
        """
        present = labels.unique()
        is_absent = torch.ones(len(self.embeddings), device=labels.device)
        is_absent[BLANK] = is_absent[present] = 0
        num_absent = int(is_absent.sum())
        if num_absent <= NUM_OTHER_LABELS:
            chosen = torch.arange(1, len(self.embeddings), device=labels.device)
            return chosen, torch.zeros_like(self.energies[1:])
        chosen = torch.cat([present, is_absent.multinomial(NUM_OTHER_LABELS)]).sort().values
        return chosen, is_absent[chosen] * math.log(num_absent / NUM_OTHER_LABELS)

    def forward(
        self, vectors: torch.Tensor, chosen: torch.Tensor | None = None, log_weights: torch.Tensor | float = 0.0
    ) -> torch.Tensor:
        """`(..., hidden_size)` → `(..., labels)`, of all labels or of the blank and those that [`sample`] chose."""
        chosen = slice(1, None) if chosen is None else chosen
        # With the filler's embedding for the blank, CTC would learn to say nothing at all before anything else.
        energies = vectors @ self.embeddings[chosen].T - self.energies[chosen]
        return nn.functional.pad(self.log_scale.exp() * energies + log_weights, (1, 0)).log_softmax(-1)

    def distance(self, vectors: torch.Tensor, log_probs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """
        Squared distance of each vector to the mean of the embeddings, weighted by their probabilities, over the mean
        squared length of an embedding. No gradient goes through the probabilities.
        """
        expected = log_probs.detach().exp() @ torch.cat([self.embeddings[:1], self.embeddings[chosen]])
        return (vectors - expected).pow(2).sum(-1) / (2 * self.energies[1:].mean())


class Aligner(nn.Module):
    """
    Copies of what the warm-up runs: projector, embeddings of the labels and, without a feature cache, the encoder.

    Args:
        model ([`LsmForConditionalGeneration`]): Gives the weights. Under ZeRO-3 they are gathered here.
        vocabulary (`list[int]`): Token ids of the labels, in their order, that of the blank first.
        with_encoder (`bool`): Whether the encoder is needed.
        bf16 (`bool`): Whether the projector computes in mixed precision. Distances and CTC never do.
    """

    def __init__(self, model: LsmForConditionalGeneration, vocabulary: list[int], with_encoder: bool, bf16: bool):
        super().__init__()
        self.bf16 = bf16
        parts = model.lsm
        # Copies, as ZeRO-3 spreads the model's own weights over the processes, and half precision is too coarse here.
        self.projector = type(parts.projector)(model.config).float()
        with whole(parts.projector.parameters()):
            self.projector.load_state_dict(parts.projector.state_dict())
        self.encoder = None
        if with_encoder:
            self.encoder = LsmSpeechEncoder(model.config.audio_config).to(parts.audio_tower.dtype)
            with whole(parts.audio_tower.parameters()):
                self.encoder.load_state_dict(parts.audio_tower.state_dict())
            self.encoder.requires_grad_(False).eval()
        embeddings = model.get_input_embeddings()
        with whole(embeddings.parameters()), torch.no_grad():
            # Not its weights, as some LLMs scale what they look up.
            tokens = torch.tensor(vocabulary, device=embeddings.weight.device)
            self.head = EmbeddingCtcHead(parts.embed_tokens(tokens).float().cpu())
        self.encoder_padding = model.config.encoder_padding

    def train(self, mode: bool = True):
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The clips' vectors, `(clips, vectors, hidden_size)`."""
        if "hidden_states" in batch:
            hidden_states = batch["hidden_states"].float()
        else:
            mask = batch["input_features_mask"] if self.encoder_padding == "longest" else None
            features = batch["input_features"].to(self.encoder.conv1.weight.dtype)
            with torch.no_grad():
                hidden_states = self.encoder(features, input_features_mask=mask).last_hidden_state.float()
        with torch.autocast(hidden_states.device.type, torch.bfloat16, enabled=self.bf16):
            packed = self.projector(hidden_states, batch["frames"])
        return pad_sequence(packed.float().split(batch["num_vectors"].tolist()), batch_first=True)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """CTC's negative log-likelihood per label, averaged over the clips, and what pulls vectors to embeddings."""
        vectors = self(batch)
        chosen, log_weights = self.head.sample(batch["labels"])
        log_probs = self.head(vectors, chosen, log_weights)
        labels = torch.searchsorted(chosen, batch["labels"]) + 1
        ctc = nn.functional.ctc_loss(
            log_probs.transpose(0, 1), labels, batch["num_vectors"], batch["num_labels"], blank=BLANK
        )
        mask = length_mask(batch["num_vectors"], vectors.shape[1])
        distances = self.head.distance(vectors, log_probs, chosen) * mask  # [clips, vectors]
        return ctc + PULL * (distances.sum(-1) / batch["num_vectors"]).mean()

    @torch.no_grad()
    def recognize(self, batch: dict[str, torch.Tensor]) -> list[list[int]]:
        """Labels of each clip: the best of every vector, repetitions and blanks left out."""
        paths = self.head(self(batch)).argmax(-1)  # [clips, vectors]
        paths = [path[:length].unique_consecutive() for path, length in zip(paths, batch["num_vectors"], strict=True)]
        return [path[path != BLANK].tolist() for path in paths]


@contextmanager
def whole(parameters: Iterable[nn.Parameter], write_from: int | None = None) -> Iterator[None]:
    """
    Puts together parameters that ZeRO-3 has spread over the processes, for as long as the context lasts.

    Args:
        parameters (`Iterable[nn.Parameter]`): The parameters. Without ZeRO-3 nothing happens to them.
        write_from (`int`, *optional*): Rank whose changes to them are kept. By default nobody changes them.
    """
    parameters = list(parameters)
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed  # deepspeed.zero is no module of its own, so it cannot be imported from

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=write_from):
        yield


class AlignmentCollator:
    """
    Turns indices of rows into encoder output, or what the encoder makes it of, and labels.

    Args:
        processor ([`LsmProcessor`]): Extracts features.
        rows (`datasets.Dataset`): Rows with `audio`, or with `audio_hash` if there is a `feature_cache`.
        labels (`list[list[int]]`): Labels of every row.
        feature_cache ([`FeatureCache`], *optional*): Has the encoder's output for every row.
    """

    def __init__(self, processor: LsmProcessor, rows: Dataset, labels: list[list[int]], feature_cache: Any = None):
        self.processor, self.rows, self.labels, self.feature_cache = processor, rows, labels, feature_cache

    def __call__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        rows = [self.rows[index] for index in indices]
        timing = self.processor.timing
        if self.feature_cache is not None:
            clips = [self.feature_cache.load(row["audio_hash"]) for row in rows]
            chunks = [chunk for clip in clips for chunk in clip]
            batch = {
                "hidden_states": pad_sequence(chunks, batch_first=True),
                "frames": torch.tensor([len(chunk) for chunk in chunks]),
            }
            num_chunks = [len(clip) for clip in clips]
        else:
            waveforms = [load_waveform(row["audio"], target_rate=timing.sampling_rate) for row in rows]
            inputs = self.processor(audio=waveforms)
            batch = {key: inputs[key] for key in ("input_features", "input_features_mask")}
            batch["frames"] = timing.encoder_frames(inputs["input_features_mask"].sum(-1))
            num_chunks = [len(timing.chunk_bounds(len(waveform))) for waveform in waveforms]
        vectors_of_chunks = timing.windows(batch["frames"]) * self.processor.num_queries
        labels = [self.labels[index] for index in indices]
        return {
            **batch,
            "num_vectors": torch.stack([part.sum() for part in vectors_of_chunks.split(num_chunks)]),
            "labels": torch.tensor(list(chain.from_iterable(labels)), dtype=torch.long),
            "num_labels": torch.tensor([len(sequence) for sequence in labels]),
        }


def tokenize_transcripts(tokenizer: PreTrainedTokenizerBase, texts: list[str | None]) -> list[list[int]]:
    """The tokens of transcripts as they stand in a prompt; none where there is no transcript."""
    encoded = tokenizer(
        [BEFORE_SPEECH + (text or "").strip() for text in texts], add_special_tokens=False, return_offsets_mapping=True
    )
    return [
        [token for token, (_, end) in zip(tokens, offsets, strict=True) if end > len(BEFORE_SPEECH)]
        for tokens, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def make_vocabulary(tokenizer: PreTrainedTokenizerBase, tokens: list[list[int]]) -> list[int]:
    """The token ids that labels stand for: the blank's filler, then every token of the transcripts once."""
    filler = tokenize_transcripts(tokenizer, [FILLER])[0][-1]
    return [filler, *sorted({token for sequence in tokens for token in sequence} - {filler})]


def alignable_rows(processor: LsmProcessor, rows: Dataset, tokens: list[list[int]]) -> list[int]:
    """
    Indices of the rows that CTC can learn from: as many vectors as tokens, and one more between two that are equal.

    Raises:
        ValueError: If too many rows have fewer vectors than that, or no row has both words and speech.
    """
    samples = [count or 0 for count in rows["num_samples"][:]]
    spoken = [index for index, count in enumerate(samples) if count and tokens[index]]
    if not spoken:
        raise ValueError(f"None of {len(rows)} rows has speech and, in its column `text`, words to align it to.")
    needed = {i: len(tokens[i]) + sum(a == b for a, b in zip(tokens[i], tokens[i][1:], strict=False)) for i in spoken}
    vectors = {i: processor.timing.audio_tokens_of_clip(samples[i]) for i in spoken}
    alignable = [i for i in spoken if needed[i] <= vectors[i]]
    too_long = len(spoken) - len(alignable)
    if too_long > MAX_SHARE_TOO_LONG * len(spoken):
        seconds = sum(samples[i] for i in spoken) / processor.timing.sampling_rate
        raise ValueError(
            f"{too_long} of {len(spoken)} clips have more words than vectors: the projector makes "
            f"{sum(vectors.values()) / seconds:.1f} vectors per second, the transcripts have "
            f"{sum(needed.values()) / seconds:.1f} tokens per second, and CTC needs a vector for each. Compose the "
            f"model with a smaller --window_size (it is {processor.window_size}; 6 suffices for English) or more "
            f"--num_queries (it is {processor.num_queries})."
        )
    return alignable
