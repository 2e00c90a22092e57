"""What each sub-command of `spvit` does: open, run, write, show."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from accelerate.utils import set_seed
from rich.console import Console
from torch import nn

from spvit.architecture import Architecture, dense
from spvit.budget import human
from spvit.checkpoint import describe, save, write_text
from spvit.cli import convert
from spvit.cli import options as cli
from spvit.cli.inputs import model_and_images
from spvit.cli.plan import print_plan
from spvit.cli.report import report_at_the_end
from spvit.cli.show import block_table, comparison_table, kinds_text, latency_table, say
from spvit.cost import count_params
from spvit.errors import ArchitectureError, CheckpointError, DataError, ModelError, RunFolderError
from spvit.hosts.host import macs_of_image
from spvit.hosts.rebuild import build, can_build, source_of
from spvit.models import ModelConfig, open_model
from spvit.replacements.costs import network_costs
from spvit.speed.benchmark import BATCHES, Latency, Program, measure_batches
from spvit.speed.latency import batches_to_measure
from spvit.surgery import prune, pruned_record
from spvit.train.compress import check_decision, deployed, run_compress, search, write_model
from spvit.train.figures import Evaluation, Figures, figures_of
from spvit.train.headers import checked
from spvit.train.loop import Phase, Run, run_phase
from spvit.train.processes import by_the_first, processes
from spvit.train.progress import PhaseProgress
from spvit.train.run_folder import DENSE, FINETUNE, RunFolder
from spvit.train.settings import LoopConfig
from spvit.zoo import architectures

NOT_SETTINGS = ("resume", "dry_run")


def open_run(
    name: str, options: cli.RunCommand, trains_head: bool, console: Console, unlabelled: bool = False
) -> tuple[nn.Module, Run]:
    """Return the model of a run, and the run with its settings written."""
    folder = RunFolder.open(options.output, options.resume)
    set_seed(options.seed)
    opened, images = model_and_images(options, trains_head, unlabelled=unlabelled)
    model = opened.model
    processes().wait_for_everyone()  # until all have found the folder fit to write to
    settings = {key: value for key, value in dataclasses.asdict(options).items() if key not in NOT_SETTINGS}
    by_the_first(lambda: folder.write_settings(name, yaml.safe_dump(settings, sort_keys=False)))
    costs = f"{human(count_params(model))} params, {human(macs_of_image(model))} macs"
    labels = f"{len(images.classes)} classes" if images.classes else "no labels: judged by agreement with it"
    say(console, f"{options.model}: {costs}; {labels}")
    if options.shard and processes().num_processes == 1:
        say(console, "shard: one process holds the whole model; start several for parts, as with torchrun")
    return model, Run(images, folder, options, PhaseProgress(console))


def _write(model: nn.Module, figures: Figures, run: Run, console: Console, when: str = "") -> None:
    """Write a run's model, and say how accurate it is."""
    write_model(model, figures, run.images, run.folder.path)
    _say_where(console, run.folder.path, f"{figures.words}{when}")


def _say_where(console: Console, folder: Path, *lines: str) -> None:
    dense = "" if can_build(describe(folder).host) else ", host=the dense model"
    say(console, *lines, f'files in {folder}; load the model with spvit.load("{folder}"{dense})')


def train_command(options: cli.TrainCommand, console: Console) -> None:
    """Train a dense model and write it."""
    model, run = open_run("train", options, True, console)
    _write(model, run_phase(Phase(DENSE, model, options.dense), checked(run)), run, console)


def search_command(options: cli.SearchCommand, console: Console) -> None:
    """Search, and write the architecture and the pruned model as the search left it."""
    if options.compile:
        raise DataError("a search is not compiled, as each step draws gates, which choose what runs; leave out compile")
    if options.shard:
        raise DataError("a search is not sharded, as its budget reads the gates of all blocks at once; leave out shard")
    budget = options.budget()  # before anything is downloaded
    host, run = open_run("search", options, False, console)
    limits = check_decision(host, budget, options.multiple)
    run = checked(run)
    net, architecture = search(host, limits, options.search, run, options.multiple)
    console.print(block_table(architecture, network_costs(host), "architecture"))
    pruned = prune(host, architecture, weights=net)
    _write(pruned, figures_of([pruned], run.images, options)[0], run, console, " before fine-tuning")


def finetune_command(options: cli.FinetuneCommand, console: Console) -> None:
    """Fine-tune a pruned model, or a dense one after pruning it to an architecture, and write it folded."""
    architecture = Architecture.load(options.architecture) if options.architecture is not None else None
    model, run = open_run("finetune", options, False, console)
    teacher = None
    if architecture is not None:
        teacher = model
        model = _pruned_to(model, architecture, options.architecture)
    elif pruned_record(model) is None:
        raise ModelError(f"{options.model} is a dense model; name what to keep with --architecture, or see spvit train")
    figures = run_phase(Phase(FINETUNE, model, options.finetune, teacher=teacher), checked(run))
    _write(deployed(model), figures, run, console)


def compress_command(options: cli.CompressCommand, console: Console) -> None:
    """Compress a model to a budget; or print what that would take."""
    if options.dry_run:
        print_plan(options, console)
        return
    budget = options.budget()  # before anything is downloaded
    model, run = open_run("compress", options, options.dense.epochs > 0, console, unlabelled=True)
    result = run_compress(model, budget, options, run)
    if not processes().is_main_process:
        return
    costs = network_costs(result.host)
    batches = batches_to_measure(options.batches, None if options.latency is None else options.latency_batch)
    latencies = latencies_of({"dense": result.host, "pruned": result.model}, batches, console)
    console.print(block_table(result.architecture, costs, "architecture"), comparison_table(result, costs))
    console.print(latency_table(latencies))
    after = f"right after pruning {result.after_pruning.words}"
    _say_where(console, run.folder.path, f"attention: {kinds_text(result.architecture)}; {after}")
    measured = {name: [dataclasses.asdict(latency) for latency in own] for name, own in latencies.items()}
    write_text(run.folder.latency, json.dumps(measured, indent=2) + "\n")
    report_at_the_end(run.folder, result.host, console)


def evaluate_command(options: cli.EvaluateCommand, console: Console) -> None:
    """Print a model's figures on the validation images."""
    opened, images = model_and_images(options)
    [figures] = figures_of([opened.model], images, LoopConfig(precision=options.precision))
    assert isinstance(figures, Evaluation)  # images that this command takes have labels
    more = f"top-5 {figures.accuracy_top5:.2%}, loss {figures.loss:.4f}, {figures.images:,} images"
    say(console, f"{figures.words}, {more}")


def profile_command(options: cli.ProfileCommand, console: Console) -> None:
    """Print the costs of a model by block, dense against pruned."""
    model = open_model(options, weights=False, code=True).model  # weights, which cost a download, are not counted
    record = pruned_record(model)
    if record is not None and options.architecture is not None:
        raise ArchitectureError(f"{options.model} is pruned already; name a dense model with --architecture")
    host = model if record is None else build(source_of(model))
    costs = network_costs(host)
    if record is not None:
        architecture = record.architecture
    elif options.architecture is not None:
        architecture = _named_architecture(options.architecture)
    else:
        architecture = dense([block.units for block in costs["macs"].blocks])
    pruned = deployed(model if record is not None else _pruned_to(host, architecture, options.architecture))
    console.print(block_table(architecture, costs, options.model))
    if options.latency:
        models = (
            {"dense": host} if record is None and options.architecture is None else {"dense": host, "pruned": pruned}
        )
        console.print(latency_table(latencies_of(models, BATCHES, console)))


def convert_command(options: cli.ConvertCommand, console: Console) -> None:
    """Write a checkpoint of others in spvit's format, and say what it was recognised as."""
    run = RunFolder(options.output)
    if run.path.is_file() or run.used:
        raise RunFolderError(f"output {run.path} is in use; name a new or empty folder")
    if options.model_args and options.model is None:
        raise ModelError(f"model_args {options.model_args} need the timm model that they are for; name it with --model")
    published = convert.read_published(options.checkpoint)
    weights, said = published.form != "indicators", f"{published.path}: {published.described()}"
    if options.indicators is not None and not weights:
        raise CheckpointError(f"{published.path} is an FFN indicator file itself; --indicators goes with weights")
    indicators = convert.read_published(options.indicators) if options.indicators is not None else None
    name = options.model or (convert.model_name(published) if weights else None)
    opened = None
    if name is not None:
        arguments = {"num_classes": published.classes(), **options.model_args}
        opened = open_model(ModelConfig(model=name, model_args=arguments, pretrained=False))
    if opened is None or not weights:
        architecture = convert.indicated_architecture(published, None if opened is None else opened.model)
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_architecture(architecture)
        kept = _kept_lines(architecture, indicated=True)
        say(console, said, *kept, f"architecture in {run.architecture}, for spvit finetune")
        return
    try:
        model = convert.rebuild(published, opened.model, indicators)
    except CheckpointError as error:
        hint = "" if options.model is not None else ", determined by its shapes; --model names another"
        raise CheckpointError(f"{error} (model {name}{hint})") from error
    save(model, run.path, preprocessing=opened.preprocessing)
    lines = [f"{said}; model {name}, {published.classes()} classes"]
    record = pruned_record(model)
    if record is not None:
        lines += _kept_lines(record.architecture, indicated=published.form == "dense")
        if indicators is None and any(len(block.ffn.units) < block.ffn.width for block in record.architecture.blocks):
            lines.append("the file does not list which FFN units it kept; the first stand for them, see --indicators")
    _say_where(console, run.path, *lines)


def _kept_lines(architecture: Architecture, indicated: bool) -> list[str]:
    """Return what is kept in words; of an architecture that indicators say, where its attention is from too."""
    widths = ", ".join(f"{len(block.ffn.units)}/{block.ffn.width}" for block in architecture.blocks)
    lines = [f"attention: {kinds_text(architecture)}; skip adds: {architecture.skip_rule}", f"FFN units: {widths}"]
    if indicated:
        name = convert.architecture_name(architecture.widths())
        known = f"attention as in the published architecture of these widths, {name}"
        lines.append(known if name else "an indicator file lists no attention layers, so all of them stay")
    return lines


def _pruned_to(host: nn.Module, architecture: Architecture, name: str | None) -> nn.Module:
    try:
        return prune(host, architecture)
    except ArchitectureError as error:
        raise ArchitectureError(f"architecture {name}: {error}") from error


def _named_architecture(name: str) -> Architecture:
    published = architectures()
    if name in published:
        return published[name]
    if not Path(name).is_file():
        known = ", ".join(published)
        raise ArchitectureError(f"architecture {name!r} is neither a file nor a published one; published are {known}")
    return Architecture.load(name)


def latencies_of(
    models: dict[str, nn.Module], batches: Sequence[int], console: Console
) -> dict[str, tuple[Latency, ...]]:
    """Return the latencies of models by name, one a batch size, measured side by side on the device of the run."""
    programs = [Program.of(name, model.to(processes().device)) for name, model in models.items()]
    with Console(stderr=True, quiet=console.quiet).status("measuring latency"):
        return dict(zip(models, measure_batches(programs, batches)))
