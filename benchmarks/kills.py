"""Whether runs that are killed at random moments, and resumed, end at the same bytes as runs that are not.

python benchmarks/kills.py --output FOLDER [--kills 20] [--processes 1 2] [--seed 0]

Two runs of `spvit compress` take turns: one decides by scores, the other by a search. Each is killed by SIGKILL after a
random share of its time and resumed, again and again, until it has its results; then the next one begins, until there
were as many kills as asked for. Of several processes all are killed, or a random one alone, and then it counts how long
the others need to end. No part of the tests, since it takes minutes: about half a minute a kill on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

MODEL_ARGS = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 48, "depth": 6}
SHORT = ["--finetune.epochs", "3", "--finetune.warmup_epochs", "0", "--save_minutes", "0.02", "--log_every", "1"]
WORDS = ["--model", "vit_tiny_patch16_224", "--model_args", json.dumps(MODEL_ARGS | {"num_heads": 3}), *SHORT]
WORDS += ["--pretrained", "false", "--data", "digits", "--images.mean", "[0.5]", "--images.std", "[0.5]"]
WORDS += ["--images.mixup", "0.2", "--images.random_erasing", "0.2", "--images.workers", "1", "--batches", "[1]"]
WORDS += ["--dense.epochs", "1", "--dense.warmup_epochs", "0", "--calibration_images", "512", "--macs", "60%"]
WAYS = {"scores": [], "search": ["--search.epochs", "3", "--search.warmup_epochs", "0"]}
RESULTS = ("model.safetensors", "model.json", "architecture.json", "summary.json")
MOST_SHARE = 0.4
"""Of the time of a whole run, from when it is at work on, after which it is killed at the latest."""
PATIENCE = 60.0
"""Seconds in which the other processes must have ended."""


def started(folder: Path, way: str, processes: int) -> subprocess.Popen[bytes]:
    """Start a run in a folder, or continue it, in a group of processes of its own that writes to a log beside it."""
    continued = (folder / "config.yaml").exists()
    words = ["compress", "--output", str(folder), *(["--resume"] if continued else [*WORDS, *WAYS[way]])]
    launcher = []
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, "-m", "spvit_command", *words]
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def at_work(folder: Path, run: subprocess.Popen[bytes]) -> bool:
    """Wait until a run has loaded all and written its settings, and return whether it has."""
    begun, settings = time.time(), folder / "config.yaml"
    while run.poll() is None:
        if settings.exists() and settings.stat().st_mtime >= begun:
            return True
        time.sleep(0.01)
    return False


def killed(run: subprocess.Popen[bytes], chance: random.Random) -> tuple[str, float]:
    """Kill a run; return which of its processes, and after how many seconds all had ended."""
    ranks = psutil.Process(run.pid).children()
    victim = chance.choice(["all", *range(len(ranks))]) if ranks and "torch" in " ".join(run.args) else "all"
    since = time.monotonic()
    if victim == "all":
        os.killpg(run.pid, signal.SIGKILL)
    else:
        ranks[victim].kill()
    run.wait(timeout=PATIENCE)
    seconds = time.monotonic() - since
    for rank in psutil.wait_procs(ranks, timeout=PATIENCE)[1]:  # readers of images may take a moment more
        rank.kill()
    return str(victim), seconds


def newest(folder: Path) -> str:
    """Return the file that a run wrote last."""
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".lock", "config.yaml", "metrics.jsonl")
    ]
    return str(max(files, key=lambda path: path.stat().st_mtime).relative_to(folder)) if files else "nothing"


def whole(folder: Path, way: str, processes: int) -> float:
    """Make a run that is not killed and return its seconds."""
    run = started(folder, way, processes)
    assert at_work(folder, run), f"see {folder.with_suffix('.log')}"
    begun = time.monotonic()
    assert run.wait() == 0, f"see {folder.with_suffix('.log')}"
    return time.monotonic() - begun


def tried(output: Path, processes: int, kills: int, seed: int, console: Console) -> list[dict[str, Any]]:
    """Kill and resume runs so many times; return what became of each."""
    chance, found = random.Random(seed), []
    seconds = {way: whole(output / f"whole-{way}", way, processes) for way in WAYS}
    console.print(f"{processes} processes, not killed: {seconds} s")
    while kills > 0:
        way = list(WAYS)[len(found) % len(WAYS)]
        folder, moments = output / f"killed-{len(found)}-{way}", []
        while True:
            run = started(folder, way, processes)
            if kills > 0 and at_work(folder, run):
                time.sleep(chance.uniform(0, MOST_SHARE * seconds[way]))
                if run.poll() is None and not (folder / "summary.json").exists():  # or it has all that is compared
                    victim, ended = killed(run, chance)
                    moments.append({"after": newest(folder), "victim": victim, "ended": round(ended, 1)})
                    console.print(f"{folder.name}: killed {moments[-1]}")
                    kills -= 1
                    continue
            code = run.wait()
            break
        same = [
            (folder / name).is_file() and (folder / name).read_bytes() == (output / f"whole-{way}" / name).read_bytes()
            for name in RESULTS
        ]
        found.append({"way": way, "processes": processes, "kills": moments, "code": code, "same": all(same)})
        console.print(f"{folder.name}: exit code {code}, {'the same bytes' if all(same) else 'OTHER BYTES'}")
    return found


def main() -> None:
    """Run all and show a table; exit with 1 when a run ended at other bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs; what is in it goes")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console, found = Console(soft_wrap=True), []
    for processes in options.processes:
        output = options.output / str(processes)
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        found += tried(output, processes, options.kills, options.seed, console)
    (options.output / "kills.json").write_text(json.dumps(found, indent=2) + "\n")
    table = Table("processes", "decided by", "kills", "slowest end", "same bytes", title="killed and resumed")
    for run in found:
        slowest = max((kill["ended"] for kill in run["kills"]), default=0.0)
        row = run["processes"], run["way"], len(run["kills"]), f"{slowest} s", run["same"]
        table.add_row(*map(str, row))
    console.print(table)
    sys.exit(not all(run["same"] for run in found))


if __name__ == "__main__":
    main()
