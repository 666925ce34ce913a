"""The script that looks at the site in a browser, on a page in order and on one with every fault that it knows."""
import subprocess
import sys

import pytest

import browser
from book import ROOT

pytest.importorskip("websocket", reason="no websocket-client")
needs_browser = pytest.mark.skipif(browser.browser() is None, reason="no Chromium on this machine")
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>A page</title>
<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width, initial-scale=1">
<style>img, p {{ max-width: 100% }}</style></head><body class="quarto-light">{body}</body></html>"""
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
GOOD = f"""<h1 id="top">In order</h1><p><a href="index.html#top">here</a> <a href="#top">above</a>
<a href="https://example.org/nowhere">outside</a></p><img src="{PIXEL}" alt="a pixel">
<p>Five dollars, $5; code <code>$$x$$ @eq-label</code>.</p>
<div style="overflow-x: auto"><div style="width: 2000px">what is wide scrolls by itself</div></div>"""
BAD = """<div style="width: 1000px">wide</div><img src="gone.png"><p>$$x^2$$ and ?@eq-gone</p>
<math><merror><mtext>broken</mtext></merror></math><a href="gone.html">dead</a> <a href="index.html#gone">lost</a>
<script>console.error("a complaint"); throw new Error("an exception")</script>"""
FAULTS = ("scrolls sideways, 1", "missing image gone.png", "image without alternative text", "unresolved: $$x^2$$",
          "mathematics with an error: broken", "console: a complaint", "console: Error: an exception",
          "dead link gone.html", "dead anchor index.html#gone")


@pytest.fixture
def site(tmp_path):
    (tmp_path / "index.html").write_text(PAGE.format(body=GOOD))
    return tmp_path


@needs_browser
@pytest.mark.processes
def test_a_page_in_order_and_one_with_every_fault(site):
    assert browser.site_problems(site, browser.browser()) == []
    (site / "bad.html").write_text(PAGE.format(body=BAD))
    found = browser.site_problems(site, browser.browser(), only=["bad.html"], pictures=site / "shots")
    missed = [fault for fault in FAULTS if not any(fault in problem for problem in found)]
    assert not missed, found
    sideways = [problem for problem in found if "sideways" in problem]
    assert len(sideways) == 2 and all("390 px" in problem and "<div> wide" in problem for problem in sideways)
    assert all(problem.startswith("bad.html: ") for problem in found)
    assert len(list((site / "shots").glob("bad-*.png"))) == len(browser.VIEWS)


def test_links_within_a_site_are_checked_without_a_browser(site):
    assert browser.link_problems(site, site / "index.html") == []
    (site / "bad.html").write_text(PAGE.format(body=BAD))
    assert browser.link_problems(site, site / "bad.html") == ["dead link gone.html", "dead anchor index.html#gone"]


def test_without_a_site_it_says_so_and_ends_well(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "browser.py"), "--site", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.startswith("skipped: no site in ")


def test_what_is_missing_is_named(site, monkeypatch):
    assert browser.missing(site) is None or "Chromium" in browser.missing(site)
    monkeypatch.setattr(browser, "BROWSERS", ("no-such-browser",))
    assert browser.missing(site) == "no Chromium among no-such-browser"
