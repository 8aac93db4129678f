"""A page in headless Chromium: what failed to load, and what its scripts raised."""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # A page that wants something from elsewhere must not find it here by chance.
    *("--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "--window-size=1280,2400"),
)
# Before all other scripts of the page; the verdict is left where --dump-dom shows it.
PROBE = """<script>
const found = {errors: [], broken: [], foreign: []};
addEventListener("error", (event) => {
  const at = event.target;
  if (at === window) found.errors.push(String(event.message));
  else found.broken.push(at.src || at.href || at.tagName);
}, true);
addEventListener("unhandledrejection", (event) => found.errors.push(String(event.reason)));
addEventListener("load", () => setTimeout(() => {
  for (const image of document.images) {
    if (!image.naturalWidth) found.broken.push(image.currentSrc || image.src);
  }
  for (const entry of performance.getEntriesByType("resource")) {
    if (!entry.name.startsWith(location.origin) && /^https?:/.test(entry.name))
      found.foreign.push(entry.name);
  }
  document.documentElement.setAttribute("data-found", JSON.stringify(found));
}, 500));
</script>"""


class _Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        file = Path(self.translate_path(self.path.partition("?")[0]))
        if file.suffix != ".html" or not file.is_file():
            super().do_GET()
            return
        page = file.read_text().replace("<head>", f"<head>{PROBE}", 1).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def visit(
    root: Path, page: str, scratch: Path, screenshot: Path | None = None
) -> dict[str, list[str]]:
    """Open `page` of the folder `root`: script errors, broken images, resources from elsewhere."""
    assert CHROMIUM is not None
    handler = functools.partial(_Handler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            profile = scratch / f"profile-{page.replace('/', '-')}"
            command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
            if screenshot is not None:
                command.append(f"--screenshot={screenshot}")
            address = f"http://127.0.0.1:{server.server_port}/{page}"
            done = subprocess.run(
                [*command, "--virtual-time-budget=8000", "--dump-dom", address],
                capture_output=True,
                text=True,
                timeout=180,
            )
        finally:
            server.shutdown()
            thread.join()
    seen = re.search(r'data-found="([^"]*)"', done.stdout)
    assert seen, f"{page} was not loaded:\n{done.stderr[-2000:]}"
    found: dict[str, list[str]] = json.loads(html.unescape(seen[1]))
    return found
