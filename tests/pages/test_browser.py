"""Pages in a headless browser (`make browser` installs one): nothing is complained of, and a phone shows it whole."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import spvit
from spvit.architecture import dense
from tiny import images, make_host

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE = 390
SCRIPT = """
const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
const pictures = [...page.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect());
const own = page.defaultView.getComputedStyle(page.body);
document.querySelector("pre").textContent = JSON.stringify({
    width: root.clientWidth, needs: root.scrollWidth, colours: [own.color, own.backgroundColor],
    pictures: pictures.map(box => [box.width, box.height]),
    shown: [...page.querySelectorAll("figure image")].length,
    letters: [...page.querySelectorAll("figure text")].map(text => text.getBoundingClientRect().height),
});
"""


def seen(page: Path, folder: Path, width: int, dark: bool) -> tuple[dict, list[str]]:
    """Return what a browser measures of a page in a window of a width, and what it complains of on its console."""
    frame = f'<iframe width="{width}" height="20000" srcdoc="{html.escape(page.read_text())}"></iframe>'
    around = folder / "around.html"
    around.write_text(f"<!doctype html>{frame}<pre></pre><script>onload = () => {{ {SCRIPT} }}</script>")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    words += [f"--user-data-dir={folder}/profile"]
    words += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", around.as_uri()]
    done = subprocess.run([str(BROWSER), *words], capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert found, done.stdout[-500:]
    return json.loads(html.unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium; make browser installs one")
@pytest.mark.parametrize("width", [PHONE, 1280])
def test_a_page_in_a_browser(tmp_path: Path, width: int) -> None:
    host, folder = make_host("class_token", torch.float32), tmp_path / ("a_long_name_" * 6)
    spvit.save(spvit.prune(host, dense([72] * 4)), folder)
    lines = [{"phase": "finetune", "event": "step", "epoch": 1, "step": step, "loss": 1 / step} for step in (1, 2, 3)]
    lines.append({"phase": "finetune", "event": "evaluation", "epoch": 1, "accuracy": 0.5, "loss": 0.3})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "config.yaml").write_text(f"# spvit compress\ndata: {'no/such/folder' * 20}\n")
    page, colours = spvit.report(folder, host=host, images=images(host, 6).float()), []
    for dark in (False, True):
        found, complaints = seen(page, tmp_path, width, dark)
        assert complaints == []
        assert found["needs"] == found["width"] == width
        assert len(found["pictures"]) == 4
        assert all(0 < across <= width and down > 50 for across, down in found["pictures"])
        assert found["shown"] == 3 * 5
        assert min(found["letters"]) > 9
        colours.append(found["colours"])
    (ink, paper), (dark_ink, dark_paper) = colours
    assert ink != paper != dark_paper != dark_ink
