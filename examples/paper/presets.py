"""Presets for small machines: a value per option, or a dictionary with a value per optimizer.

`small` gives every optimizer four learning rates, a factor of about 3 apart, and two weight decays.
With AdamG and Hyperball, weight decay acts only on parameters without a group. With rotational
AdamW it sets the angle per step, so its values are larger.
"""

from typing import Any

from .published import OPTIMIZERS

_L2 = (0.0, 5e-4)

PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "model": "resnet20",
        "width": 4,
        "protocol": "sound",
        "train_images": 6000,
        "validation": 1 / 60,  # 1000 images
        "epochs": 4,
        "batch_size": 64,
        "test_batch_size": 1000,
        "schedule": "cosine",
        "b2": 0.99,
        "seeds": (0, 1, 2),
        "search_seeds": (100,),
        "learning_rates": {
            "sgd": (0.03, 0.1, 0.3, 1.0),
            "sgdmrt": (0.03, 0.1, 0.3, 1.0),
            "adam": (3e-3, 1e-2, 3e-2, 0.1),
            "adamw": (3e-3, 1e-2, 3e-2, 0.1),
            "adams": (3e-3, 1e-2, 3e-2, 0.1),
            "adamsrt": (3e-3, 1e-2, 3e-2, 0.1),
            "adamg": (1e-2, 3e-2, 0.1, 0.3),
            "hyperball": (3e-3, 1e-2, 3e-2, 0.1),
            "rotational_adamw": (1e-3, 3e-3, 1e-2, 3e-2),
        },
        "weight_decays": dict.fromkeys(OPTIMIZERS, _L2)
        | {"adamw": (0.0, 0.05), "rotational_adamw": (0.1, 1.0)},
    }
}
