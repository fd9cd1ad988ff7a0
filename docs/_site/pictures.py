"""
Take the pictures of the documentation that show pages: the run report and the token view of a run of the demo.

    python examples/digits_demo.py --seed 20
    python docs/_site/pictures.py runs/digits/gndpo-seed20 docs

`make docs` does both when the sources of the pages have changed. It needs playwright and a Chromium, which Debian has as
`chromium`.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright


def take_report(browser: Browser, run: Path, picture: Path) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    tab.goto((run / "report" / "report.html").as_uri())
    tab.screenshot(path=picture, full_page=True)


def take_tokens(browser: Browser, run: Path, picture: Path) -> None:
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    tab.goto((run / "token_scores" / "train_00010.html").as_uri())
    tab.locator("#lowest li").first.click()  # the completion with the lowest score of the batch
    tab.locator("main").evaluate("main => main.scrollTop = 0")
    tab.locator("#completion .marked").hover()
    tab.screenshot(path=picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="`output_dir` of a run of at least 10 steps")
    parser.add_argument("folder", type=Path, help="where the PNGs go")
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("there is no Chromium: install Debian's package `chromium`")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        run = args.run.resolve()
        take_tokens(browser, run, args.folder / "token_view.png")
        take_report(browser, run, args.folder / "run_report.png")
        browser.close()


if __name__ == "__main__":
    main()
