"""Markers in texts that arrive in pieces."""

from collections.abc import Sequence


def split_at_marker(text: str, markers: Sequence[str]) -> tuple[str, str | None, str]:
    """What comes before the first marker, the marker, and what follows it.

    Without one, what is certainly outside every marker, None, and an end of the text that may be the beginning of one.
    """
    found = [(place, marker) for marker in markers if (place := text.find(marker)) >= 0]
    if found:
        place, marker = min(found)
        return text[:place], marker, text[place + len(marker) :]
    kept = max(_length_of_beginning(text, marker) for marker in markers)
    return text[: len(text) - kept], None, text[len(text) - kept :]


def _length_of_beginning(text: str, marker: str) -> int:
    longest = min(len(text), len(marker) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(marker[:length])), 0)
