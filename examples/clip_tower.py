"""CLIP with an image tower of 70 % of its MACs: prune the tower alone, put it back, and match images to texts.

Cells of `# %%` run one by one in an editor, or all together. Needs the extra `hf`.

    python examples/clip_tower.py path/to/photographs a cat,a dog  # pictures, and texts with commas between them
    python examples/clip_tower.py --tiny                           # random weights and noise: seconds, offline
"""

# %% Both towers, images, and the texts as tokens
import sys
from pathlib import Path

import torch
import transformers
from torch import nn

import spvit

TINY = "--tiny" in sys.argv
torch.manual_seed(0)

if TINY:
    sizes = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3}
    texts = {**sizes, "vocab_size": 50, "eos_token_id": 49, "bos_token_id": 48}
    config = transformers.CLIPConfig(
        text_config=texts, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=24
    )
    clip = transformers.CLIPModel(config).eval()
    images, tokens = torch.randn(64, 3, 32, 32), {"input_ids": torch.tensor([[48, 1, 2, 49], [48, 3, 4, 49]])}
else:
    name = "openai/clip-vit-base-patch16"
    clip = transformers.CLIPModel.from_pretrained(name).eval()
    processor = transformers.CLIPProcessor.from_pretrained(name)
    processing = processor.image_processor
    prepare = spvit.transform(
        clip.vision_model, spvit.Preprocessing(tuple(processing.image_mean), tuple(processing.image_std), crop=1.0)
    )
    suffixes = (".jpg", ".jpeg", ".png")
    files = sorted(path for path in Path(sys.argv[1]).rglob("*") if path.suffix.lower() in suffixes)
    images = torch.stack([prepare(file) for file in files[:1000]])
    tokens = processor(text=" ".join(sys.argv[2:]).split(","), return_tensors="pt", padding=True)

calibration, unseen = images[: len(images) * 3 // 4], images[len(images) * 3 // 4 :]


# %% What the tower is for: the projected embedding. What counts may be any function of the tower's output
def embedding(output: object) -> torch.Tensor:
    """Return the normalised embeddings [images, width] that CLIP compares with those of texts."""
    return nn.functional.normalize(clip.visual_projection(output.pooler_output), dim=1)


@torch.no_grad()
def guesses() -> torch.Tensor:
    """Return the text [images] that each unseen image is most like."""
    return torch.cat([clip(pixel_values=batch, **tokens).logits_per_image.argmax(1) for batch in unseen.split(50)])


before = guesses()

# %% Prune the tower, and put it back: the text tower and both projections stay
host = spvit.recognise(clip.vision_model, calibration)
scores = spvit.score(host, calibration, multiple=4 if TINY else 8, objective=embedding)
architecture = spvit.decide(host, macs="70%", scores=scores, objective=embedding)
clip.vision_model = spvit.fold(spvit.prune(host, architecture, repair=calibration).eval())
print(architecture)

# %% The same texts?
after = guesses()
print(f"same text as before for {(before == after).float().mean():.0%} of {len(unseen)} unseen images")
print(f"MACs: {spvit.cost(host, architecture)['macs'] / spvit.cost(host)['macs']:.0%} of the dense tower's")
