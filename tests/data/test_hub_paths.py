"""What rows of a dataset on the Hub may name, and what not."""

import pytest
from datasets import config
from huggingface_hub import constants

from modeling_lsm.data.hub_paths import check_hub_path


OWN = "hf://datasets/owner/name@0123abc"


@pytest.mark.parametrize(
    "path",
    [
        f"{OWN}/data/a.wav",
        "hf://datasets/owner/name/a.wav",
        f"zip://a.wav::{OWN}/b.zip",
        f"tar://c/a.wav::gzip://b.tar::{OWN}/b.tar.gz",
        "https://example.org/a.wav",
        "HTTP://example.org/a.wav",
        "data:audio/wav;base64,UklGRg==",
        f"{config.HF_DATASETS_CACHE}/downloads/extracted/abc/a.wav",
        f"{constants.HF_HUB_CACHE}/datasets--owner--name/snapshots/abc/a.wav",
    ],
)
def test_its_own(path):
    check_hub_path(path, "owner/name")


def test_old_names():
    check_hub_path("hf://datasets/openslr/librispeech_asr@main/a.flac", "librispeech_asr")
    check_hub_path("hf://datasets/librispeech_asr@main/a.flac", "librispeech_asr")
    with pytest.raises(ValueError, match="is not a file of the dataset"):
        check_hub_path("hf://datasets/openslr/librispeech_asr2@main/a.flac", "librispeech_asr")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "a.wav",
        "../a.wav",
        f"{constants.HF_HUB_CACHE}/../../.ssh/id_rsa",
        f"{constants.HF_HUB_CACHE}-of-another/a.wav",
        "~/a.wav",
        "file:///etc/passwd",
        "hdfs://host/a.wav",
        "s3://bucket/a.wav",
        "ftp://host/a.wav",
        "hf://owner/name/a.wav",
        "hf://datasets/owner/other@main/a.wav",
        "hf://datasets/owner/name2/a.wav",
        "hf://datasets/other/owner/name/a.wav",
        "hf://buckets/owner/name/a.wav",
        "zip://a.wav::http://example.org/b.zip",
        "zip://a.wav::/home/user/b.zip",
        f"s3://bucket/a.wav::{OWN}/b.zip",
        f"simplecache::{OWN}/b.zip",
        f"{OWN}/a.wav::s3://bucket/a.wav",
        "http://example.org/a.wav::s3://bucket/a.wav",
        "",
    ],
)
def test_what_is_not(path):
    with pytest.raises(ValueError, match="is not a file of the dataset owner/name, nor an http"):
        check_hub_path(path, "owner/name")
