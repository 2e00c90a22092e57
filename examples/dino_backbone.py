"""DINOv2 at half of its MACs: how well its features hold, and whether they find the same neighbours.

Cells of `# %%` run one by one in an editor, or all together:

    python examples/dino_backbone.py path/to/photographs  # any folder of pictures; some hundred or more
    python examples/dino_backbone.py --tiny               # random weights and noise for images: seconds, offline
"""

# %% The backbone, and crops of photographs without labels
import sys
from pathlib import Path

import timm
import torch
from torch import nn

import spvit

TINY = "--tiny" in sys.argv
torch.manual_seed(0)

if TINY:
    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 3, "num_heads": 3}
    host = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **sizes).eval()
    images = torch.randn(64, 3, 28, 28)
else:
    host = timm.create_model("vit_small_patch14_dinov2.lvd142m", pretrained=True, num_classes=0, img_size=224).eval()
    prepare = spvit.transform(host, spvit.Preprocessing(crop=1.0))
    suffixes = (".jpg", ".jpeg", ".png")
    files = sorted(path for path in Path(sys.argv[1]).rglob("*") if path.suffix.lower() in suffixes)
    images = torch.stack([prepare(file) for file in files[:1200]])

# Two parts: what the scores and the repair see, and what is judged. Pictures that are alike belong to the same part.
calibration, unseen = images[: len(images) * 3 // 4], images[len(images) * 3 // 4 :]

# %% Score by features, as there are no classes; `objective="tokens"` counts what a dense-prediction head reads
scores = spvit.score(host, calibration, multiple=4 if TINY else 8, objective="features")
architecture = spvit.decide(host, macs="50%", scores=scores)
small = spvit.fold(spvit.prune(host, architecture, repair=calibration)).eval()
print(architecture)


# %% Do the features hold? Cosine with the dense ones, both less the dense mean, which all images share
@torch.no_grad()
def embed(model: nn.Module) -> torch.Tensor:
    """Return the class tokens [images, width] of the unseen images."""
    return torch.cat([model(batch) for batch in unseen.split(50)])


dense, pruned = embed(host), embed(small)
mean = dense.mean(0)
print(f"cosine: {nn.functional.cosine_similarity(dense - mean, pruned - mean).mean():.3f} on {len(unseen)} images")


# %% Do they find the same neighbours?
def nearest(features: torch.Tensor) -> torch.Tensor:
    """Return the index [images] of each image's nearest other one."""
    normed = nn.functional.normalize(features - mean, dim=1)
    return (normed @ normed.T).fill_diagonal_(-2).argmax(1)


print(f"same nearest neighbour: {(nearest(dense) == nearest(pruned)).float().mean():.0%}")

# %% How fast: both in turns, so that a busy machine slows them alike
for row in spvit.benchmark(host, small, batches=(1,), seconds=0.05 if TINY else 1.0):
    (latency,) = row.latency
    print(f"{latency.latency_ms:.1f} ms, {latency.speed_up:.2f} times as fast as the first")
