"""Uploads a model to the Hugging Face hub, with a card that is filled from its run.

A repository gets `model.json`, `model.safetensors`, `README.md` and the report's picture, if any, in one commit. What
the card says of the base model and its licence is read, from timm or from the base model's own card; what is not known
it calls unknown.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from spvit.architecture import Architecture
from spvit.budget import human
from spvit.checkpoint import DESCRIPTION, WEIGHTS, Description, describe, load, save
from spvit.errors import CheckpointError, HubError, SpvitError
from spvit.hosts.rebuild import build, can_build
from spvit.hub import HUB, hub_errors, spare_retries
from spvit.models import HUGGING_FACE
from spvit.pages.page import report
from spvit.replacements.costs import cost
from spvit.train.figures import said
from spvit.train.run_folder import RunFolder

CARD, PICTURE = "README.md", "network.svg"
_STAGES = {"dense": "dense", "after_pruning": "pruned, before training", "pruned": "this model"}
_NAMES = {
    "macs": "MACs of one image",
    "params": "parameters",
    "accuracy_top5": "top-5 accuracy",
    "agreement": "agreement with the dense model",
    "loss": "mean cross entropy",
    "images": "validation images",
}
UNKNOWN = "unknown"
_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "gemma", UNKNOWN)
"""Names that the hub knows; any other is written as one of our own."""


@dataclass(frozen=True)
class Base:
    """The model that a run started from: its name on the hub, where it has one, and its licence, and who says so."""

    name: str | None = None
    licence: Mapping[str, str] = field(default_factory=lambda: {"license": UNKNOWN})
    source: str = ""


def push(
    model: nn.Module | str | Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload a model of spvit",
    license: str | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    **about: Any,
) -> str:
    """Upload a model to the Hugging Face hub, and return what `load` takes to rebuild it: `"hub:USER/MODEL"`.

    Args:
        model: a run folder or what `save` wrote; or a model, which is saved first.
        name: USER/MODEL on the hub, or MODEL under the user's own name. It is made where it does not exist.
        private: whether only its owner may read it.
        revision: the branch to upload to, made where it does not exist; None is the main one.
        message: of the commit.
        license: of the result; when absent that of the base model, where it is known.
        base_model: the model on the hub that it was made of; when absent what the run's settings name.
        overwrite: whether to replace a model that the branch holds; its history keeps the former one.
        **about: of a model that is saved first: preprocessing, classes and metrics, as `save` takes them.

    Raises:
        CheckpointError: the folder holds no model that loads, or the model cannot be saved.
        HubError: the hub cannot be reached or refuses, no one is logged in, the name holds a model already, or is not
            private as asked.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    with tempfile.TemporaryDirectory() as temporary:
        if isinstance(model, nn.Module):
            model = save(model, Path(temporary) / "model", **about)
        elif about:
            raise CheckpointError(f"{model} is a folder, which says itself what {', '.join(about)} would; leave it out")
        folder = Path(model)
        check_loads(folder)
        if not spare_retries():
            raise HubError(f"the hub cannot be reached; connect, and push {folder} again")
        if get_token() is None:
            raise HubError(
                f"no one is logged in to the hub, so {name} cannot be written: hf auth login, or set HF_TOKEN"
            )
        api = HfApi(library_name="spvit", library_version=version("spvit"))
        with hub_errors(name):
            name = api.create_repo(name, private=private, exist_ok=True).repo_id
            _check_place(api, name, private, revision, overwrite)
            place = name if revision is None else f"{name}@{revision}"
            picture = _picture(folder)
            card = model_card(folder, place, license, base_model, drawn=picture is not None)
            files: dict[str, Any] = {path: folder / path for path in (DESCRIPTION, WEIGHTS)} | {CARD: card.encode()}
            files |= {PICTURE: picture} if picture is not None else {}
            operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=own) for path, own in files.items()]
            api.create_commit(name, operations, commit_message=message, revision=revision)
    return f"{HUB}{place}"


def check_loads(folder: Path) -> None:
    """Raise CheckpointError when a folder holds no model that loads: nobody could load it from the hub either."""
    if can_build(describe(folder).host):
        load(folder)
    elif not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} holds no {WEIGHTS}")


def _check_place(api: Any, name: str, private: bool, revision: str | None, overwrite: bool) -> None:
    """Make the branch to upload to. Raises HubError when it holds a model already, or is not private as asked."""
    if private and not api.model_info(name).private:
        raise HubError(f"{name} is public already; make it private on its page first, or leave out private")
    if revision is not None and revision not in {ref.name for ref in api.list_repo_refs(name).branches}:
        api.create_branch(name, branch=revision)
    elif not overwrite and WEIGHTS in api.list_repo_files(name, revision=revision):
        advice = "name another, or a new revision, or pass overwrite, which leaves it in the history"
        raise HubError(f"{name} holds a model already; {advice}")


def _picture(folder: Path) -> bytes | None:
    """Return the report's picture of the network as SVG; None where its packages are missing, or it cannot be drawn."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            page = report(folder, Path(temporary) / "page.html", images=0, svg=True)
        except SpvitError:
            return None
        drawn = page.with_name("page-network.svg")
        return drawn.read_bytes() if drawn.is_file() else None


def model_card(
    folder: str | Path, name: str, license: str | None = None, base_model: str | None = None, drawn: bool = False
) -> str:
    """Return the card of a folder's model under a name on the hub: YAML for the hub, then Markdown for a reader.

    drawn: whether the picture of the network goes beside it.
    """
    run, description = RunFolder(folder), describe(folder)
    base = _base(run, license, base_model)
    metadata: dict[str, Any] = {**base.licence, "library_name": "spvit"}
    metadata["pipeline_tag"] = "image-classification" if description.classes else "image-feature-extraction"
    metadata |= {"base_model": base.name} if base.name else {}
    metadata["tags"] = ["spvit", "vision-transformer", "compression", str(description.host["library"])]
    metadata |= {"metrics": ["accuracy"]} if "accuracy" in description.metrics else {}
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {name.partition('@')[0].rpartition('/')[2]}",
        _headline(description, base),
        _figures(run, description),
        _usage(description, name),
        _blocks(description.architecture, drawn),
        _how(run),
        _licence_text(base),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _headline(description: Description, base: Base) -> str:
    host = description.host.get("name", description.host.get("class"))
    made = f"`{base.name or host}`"
    if description.architecture is None:
        return f"A dense vision transformer, {made}, written by spvit."
    kept = "fewer heads, dimensions and FFN units, and convolutions or nothing in place of some attention layers"
    return f"{made}, a vision transformer that spvit made smaller ({kept}). It is a plain PyTorch model."


def _figures(run: RunFolder, description: Description) -> str:
    """Return a table of figures, dense against what was made of it; a run's summary says of how many images."""
    columns: dict[str, dict[str, str]] = {name: {} for name in _STAGES.values()}
    if can_build(description.host):
        host = build(description.host)
        for stage, architecture in (("dense", None), ("pruned", description.architecture)):
            if stage == "pruned" or description.architecture is not None:
                counts = cost(host, architecture).items()
                columns[_STAGES[stage]] |= {_NAMES[metric]: human(count) for metric, count in counts}
    measured = run.figures() or {"pruned": description.metrics}
    for stage, name in _STAGES.items():
        for key, value in measured.get(stage, {}).items():
            columns[name][_NAMES.get(key, key)] = f"{value:,.0f}" if key == "images" else said(key, value)
    shown = [name for name, own in columns.items() if own]
    rows = dict.fromkeys(row for name in shown for row in columns[name])
    lines = [["", *shown], ["---"] * (1 + len(shown))]
    lines += [[row, *(columns[name].get(row, "") for name in shown)] for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    data = _without_places(run.command_and_settings()[1].get("data"))
    source = f"Measured on the validation images of `{data}`, which may also have chosen the weights among epochs."
    return f"{table}\n\n{source}" if data and any(measured.values()) else table


def _usage(description: Description, name: str) -> str:
    size = ", ".join(map(str, description.input_size))
    host = "" if can_build(description.host) else ", host=the_dense_model"
    cls = description.host.get("class")
    more = f"\n\nIt is a `{cls}` of transformers, with its `config`; call it as you do that."
    return f"""## Use it

```python
import spvit

model = spvit.load("{HUB}{name}"{host})
about = spvit.describe("{HUB}{name}")  # input size, mean and std, crop, class names
outputs = model(images)  # [batch, {size}], resized and normalised as `about` says
```{more if description.host["library"] == "transformers" else ""}"""


def _blocks(architecture: Architecture | None, drawn: bool) -> str:
    if architecture is None:
        return ""
    said = "`msa 16/24` has queries and keys of 16 dimensions a head and values of 24."
    picture = f"![The network, block by block]({PICTURE})\n\n" if drawn else ""
    return f"## What each block keeps\n\n{picture}```\n{architecture}\n```\n\n{said}"


def _how(run: RunFolder) -> str:
    command, settings = run.command_and_settings()
    if not command:
        return ""
    own = {key: value for key, value in settings.items() if key not in ("output", "track") and value is not None}
    text = yaml.safe_dump(_without_places(own), sort_keys=False)
    return (
        f"## How it was made\n\n`spvit {command} --recipe recipe.yaml --output RUN`, with spvit {version('spvit')}, "
        f"torch {version('torch')} and timm {version('timm')}.\n\n"
        f"<details><summary>recipe.yaml</summary>\n\n```yaml\n{text}```\n\n</details>"
    )


def _without_places(value: Any) -> Any:
    """Return settings with nothing left of absolute paths but the last name: the card is public."""
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    place = isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute())
    return Path(value).name if place else value


def _licence_text(base: Base) -> str:
    name = base.licence.get("license_name", base.licence["license"])
    if name == UNKNOWN:
        return "## Licence\n\nNot known: neither the run nor its base model say it. Ask before you use this model."
    return f"## Licence\n\n{name}, {base.source}. It holds for this model too."


def _base(run: RunFolder, license: str | None, base_model: str | None) -> Base:
    """Return what a run started from, as far as its settings, timm and the hub say; what is given comes first."""
    found = _on_hub(base_model) if base_model is not None else _started_from(run)
    if license is None:
        return found
    return Base(found.name, _licence(license), "as whoever uploaded it says")


def _started_from(run: RunFolder) -> Base:
    _, settings = run.command_and_settings()
    model = str(settings.get("model", ""))
    if not model or settings.get("checkpoint") is not None:
        return Base()
    if Path(model).is_dir():  # it went on from another run
        return _started_from(RunFolder(model))
    for prefix in (HUB, HUGGING_FACE):
        name = model.removeprefix(prefix).partition("@")[0]
        if model.startswith(prefix):
            return Base() if Path(name).exists() else _on_hub(name)
    return _of_timm(model) if settings.get("pretrained", True) else Base()


def _of_timm(model: str) -> Base:
    import timm

    found = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    if found is None:
        return Base()
    return Base(found.hf_hub_id, _licence(found.license or UNKNOWN), "as timm states it of the base model")


def _on_hub(name: str) -> Base:
    """Return a model on the hub, with the licence that its card states."""
    from huggingface_hub import HfApi

    try:
        with hub_errors(name):
            card = HfApi().model_info(name).card_data
    except HubError:
        return Base(name)
    stated = {key: str(card[key]) for key in ("license", "license_name", "license_link") if card and card.get(key)}
    return Base(name, stated, "as the base model's card states it") if "license" in stated else Base(name)


def _licence(name: str) -> dict[str, str]:
    return {"license": name} if name in _LICENCES else {"license": "other", "license_name": name}
