"""One tiny cluster of eight expert actors, shared by all end-to-end tests: starting one takes half a minute."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import write_mixtral
from tests.support.served_cluster import ServedCluster
from tests.support.tokenizers import write_byte_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral of 4 layers and 8 experts, in fp16, so that the packed kernel serves it."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    path.mkdir()
    write_mixtral(path, layers=4, experts=8, dtype=torch.float16)
    write_byte_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[ServedCluster]:
    """The shared cluster. Whoever hurts it must wait until it is whole again."""
    served = ServedCluster(tmp_path_factory.mktemp("home"), tiny_model)
    yield served
    served.stop()
