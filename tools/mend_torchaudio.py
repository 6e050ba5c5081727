#!/usr/bin/env python3
"""Make an installed torchaudio usable beside a CPU-only torch.

The torchaudio wheel ships libraries linked against CUDA. Where torch is a CPU build they cannot be loaded, `import
torchaudio` fails, and `import transformers` fails with it. torchaudio's resampling, transforms and augmentations are
plain PyTorch and need none of these libraries, so removing them is the whole mend (forced alignment and the CUDA CTC
decoder are lost, which a CPU-only torch could not run anyway).

Run it after installing, as often as you like: where torchaudio works, or is not installed, nothing is touched.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path


# Imported in a fresh process: a half-failed import would otherwise stay in this one.
PROBE_TORCHAUDIO = (
    "import torch, torchaudio; torchaudio.functional.resample(torch.zeros(1, 160), orig_freq=16000, new_freq=8000)"
)
PROBE_ACCELERATOR = "import torch, sys; sys.exit(bool(torch.version.cuda or torch.version.hip))"


def run_probe(code: str) -> subprocess.CompletedProcess:
    """Run a line of Python in a fresh interpreter of this environment and capture what it prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def compiled_libraries(package_dir: Path) -> list[Path]:
    """The compiled libraries that a torchaudio package folder carries."""
    return sorted((package_dir / "lib").glob("*.so"))


def mend(package_dir: Path) -> str:
    """Remove torchaudio's compiled libraries if they are what keeps it from being imported.

    Args:
        package_dir: The installed `torchaudio` folder.

    Returns:
        One line that says what was found and done.

    Raises:
        RuntimeError: torchaudio does not work and removing its libraries is not the mend: torch is not CPU-only, there
            are no libraries to remove, or it fails without them as well.
    """
    probe = run_probe(PROBE_TORCHAUDIO)
    if probe.returncode == 0:
        return "torchaudio works, nothing to mend"

    libraries = compiled_libraries(package_dir)
    if not libraries:
        raise RuntimeError(f"torchaudio in {package_dir} fails, and not for its compiled libraries:\n{probe.stderr}")
    if run_probe(PROBE_ACCELERATOR).returncode != 0:
        raise RuntimeError(
            f"torchaudio in {package_dir} fails beside a torch that is not a CPU build. Install the torchaudio that "
            f"was built for this torch.\n{probe.stderr}"
        )

    for library in libraries:
        library.unlink()
    probe = run_probe(PROBE_TORCHAUDIO)
    if probe.returncode != 0:
        raise RuntimeError(f"torchaudio in {package_dir} fails without its compiled libraries too:\n{probe.stderr}")
    return f"torchaudio mended: removed {len(libraries)} libraries that need CUDA, it now runs as pure PyTorch"


def main() -> int:
    spec = importlib.util.find_spec("torchaudio")
    if spec is None:
        print("torchaudio is not installed, nothing to mend")
        return 0
    try:
        print(mend(Path(spec.origin).parent))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
