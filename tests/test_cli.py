"""The command line: what it writes and says, and how it answers wrong input."""

import dataclasses
import inspect
import subprocess
import sys
from types import SimpleNamespace

import av
import pytest
import torch
from PIL import Image

from dit_kernels import cli
from dit_kernels.cli.train import train as train_command
from dit_kernels.video.model import ModelConfig, TextToVideo
from dit_kernels.video.training import Trainer, TrainingConfig, train

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


@pytest.mark.parametrize("arguments", [[], ["--help"]], ids=["nothing", "help"])
def test_help_teaches(run, arguments):
    result = run(*arguments)
    assert result.code == 0
    assert result.err == ""
    assert 'dit-kernels generate "a seven moving left"' in result.out
    for command in COMMANDS:
        assert command in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_in_its_help(run, command):
    result = run(command, "--help")
    assert result.code == 0
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
        ("generate|a one|--frames|6", ["frames must be a multiple of 4", "got 6"]),
        ("generate|a one|--size|30", ["height must be a multiple of 4", "got 30"]),
        ("generate|a one|--seed|-1", ["--seed"]),
        ("generate|a one|--bogus", ["No such option", "--bogus"]),
        ("generate|a one|--device|nowhere", ["--device must be auto, cpu, cuda", "nowhere"]),
        ("generate|a one|--device|cuda:99", ["no cuda:99 here", "dit-kernels info"]),
        ("generate|a one|--weights|none", ["no checkpoint at none"]),
        ("generate|a one|--weights|a-file", ["a-file is not a checkpoint"]),
        ("generate|a one|--out|a-file/x.mp4", ["a-file"]),
        ("train|--out|a-file", ["a-file"]),
        ("train|--size|12", ["size must be at least 14"]),
        ("train|--size|18", ["(4, 4, 4)", "18"]),
        ("train|--steps|0", ["--steps"]),
        ("train|--size|ten", ["--size", "must be like 32, or 32x48"]),
        ("train|--patch-size|2x2", ["--patch-size", "must be like 1x2x2"]),
        ("train|--codec|nowhere", ["no codec at nowhere", "identity, causal"]),
        ("train|--codec|a-file", ["a-file is not a checkpoint"]),
        ("train|--codec|causal|--frames|8", ["1 more than a multiple of 2", "such as 9", "got 8"]),
        ("train|--text-encoder|nowhere", ["no text encoder at nowhere"]),
        ("train|--text-mode|loud", ["text_mode must be one of", "loud"]),
        ("train|--objective|gan", ["objective must be one of flow, ddpm", "gan"]),
        ("train|--optimizer|sgd", ["optimizer must be one of muon, adamw", "sgd"]),
        ("train|--accumulate|3", ["accumulate must divide", "3 and 16"]),
        ("train|--data|nowhere", ["no folder of videos, and no CSV, at nowhere"]),
        ("train|--data|.", ["no video in . can be used"]),
        ("train|--data|a-file", ["a CSV with the columns video and caption"]),
        ("train|--digits|0", ["--digits"]),
        ("train-codec|--frames|4", ["1 more than a multiple of 2", "got 4"]),
        ("train-codec|--strides|2", ["must be like 1x2x2"]),
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

    made = run("generate", PROMPT, "--steps", 1, "--weights", "r/checkpoint.safetensors")
    assert made.out == "video.mp4\n"


def test_train_resumes_to_the_weights_of_an_unbroken_run(run, tmp_path):
    config = TrainingConfig(steps=4, batch_size=2, checkpoint_every=2)
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
    for config in (ModelConfig(), TrainingConfig()):
        for field in dataclasses.fields(config):
            if field.name in defaults:
                default = defaults[field.name]
                # by default these two follow the codec; in pixels they are the library's
                assert default == getattr(config, field.name) or (
                    default is None and field.name in ("frames", "patch_size")
                ), field.name
                checked += 1
    assert checked == 29


def test_evaluate_prints_a_row_for_the_model_and_one_for_real_clips(run, weights):
    command = ["evaluate", "--count", 4, "--steps", 1, "--weights", weights]
    assert run(*command, "--bar", 0).code == 0
    result = run(*command)
    assert result.code == 1
    assert "is below the bar of 90%" in result.out
    assert "generated" in result.out
    assert "real, held out" in result.out
    assert "4 (100.0%)" in result.out  # of the real clips
    assert "digit by digit" in result.out


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


@pytest.mark.parametrize("error", [1e-3, 3e-3])
def test_check_prints_a_row_an_op_and_fails_if_one_is_off(run, monkeypatch, error):
    from dit_kernels.check import Row

    forward = Row("adaln", "wan out0", "triton", "bfloat16", "forward", 1e-3, 2e-3, 4)
    backward = Row("adaln", "flux dx", "triton", "bfloat16", "backward", error, 2e-3, 9)
    monkeypatch.setattr("dit_kernels.check.run", lambda: [forward, backward])
    result = run("check")
    right = error < 2e-3
    assert result.code == (0 if right else 1)
    assert "13 tensors compared" in result.out
    assert ("all within what is allowed" if right else "1 rows off") in result.out
    assert ("flux dx is off by 3.00e-03, allowed 2.00e-03" in result.out) == (not right)
