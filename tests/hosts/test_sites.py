"""Where the layers of every host are, what their weights are, and how a host is made again."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spvit
from spvit.architecture import dense
from spvit.errors import UnsupportedHostError
from spvit.hosts.host import Host, input_size, logits_of, outputs_of
from spvit.hosts.rebuild import build, source_of
from spvit.hosts.sites import Rows
from spvit.hosts.weights import read_weights
from tiny import FAMILY_OF, HOSTS, assert_close, images, logits, make_host, paths_of, with_kinds

timm = pytest.importorskip("timm")


@pytest.mark.parametrize("name", HOSTS)
def test_sites_are_where_the_family_says(name: str) -> None:
    model = make_host(name)
    host = Host.of(model)
    x = images(model, batch=3)
    assert host.input_size == input_size(model) == x.shape[1:]
    assert len(host.blocks) == 4
    seen: dict[str, list[Tensor]] = {}

    def record(path: str, module: nn.Module, args: Any, out: Any) -> None:
        seen[path] = [args[0], out[0] if isinstance(out, tuple) else out]

    for block in host.blocks:
        site = block.attention
        paths = [site.path, *block.ffn.linears, block.ffn.second, site.norm]
        paths += [f"{site.path}.{linear_of(rows)}" for rows in (site.query, site.key, site.value)]
        for path in {path for path in paths if path is not None}:
            model.get_submodule(path).register_forward_hook(partial(record, path))
    grids = host.family.watch_grids(model, range(4), ExitStack())
    logits(model, x)

    for index, (block, paths) in enumerate(zip(host.blocks, paths_of(model))):
        site, ffn = block.attention, block.ffn
        assert (block.path, site.path, ffn.linears, ffn.second) == (
            paths.block,
            paths.attention,
            (paths.first,),
            paths.second,
        )
        tokens, out = seen[site.path]
        assert tokens.shape == out.shape == (3 * site.windows, site.keys, site.dim)
        assert site.tokens == site.prefix_tokens + site.grid[0] * site.grid[1] <= site.windows * site.keys
        assert (site.keys == site.tokens) or FAMILY_OF[name] == "timm_swin"
        assert (site.norm is None) == (name == "residual_post_norm")  # whose norm follows the attention
        if site.norm is not None:
            normalised = seen[site.norm][1].reshape(3, site.tokens, site.dim)
            gathered = grids[index].gather(tokens, site.prefix_tokens)
            assert torch.equal(normalised[:, site.prefix_tokens :], gathered)
            # What the host pads with is zero, and so is what a grid pads with.
            assert torch.equal(grids[index].scatter(gathered), tokens[:, site.prefix_tokens :])
        assert seen[ffn.linears[0]][1].shape == seen[ffn.second][0].shape == (3, site.tokens, ffn.units)
        attention = model.get_submodule(site.path)
        weights = host.weights(index)
        for part, rows in (("query", site.query), ("key", site.key), ("value", site.value)):
            found = torch.einsum("bnd,hed->bnhe", tokens, getattr(weights, f"{part}_weight"))
            bias = getattr(weights, f"{part}_bias")
            found = found if bias is None else found + bias
            assert found.shape[2:] == (site.heads, site.head_width)
            captured = seen[f"{site.path}.{linear_of(rows)}"][1]
            assert_close(captured[..., rows.start : rows.start + site.heads * site.head_width], found.flatten(2))
        assert weights.out_weight.shape == (site.dim, site.heads, site.head_width)
        assert weights.out_bias is None or weights.out_bias.shape == (site.dim,)
        assert isinstance(attention(tokens), tuple) == bool(site.tuple_items)


def linear_of(rows: Rows) -> str:
    """Return the name of the linear layer that rows are of."""
    return rows.weight.removesuffix(".weight")


@pytest.mark.parametrize("name", HOSTS)
def test_weights_are_views_through_which_gradients_flow(name: str) -> None:
    model = make_host(name)
    site = Host.of(model).blocks[0].attention
    attention = model.get_submodule(site.path)
    weights = read_weights(attention, site)
    sum(part.sum() for part in vars(weights).values() if part is not None).backward()
    touched = {name for name, parameter in attention.named_parameters() if parameter.grad is not None}
    projections = {linear_of(rows) for rows in (site.query, site.key, site.value, site.out)}
    wanted = {f"{projection}.{part}" for projection in projections for part in ("weight", "bias")}
    assert touched == wanted & {name for name, _ in attention.named_parameters()}
    for name in touched:
        assert (attention.get_parameter(name).grad == 1).all()


def test_input_size_can_change_before_a_search() -> None:
    host = make_host("class_token")
    host.set_input_size((96, 64))
    assert Host.of(host).input_size == (3, 96, 64)
    assert Host.of(host).blocks[0].attention.grid == (6, 4)


def test_a_host_is_itself_and_every_verb_takes_it() -> None:
    model = make_host("class_token")
    host = Host.of(model)
    assert Host.of(host) is host
    x = images(model, 16)
    architecture = spvit.decide(host, macs="70%", calibration=x)
    assert architecture == spvit.decide(model, macs="70%", calibration=x)
    for given in ({}, {"repair": x}):
        found, expected = (spvit.prune(own, architecture, **given).state_dict() for own in (host, model))
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert torch.equal(logits(spvit.make_searchable(host), x), logits(model, x))
    assert spvit.cost(host, architecture) == spvit.cost(model, architecture)
    assert spvit.score(host, x) == spvit.score(model, x)
    assert spvit.prune(host, architecture, inplace=True) is model


def test_logits_and_features_are_found_in_any_answer() -> None:
    scores, maps = torch.zeros(2, 3), [torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2)]
    for answer in (scores, (scores, maps), [scores], SimpleNamespace(logits=scores), {"logits": scores, "loss": maps}):
        assert logits_of(answer) is scores
    hidden, pooled, embeds = torch.zeros(2, 5, 4), torch.zeros(2, 4), torch.zeros(2, 6)
    headless = {"last_hidden_state": hidden, "pooler_output": None}
    for answer, expected in (
        (SimpleNamespace(image_embeds=embeds, last_hidden_state=hidden), [embeds]),
        (SimpleNamespace(last_hidden_state=hidden, pooler_output=pooled), [pooled]),
        (SimpleNamespace(**headless), [hidden]),
        (headless, [hidden]),
        (maps, maps),
        (SimpleNamespace(feature_maps=tuple(maps)), maps),
        ({"patches": hidden, "class": pooled, "about": "text"}, [hidden, pooled]),
    ):
        found = outputs_of(answer)
        assert len(found) == len(expected)
        assert all(own is other for own, other in zip(found, expected))
    for answer in ({}, (), SimpleNamespace(logits=None), None, ("a",)):
        with pytest.raises(
            UnsupportedHostError, match=f"cannot find logits or features in a {type(answer).__name__}; expected a tens"
        ):
            logits_of(answer)


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_can_be_built_again_from_its_source(name: str) -> None:
    host = make_host(name)
    twin = build(json.loads(json.dumps(source_of(host)))).to(torch.float64).eval()
    assert type(twin) is type(host)
    twin.load_state_dict(host.state_dict(), strict=True)
    assert torch.equal(logits(twin, images(host)), logits(host, images(host)))


@pytest.mark.parametrize("name", ["class_token", "swin"])
@pytest.mark.parametrize("change", ["classes", "pooling", "input size"])
def test_a_host_changed_after_it_was_made_is_built_as_it_is_now(change: str, name: str) -> None:
    host = make_host(name)
    if change == "classes":
        host.reset_classifier(3)
    elif change == "pooling":
        host.reset_classifier(3, "avg")
    else:
        host.set_input_size((96, 64))
    host = host.to(torch.float64).eval()
    twin = build(source_of(host)).to(torch.float64).eval()
    twin.load_state_dict(host.state_dict(), strict=True)
    assert torch.equal(logits(twin, images(host)), logits(host, images(host)))


def _of_old_timm(name: str, **options: Any) -> nn.Module:
    """Return a model as timm before 1.0.31 makes it: without a note of its arguments."""
    model = timm.create_model(name, **options)
    vars(model).pop("_model_args", None)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 7},
        {
            "num_classes": 7,
            "img_size": (32, 64),
            "patch_size": 8,
            "in_chans": 1,
            "drop_path_rate": 0.1,
            "drop_rate": 0.1,
        },
        {"num_classes": 0, "global_pool": "avg", "dynamic_img_size": True},
    ],
)
@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])
def test_usual_arguments_are_read_off_a_model_of_timm_that_keeps_none(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    host = _of_old_timm(name, **options).eval()
    blocks = Host.of(host).blocks
    kinds = ["skip", "conv1"] + ["msa"] * (len(blocks) - 2)
    pruned = spvit.prune(host, with_kinds(dense([block.ffn.units for block in blocks]), *kinds))
    twin = spvit.load(spvit.save(pruned, tmp_path / "pruned"))
    assert torch.equal(logits(twin, images(host)), logits(pruned, images(host)))
    assert torch.equal(
        logits(spvit.load(spvit.save(host, tmp_path / "dense")), images(host)), logits(host, images(host))
    )


@pytest.mark.parametrize("change", ["heads", "activation", "pruned before"])
def test_arguments_that_a_model_of_timm_does_not_tell_are_not_guessed(change: str) -> None:
    model = _of_old_timm("test_vit", **({"num_heads": 4} if change == "heads" else {}))
    if change == "activation":
        model.blocks[1].mlp.act = nn.ReLU()
    elif change == "pruned before":
        model.blocks[0].attn = nn.Identity()
    with pytest.raises(UnsupportedHostError, match=r"timm\.models.*host=model\); models that timm 1\.0\.31 or newer"):
        build(source_of(model))


def test_hosts_that_no_file_describes_are_named_by_their_class() -> None:
    own = timm.models.VisionTransformer(img_size=32, embed_dim=24, depth=1, num_heads=3)
    small = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 3}
    odd = timm.create_model("vit_tiny_patch16_224", norm_layer=nn.LayerNorm, **small)
    for model in (own, odd):
        source = source_of(model)
        assert source == {"library": "timm", "class": "timm.models.vision_transformer.VisionTransformer"}
        with pytest.raises(
            UnsupportedHostError, match=r"names no model of timm or transformers but a timm\.models\.vis"
        ):
            build(source)
