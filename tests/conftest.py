"""For every test: Triton's interpreter where there is no GPU, and the Hypothesis profiles.

`ci` (the default) is fast and draws the same examples in every run. `gpu` draws more, other ones each time, and does
not shrink: after one bad access every further call of the process fails, so a shrunk example would be a wrong lead.
"""

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from bench import interpret  # noqa: F401  before anything that imports triton

settings.register_profile(
    "ci",
    max_examples=20,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.register_profile(
    "gpu", settings.get_profile("ci"), max_examples=60, derandomize=False, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("ci")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
