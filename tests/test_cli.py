"""The command line on a base install, in new processes without what the extras bring."""

import subprocess
import sys
from pathlib import Path

import pytest

import sb3_algd
from sb3_algd import cli

MISSING = ("mujoco", "safety_gymnasium", "rl_zoo3", "matplotlib", "scipy", "optuna", "pandas", "xmltodict", "imageio")


def run_on_base(module: str, *options: str) -> subprocess.CompletedProcess[str]:
    program = (
        f"import runpy, sys\nsys.modules.update(dict.fromkeys({MISSING!r}))\n"
        f"sys.argv = ['sb3-algd', *{options!r}]\nrunpy.run_module({module!r}, run_name='__main__')"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    cli.main(["--help"])
    told = capsys.readouterr().out
    assert told.startswith(f"sb3_algd {sb3_algd.__version__}\nusage: sb3-algd <command>")
    assert all(f"  {name}" in told for name in cli.COMMANDS)
    assert told.count("the extra zoo") == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("plot_train -e TwoModes-v0 -f {0}/nowhere", "nowhere/algd: No such file or directory. Name the log folder with -f"),
        ("plot_from_file -i {0}/nowhere.pkl", "nowhere.pkl: No such file or directory. Name .* the file with -i"),
        ("all_plots -e TwoModes-v0", "all_plots needs -f"),
        ("plot_from_file", "plot_from_file needs -i"),
        ("push_to_hub --env TwoModes-v0 -orga x -f {0}/nowhere", "nowhere/algd folder was not found"),
    ],
)
def test_what_is_not_there_is_named(command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It replaces its own command line
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit, match=message):
        cli.main(command.format(tmp_path).split())


def test_without_the_zoo() -> None:
    told = run_on_base("sb3_algd.cli", "--help")
    assert told.returncode == 0
    assert "enjoy" in told.stdout
    refused = run_on_base("sb3_algd.cli", "train", "--env", "TwoModes-v0")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "pip install" in refused.stderr
    refused = run_on_base("sb3_algd.cli", "compare", "--env", "TwoModes-v0")
    assert refused.stderr == "The figure needs matplotlib. Install with: pip install matplotlib\n"
    refused = run_on_base("sb3_algd.cli", "compare", "--env", "TwoModes-v0", "--algos", "nothing")
    assert "invalid choice: 'nothing'" in refused.stderr


def test_environments_name_the_extra_that_they_need() -> None:
    listed = run_on_base("sb3_algd.envs")
    assert listed.returncode == 0, listed.stderr
    lines = {line.split()[0]: line.split() for line in listed.stdout.splitlines() if line}
    assert lines["TwoModes-v0"] == ["TwoModes-v0", "own", "64", "no", "1", "2", "100"]
    assert lines["HopperSpeed-v0"][2:] == ["-", "-", "-", "-", "1000"]
    assert lines["Safexp-PointButton1-v0"][2:] == ["-", "-", "-", "-", "400"]
    needs = [line for line in listed.stdout.splitlines() if line.startswith("-: ")]
    assert len(needs) == 2
    assert "safety-gymnasium==1.0.0" in needs[0]
    assert needs[1] == '-: the speed tasks need: pip install "sb3_algd[safety]"'
