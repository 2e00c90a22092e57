"""The examples run offline at tiny size, from an empty folder."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from spvit.cli.main import parse

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
SAYS = {"classifier": "same first guess on", "clip_tower": "same text as before", "dino_backbone": "nearest neighbour"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--tiny"])
    runpy.run_path(str(path), run_name="__main__")
    assert SAYS[path.stem] in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 1, 138, 143])
def test_the_slurm_script_starts_a_run_and_goes_on_with_it(tmp_path: Path, monkeypatch, code: int) -> None:
    """With a srun that writes down what each process would run, and a scontrol that answers."""
    root = Path(__file__).parents[1]
    asked, queued, run = tmp_path / "asked", tmp_path / "queued", tmp_path / "run"
    stubs = {
        "srun": f'shift; export SLURM_PROCID=3 SLURM_LOCALID=1; "$@" > {asked}; exit {code}',
        "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT"; printf "%s\\n" "$@"',
        "scontrol": f'if [ $1 = requeue ]; then echo $2 > {queued}; else printf "first\\nsecond\\n"; fi',
    }
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN": str(run), "DATA": "my images"}
    own |= {"SLURM_NTASKS": "32", "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "two"}
    for resumed in (False, True):
        done = subprocess.run(["bash", "examples/slurm.sh"], cwd=root, env=own, check=False)
        assert done.returncode == code
        where, *words = asked.read_text().splitlines()
        assert (where, words[:3]) == ("3 1 32 first:29500", ["-m", "spvit_command", "compress"])
        assert queued.exists() == (code in (138, 143))
        assert ("--resume" in words) == resumed
        monkeypatch.chdir(root)
        if resumed:
            assert words[3:] == ["--output", str(run), "--resume"]
            continue
        _, options = parse(words[2:])
        assert (options.data, options.output) == ("my images", str(run))
        assert 32 * options.images.batch_size == 1024
        run.mkdir()
        (run / "config.yaml").touch()
