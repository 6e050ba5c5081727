"""Which files the rows of a dataset on the Hub may name: its author is a stranger to the machine that reads it."""

import os
import re

from datasets import config
from huggingface_hub import constants

from ..fetching_lsm import is_fetched


ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "lzma", "lz4", "zstd")  # as `datasets` reads them in a stream


def check_hub_path(path: str, dataset: str) -> None:
    """
    Raises a `ValueError` unless a row of the Hub's `dataset` may name `path`. It may name

    - a file of the same dataset, maybe in an archive, as streams of `datasets` name them:
      `hf://datasets/owner/name@revision/a.wav`, `zip://a.wav::hf://datasets/owner/name@revision/b.zip`;
    - a file in the caches of `datasets` and of the Hub, which is how `datasets` names what it has downloaded;
    - an http(s) or `data:` URL, which [`load_waveform`] reads within its limits;

    and nothing else: neither another file system nor any other file of this machine or of the Hub.
    """
    *archives, last = path.split("::")
    # The Hub's oldest datasets are known by a short name.
    own = rf"hf://datasets/{'' if '/' in dataset else '([^/@]+/)?'}{re.escape(dataset)}[@/]"
    if re.match(own, last) and all(re.match(rf"({'|'.join(ARCHIVES)})://", archive) for archive in archives):
        return
    if is_fetched(path) and not archives:
        return
    caches = (str(config.HF_DATASETS_CACHE), str(config.DOWNLOADED_DATASETS_PATH), constants.HF_HUB_CACHE)
    folders = [os.path.join(os.path.abspath(cache), "") for cache in caches]
    if "://" not in path and os.path.isabs(path) and os.path.normpath(path).startswith(tuple(folders)):
        return
    raise ValueError(
        f"{path!r:.200} is not a file of the dataset {dataset}, nor an http(s) URL. Rows of a dataset on the Hub "
        "cannot name other files; download it and load it as files if you trust it."
    )


__all__ = ["check_hub_path"]
