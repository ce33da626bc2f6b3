"""The playground's page: whole, closed to everything else, and there without a key."""

import re

from fake_engine import Api


def test_the_page_needs_no_key_and_nothing_but_itself():
    response = Api(api_key="secret").get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", response.text)
    assert "innerHTML" not in response.text, "what models say is never markup"
