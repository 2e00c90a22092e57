"""A classifier at half of its MACs, from a folder of images: score, decide, repair, compare, save, export.

Cells of `# %%` run one by one in an editor, or all together:

    python examples/classifier.py path/to/images  # with train/CLASS/*.jpg and val/CLASS/*.jpg of the model's classes
    python examples/classifier.py --tiny          # random weights and noise for images: seconds, offline
"""

# %% The model, and images as it wants them
import sys

import timm
import torch

import spvit
from spvit.train.data import load_images

TINY = "--tiny" in sys.argv
OUTPUT = "classifier"
torch.manual_seed(0)

if TINY:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
    host = timm.create_model("deit_small_patch16_224", **sizes).eval()
    calibration, validation, labels = torch.randn(64, 3, 32, 32), torch.randn(16, 3, 32, 32), torch.arange(16) % 5
    preprocessing, classes = spvit.Preprocessing(), tuple("abcde")
else:
    host = timm.create_model("deit_small_patch16_224.fb_in1k", pretrained=True).eval()
    found = load_images(sys.argv[1], spvit.ImageConfig(), (3, 224, 224), spvit.Preprocessing())
    preprocessing, classes = found.preprocessing, found.classes
    assert len(classes) == host.num_classes, "train a head for these classes first, or let `spvit compress` do so"
    order = torch.randperm(len(found.views)).tolist()[:1000]
    calibration = torch.stack([found.views[index][0] for index in order])  # no labels
    some = range(0, len(found.validation), max(1, len(found.validation) // 500))
    validation = torch.stack([found.validation[index][0] for index in some])
    labels = torch.tensor([found.validation[index][1] for index in some])

# %% What each replacement costs in accuracy: once, whatever the budget
scores = spvit.score(host, calibration, multiple=4 if TINY else 8)
for budget in ("75%", "50%"):
    architecture = spvit.decide(host, macs=budget, scores=scores)
    print(f"{budget}: {architecture}\n")

# %% Prune, repair in closed form, fold: plain PyTorch
small = spvit.fold(spvit.prune(host, architecture, repair=calibration)).eval()


# %% Before and after
@torch.no_grad()
def accuracy(model: torch.nn.Module) -> float:
    """Return the share of validation images whose first guess is their class."""
    right = [model(batch).argmax(1) == target for batch, target in zip(validation.split(50), labels.split(50))]
    return torch.cat(right).float().mean().item()


for name, model, kept in (("dense", host, None), ("half", small, architecture)):
    cost = spvit.cost(host, kept)
    print(f"{name}: {accuracy(model):.1%} of {len(labels)}, {cost['macs']:,} MACs, {cost['params']:,} parameters")

# %% Keep it, and take it out of PyTorch
spvit.save(small, OUTPUT, preprocessing=preprocessing, classes=classes, overwrite=True)
again = spvit.load(OUTPUT).eval()
with torch.no_grad():
    assert torch.equal(again(validation[:4]), small(validation[:4]))
written = spvit.export(small, f"{OUTPUT}/model.onnx", images=validation, preprocessing=preprocessing, overwrite=True)
print(f"{written.bytes:,} bytes; the same first guess on {written.agreement:.1%} of the images")
