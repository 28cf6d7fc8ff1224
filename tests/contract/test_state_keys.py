"""The names and shapes of a harmonised network's tensors: stores and payloads know them by these.

A change here orphans every stored local parameter; it needs a new exchange schema. The golden file
was listed from a build and checked by hand against MONAI's UNet and the layers' docstrings.
"""

from __future__ import annotations

import json
from pathlib import Path

from uharmony_model.harmonize import stacked_keys
from uharmony_model.networks import build_network
from uharmony_model.study import Study

GOLDEN = Path(__file__).parent.parent / "golden" / "state_keys_unet.json"
LOCAL = {"gain", "shift", "rho", "lam", "weight_residual", "kernel_residual", "bias_residual"}
EVERY = {"harmonization": {"residuals": ["phi", "stem", "depthwise", "head"]}}


def test_a_small_unet_with_three_domains():
    study = Study.model_validate(
        {
            "name": "golden",
            "task": {"classes": {"core": 1}, "intensity": {"mr": {"policy": "zscore"}}},
            "network": {"name": "unet", "features": [4, 8], "residual_units": 1, **EVERY},
        }
    )
    model = build_network(study, ("a", "b", "c"), seed=0)
    state = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert state == golden
    assert stacked_keys(model) == {key for key in golden if key.rpartition(".")[2] in LOCAL}
    assert all(golden[key][0] == 3 for key in stacked_keys(model))
