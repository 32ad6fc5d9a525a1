"""Subjects that several tests look at, made once."""

import pytest

from lab_utils.phantom import make_subject

TUMOUR_SEEDS = (11, 12, 13, 14, 15)


@pytest.fixture(scope="session")
def atlas_dir(request):
    return request.config.cache.mkdir("phantom-atlas")


@pytest.fixture(scope="session")
def tumours(atlas_dir):
    return [make_subject(seed, "tumour", "brats", atlas_dir=atlas_dir) for seed in TUMOUR_SEEDS]


@pytest.fixture(scope="session")
def tumour(tumours):
    return tumours[0]


@pytest.fixture(scope="session")
def twin(atlas_dir):
    """The healthy subject of the first tumour's seed."""
    return make_subject(TUMOUR_SEEDS[0], "healthy", "brats", atlas_dir=atlas_dir)


@pytest.fixture(scope="session")
def healthy(atlas_dir):
    return [make_subject(seed, "healthy", "hcp", atlas_dir=atlas_dir) for seed in (21, 22)]
