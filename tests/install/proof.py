"""Programs that prove, in an environment of their own, that nnU-Net's own search finds every registered name."""

from __future__ import annotations

# nnU-Net's search, as its commands call it: from 2.8 on by the first function, before that by the second.
SEARCH = """
import os, nnunetv2
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

def trainer(name):
    try:
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
    except ImportError:
        folder = os.path.join(nnunetv2.__path__[0], "training", "nnUNetTrainer")
        return recursive_find_python_class(folder, name, "nnunetv2.training.nnUNetTrainer")
    try:
        return recursive_find_trainer_class_by_name(name)
    except RuntimeError:
        return None

def planner(name):
    folder = os.path.join(nnunetv2.__path__[0], "experiment_planning")
    return recursive_find_python_class(folder, name, "nnunetv2.experiment_planning")
"""
# Prints as JSON where things come from, after every registered name was found.
PROOF = (
    SEARCH
    + """
import json, _nnunet_ext_hook, nnunet_ext
from importlib.metadata import version
from nnunet_ext import registry

found = {name: trainer(name) for name in registry.names("trainers")}
found.update({name: planner(name) for name in registry.names("planners")})
assert found and all(found.values()), found
assert all(cls.__name__ == name for name, cls in found.items()), found
scheduled = registry.names("trainers")[0] + "_7epochs_3iters"
assert trainer(scheduled).__name__ == scheduled
assert trainer("nnUNetTrainerNoMirroring") and planner("ResEncUNetPlanner")
assert not _nnunet_ext_hook.errors
files = {module.__name__: module.__file__ for module in (nnunet_ext, _nnunet_ext_hook, nnunetv2)}
print("\\n" + json.dumps({"version": version("nnunetv2"), **files}))
"""
)
