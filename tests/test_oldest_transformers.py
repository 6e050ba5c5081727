"""The code that ships with a checkpoint, under the oldest transformers that `setup.py` admits."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from tests.test_remote_code import USE, expected_results, isolated, run_isolated  # noqa: F401 -- a fixture


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TESTS = [f"tests/test_{name}.py" for name in ("configuration", "processing", "modeling", "remote_code", "pipeline")]

# In the process that runs the tests, so that they cannot have met another version.
RUN = """
import sys, pytest, transformers
assert transformers.__version__ == sys.argv[1], f"{transformers.__file__} is {transformers.__version__}"
raise SystemExit(pytest.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def oldest() -> Version:
    """The version that `setup.py` names."""
    requirement = re.search(r'install_requires=\[\s*"transformers>=([\d.]+)"', (ROOT / "setup.py").read_text("utf-8"))
    version = Version(requirement[1])
    return Version(".".join(map(str, (version.major, version.minor, version.micro))))


@pytest.fixture(scope="module")
def python(oldest) -> Path:
    """
    The interpreter of an environment in which the oldest transformers stands before this environment's packages. It is
    kept: pip has nothing to do the next time.
    """
    folder = ROOT / ".cache" / f"transformers-{oldest}"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    paths = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (own / "beneath.pth").write_text("\n".join(sorted(paths)), encoding="utf-8")
    # With what it needs in another version than this environment has.
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", f"transformers=={oldest}"]
    subprocess.run(command, check=True)
    return python


def test_fast_tests(python, oldest, tmp_path):
    report = tmp_path / "report.xml"
    arguments = ["-m", "not slow", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS]
    process = subprocess.run(
        [python, "-c", RUN, str(oldest), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]
    skipped = re.findall(r'<skipped [^>]*message="([^"]*)"', report.read_text(encoding="utf-8"))
    assert all(re.search("transformers 5|could not import", reason) for reason in skipped), skipped


def test_checkpoints_travel_both_ways(python, oldest, tiny_checkpoint, librivox, isolated):  # noqa: F811
    """What this version saves, the oldest loads, uses and saves; and that loads in this version again."""
    clip, (checkpoint, saved, results) = librivox[1].path, (isolated / name for name in ("new", "old", "results.pt"))
    expected = expected_results(tiny_checkpoint, clip)
    shutil.copytree(tiny_checkpoint, checkpoint)
    run_isolated(isolated, USE, checkpoint, clip, results, saved, python=python)
    seen = torch.load(results, weights_only=False)
    assert Version(seen["transformers"]) == oldest
    for actual in (seen, expected_results(saved, clip)):
        assert actual["answers"] == expected["answers"]
        assert set(actual["inputs"]) == set(expected["inputs"])
        assert all(torch.equal(actual["inputs"][key], expected["inputs"][key]) for key in expected["inputs"])
        torch.testing.assert_close(actual["logits"], expected["logits"], atol=1e-5, rtol=0.0)
