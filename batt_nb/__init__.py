"""Operando battery data of X-ray, NMR and electrochemistry, joined by electrochemical state."""
__version__ = "0.1.0"

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["core", "campaign", "report", "explore", "cli"],
    submod_attrs={"campaign": ["Campaign", "read", "formats"]},
)
