"""Write requirements.lock: every package of pyproject.toml and its extras, pinned.

Versions that are already locked are kept where they still fit; delete a line to renew it.
CUDA libraries are left out, because they come with PyTorch's CUDA build and not with its CPU build.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
HEADER = (
    "# Every package of the lab, pinned for Python 3.11 to 3.13. `make lock` writes this file.\n"
)
CUDA = re.compile(r"^(nvidia-|cuda-|triton\b)")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "requirements.txt")
        result.write_text(LOCK.read_text(encoding="utf-8"), encoding="utf-8")
        subprocess.run(
            [
                sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal",
                "--python-version", "3.11", "--all-extras", "--no-header", "--no-annotate",
                "--output-file", result, ROOT / "pyproject.toml",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        lines = result.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not CUDA.match(line) and not line.startswith("--")]
    LOCK.write_text(HEADER + "\n".join(kept) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
