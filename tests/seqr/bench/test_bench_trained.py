"""The adapters of the search benchmark are trained, and the library is built around them as its page says."""

import pytest
import torch

from seqr.bench.routing.adapters import Shelf
from seqr.bench.routing.trained import LANGUAGES, Seeds, expand, train_seeds
from seqr.routing.search import SearchIndex


@pytest.fixture(scope="module")
def seeds() -> Seeds:
    return train_seeds(4, steps=3)


def test_every_seed_learned_something_of_its_own(seeds: Seeds) -> None:
    assert seeds.b.shape == (LANGUAGES, 2, 64, 4)
    assert bool((seeds.b.norm(dim=(2, 3)) > 0).all())
    assert not torch.equal(seeds.b[0, 0], seeds.b[0, 1])


def test_a_library_begins_with_the_seeds_and_repeats_itself(seeds: Seeds) -> None:
    r = torch.cat(list(expand(seeds, 50, at_once=20)))
    assert r.shape == (50, 4, 4)
    first = torch.linalg.qr(seeds.b[0, 0].double()).R
    torch.testing.assert_close(r[0].double().abs(), first.abs(), rtol=1e-4, atol=1e-6)
    assert torch.equal(r, torch.cat(list(expand(seeds, 50, at_once=20))))


def test_search_finds_what_the_full_product_finds_on_them(seeds: Seeds) -> None:
    shelf = Shelf.calibrated(expand(seeds, 200), seeds.calibration[:256])
    index = SearchIndex.build(shelf.truth, shelf.usable, seeds.calibration)
    z, permitted = seeds.tokens[:20], shelf.everyone(20)
    norms = torch.einsum("nij,tj->tni", shelf.r.double(), z.double()).norm(dim=2)
    assert index.route(z, index.allow(permitted)).tolist() == ((norms - shelf.mu) / shelf.sigma).argmax(1).tolist()
