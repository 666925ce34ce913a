"""Look at the site in a real browser: every page, wide and narrow, light and dark.

    python tools/browser.py                                  # the site in _docs, by `make docs`
    python tools/browser.py --site FOLDER --only index.html --screenshots FOLDER

Fails on pages that scroll sideways, errors in the console, pictures that are missing or have no alternative text,
mathematics and references that stayed unresolved, and links within the site that lead nowhere. It drives Chromium by
its DevTools protocol. Where there is no site, no Chromium or no websocket-client, it says so and ends well.
"""
import argparse
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
VIEWS = [(width, scheme) for width in (1400, 390) for scheme in ("light", "dark")]
SECONDS = 30  # that a page may take
DARK = """
document.body.classList.contains("quarto-light") && window.quartoToggleColorScheme && window.quartoToggleColorScheme()
"""
LOOK = r"""
(async () => {
  const found = [], shown = text => text.trim().replace(/\s+/g, " ").slice(0, 60);
  const images = [...document.images];
  images.forEach(image => { image.loading = "eager"; });
  await Promise.all(images.map(image => image.decode().catch(() => null)));
  for (const image of images) {
    const source = image.getAttribute("src")?.slice(0, 80);
    if (!image.naturalWidth) found.push("missing image " + source);
    if (!image.hasAttribute("alt")) found.push("image without alternative text " + source);
  }
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) {
    const wide = [...document.querySelectorAll("body *:not(pre *, table *)")].filter(
      one => one.getBoundingClientRect().right > width + 1);
    const last = wide.filter(one => ![...one.children].some(child => wide.includes(child)))[0];
    found.push("scrolls sideways, " + document.documentElement.scrollWidth + " > " + width + " pixels" +
               (last ? ": <" + last.tagName.toLowerCase() + "> " + shown(last.textContent) : ""));
  }
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (node.parentElement.closest("pre, code, script, style, math, noscript, textarea")) continue;
    if (/\$\$|\\\(|\\\[|\\begin\{|\?@[a-z]|@(eq|sec|fig|tbl|thm|prp|cor|def)-/.test(node.data))
      found.push("unresolved: " + shown(node.data));
  }
  for (const broken of document.querySelectorAll("merror, .katex-error, mjx-merror"))
    found.push("mathematics with an error: " + shown(broken.textContent));
  return found;
})()
"""


class Quiet(SimpleHTTPRequestHandler):
    """A server that logs nothing."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


class Chromium:
    """A headless Chromium, and one page of it."""

    def __init__(self, program: str):
        from websocket import create_connection

        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        options = ["--headless=new", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0",
                   "--no-first-run", "--remote-allow-origins=*", f"--user-data-dir={self.folder.name}"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            options.append("--no-sandbox")  # which Chromium does not have for root
        self.process = subprocess.Popen([program, *options, "about:blank"], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        port, path = self._address()
        self.socket = create_connection(f"ws://127.0.0.1:{port}{path}", timeout=SECONDS)
        self.count, self.session, self.events = 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _address(self) -> tuple[str, str]:
        """Port and path of the debugger, from the file that Chromium writes when it listens."""
        file, until = Path(self.folder.name, "DevToolsActivePort"), time.monotonic() + SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            lines = file.read_text().split() if file.exists() else []
            if len(lines) == 2:
                return lines[0], lines[1]
            time.sleep(0.05)
        raise RuntimeError("Chromium did not start")

    def call(self, method: str, **parameters: object) -> dict:
        """The result of a command; events that come before it are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def wait(self, method: str) -> None:
        """Wait for an event, which may have come already."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(json.loads(self.socket.recv()))

    def evaluate(self, script: str) -> object:
        """The value of an expression on the page."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def open(self, address: str, width: int) -> None:
        """Load a page in a window of this width."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                  mobile=width < 600)
        self.events.clear()
        self.call("Page.navigate", url=address)
        self.wait("Page.loadEventFired")

    def complaints(self) -> list[str]:
        """Errors in the console since the page was opened."""
        found = []
        for event in self.events:
            kind, its = event.get("method"), event.get("params", {})
            if kind == "Runtime.exceptionThrown":
                found.append(its["exceptionDetails"].get("exception", {}).get("description", "an exception"))
            elif kind == "Log.entryAdded" and its["entry"]["level"] == "error":
                found.append(f"{its['entry']['text']} {its['entry'].get('url', '')}")
            elif kind == "Runtime.consoleAPICalled" and its["type"] == "error":
                found.append(" ".join(str(argument.get("value", "")) for argument in its["args"]))
        return [f"console: {' '.join(text.split())[:160]}" for text in found]

    def close(self) -> None:
        """End the browser, and wait until it has ended."""
        self.session = None
        try:
            self.call("Browser.close")
        except Exception:
            self.process.kill()
        self.socket.close()
        self.process.wait(SECONDS)
        self.folder.cleanup()


def page_problems(chromium: Chromium, address: str, picture: Path | None = None) -> list[str]:
    """What is wrong with one page, in any of the views."""
    found = []
    for width, scheme in VIEWS:
        chromium.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        chromium.open(address, width)
        if scheme == "dark":
            chromium.evaluate(DARK)
        here = [*chromium.evaluate(LOOK), *chromium.complaints()]
        found += [f"{problem} ({width} px, {scheme})" for problem in dict.fromkeys(here)]
        if picture:
            shot = chromium.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.with_name(f"{picture.name}-{width}-{scheme}.png").write_bytes(base64.b64decode(shot))
    return found


@cache
def anchors(path: Path) -> frozenset[str]:
    """Every place of a page that a link can lead to."""
    return frozenset(re.findall(r"""\s(?:id|name)=["']([^"']+)["']""", path.read_text(encoding="utf-8")))


def link_problems(site: Path, page: Path) -> list[str]:
    """Links of a page within the site that lead nowhere."""
    found, base = [], f"http://site/{page.relative_to(site).as_posix()}"
    text = re.sub(r"<(script|style)\b.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in dict.fromkeys(re.findall(r"""<a\b[^>]*?\shref=["']([^"']*)["']""", text)):
        parts = urlsplit(urljoin(base, link.replace("&amp;", "&")))
        if parts.scheme not in ("http", "https") or parts.netloc != "site":
            continue
        goal = site / unquote(parts.path).lstrip("/")
        goal = goal / "index.html" if goal.is_dir() else goal
        if not goal.exists():
            found.append(f"dead link {link}")
        elif parts.fragment and goal.suffix == ".html" and unquote(parts.fragment) not in anchors(goal):
            found.append(f"dead anchor {link}")
    return found


def site_problems(site: Path, program: str, only: list[str] | None = None, pictures: Path | None = None) -> list[str]:
    """Everything that is wrong with a site, each with its page."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    chromium, found = Chromium(program), []
    try:
        for page in sorted(site.rglob("*.html")):
            name = page.relative_to(site).as_posix()
            if only and name not in only:
                continue
            here = page_problems(chromium, f"http://127.0.0.1:{server.server_port}/{name}",
                                 pictures / page.relative_to(site).with_suffix("") if pictures else None)
            found += [f"{name}: {problem}" for problem in here + link_problems(site, page)]
    finally:
        chromium.close()
        server.shutdown()
        server.server_close()
    return found


def browser() -> str | None:
    """The path of a Chromium, None where there is none."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def missing(site: Path) -> str | None:
    """What is not there, for which the site cannot be looked at."""
    if not (site / "index.html").exists():
        return f"no site in {site}: make docs makes it"
    if browser() is None:
        return f"no Chromium among {', '.join(BROWSERS)}"
    try:
        import websocket  # noqa: F401
    except ModuleNotFoundError:
        return "no websocket-client: pip install websocket-client"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, default=ROOT / "_docs")
    parser.add_argument("--only", nargs="+", help="pages, by their paths in the site")
    parser.add_argument("--screenshots", type=Path, help="a folder for a picture of each page and view")
    chosen = parser.parse_args()
    reason, program = missing(chosen.site), browser()
    if reason or program is None:
        print(f"skipped: {reason}")
        return 0
    found = site_problems(chosen.site, program, chosen.only, chosen.screenshots)
    print("\n".join(found) or "Every page is in order.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
