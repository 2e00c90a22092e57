"""Pages about runs. What a page needs is imported when one is written: importing spvit loads no model library."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from spvit.hosts.host import Host


def report(
    run: str | Path,
    output: str | Path | None = None,
    *,
    host: nn.Module | Host | None = None,
    images: int | Tensor = 256,
    svg: bool = False,
    png: bool = False,
) -> Path:
    """Write one HTML page about a run, done or not, or a saved model, and return its path. It loads nothing.

    Args:
        run: a run folder, or what `spvit.save` wrote.
        output: the file; None: `report.html` in the run folder. A page that was there is replaced.
        host: the dense model, for one that neither timm nor transformers makes; it stays as it is.
        images: validation images of the run, at most, on which dense and pruned are compared; some are shown on the
            page, with where attention looks. 0: none are read or shown. A tensor, normalised as for the model, stands
            for them: [images, channels, height, width].
        svg: write each picture as SVG beside the page too, as `report-NAME.svg`.
        png: the same as PNG.

    Raises:
        RunFolderError: the folder holds nothing of a run.
        ReportError: a package is missing (extra `report`), or the file is none of spvit's pages.
    """
    from spvit.report.page import write_report

    return write_report(run, output, host, images, svg, png)
