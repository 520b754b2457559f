"""Look at the built site in headless Chromium: ``python docs/check_site.py`` after ``make docs``.

Every page is opened at the width of a phone and of a desktop. It must load, throw no error, show all of its pictures, and
fit the window; every internal link, and the place in a page that it names, must exist. Exits with 1 and a list of what is
wrong.
"""

import functools
import http.server
import json
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

SITE = Path(__file__).resolve().parent / "_build" / "html"
WIDTHS = (390, 1280)
"""CSS pixels: a phone, a desktop."""
CHECKER = "checker.html"
PATIENCE = 900
"""Seconds for all pages."""

# One page loads all others in a frame, one after the other, and sends what it saw to the server that it came from.
SCRIPT = """<!doctype html><meta charset="utf-8"><body></body><script>
const pages = PAGES, widths = WIDTHS, found = [];
const frame = document.createElement("iframe");
frame.style.height = "900px"; frame.style.border = "0"; document.body.append(frame);
function loaded(page, width) {
  return new Promise(resolve => {
    const timer = setTimeout(() => resolve(null), 20000);
    frame.onload = () => { clearTimeout(timer); resolve(frame.contentWindow); };
    frame.style.width = width + "px"; frame.src = page;
  });
}
async function look(page, width) {
  const inside = await loaded(page, width), errors = [];
  if (!inside) return ["did not load"];
  inside.addEventListener("error", event => errors.push("error: " + (event.message || "resource")), true);
  const pictures = [...inside.document.images].filter(image => !image.src.includes("/_static/")); // no icons of the theme
  for (const picture of pictures) { picture.loading = "eager"; }
  await Promise.all(pictures.map(picture => picture.decode().catch(() => {})));
  for (const picture of pictures) {
    const name = decodeURI(picture.src).slice(0, 80), box = picture.getBoundingClientRect();
    if (!picture.naturalWidth) errors.push("picture not loaded: " + name);
    else if (box.width < 1 || box.height < 1) errors.push("picture not visible: " + name);
    else if (box.width > width) errors.push("picture wider than the window: " + name);
  }
  const wide = inside.document.documentElement.scrollWidth;
  if (wide > width + 1) errors.push("page is " + wide + " wide");
  if (!inside.document.title) errors.push("no title");
  return errors;
}
(async () => {
  for (const page of pages) for (const width of widths)
    for (const what of await look(page, width)) found.push([page, width, what]);
  await fetch("/CHECKER", {method: "POST", body: JSON.stringify(found)});
})();
</script>"""


class _Page(HTMLParser):
    """Links of one page, and the places in it that a link can name."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.places |= {value for name, value in attrs if name in ("id", "name") and value}
        for name in ("href", "src"):
            if given.get(name):
                self.links.append(str(given[name]))


def broken_links(site: Path) -> list[str]:
    """Internal links that lead nowhere."""
    pages = {path.relative_to(site).as_posix(): _Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    broken = []
    for name, page in pages.items():
        for link in page.links:
            if urlsplit(link).scheme or link.startswith("//"):
                continue
            path, place = urldefrag(urljoin(f"/{name}", link))
            target = unquote(urlsplit(path).path).lstrip("/")
            if not (site / target).exists():
                broken.append(f"{name}: {link}")
            elif place and target in pages and unquote(place) not in pages[target].places:
                broken.append(f"{name}: {link} (no such place)")
    return broken


class _Server(http.server.SimpleHTTPRequestHandler):
    """The site, the page that looks at it, and an ear for what it found."""

    page = b""
    told: queue.Queue

    def do_GET(self) -> None:
        if self.path != f"/{CHECKER}":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.page)

    def do_POST(self) -> None:
        self.told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def seen(site: Path, browser: str) -> list[str]:
    """What is wrong with the pages as a browser shows them."""
    pages = [f"/{path.relative_to(site).as_posix()}" for path in sorted(site.rglob("*.html"))]
    script = (
        SCRIPT.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS)).replace("CHECKER", CHECKER)
    )
    told: queue.Queue = queue.Queue()
    handler = type("Handler", (_Server,), {"page": script.encode(), "told": told})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    address = f"http://127.0.0.1:{server.server_port}/{CHECKER}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, tempfile.TemporaryFile("w+") as log:
        running = subprocess.Popen(
            [
                browser,
                *options,
                f"--user-data-dir={profile}",
                "--window-size=1400,1000",
                "--remote-debugging-port=0",
                address,
            ],
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        try:
            found = [f"{page} at {width}: {what}" for page, width, what in told.get(timeout=PATIENCE)]
        except queue.Empty:
            found = [f"the browser was not done within {PATIENCE} s"]
        running.terminate()
        running.wait()
        log.seek(0)
        # An error of a script, not a note of the browser on itself.
        found += sorted({line for line in log.read().splitlines() if "CONSOLE" in line and "rror" in line})
    server.shutdown()
    print(f"{len(pages)} pages at {' and '.join(map(str, WIDTHS))} pixels")
    return found


def main() -> int:
    if not (SITE / "index.html").is_file():
        print("there is no site; run `make docs` first")
        return 1
    found = broken_links(SITE)
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((path for name in names if (path := shutil.which(name))), None)
    if browser is None:
        print(f"no browser: none of {', '.join(names)} is installed; links only")
        return 1
    found += seen(SITE, browser)
    print("\n".join(found) if found else "every page loads, every link leads somewhere, every picture is seen")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
