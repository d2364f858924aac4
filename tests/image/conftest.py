"""One image for all tests here: building it takes minutes."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import image
from tests.support.manifests import ROOT

ASKED = "OCTAVO_IMAGE_CHECK"
KEEP = "OCTAVO_IMAGE_KEEP"
"""1: an image that is there is used as it is, and stays; for whoever works on these tests."""


@pytest.fixture(scope="session")
def cpu_image() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Root file system and configuration of the CPU image, built here; skips the test where nobody asked for that."""
    if os.environ.get(ASKED) != "1":
        pytest.skip(f"builds an image, which takes minutes: make image-check ({ASKED}=1) does")
    why = image.why_not()
    if why is not None:
        pytest.skip(why)
    workshop = image.Workshop(Path(os.environ.get("OCTAVO_IMAGE_DIR", ROOT / "build" / "image")))
    keep = os.environ.get(KEEP) == "1"
    try:
        if not (keep and workshop.has("cpu")):
            workshop.close()  # what a killed run left
            workshop.build("cpu")
        yield workshop.mounted("cpu"), workshop.config("cpu")
    finally:
        if not keep:
            workshop.close()
