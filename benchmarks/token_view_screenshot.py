"""
Take a picture of a page of the token view, as a browser shows it.

    python examples/digits_demo.py --seed 20 --max_steps 10 --log_completions true --logging_steps 10
    python benchmarks/token_view_screenshot.py runs/digits/gndpo-seed20/token_scores/train_00010.html docs/token_view.png

It needs playwright and a Chromium, which Debian has as `chromium`.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="the page, token_scores/*.html of a run")
    parser.add_argument("picture", type=Path, help="where the PNG goes")
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("there is no Chromium: install Debian's package `chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 800})
        tab.goto(args.page.resolve().as_uri())
        tab.locator("#lowest li").first.click()  # the completion with the lowest score of the batch
        tab.locator("main").evaluate("main => main.scrollTop = 0")
        tab.locator("#completion .marked").hover()
        tab.screenshot(path=args.picture)
        browser.close()


if __name__ == "__main__":
    main()
