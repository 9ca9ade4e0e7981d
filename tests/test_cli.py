"""The command line: what it writes and says, and how it answers wrong input."""

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from dit_kernels import cli
from dit_kernels.cli.train import train as train_command
from dit_kernels.video.files import write_video
from dit_kernels.video.model import ModelConfig, TextToVideo
from dit_kernels.video.real_clips import read_video
from dit_kernels.video.training import SHIPPED_RUN, Trainer, train

PROMPT = "a seven moving left"
COMMANDS = ("train", "train-codec", "generate", "evaluate", "demo", "info", "check")
SMALL = ModelConfig(
    size=16, frames=4, hidden_size=32, depth=1, num_heads=2, text_dim=32, text_depth=1
)
SMALL_RUN = [
    "--size",
    "16",
    "--frames",
    "4",
    "--hidden-size",
    "32",
    "--depth",
    "1",
    "--num-heads",
    "2",
    "--batch-size",
    "2",
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small model's file; what it shows does not matter here."""
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    torch.manual_seed(0)
    model = TextToVideo(SMALL)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # at its start the DiT makes every video grey
    model.save(path)
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run `dit-kernels ARGUMENTS...` in an empty folder; its code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["dit-kernels", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = exit_.value.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return run


def assert_one_line(result, *parts):
    """The answer to wrong input: exit code 2, one line on stderr, nothing else."""
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("dit-kernels: ")
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    for part in parts:
        assert part in result.err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=["nothing", "help", "h"])
def test_help_teaches(run, arguments):
    result = run(*arguments)
    assert result.code == 0
    assert result.err == ""
    assert 'dit-kernels generate "a seven moving left"' in result.out
    for command in COMMANDS:
        assert command in result.out


def test_version(run):
    result = run("--version")
    assert (result.code, result.err) == (0, "")
    assert re.fullmatch(r"dit-kernels \d+\.\d+\.\d+\S*\n", result.out)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_in_its_help(run, command):
    result = run(command, "--help")
    assert result.code == 0
    assert run(command, "-h").out == result.out
    assert "Example" in result.out
    assert f"dit-kernels {command}" in result.out


def test_help_does_not_wait_for_the_extras():
    heavy = ("diffusers", "sklearn", "av", "PIL")
    program = (
        "import sys; from dit_kernels.cli import app; app(['--help'], standalone_mode=False); "
        f"assert not [m for m in {heavy!r} if m in sys.modules]"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_generate_mp4(run, weights, tmp_path):
    result = run("generate", PROMPT, "--weights", weights, "--steps", 1, "--out", "new/x.mp4")
    assert result.code == 0
    assert result.out == "new/x.mp4\n"
    assert result.err == ""
    with av.open(str(tmp_path / "new" / "x.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 4


def test_generate_writes_one_mp4_or_gif_a_prompt(run, weights, tmp_path):
    two = [PROMPT, "an eight moving up"]
    result = run("generate", *two, "--weights", weights, "--steps", 1, "--out", "x.gif")
    expected = ["x-1-a-seven-moving-left.gif", "x-2-an-eight-moving-up.gif"]
    assert result.out.split() == expected
    assert all((tmp_path / name).is_file() for name in expected)


def test_generate_puts_all_prompts_in_one_png(run, weights, tmp_path):
    options = ["--weights", weights, "--steps", 1, "--frames", 8, "--out", "x.png"]
    assert run("generate", PROMPT, PROMPT, *options).out == "x.png\n"
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.width == 6 + 8 * (96 + 6)


def test_an_empty_prompt_leaves_the_choice_to_the_model(run, weights, tmp_path):
    result = run("generate", PROMPT, "", "?!", "--weights", weights, "--steps", 1, "--out", "x.gif")
    assert result.code == 0
    assert result.err == "".join(
        f"prompt {i} has no words: the model chooses what it shows\n" for i in (2, 3)
    )
    assert result.out.split()[1:] == ["x-2-unconditional.gif", "x-3-unconditional.gif"]


def test_a_message_names_options_and_leaves_paths_alone():
    message = (
        "DiT: text_mode is not in runs/text_mode/a.b, ./text_mode or my-text_mode; num_heads. Or "
    )
    expected = (
        "--text-mode is not in runs/text_mode/a.b, ./text_mode or my-text_mode; --num-heads. Or "
    )
    assert cli.console.in_options(message, ["train", "--out", "x"]) == expected
    assert cli.console.in_options("size must be 1", ["generate"]) == "--size must be 1"
    assert cli.console.in_options("size must be 1", ["info"]) == "size must be 1"
    assert cli.console.in_options("a num_heads", ["--nothing"]) == "a num_heads"


def test_generate_is_the_same_for_the_same_seed(run, weights, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        options = ["--weights", weights, "--steps", 1, "--seed", seed, "--out", f"{name}.png"]
        assert run("generate", PROMPT, *options).code == 0
    one, again, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert one == again
    assert one != other


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("generate|a dog", ['unknown word "dog"', "known words are", "seven"]),
        ("generate", ["Missing argument", "PROMPT"]),
        ("generate|a one|--out|x.avi", [".mp4, .gif, .png", "x.avi"]),
        ("generate|a one|--steps|0", ["--steps", "greater than or equal to 1"]),
        ("generate|a one|--steps|many", ["--steps", "integer"]),
        ("generate|a one|--frames|6", ["--frames must be a multiple of 4", "got 6"]),
        ("generate|a one|--size|30", ["height must be a multiple of 4", "got 30"]),
        ("generate|a one|--seed|-1", ["--seed"]),
        ("generate|a one|--frames|0", ["--frames", "greater than or equal to 1"]),
        (
            "generate|a one|a two|--size|400000",
            ["20,000,000,000 tokens (2 clips of 4 frames of 400000 x 400000) take at least"],
        ),
        (
            "generate|a one|--frames|4000000000",
            ["16,000,000,000 tokens (a clip of", "GiB of memory; this machine has"],
        ),
        ("train|--frames|40000000000", ["pixels (a clip of 40000000000 frames of 32 x 32) take"]),
        (
            "train|--batch-size|400000000",
            ["tokens a step (400000000 clips of 8 frames of 32 x 32) take"],
        ),
        (
            "train|--hidden-size|1000000",
            ["72,000,000,000,000 parameters (4 blocks of width 1000000)"],
        ),
        ("generate|a one|--bogus", ["No such option", "--bogus"]),
        ("generate|a one|--sceduler|ddim", ["No such option: --sceduler", "--scheduler"]),
        ("generate|a one|--device|nowhere", ["--device must be auto, cpu, cuda", "nowhere"]),
        (
            "generate|a one|--device|meta",
            ["--device must be auto, cpu, cuda or cuda:N; got 'meta'"],
        ),
        ("generate|a one|--device|cuda:99", ["no cuda:99 here", "dit-kernels info"]),
        ("generate|a one|--weights|none", ["no checkpoint at none"]),
        (
            "generate|a one|--weights|.",
            ["no model.safetensors and no checkpoint.safetensors in the"],
        ),
        ("generate|a one|--weights|a-file", ["a-file is not a checkpoint"]),
        ("generate|a one|--out|a-file/x.mp4", ["a-file"]),
        ("generate|a one|--out|/proc/x.mp4", ["nothing can be written to /proc"]),
        ("train|--out|a-file", ["a-file"]),
        ("train|--size|12", ["--size must be at least 14"]),
        ("train|--size|18", ["(4, 4, 4)", "18"]),
        ("train|--steps|0", ["--steps"]),
        ("train|--num-heads|3", [": --num-heads must divide --hidden-size; got 3 and 128"]),
        ("train|--small-steps|2|--small-size|12", [": small clips: size must be at least 14"]),
        (
            "train|--vary-every|4|--size|20",
            [": clips half as large again: the patch (4, 4, 4) must"],
        ),
        ("train|--qk-norm|l2", ["--qk-norm must be one of rms, layer, none; got 'l2'"]),
        ("train|--time-mean|nan", ["--time-mean must be a finite number; got nan"]),
        ("train|--size|ten", ["--size", "must be like 32, or 32x48"]),
        ("train|--patch-size|2x2", ["--patch-size", "must be like 1x2x2"]),
        ("train|--codec|nowhere", ["no codec at nowhere", "identity, causal"]),
        ("train|--codec|a-file", ["a-file is not a checkpoint"]),
        ("train|--codec|causal|--frames|8", ["1 more than a multiple of 2", "such as 9", "got 8"]),
        ("train|--text-encoder|nowhere", ["no text encoder at nowhere"]),
        ("train|--text-mode|loud", ["dit-kernels: --text-mode must be one of", "loud"]),
        ("train|--objective|gan", ["--objective must be one of flow, ddpm", "gan"]),
        ("train|--optimizer|sgd", ["optimizer must be one of muon, adamw", "sgd"]),
        ("train|--accumulate|3", ["--accumulate must divide", "3 and 32"]),
        ("train|--data|nowhere", ["no folder of videos, and no CSV, at nowhere"]),
        ("train|--data|.", ["no video in . can be used"]),
        ("train|--data|a-file", ["a CSV with the columns video and caption"]),
        ("train|--digits|0", ["--digits"]),
        (
            "train|--data|.|--digits|2|--wordings",
            ["--digits, --wordings would change nothing where --data is ."],
        ),
        ("train|--data|.|--hold-out", ["--hold-out would change nothing"]),
        ("train-codec|--data|.|--speeds", ["--speeds would change nothing"]),
        ("train|--frame-step|2", ["--frame-step would change nothing where --data is digits"]),
        (
            "train|--objective|ddpm|--time-mean|2",
            ["--time-mean would change nothing", "objective is ddpm"],
        ),
        ("train|--size|48|--small-size|16", ["--small-size would change nothing in a run without"]),
        (
            "train-codec|--batch-size|40000000",
            ["pixels (40000000 clips of 9 frames of 32 x 32) take"],
        ),
        ("train-codec|--frames|4", ["1 more than a multiple of 2", "got 4"]),
        ("train-codec|--strides|2", ["Invalid value for '--strides': must be like 1x2x2"]),
        (
            "generate|a one|--scheduler|heun",
            ["--scheduler must be one of euler, ddim, dpm++", "heun"],
        ),
        ("generate|a one|--image|none.png", ["no such file: none.png"]),
        ("generate|a one|--image|a-file", ["a-file: it can't be decoded"]),
        ("generate|a one|--image|a|--video|b", ["--image and --video can't both be given"]),
        ("evaluate|--markdown|x.md", ["--json", "give both"]),
        ("evaluate|--count|0", ["--count"]),
        ("evaluate|--weights|none", ["no checkpoint at none"]),
        ("demo|--out|a-file", ["a-file"]),
        ("paint", ["No such command", "paint"]),
    ],
    ids=lambda value: value.replace("|", " ") if isinstance(value, str) else "",
)
def test_wrong_input_gets_one_line(run, weights, tmp_path, arguments, parts):
    (tmp_path / "a-file").write_text("not a checkpoint")
    arguments = arguments.split("|")
    if arguments[0] == "generate" and len(arguments) > 1 and "--weights" not in arguments:
        arguments += ["--weights", weights]
    assert_one_line(run(*arguments), *parts)


@pytest.mark.parametrize(
    ("library", "arguments", "extra"),
    [
        ("diffusers", ["generate", PROMPT], "video"),
        ("av", ["generate", PROMPT], "video"),
        ("PIL", ["generate", PROMPT, "--out", "x.png"], "video"),
        ("sklearn.datasets", ["train"], "train"),
    ],
)
def test_a_missing_extra_says_what_to_type(run, weights, monkeypatch, library, arguments, extra):
    from dit_kernels.video.digits import load_scans

    load_scans.cache_clear()
    monkeypatch.setitem(sys.modules, library, None)
    if arguments[0] == "generate":
        arguments = [*arguments, "--weights", weights, "--steps", 1]
    assert_one_line(run(*arguments), f'pip install "dit-kernels[{extra}]"')


def test_train_then_resume_then_generate(run, tmp_path):
    first = run("train", "--out", "r", "--steps", 4, "--checkpoint-every", 2, *SMALL_RUN)
    assert first.code == 0, first.err
    assert "parameters, step 0 of 4" in first.out
    assert "--weights r/model.safetensors" in first.out
    assert "step 4/4" in first.err
    assert "loss" in first.err
    assert "tokens/s" in first.err
    assert "minutes left" in first.err
    assert (tmp_path / "r" / "loss.png").stat().st_size > 1000
    assert len(list((tmp_path / "r" / "logs").iterdir())) == 1

    again = run("train", "--out", "r", "--steps", 4)
    assert_one_line(again, "is already there", "--resume")

    finished = run("train", "--out", "r", "--resume")
    assert finished.code == 0, finished.err
    assert "step 4 of 4" in finished.out

    other = run("train", "--out", "r", "--resume", "--steps", 9)
    assert_one_line(other, "--steps 9 differs from 4")
    other = run("train", "--out", "r", "--resume", "--digits", 2)
    assert_one_line(other, "--digits 2 differs from 1")

    files = "r/checkpoint.safetensors", "r/model.safetensors", "r"
    pictures = []
    for file in files:
        made = run("generate", PROMPT, "--steps", 1, "--weights", file, "--out", "x.png")
        assert made.out == "x.png\n"
        pictures.append((tmp_path / "x.png").read_bytes())
    assert pictures[2] == pictures[1]
    (tmp_path / "r" / "model.safetensors").unlink()
    assert run("generate", PROMPT, "--steps", 1, "--weights", "r", "--out", "x.png").code == 0
    assert (tmp_path / "x.png").read_bytes() == pictures[0]


def test_train_resumes_to_the_weights_of_an_unbroken_run(run, tmp_path):
    config = dataclasses.replace(
        SHIPPED_RUN, small_steps=0, steps=4, batch_size=2, checkpoint_every=2
    )
    model = ModelConfig(size=16, frames=4, hidden_size=32, depth=1, num_heads=2)
    run("train", "--out", "unbroken", "--steps", 4, "--checkpoint-every", 2, *SMALL_RUN)

    def interrupt(done, loss):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Trainer(model, config), tmp_path / "broken", interrupt)
    result = run("train", "--out", "broken", "--resume")
    assert "step 2 of 4" in result.out
    unbroken, broken = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("unbroken", "broken")
    )
    assert unbroken == broken


def test_ctrl_c_keeps_the_work_done(run, monkeypatch):
    step = Trainer.step

    def interrupted(self):
        if self.step_number == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    result = run("train", "--out", "r", "--steps", 9, *SMALL_RUN)
    assert result.code == 130
    assert "stopped after step 3; add --resume" in result.out
    assert Trainer.load("r/checkpoint.safetensors").step_number == 3


def test_train_defaults_are_those_of_the_library():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(train_command).parameters.items()
    }
    checked = 0
    for config in (ModelConfig(), SHIPPED_RUN):
        for field in dataclasses.fields(config):
            if field.name in defaults:
                default = defaults[field.name]
                # by default these follow the codec, and what is trained on; in pixels they are the library's
                assert default == getattr(config, field.name) or (
                    default is None
                    and field.name in ("frames", "patch_size", "small_steps", "init")
                ), field.name
                checked += 1
    assert checked == 31


def test_evaluate_prints_a_row_for_the_model_and_one_for_real_clips(run, weights):
    command = ["evaluate", "--count", 4, "--steps", 1, "--weights", weights]
    assert run(*command, "--bar", 0).code == 0
    result = run(*command)
    assert result.code == 1
    assert "is below the bar of 90%" in result.out
    assert "real, held out" in result.out
    assert "4 (100.0%)" in result.out  # of the real clips
    assert f"{weights}, digit by digit:  " in result.out.replace("\n", "")


def test_evaluate_counts_prompts_that_were_held_out_apart(run):
    short = ("--steps", 1, "--checkpoint-every", 1)
    assert run("train", "--out", "r", "--hold-out", *short, *SMALL_RUN).code == 0
    command = ["evaluate", "--count", 4, "--steps", 1, "--weights", "r/model.safetensors"]
    result = run(*command, "--name", "mine")
    for row in ("prompts never shown", "other prompts"):  # four digits each
        assert re.search(rf"mine, {row}, digit by digit:(  \d: ./1){{3}}\s+\d: ./1\n", result.out)


def test_tables_fit_a_terminal_of_80_columns(run, weights, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = run("evaluate", "--count", 4, "--steps", 1, "--weights", weights, "--name", "m" * 34)
    assert "digit" in result.out
    assert "m" * 34 in result.out
    assert "…" not in result.out


def test_a_new_run_under_resume_says_so(run):
    result = run("train", "--out", "typo", "--resume", "--steps", 1, *SMALL_RUN)
    assert result.code == 0
    assert "there is no typo/checkpoint.safetensors yet: a new run" in result.out
    result = run("train", "--out", "typo", "--resume", "--init", "shipped")
    assert "--init shipped differs from none in typo/checkpoint.safetensors" in result.err


def test_a_run_from_other_weights_in_other_words(run, weights):
    short = ("--steps", 1, "--checkpoint-every", 1, "--batch-size", 4)
    begin = ("train", "--out", "r", "--init", weights, "--wordings", *short)
    assert run(*begin).code == 0
    result = run(*begin, "--hidden-size", 48, "--resume")
    assert "--hidden-size 48 differs from 32 in r/checkpoint.safetensors" in result.err
    result = run("train", "--out", "s", "--init", weights, "--hidden-size", 48)
    assert result.code == 2
    assert f"--hidden-size 48 differs from 32 in {weights}, which --init begins with" in result.err
    result = run("train", "--out", "s", "--init", "nothing.safetensors")
    assert result.code == 2
    assert "nothing.safetensors" in result.err
    command = ["evaluate", "--count", 4, "--steps", 1, "--weights", "r/model.safetensors"]
    result = run(*command, "--name", "mine", "--bar", 0)
    assert re.search(
        r"mine, prompts never shown, digit by digit:(  \d: ./1){3}\s+\d: ./1\n", result.out
    )
    assert run("generate", "the digit two drifting upwards", "--weights", "r/model.safetensors",
               "--steps", 1, "--out", "two.gif").code == 0  # fmt: skip


def test_demo_says_where_the_files_are_and_what_to_type_next(run, weights, monkeypatch, tmp_path):
    monkeypatch.setattr("dit_kernels.video.model.SHIPPED_WEIGHTS", weights)
    result = run("demo", "--out", "films")
    assert result.code == 0, result.err
    assert "films/contact-sheet.png" in result.out
    assert "dit-kernels generate" in result.out
    assert (tmp_path / "films" / "contact-sheet.png").is_file()
    assert len(list((tmp_path / "films").glob("*.mp4"))) == 8


def test_info_names_each_backend_with_its_reason(run):
    from dit_kernels import backends

    result = run("info")
    assert result.code == 0
    assert torch.__version__.partition("+")[0] in result.out
    for backend in backends.report():
        assert backend.name in result.out
    assert "DIT_KERNELS_BACKEND" not in result.out


@pytest.mark.parametrize("command", [["info"], ["check"], ["check", "--diffusers"]])
def test_a_backend_that_there_is_none_of_is_named(run, monkeypatch, command):
    monkeypatch.setenv("DIT_KERNELS_BACKEND", "foo")
    assert_one_line(run(*command), "DIT_KERNELS_BACKEND: backend must be one of auto,", "got 'foo'")
    monkeypatch.setenv("DIT_KERNELS_BACKEND", "reference")
    if command == ["info"]:
        assert re.search(r"DIT_KERNELS_BACKEND\W+reference", run("info").out)


@pytest.mark.parametrize("error", [1e-3, 3e-3])
def test_check_prints_a_row_an_op_and_fails_if_one_is_off(run, monkeypatch, error):
    from dit_kernels.check import Row

    monkeypatch.setenv("COLUMNS", "80")
    forward = Row("feed_forward", "wan out0", "reference", "bfloat16", "forward", 1e-3, 2e-3, 4)
    backward = Row("feed_forward", "flux dx", "reference", "bfloat16", "backward", error, 2e-3, 9)
    monkeypatch.setattr("dit_kernels.check.run", lambda: [forward, backward])
    result = run("check")
    right = error < 2e-3
    assert result.code == (0 if right else 1)
    assert "13 tensors compared" in result.out
    assert re.search(r"feed_forward +reference .* 2.0e-03  (ok|OFF) *\n", result.out)[1] == (
        "ok" if right else "OFF"
    )
    assert ("all within what is allowed" if right else "1 rows off") in result.out
    assert ("flux dx is off by 3.00e-03, allowed 2.00e-03" in result.out) == (not right)


def test_train_codec_then_train_in_its_latents(run, tmp_path):
    small = ["--size", "16", "--steps", 2, "--checkpoint-every", 1, "--batch-size", 2]
    codec = ["train-codec", "--out", "c", "--width", 4, "--latent-channels", 3, "--frames", 5]
    made = run(*codec, *small)
    assert made.code == 0, made.err
    assert "dB peak signal to noise" in made.out
    assert "dit-kernels train --codec c/codec.safetensors --data digits" in made.out
    assert "clips/s" in made.err
    assert_one_line(run(*codec, *small), "is already there", "--resume")
    assert_one_line(run(*codec, "--resume", "--kl-weight", 1), "--kl-weight 1.0 differs from 0.001")
    assert run("train-codec", "--out", "c", "--resume").code == 0

    model = ["--hidden-size", 32, "--depth", 1, "--num-heads", 2, "--patch-size", "1x2x2"]
    command = ["train", "--out", "m", "--codec", "c", "--given-share", 0.5]
    trained = run(*command, *small, *model, "--frames", 5)
    assert trained.code == 0, trained.err
    weights = "m/model.safetensors"
    first = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8))
    first.save("first.png")
    options = ["--weights", weights, "--steps", 1, "--frames", 9, "--out", "x.png"]
    assert run("generate", PROMPT, "--image", "first.png", *options).code == 0
    frames = frames_of("x.png", 9)
    assert (frames[0] == np.array(first)).all()  # the given frame, exactly
    assert not (frames[1] == frames[0]).all()
    judged = run("evaluate", "--weights", weights, "--count", 2, "--steps", 1, "--bar", 0)
    assert "through the codec" in judged.out


def frames_of(path, count):
    """The frames, grey, of a PNG that `generate` wrote for one prompt."""
    with Image.open(path) as sheet:
        shown = np.array(sheet.convert("L"))[6 + 24 :]
    return [shown[:96:6, 6 + i * 102 : 6 + i * 102 + 96 : 6] for i in range(count)]


def test_generate_goes_on_from_a_video(run, weights):
    options = ["--weights", weights, "--steps", 1]
    assert run("generate", PROMPT, *options, "--out", "start.mp4").code == 0
    long = run(
        "generate", PROMPT, *options, "--video", "start.mp4", "--frames", 8, "--out", "x.png"
    )
    assert long.code == 0, long.err
    kept = read_video("start.mp4", (16, 16), channels=1)[..., 0]
    assert all((a == b).all() for a, b in zip(frames_of("x.png", 8), kept, strict=False))
    nothing_left = run("generate", PROMPT, *options, "--video", "start.mp4", "--out", "x.png")
    assert_one_line(nothing_left, "start.mp4 gives 4 of 4 frames", "--frames")


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "ddpm"])
def test_generate_with_other_schedulers_and_sizes(run, weights, tmp_path, scheduler):
    options = ["--weights", weights, "--steps", 2, "--size", "16x24", "--out", "x.png"]
    assert run("generate", PROMPT, *options, "--scheduler", scheduler).code == 0
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.size == (6 + 4 * (144 + 6), 6 + 24 + 96 + 6)


def test_train_on_a_folder_of_videos(run, tmp_path):
    films = tmp_path / "films"
    for i, name in enumerate(("one", "two")):
        frames = torch.randint(0, 256, (10, 32, 32, 3), dtype=torch.uint8)
        write_video(films / f"{name}.mp4", frames)
        (films / f"{name}.txt").write_text(f"A film, number {i}.")
    (films / "broken.mp4").write_bytes(b"nothing")
    (films / "broken.txt").write_text("never seen")
    options = ["--data", "films", "--out", "r", "--steps", 1, "--patch-size", "2x4x4"]
    trained = run("train", *options, *SMALL_RUN)
    assert trained.code == 0, trained.err
    assert "skipped films/broken.mp4: it can't be decoded" in trained.out
    assert 'generate "A film, number ' in trained.out
    model = TextToVideo.load("r/model.safetensors")
    assert model.config.words == ("0", "1", "a", "film", "number")
    assert model.config.channels == 3
    made = run("generate", "a film number 1", "--weights", "r/model.safetensors", "--steps", 1)
    assert made.code == 0, made.err
    judged = run("evaluate", "--weights", "r/model.safetensors")
    assert_one_line(judged, "r/model.safetensors was trained with --data films", "moving digits")
    refused = run("train", "--data", "films", "--out", "s", "--init", "shipped", "--steps", 1)
    assert_one_line(refused, "shipped have 1 colour channels, those of --data films have 3")


def test_evaluate_writes_its_figures_and_their_table(run, weights, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- evaluation -->\nold\n<!-- end of evaluation -->\nafter\n")
    command = ["evaluate", "--count", 4, "--steps", 1, "--weights", weights, "--bar", 0]
    for name in ("pixels", "latents", "pixels"):
        written = ["--json", "figures.json", "--markdown", page, "--name", name]
        assert run(*command, *written).code == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == ["pixels", "latents"]
    assert figures["pixels"]["settings"]["steps"] == 1
    score = figures["pixels"]["rows"]["pixels"]
    real = figures["pixels"]["rows"]["real, held out"]
    assert score["total"] == real["total"] == 4
    lines = page.read_text().splitlines()
    assert lines[:2] == ["before", "<!-- evaluation -->"]
    assert lines[-2:] == ["<!-- end of evaluation -->", "after"]
    assert (
        f"| real, held out | 4 | {real['digits'] / 4:.1%} | {real['directions'] / 4:.1%} |" in lines
    )
    assert f"| latents | 4 | {score['digits'] / 4:.1%} | {score['directions'] / 4:.1%} |" in lines
    assert len(lines) == 4 + 2 + 3  # the real clips once


@pytest.mark.parametrize(
    ("written", "part"),
    [
        (["--json", "x.json", "--markdown", "page"], "page has no place for the table"),
        (["--json", "page"], "page holds no figures of `dit-kernels evaluate`: Expecting value"),
        (["--json", "list"], "list holds no figures of `dit-kernels evaluate`"),
        (["--json", "page/x.json"], "File exists: page"),
        (["--json", "."], ". is a folder; a file is to be written there"),
        (["--json", "/proc/x.json"], "nothing can be written to /proc\n"),
    ],
)
def test_evaluate_makes_no_videos_that_it_could_not_write_about(
    run, monkeypatch, tmp_path, written, part
):
    (tmp_path / "page").write_text("no place")
    (tmp_path / "list").write_text("[1]")
    monkeypatch.setattr("dit_kernels.video.evaluation.generate", None)
    assert_one_line(run("evaluate", *written), part)
