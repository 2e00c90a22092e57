"""What each sub-command of `spvit` does: open, run, write, show."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import set_seed
from rich.console import Console
from torch import nn

from spvit.architecture import Architecture, dense
from spvit.benchmark import Latency, measure_latencies
from spvit.budget import human
from spvit.checkpoint import save
from spvit.cli import convert
from spvit.cli import options as cli
from spvit.cli.inputs import model_and_images
from spvit.cli.plan import print_plan
from spvit.cli.show import block_table, comparison_table, kinds_text, latency_text, say
from spvit.cost import count_macs, count_params
from spvit.errors import ArchitectureError, CheckpointError, ModelError, RunFolderError
from spvit.hosts.host import example_images
from spvit.hosts.recognise import family_of
from spvit.models import ModelConfig, OpenedModel, open_model
from spvit.replacements.costs import network_costs
from spvit.surgery import prune, pruned_record
from spvit.train.compress import check_decision, deployed, figures_of, run_compress, search, write_model
from spvit.train.loop import Phase, Run, run_phase
from spvit.train.processes import processes
from spvit.train.progress import PhaseProgress
from spvit.train.run_folder import DENSE, FINETUNE, RunFolder
from spvit.train.settings import LoopConfig, check_settings
from spvit.zoo import architectures, unfolded_params

NOT_SETTINGS = ("resume", "dry_run")
BATCHES = (1, 64)


def _open(name: str, options: cli.RunCommand, trains_head: bool, console: Console) -> tuple[nn.Module, Run]:
    """Return the model of a run, and the run with its settings written."""
    folder = RunFolder.open(options.output, options.resume)
    set_seed(options.seed)
    opened, images = model_and_images(options, trains_head)
    state = processes()
    state.wait_for_everyone()  # until all have found the folder fit to write to
    if state.is_main_process:
        settings = {key: value for key, value in dataclasses.asdict(options).items() if key not in NOT_SETTINGS}
        folder.write_settings(name, yaml.safe_dump(settings, sort_keys=False))
    state.wait_for_everyone()
    params, macs = count_params(opened.model), _macs(opened.model)
    say(console, f"{options.model}: {human(params)} params, {human(macs)} macs; {len(images.classes)} classes")
    return opened.model, Run(images, folder, options, PhaseProgress(console))


def train_command(options: cli.TrainCommand, console: Console) -> None:
    """Train a dense model and write it."""
    model, run = _open("train", options, True, console)
    figures = run_phase(Phase(DENSE, model, options.dense), run)
    write_model(model, figures, run.images, run.folder.path)
    _say_where(console, run.folder.path, f"accuracy {figures.accuracy:.2%}")


def search_command(options: cli.SearchCommand, console: Console) -> None:
    """Search, and write the architecture and the pruned model as the search left it."""
    host, run = _open("search", options, False, console)
    check_settings(options.search)
    limits = check_decision(host, options.budget(), options.multiple)
    teacher = host if options.search.teacher is None else None
    net, architecture = search(host, limits, options.search, run, options.multiple, teacher)
    console.print(block_table(architecture, network_costs(host), "architecture"))
    pruned = prune(host, architecture, weights=net)
    figures = figures_of(pruned, run.images, options)
    write_model(pruned, figures, run.images, run.folder.path)
    _say_where(console, run.folder.path, f"accuracy {figures.accuracy:.2%} before fine-tuning")


def finetune_command(options: cli.FinetuneCommand, console: Console) -> None:
    """Fine-tune a pruned model, or a dense one after pruning it to an architecture, and write it folded."""
    architecture = Architecture.load(options.architecture) if options.architecture is not None else None
    model, run = _open("finetune", options, False, console)
    teacher = None
    if architecture is not None:
        teacher = model if options.finetune.teacher is None else None
        model = _pruned_to(model, architecture, str(options.architecture))
    elif pruned_record(model) is None:
        raise ModelError(f"{options.model} is a dense model; name what to keep with --architecture, or see spvit train")
    elif options.finetune.distillation > 0 and options.finetune.teacher is None:
        raise ModelError(
            "distillation needs a teacher; name one with --finetune.teacher, or the dense model with --model and what "
            "to keep with --architecture"
        )
    figures = run_phase(Phase(FINETUNE, model, options.finetune, teacher=teacher), run)
    write_model(deployed(model), figures, run.images, run.folder.path)
    _say_where(console, run.folder.path, f"accuracy {figures.accuracy:.2%}")


def compress_command(options: cli.CompressCommand, console: Console) -> None:
    """Compress a model to a budget; or print what that would take."""
    if options.dry_run:
        print_plan(options, console)
        return
    model, run = _open("compress", options, options.dense.epochs > 0, console)
    result = run_compress(model, options.budget(), options, run)
    if not processes().is_main_process:
        return
    costs = network_costs(result.host)
    spent = {
        "dense": {metric: cost.dense for metric, cost in costs.items()},
        "pruned": {metric: cost.of(result.architecture) for metric, cost in costs.items()},
    }
    latencies = _latencies({"dense": result.host, "pruned": result.model})
    console.print(block_table(result.architecture, costs, "architecture"))
    console.print(comparison_table({"dense": result.dense, "pruned": result.pruned}, spent, latencies))
    after = f"accuracy right after pruning {result.after_pruning.accuracy:.2%}"
    _say_where(console, run.folder.path, f"attention: {kinds_text(result.architecture)}; {after}")


def evaluate_command(options: cli.EvaluateCommand, console: Console) -> None:
    """Print a model's figures on the validation images."""
    opened, images = model_and_images(options)
    figures = figures_of(opened.model, images, LoopConfig(precision=options.precision))
    shares = f"accuracy {figures.accuracy:.2%}, top-5 {figures.accuracy_top5:.2%}"
    say(console, f"{shares}, loss {figures.loss:.4f}, {figures.images:,} images")


def profile_command(options: cli.ProfileCommand, console: Console) -> None:
    """Print the costs of a model by block, dense against pruned; those of a published one as published too."""
    # Costs do not depend on weights, so none are downloaded.
    model = open_model(options, weights=False).model
    record = pruned_record(model)
    if record is not None and options.architecture is not None:
        raise ArchitectureError(f"{options.model} is pruned already; name a dense model with --architecture")
    host = family_of(model).build(family_of(model).source(model)) if record is not None else model
    costs = network_costs(host)
    if record is not None:
        architecture = record.architecture
    elif options.architecture is not None:
        architecture = _named_architecture(options.architecture)
    else:
        architecture = dense([block.units for block in costs["macs"].blocks])
    pruned = deployed(model if record is not None else _pruned_to(host, architecture, str(options.architecture)))
    console.print(block_table(architecture, costs, options.model))
    if architecture in architectures().values():
        own = {metric: cost.of(architecture) for metric, cost in costs.items()}
        unfolded = unfolded_params(host, architecture)
        say(
            console,
            f"deployed: {own['params']:,} params, {own['macs']:,} macs",
            f"as published: {unfolded:,} params ({human(unfolded)}), which counts convolutions before folding, with "
            "the whole value and output projections",
        )
    if options.latency:
        for name, latencies in _latencies({"dense": host.eval(), "pruned": pruned}).items():
            say(console, *(f"{name}: {latency_text(latency)}" for latency in latencies))


def convert_command(options: cli.ConvertCommand, console: Console) -> None:
    """Write a checkpoint of others in spvit's format, and say what it was recognised as."""
    run = RunFolder(options.output)
    if run.path.is_file() or run.used:
        raise RunFolderError(f"output {run.path} is in use; name a new or empty folder")
    if options.model_args and options.model is None:
        raise ModelError(f"model_args {options.model_args} need the timm model that they are for; name it with --model")
    published = convert.read_published(options.checkpoint)
    if published.form == "indicators":
        _convert_indicators(published, options, run, console)
        return
    indicators = convert.read_published(options.indicators) if options.indicators is not None else None
    name = options.model or convert.model_name(published)
    opened = _random_host(name, {"num_classes": published.classes(), **options.model_args})
    try:
        model = convert.rebuild(published, opened.model, indicators)
    except CheckpointError as error:
        hint = "" if options.model is not None else ", determined by its shapes; --model names another"
        raise CheckpointError(f"{error} (model {name}{hint})") from error
    save(model, run.path, preprocessing=opened.preprocessing)
    lines = [f"{published.path}: {published.described()}; model {name}, {published.classes()} classes"]
    record = pruned_record(model)
    if record is not None:
        lines += _kept_lines(record.architecture, indicated=published.form == "dense")
        if indicators is None and any(len(block.ffn.units) < block.ffn.width for block in record.architecture.blocks):
            lines.append("the file does not list which FFN units it kept; the first stand for them, see --indicators")
    _say_where(console, run.path, *lines)


def _convert_indicators(
    published: convert.Published, options: cli.ConvertCommand, run: RunFolder, console: Console
) -> None:
    """Write the architecture of an indicator file, which holds no weights."""
    if options.indicators is not None:
        raise CheckpointError(f"{published.path} is an FFN indicator file itself; --indicators goes with weights")
    host = _random_host(options.model, options.model_args).model if options.model is not None else None
    architecture = convert.indicated_architecture(published, host)
    run.path.mkdir(parents=True, exist_ok=True)
    run.write_architecture(architecture)
    lines = [f"{published.path}: {published.described()}", *_kept_lines(architecture, indicated=True)]
    say(console, *lines, f"architecture in {run.architecture}, for spvit finetune")


def _random_host(name: str, arguments: dict[str, Any]) -> OpenedModel:
    return open_model(ModelConfig(model=name, model_args=arguments, pretrained=False))


def _kept_lines(architecture: Architecture, indicated: bool) -> list[str]:
    """Return what is kept in words; of an architecture that indicators say, where its attention is from too."""
    widths = ", ".join(f"{len(block.ffn.units)}/{block.ffn.width}" for block in architecture.blocks)
    lines = [f"attention: {kinds_text(architecture)}; skip adds: {architecture.skip_rule}", f"FFN units: {widths}"]
    if indicated:
        name = convert.architecture_name(architecture.widths())
        known = f"attention as in the published architecture of these widths, {name}"
        lines.append(known if name else "an indicator file lists no attention layers, so all of them stay")
    return lines


def _pruned_to(host: nn.Module, architecture: Architecture, name: str) -> nn.Module:
    try:
        return prune(host, architecture)
    except ArchitectureError as error:
        raise ArchitectureError(f"architecture {name}: {error}") from error


def _named_architecture(name: str) -> Architecture:
    published = architectures()
    if name not in published and not Path(name).is_file():
        known = ", ".join(published)
        raise ArchitectureError(f"architecture {name!r} is neither a file nor a published one; published are {known}")
    return published[name] if name in published else Architecture.load(name)


def _latencies(models: dict[str, nn.Module]) -> dict[str, list[Latency]]:
    """Return the latencies of models by name, one a batch size, measured side by side."""
    measured = [measure_latencies(list(models.values()), example_images(models["dense"], batch)) for batch in BATCHES]
    return {name: [latencies[index] for latencies in measured] for index, name in enumerate(models)}


def _macs(model: nn.Module) -> int:
    return count_macs(model, lambda twin: twin(example_images(twin)))


def _say_where(console: Console, folder: Path, *lines: str) -> None:
    say(console, *lines, f'files in {folder}; load the model with spvit.load("{folder}")')
