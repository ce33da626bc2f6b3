"""The playground in a real browser, where there is one."""

import pytest

from browser import CHROMIUM, open_page
from server_process import launch, parallel_flags

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")


def test_a_conversation_in_the_browser(tmp_path):
    flags = [*parallel_flags(2), "--enable-metrics", "--api-key", "secret"]
    with launch(tmp_path / "log", *flags) as server, open_page(tmp_path / "profile") as page:
        page.call("Page.navigate", url=server.url)
        page.wait_for("typeof $ === 'function' && $('model').textContent.includes('API key')")
        page.evaluate("$('key').value = 'secret'; $('key').dispatchEvent(new Event('change'))")
        page.wait_for("$('model').textContent.includes('nibble')")
        page.problems.clear()  # the answers without the key

        page.evaluate("$('temperature').value = 0; $('max_tokens').value = 60; $('prompt').focus()")
        page.type("What is 17 plus 25?")
        page.press("Enter")
        page.wait_for("document.querySelector('.speed')?.textContent.includes('tokens/s')")
        assert page.evaluate("document.querySelector('.text').textContent") == "17 plus 25 is 42."

        page.evaluate("$('temperature').value = 1.5; $('compare').click(); $('prompt').focus()")
        page.type("What is 2 plus 2?")
        page.press("Enter")
        page.wait_for("[...document.querySelectorAll('.speed')].filter((e) => e.textContent).length === 3")
        titles = page.evaluate("[...document.querySelectorAll('.answers:last-child h3')].map((e) => e.textContent)")
        assert titles == ["temperature 1.5", "greedy"]

        figures = page.wait_for("$('figures').innerText.includes('rank 1') && $('figures').innerText")
        for name in ("tokens/s", "dispatched", "rows/s, rank 0"):
            assert name in figures
        page.wait_for("!$('figures').innerText.includes('dispatched in all\\n0 B')")

        tree = page.call("Accessibility.getFullAXTree")["nodes"]
        roles = ("textbox", "spinbutton", "checkbox", "button")
        controls = [node for node in tree if node.get("role", {}).get("value") in roles]
        assert len(controls) >= 9
        assert all(control.get("name", {}).get("value") for control in controls), "every control has a name"
        assert page.problems == []
        page.screenshot(tmp_path / "playground.png")

        page.evaluate("$('max_tokens').value = 100000; $('prompt').value = '<b>bold</b>'; $('ask').requestSubmit()")
        page.wait_for("document.querySelector('.failed')?.innerText.includes('max_tokens (100000)')")
        said = page.evaluate("[...document.querySelectorAll('.mine')].at(-1).innerHTML")
        assert said == "&lt;b&gt;bold&lt;/b&gt;", "what is said stays text"
