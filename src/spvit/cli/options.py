"""The options of each command: dataclasses whose attribute docstrings are the help.

A recipe (YAML) holds the same names. The config.yaml of a run holds its resolved values.
"""

# No postponed annotations here and where these classes inherit from: jsonargparse reads the types from the classes.
from dataclasses import dataclass, field
from typing import Any

from spvit.budget import DEFAULT_BUDGET, Budget
from spvit.models import ModelConfig
from spvit.speed.benchmark import BATCHES
from spvit.train.frontier import BUDGETS
from spvit.train.settings import (
    CompressConfig,
    DeviceConfig,
    FrontierConfig,
    ImageConfig,
    LoopConfig,
    PhaseConfig,
    SearchConfig,
    within,
)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The images."""

    data: str
    """A folder with train/ and val/ (a folder a class in each, or tar files), wds/PLACE of tar files, hfds/NAME at
    Hugging Face, a torchvision data set (CIFAR10), or digits; to compress without labels, any folder of images."""
    images: ImageConfig = field(default_factory=ImageConfig)
    """How images are read, augmented and batched."""


@dataclass(frozen=True, kw_only=True)
class RunCommand(DataOptions, ModelConfig, LoopConfig):
    """Options of every command that trains."""

    output: str
    """Run folder to write: metrics, states, architecture, model. It must be new or empty, or see resume."""
    resume: bool = False
    """Continue the run in the output folder, with its settings."""
    max_hours: float | None = within(None, 0, above=True)
    """Hours after which the run saves its state and ends, as SIGTERM ends it; --resume continues for as many."""


@dataclass(frozen=True, kw_only=True)
class TrainCommand(RunCommand):
    """Train a dense model."""

    dense: PhaseConfig = field(default_factory=PhaseConfig)
    """Training of the dense model."""


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """The cost of the pruned model: one of them, or else half of the MACs."""

    macs: str | int | None = None
    """Budget in MACs of one image: a share of the dense model's (50%), an amount (1.0G, 300M), or a whole number. 50%
    when no budget is given."""
    params: str | int | None = None
    """Budget in parameters, in the same forms."""
    latency: str | None = None
    """Budget in time of one pass, measured on this machine: a share of the dense model's (60%), or a time (8ms); not
    for a search."""

    def budget(self) -> Budget:
        """Return the budget; half of the MACs when none is given. Raises BudgetError when it is malformed."""
        return Budget.parse(self.macs, self.params, self.latency, default=DEFAULT_BUDGET)


@dataclass(frozen=True, kw_only=True)
class SearchCommand(BudgetOptions, RunCommand):
    """Search a dense model for what to keep."""

    search: SearchConfig = field(default_factory=SearchConfig)
    """The search."""
    multiple: int | None = None
    """FFN widths and ranks of attention are multiples of it; when absent 8, or less for very small models."""


@dataclass(frozen=True, kw_only=True)
class CompressCommand(BudgetOptions, CompressConfig, RunCommand):
    """Compress a model to a budget."""

    batches: tuple[int, ...] = BATCHES
    """Batch sizes at which latency is measured at the end."""
    dry_run: bool = False
    """Print the plan of the run, with time and memory from a few steps on this machine, and write nothing. It loads no
    pre-trained weights, and takes noise for the images of a folder imagenet that does not exist."""


@dataclass(frozen=True, kw_only=True)
class FrontierCommand(FrontierConfig, RunCommand):
    """Prune a model to several budgets from one scoring, and show what each costs and gives."""

    budgets: tuple[str | int, ...] = BUDGETS
    """Budgets, in the forms of macs: 75% 50% 1.0G."""
    metric: str = "macs"
    """What the budgets are of: macs, params or latency."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkCommand:
    """Measure latency, memory and size of models side by side."""

    models: tuple[str, ...]
    """timm models, hf:NAME, folders that spvit wrote, or exported files (.onnx, .pt2, .xml); the others are compared
    with the first."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model, such as {"img_size": 96}, for the timm models."""
    batches: tuple[int, ...] = BATCHES
    """Images in one pass."""
    device: str = "cpu"
    """Where PyTorch models and ONNX files run: cpu, cuda, cuda:1, mps."""
    dtype: str | None = None
    """`fp32`, `bf16` or `fp16` of PyTorch models; when absent as they are. Exported files run as they were written."""
    threads: int | None = None
    """Of the CPU; when absent as many as torch takes."""
    seconds: float = 1.0
    """At least so long for each model and batch size, if seven rounds take less."""
    json: str | None = None
    """File to write the figures to. It must be new."""


@dataclass(frozen=True, kw_only=True)
class DemoCommand(CompressCommand):
    """Compress a small vision transformer on handwritten digits, end to end."""


@dataclass(frozen=True, kw_only=True)
class FinetuneCommand(RunCommand):
    """Fine-tune a pruned model."""

    architecture: str | None = None
    """An architecture.json to prune the model to first; not for a folder that holds a pruned model."""
    finetune: PhaseConfig = field(default_factory=PhaseConfig)
    """Training of the pruned model."""


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(DataOptions, ModelConfig, DeviceConfig):
    """Measure a model's accuracy."""

    precision: str = "fp32"
    """`fp32`, or `bf16` for mixed precision."""


@dataclass(frozen=True, kw_only=True)
class PredictCommand(ModelConfig, DeviceConfig):
    """Print the most probable classes of images."""

    files: list[str]
    """Image files, or folders of them."""
    top: int = 5
    """How many classes to print of each image."""
    json: bool = False
    """Print JSON in place of lines."""


@dataclass(frozen=True, kw_only=True)
class ProfileCommand(ModelConfig, DeviceConfig):
    """Print what a model costs, block by block, dense against pruned."""

    architecture: str | None = None
    """An architecture.json, or the name of a published architecture, to set beside the dense model."""
    latency: bool = False
    """Measure the latency at batch 1 and 64 on this machine too."""


@dataclass(frozen=True, kw_only=True)
class CheckCommand:
    """Show what spvit finds in a model and verifies, and what each part of it may become."""

    model: str
    """A timm model, hf:NAME or hf:FOLDER, a folder that spvit wrote, hub:NAME, or MODULE:FUNCTION, which returns
    yours."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model, such as {"img_size": 96}, or of the function."""
    image_size: str | None = None
    """Height and width of its images (224x224), where the model does not say them."""
    channels: int | None = None
    """Channels of its images; when absent those of its first convolution, or 3."""
    json: bool = False
    """Print JSON in place of tables."""


@dataclass(frozen=True)
class ReportCommand:
    """Write a page about a run: one HTML file."""

    run: str
    """A run folder, of a run that has ended or not, or a folder with a saved model."""
    output: str | None = None
    """The file to write; when absent report.html in the run folder. A page that was there is replaced."""
    model: str | None = None
    """The dense model, where the folder does not say it or it is your own: MODULE:FUNCTION, or as for compress."""
    images: int = 256
    """Validation images, at most 1,000, to compare the dense and the pruned model on; some are shown. 0: none are."""
    svg: bool = False
    """Write each picture as SVG too, beside the page."""
    png: bool = False
    """Write each picture as PNG too, beside the page."""


@dataclass(frozen=True, kw_only=True)
class ExportCommand(ModelConfig):
    """Write a model for another runtime, run what was written, and compare."""

    to: str = "onnx"
    """`onnx` (ONNX Runtime, TensorRT), `pt2` (a torch.export program), `openvino`, or `safetensors` (weights alone)."""
    output: str | None = None
    """The file to write; when absent model.onnx (or .pt2, .xml, .export.safetensors) in the model's own folder, or in
    the current one."""
    opset: int = 18
    """Of ONNX, 18 to 23."""
    with_preprocessing: bool = False
    """Put the normalisation into the program, which then takes values from 0 to 1."""
    dynamic_size: bool = False
    """Let height and width of the images vary, where the model takes other sizes."""
    int8: bool = False
    """Of onnx: 8 bits for weights and for what they are multiplied with, calibrated on training images of data. The way
    is searched, and what is lost measured on 500 validation images."""
    fp16: bool = False
    """Of onnx: half precision, for accelerators; images and output stay in single precision."""
    most_drop: float | None = None
    """Largest loss by int8 or fp16: of accuracy (0.01 is a point), or of the cosine of features. 0.01 for int8 and
    0.005 for fp16 when absent."""
    dense: str | None = None
    """The dense model to show beside int8 and fp16: a folder that spvit wrote or a timm model; when absent the one that
    the run was made from."""
    data: str | None = None
    """Images to compare with: as for evaluate, of which the first 64 validation images are taken; noise when absent."""
    images: ImageConfig = field(default_factory=ImageConfig)
    """How images are read."""
    overwrite: bool = False
    """Replace the file if it exists."""


@dataclass(frozen=True)
class PushCommand:
    """Upload a model to the Hugging Face hub, with a card of its figures; spvit.load("hub:NAME") loads it."""

    run: str
    """The run folder, or another that spvit wrote."""
    name: str
    """USER/MODEL on the hub, or MODEL under your own name; it is made if it does not exist."""
    private: bool = False
    """Nobody else may read it."""
    revision: str | None = None
    """The branch to upload to, made if it does not exist; when absent the main one."""
    message: str = "Upload a model of spvit"
    """Message of the commit."""
    license: str | None = None
    """Licence of the model; when absent that of the base model, where it is known."""
    base_model: str | None = None
    """The model on the hub that it was made of; when absent what the run's settings name."""
    overwrite: bool = False
    """Replace a model that the branch holds; its history keeps the former one."""
    dry_run: bool = False
    """Load the model, print the card, and upload nothing."""


@dataclass(frozen=True)
class ConvertCommand:
    """Convert a DeiT, Swin or published SPViT checkpoint, or its FFN indicator file, to spvit's format."""

    checkpoint: str
    """The .pth or .safetensors file to read."""
    output: str
    """Folder to write: the model, or architecture.json for an indicator file. It must be new or empty."""
    model: str | None = None
    """timm model of the checkpoint; when absent, determined by the shapes (DeiT and Swin, tiny to base, 224 px)."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of timm.create_model, such as {"img_size": 384}; they need model."""
    indicators: str | None = None
    """An FFN indicator file, which lists the FFN units that are kept."""
