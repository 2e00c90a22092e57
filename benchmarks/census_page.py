"""The page that the census writes: which models work, what their attention may become, what is refused and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

INTRO = """\
# Which models work

`make census` wrote this page; do not edit it. It builds every ViT-like name of timm and the usual vision classes of
transformers, torchvision and vit-pytorch, with few blocks, small heads, small images and random weights, and asks spvit
what it makes of them. There are two answers.

- **Works**: the model passed these checks. Pruned to all that it has, it answers bit for bit as before. The MACs
  that spvit predicts are those that PyTorch counts. The searchable, the pruned and the folded network agree.
  Scores from images decide within a budget, and the pruned network is repaired and runs. What can be saved loads
  again, bit for bit. `torch.export` takes it with a dynamic batch wherever it takes the dense model so.
- **Refused**: spvit says so before it touches the model, and names the reason.

The checks show that the result is right, not how much accuracy stays: see [benchmarks.md](benchmarks.md).

Every attention layer of a model that works may become a convolution, a linear map or nothing, and every FFN may lose
units. The column *attention* says what else it may become:

- *narrower*: fewer heads, fewer dimensions of values, fewer of queries and keys;
- *fewer heads and values*: queries and keys of the heads that stay keep their dimensions, as positions or norms act
  on them;
- *replaced whole*: it stays as it is or is replaced;
- *in windows*: it attends within windows of the grid; a convolution in its place acts on the whole grid;
- *no search*: `spvit.make_searchable` refuses the model, as gates would change the statistics of a norm over the FFN's
  units; scores and `decide` take it.

*Saved* says whether `spvit.save` writes a file from which `spvit.load` rebuilds the model by itself.
"""


@dataclass(frozen=True)
class Outcome:
    """What became of one name."""

    library: str
    family: str
    """Class of the model."""
    name: str
    result: str
    """`passes`, `refused` or `crash`."""
    detail: str
    """What attention may become; why it is refused; or where it failed and how."""
    saved: bool = False
    """Whether the pruned model could be saved and loaded again without the dense one."""
    arguments: str = ""
    """What differs from the name's own arguments."""


Groups = dict[tuple[str, ...], list[Outcome]]


def _grouped(outcomes: Sequence[Outcome], result: str, key: Callable[[Outcome], tuple[str, ...]]) -> Groups:
    groups: defaultdict[tuple[str, ...], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.result == result:
            groups[key(outcome)].append(outcome)
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]), item[0])))


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "absent"


def _counts(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for library in dict.fromkeys(outcome.library for outcome in outcomes):
        results = [outcome.result for outcome in outcomes if outcome.library == library]
        rows.append([f"{library} {_version(library)}", len(results), *map(results.count, ("passes", "refused"))])
    return _table(("library", "names", "work", "refused"), rows)


def _examples(group: Sequence[Outcome]) -> str:
    """Return up to three names of a group, from its first to its last."""
    names = [outcome.name for outcome in group]
    return ", ".join(f"`{name}`" for name in dict.fromkeys((names[0], names[len(names) // 2], names[-1])))


def _families(group: Sequence[Outcome]) -> str:
    """Return the classes of a group with the number of names of each."""
    families = [outcome.family for outcome in group]
    return ", ".join(f"{family} ({families.count(family)})" for family in sorted(set(families)))


def page(outcomes: Sequence[Outcome]) -> str:
    """Return the page, in Markdown; the same for the same outcomes and versions."""
    parts = [INTRO, _counts(outcomes), f"\nWith torch {_version('torch')}."]
    for library in dict.fromkeys(outcome.library for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.library == library]
        parts.append(f"\n## {library}")
        works = _grouped(own, "passes", lambda item: (item.family, item.detail, "yes" if item.saved else "no"))
        if works:
            rows = [
                (family, len(group), form, saved, _examples(group)) for (family, form, saved), group in works.items()
            ]
            parts.append("\nWorks:\n\n" + _table(("class", "names", "attention", "saved", "for example"), rows))
        refused = _grouped(own, "refused", lambda item: (item.detail,))
        if refused:
            lines = [
                f"- {_families(group)}, for example {_examples(group)}: {why}" for (why,), group in refused.items()
            ]
            parts.append("\nRefused:\n\n" + "\n".join(sorted(lines)))
        crashed = _grouped(own, "crash", lambda item: (item.family, item.detail))
        if crashed:
            lines = [f"- {family}, {_examples(group)}: {reason}" for (family, reason), group in crashed.items()]
            parts.append("\nFaults of spvit, to be mended:\n\n" + "\n".join(lines))
    return "\n".join(parts) + "\n"
