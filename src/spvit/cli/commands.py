"""What each sub-command of `spvit` does: open, run, show, write."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import set_seed
from rich.console import Console
from torch import nn

from spvit.architecture import Architecture, dense
from spvit.benchmark import measure_latencies
from spvit.budget import human
from spvit.checkpoint import save, write_text
from spvit.cli.convert import (
    Published,
    architecture_name,
    check_indicated,
    indicated_architecture,
    model_name,
    read_published,
    rebuild,
)
from spvit.cli.demo import demo_settings
from spvit.cli.inputs import check_trained, model_and_images
from spvit.cli.options import (
    CompressCommand,
    ConvertCommand,
    DemoCommand,
    EvaluateCommand,
    FinetuneCommand,
    ProfileCommand,
    RunCommand,
    SearchCommand,
    TrainCommand,
)
from spvit.cli.plan import print_plan
from spvit.cli.show import block_table, comparison_table, kinds_text
from spvit.cost import count_macs, count_params
from spvit.errors import ArchitectureError, CheckpointError, ModelError, RunFolderError
from spvit.hosts.host import example_images
from spvit.hosts.recognise import family_of
from spvit.models import ModelConfig, OpenedModel, open_model
from spvit.replacements.costs import network_costs
from spvit.surgery import prune, pruned_record
from spvit.train.compress import (
    Compressed,
    check_folder,
    deployed,
    figures_of,
    finetune,
    holds_files,
    run_compress,
    train_dense,
    write_model,
)
from spvit.train.data import Images
from spvit.train.deciding import ARCHITECTURE, check_decision, search
from spvit.train.processes import processes
from spvit.train.progress import PhaseProgress
from spvit.train.settings import LoopConfig
from spvit.train.teacher import check_phases
from spvit.zoo import architectures, unfolded_params

SETTINGS = "config.yaml"
NOT_SETTINGS = ("resume", "dry_run")
BATCHES = (1, 64)


def heading(name: str) -> str:
    """Return the first line of a run's config.yaml, which says what command it is of."""
    return f"# spvit {name}"


def _open(name: str, options: RunCommand, trains_head: bool, console: Console) -> tuple[OpenedModel, Images, Path]:
    """Return the model and images of a run, and its folder with the settings written; refuse what does not fit."""
    folder = check_folder(options.output, options.resume)
    set_seed(options.seed)
    opened, images = model_and_images(options, options.data, options.images)
    check_trained(opened, options.model, images, trains_head)
    state = processes()
    state.wait_for_everyone()  # until all have found the folder fit to write to
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in dataclasses.asdict(options).items() if key not in NOT_SETTINGS}
        write_text(folder / SETTINGS, f"{heading(name)}\n{yaml.safe_dump(_plain(settings), sort_keys=False)}")
    state.wait_for_everyone()
    cost = f"{human(count_params(opened.model))} params, {human(_macs(opened.model))} macs"
    console.print(f"{options.model}: {cost}; {len(images.classes)} classes", highlight=False, soft_wrap=True)
    return opened, images, folder


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _macs(model: nn.Module) -> int:
    return count_macs(model, lambda twin: twin(example_images(twin)))


def _shared(options: RunCommand) -> LoopConfig:
    return LoopConfig(seed=options.seed, precision=options.precision, log_every=options.log_every)


def train_command(options: TrainCommand, console: Console) -> None:
    """Train a dense model and write it."""
    opened, images, folder = _open("train", options, trains_head=True, console=console)
    figures = train_dense(opened.model, images, folder, _shared(options), options.dense, PhaseProgress(console))
    write_model(opened.model, images, figures, folder)
    _say_where(console, folder, f"accuracy {figures.accuracy:.2%}")


def search_command(options: SearchCommand, console: Console) -> None:
    """Search, and write the architecture and the pruned model as the search left it."""
    opened, images, folder = _open("search", options, trains_head=False, console=console)
    shared, budget = _shared(options), options.limits()
    check_decision(opened.model, budget, options.multiple)
    check_phases([options.search], images)
    net, architecture = search(
        opened.model,
        images,
        budget,
        folder,
        shared,
        options.search,
        PhaseProgress(console),
        options.multiple,
    )
    console.print(block_table(architecture, network_costs(opened.model), "architecture"))
    pruned = prune(opened.model, architecture, weights=net)
    figures = figures_of(pruned, images, shared)
    write_model(pruned, images, figures, folder)
    _say_where(console, folder, f"accuracy {figures.accuracy:.2%} before fine-tuning")


def finetune_command(options: FinetuneCommand, console: Console) -> None:
    """Fine-tune a pruned model, or a dense one after pruning it to an architecture, and write it folded."""
    architecture = Architecture.load(options.architecture) if options.architecture is not None else None
    opened, images, folder = _open("finetune", options, trains_head=False, console=console)
    model, teacher = opened.model, None
    if architecture is not None:
        teacher, model = model, _pruned_to(model, architecture, str(options.architecture))
    elif pruned_record(model) is None:
        raise ModelError(f"{options.model} is a dense model; name what to keep with --architecture, or see spvit train")
    elif options.finetune.distillation > 0 and options.finetune.teacher is None:
        raise ModelError(
            "distillation needs a teacher; name one with --finetune.teacher, or the dense model with --model and what "
            "to keep with --architecture"
        )
    figures = finetune(model, images, folder, _shared(options), options.finetune, PhaseProgress(console), teacher)
    write_model(deployed(model), images, figures, folder)
    _say_where(console, folder, f"accuracy {figures.accuracy:.2%}")


def compress_command(options: CompressCommand, console: Console) -> None:
    """Train if asked, search, prune, fine-tune, fold and write; or print what that would take."""
    if options.dry_run:
        print_plan(options, console)
        return
    opened, images, folder = _open("compress", options, trains_head=options.dense.epochs > 0, console=console)
    result = run_compress(opened.model, images, options.limits(), folder, options, console)
    if processes().is_main_process:
        _show_compressed(result, folder, console)


def demo_command(options: DemoCommand, console: Console) -> None:
    """Compress a small vision transformer on the digits."""
    compress_command(demo_settings(options.output, options.macs, options.seed), console)


def evaluate_command(options: EvaluateCommand, console: Console) -> None:
    """Print a model's figures on the validation images."""
    opened, images = model_and_images(options, options.data, options.images)
    if not opened.trained:
        raise ModelError(f"{options.model} has no trained weights for these {len(images.classes)} classes")
    figures = figures_of(opened.model, images, LoopConfig(precision=options.precision))
    console.print(
        f"accuracy {figures.accuracy:.2%}, top-5 {figures.accuracy_top5:.2%}, loss {figures.loss:.4f}, "
        f"{figures.images:,} images",
        highlight=False,
        soft_wrap=True,
    )


def profile_command(options: ProfileCommand, console: Console) -> None:
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
        console.print(
            f"deployed: {own['params']:,} params, {own['macs']:,} macs\n"
            f"as published: {unfolded:,} params ({human(unfolded)}), which counts convolutions before folding, with "
            "the whole value and output projections",
            highlight=False,
            soft_wrap=True,
        )
    if options.latency:
        _print_latencies({"dense": host.eval(), "pruned": pruned}, console)


def convert_command(options: ConvertCommand, console: Console) -> None:
    """Write a checkpoint of others in spvit's format, and say what it was recognised as."""
    folder = Path(options.output)
    if folder.is_file() or holds_files(folder):
        raise RunFolderError(f"output {folder} is in use; name a new or empty folder")
    if options.model_args and options.model is None:
        raise ModelError(f"model_args {options.model_args} need the timm model that they are for; name it with --model")
    published = read_published(options.checkpoint)
    if published.form == "indicators":
        _convert_indicators(published, options, folder, console)
        return
    indicators = read_published(options.indicators) if options.indicators is not None else None
    name = options.model or model_name(published)
    opened = _random_host(name, published, options)
    try:
        model = rebuild(published, opened.model, indicators)
    except CheckpointError as error:
        hint = "" if options.model is not None else ", told by its shapes; --model names another"
        raise CheckpointError(f"{error} (model {name}{hint})") from error
    save(model, folder, preprocessing=opened.preprocessing)
    lines = [f"{options.checkpoint}: {published.described()}; model {name}, {published.classes()} classes"]
    record = pruned_record(model)
    if record is not None:
        lines += _architecture_lines(record.architecture)
        if indicators is None and any(len(block.ffn.units) < block.ffn.width for block in record.architecture.blocks):
            lines.append("the file does not say which FFN units it kept, so the first stand for them; see --indicators")
        if published.form == "dense":
            lines.append(_attention_line(record.architecture))
    _say_where(console, folder, "\n".join(lines))


def _random_host(name: str, published: Published, options: ConvertCommand) -> OpenedModel:
    classes = {} if published.form == "indicators" else {"num_classes": published.classes()}
    return open_model(ModelConfig(model=name, model_args={**classes, **options.model_args}, pretrained=False))


def _convert_indicators(published: Published, options: ConvertCommand, folder: Path, console: Console) -> None:
    """Write the architecture of an indicator file, which holds no weights."""
    if options.indicators is not None:
        raise CheckpointError(f"{options.checkpoint} is an FFN indicator file itself; --indicators goes with weights")
    architecture = indicated_architecture(published)
    if options.model is not None:
        check_indicated(published, architecture, _random_host(options.model, published, options).model)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / ARCHITECTURE, architecture.to_json())
    lines = [f"{options.checkpoint}: {published.described()}", *_architecture_lines(architecture)]
    lines += [_attention_line(architecture), f"architecture in {folder / ARCHITECTURE}, for spvit finetune"]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _architecture_lines(architecture: Architecture) -> list[str]:
    widths = ", ".join(f"{len(block.ffn.units)}/{block.ffn.width}" for block in architecture.blocks)
    return [f"attention: {kinds_text(architecture)}; skip adds: {architecture.skip_rule}", f"FFN units: {widths}"]


def _attention_line(architecture: Architecture) -> str:
    name = architecture_name(architecture.widths())
    if name is None:
        return "an indicator file says nothing of attention, so all of it stays"
    return f"attention as in the published architecture of these widths, {name}"


def _pruned_to(host: nn.Module, architecture: Architecture, name: str) -> nn.Module:
    try:
        return prune(host, architecture)
    except ArchitectureError as error:
        raise ArchitectureError(f"architecture {name}: {error}") from error


def _named_architecture(name: str) -> Architecture:
    published = architectures()
    if name in published:
        return published[name]
    if not Path(name).is_file():
        raise ArchitectureError(
            f"architecture {name!r} is neither a file nor a published one; published are {', '.join(published)}"
        )
    return Architecture.load(name)


def _print_latencies(models: dict[str, nn.Module], console: Console) -> None:
    for batch in BATCHES:
        images = example_images(models["dense"], batch)
        for name, latency in zip(models, measure_latencies(list(models.values()), images)):
            console.print(
                f"{name}: {latency.latency_ms:.2f} ms (spread {latency.spread_ms:.2f}) at batch {batch}, "
                f"{latency.images_per_s:.0f} images/s, {latency.device}, {latency.dtype}, {latency.threads} threads, "
                f"{latency.repeats} repeats",
                highlight=False,
                soft_wrap=True,
            )


def _show_compressed(result: Compressed, folder: Path, console: Console) -> None:
    host, model = result.host, result.model
    console.print(block_table(result.architecture, network_costs(host), "architecture"))
    rows = {"dense": host, "pruned": model}
    latencies = {batch: measure_latencies(list(rows.values()), example_images(host, batch)) for batch in BATCHES}
    console.print(
        comparison_table(
            {"dense": result.dense, "pruned": result.pruned},
            {name: {"params": count_params(row), "macs": _macs(row)} for name, row in rows.items()},
            {name: [latencies[batch][index] for batch in BATCHES] for index, name in enumerate(rows)},
        )
    )
    kept = kinds_text(result.architecture)
    _say_where(console, folder, f"attention: {kept}; accuracy right after pruning {result.after_pruning.accuracy:.2%}")


def _say_where(console: Console, folder: Path, text: str) -> None:
    console.print(
        f'{text}\nfiles in {folder}; load the model with spvit.load("{folder}")', highlight=False, soft_wrap=True
    )
