"""A page in Chromium, driven by Playwright and a model: `rethaw run examples/guides/chromium/agent.py`"""

import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import rethaw
from rethaw import Context, Image

IMAGE = Image.debian().apt_install("chromium", "libatomic1").pip_install("playwright==1.65.2", "openai==3.57.0")
SITE = "http://127.0.0.1:8000"
PAGE = """<!doctype html><title>Shop</title>
<p id=basket>nothing</p><button>apple</button><button>bread</button><button>tea</button>
<script>
  const basket = [];  // nowhere but in the page's memory
  let ticks = 0;
  setInterval(() => ticks++, 50);
  for (const button of document.querySelectorAll("button")) button.onclick = () => {
    basket.push(button.textContent);
    document.getElementById("basket").textContent = basket.join(", ");
  };
</script>
"""


def serve(place: Path) -> subprocess.Popen[bytes]:
    """A dev server in the same sandbox."""
    place.mkdir()
    (place / "index.html").write_text(PAGE)
    server = subprocess.Popen([sys.executable, "-m", "http.server", "8000", "--bind", "127.0.0.1"], cwd=place)
    while True:
        try:
            urllib.request.urlopen(SITE)
        except OSError:
            time.sleep(0.05)
        else:
            return server


@rethaw.agent(image=IMAGE, memory="2GiB")
def shopper(ctx: Context, model: str = "gpt-5-mini") -> dict[str, Any]:
    from openai import OpenAI
    from playwright.sync_api import sync_playwright

    serve(Path("/site"))
    client = OpenAI()
    with sync_playwright() as playwright:
        # The sandbox that Chromium would make for its pages is not needed in one.
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page()
        page.goto(SITE)
        clicked: list[str] = []
        while True:
            shown = page.inner_text("body")
            question = f"The page shows:\n{shown}\nAnswer with the one button to click, or with the word done."
            answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}])
            button = (answer.choices[0].message.content or "").strip()
            if button == "done":
                break
            page.get_by_role("button", name=button).click()
            clicked.append(button)
            print(f"clicked {button}: {page.inner_text('#basket')}", flush=True)
        kept = page.evaluate("basket")
        running = page.evaluate(
            "new Promise(done => { const before = ticks; setTimeout(() => done(ticks > before), 500); })"
        )
        browser.close()
    return {"clicked": clicked, "basket": kept, "timers_run": running}
