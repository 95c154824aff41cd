"""Shallower squeezes the depth and the width out of trained PyTorch networks and gives back plain dense models.

    import shallower as sh

    sites = sh.find_sites(model, example_inputs)
    plan = sh.Plan.collapse(sites)
    small = sh.apply(model, plan, example_inputs)
    sh.save(small, "out/")

The public names stand in `__init__.pyi`. Each is imported when it is first used, so that the command line answers
before PyTorch is loaded.
"""

import lazy_loader

from shallower.saving.stock.from_pretrained import register_when_imported

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register_when_imported()
