"""Training that is killed at random moments ends with the weights of an unbroken run.

One kill here; `KILLS=20 pytest tests/test_video_kills.py` does twenty.
"""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

KILLS = int(os.environ.get("KILLS", "1"))
STEPS = 12 + 3 * KILLS
COMMAND = [
    sys.executable, "-c", "from dit_kernels.cli import main; main()", "train", "--steps", str(STEPS),
    "--size", "16", "--frames", "4", "--hidden-size", "32", "--depth", "1", "--num-heads", "2",
    "--batch-size", "4", "--checkpoint-every", "2", "--given-share", "0.3", "--threads", "1",
]  # fmt: skip


def started(folder):
    """`dit-kernels train --resume` as a process of its own, which has said that it starts."""
    process = subprocess.Popen(
        [*COMMAND, "--out", str(folder), "--resume"], stdout=subprocess.PIPE, text=True
    )
    said = process.stdout.readline()
    if "a new run" in said:
        said = process.stdout.readline()
    assert "parameters, step" in said
    return process, int(said.split("step ")[1].split()[0])


def test_killed_at_random_moments(tmp_path):
    process, _ = started(tmp_path / "unbroken")
    began = time.monotonic()
    assert process.wait() == 0
    a_step = (time.monotonic() - began) / STEPS

    seed = random.randrange(1 << 32)
    print("seed of the moments:", seed)
    moment = random.Random(seed)
    resumed_at = []
    while len(resumed_at) < KILLS:
        process, step = started(tmp_path / "broken")
        resumed_at.append(step)
        with pytest.raises(subprocess.TimeoutExpired):  # or it ended, and was not killed
            process.wait(timeout=moment.uniform(0, 5 * a_step))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    process, step = started(tmp_path / "broken")
    assert process.wait() == 0
    print("resumed at steps:", [*resumed_at, step])
    for name in ("checkpoint.safetensors", "model.safetensors"):
        unbroken, broken = (tmp_path / run / name for run in ("unbroken", "broken"))
        assert unbroken.read_bytes() == broken.read_bytes(), name
    left = {path.name for path in (tmp_path / "broken").iterdir()}
    assert left == {"checkpoint.safetensors", "model.safetensors", "loss.png", "logs"}
