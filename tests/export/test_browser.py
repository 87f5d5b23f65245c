"""The web page of docs/howto/to-a-device.md in Chromium, with ONNX Runtime Web: its logits are those of Python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue

import onnxruntime
import pytest
import torch
from PIL import Image

import permafrost
from permafrost_export import predict
from tests.support.pages import blocks_of
from tests.support.paths import ROOT
from tests.support.runs import save_student

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
MODULES = [ROOT / "node_modules", *map(Path, filter(None, [os.environ.get("NODE_PATH")]))]
WEB = next((found for path in MODULES if (found := path / "onnxruntime-web/dist").is_dir()), None)
PHOTOS = sorted((ROOT.parent / "shared/data/photos").glob("*/*"))
ASK = """<script type="module">
const ask = async () => {
  const blob = await (await fetch("frame.png")).blob();
  while (!globalThis.logitsOf) await new Promise((done) => setTimeout(done, 50));
  return [...await logitsOf(blob)];
};
const failed = (error) => ({ error: String(error) });
addEventListener("error", (event) => fetch("answer", { method: "POST", body: JSON.stringify(failed(event.message)) }));
addEventListener("unhandledrejection", (event) =>
  fetch("answer", { method: "POST", body: JSON.stringify(failed(event.reason)) }));
fetch("answer", { method: "POST", body: JSON.stringify(await ask().catch(failed)) });
</script>
"""
"""Script after that of the page, which sends the logits of frame.png to the server."""


class Handler(SimpleHTTPRequestHandler):
    """Server of a folder that keeps what a page sends."""

    answers: Queue
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def do_POST(self):
        """Keep the body."""
        self.answers.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        """Write no log."""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
@pytest.mark.skipif(WEB is None, reason="no onnxruntime-web in node_modules or NODE_PATH")
@pytest.mark.parametrize("program", ["onnx", "int8"])
def test_the_page_gives_the_logits_of_python_in_a_browser(frozen, tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    save_student(frozen, "one")
    result = permafrost.export(
        "export.input_size=fixed", "export.int8=true", run="one", store=frozen.store.path
    )
    (page,) = blocks_of(ROOT / "docs/howto/to-a-device.md", "html")
    Path("index.html").write_text(page.code + ASK)
    shutil.copy(result.files[program], "student.onnx")
    Path("dist").symlink_to(WEB)
    pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()
    if PHOTOS:
        pixels = predict.resize_frame(predict.decode(PHOTOS[0]), [16, 16])
    Image.fromarray(pixels).save("frame.png")
    handler = type("Answers", (Handler,), {"answers": Queue()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/index.html"
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    browser = subprocess.Popen([BROWSER, *words, address], stderr=subprocess.DEVNULL)
    try:
        answer = handler.answers.get(timeout=120)
    finally:
        browser.terminate()
        browser.wait()
        server.shutdown()

    session = onnxruntime.InferenceSession("student.onnx")
    (expected,) = session.run(["logits"], {"images": pixels.transpose(2, 0, 1)[None]})
    tolerance = 1e-4 if program == "onnx" else 0.2  # a rounded sum of 8 bits may be another step
    torch.testing.assert_close(
        torch.tensor(answer), torch.from_numpy(expected[0]), rtol=0, atol=tolerance
    )
    assert expected.std() > 0.1
