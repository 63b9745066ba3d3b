"""Sources: where documents come from. A source is a config that can `read` itself; see `base.py`."""

from typing import Annotated

from pydantic import Field

from headspring.text.sources.base import Profile, Reading, SourceConfig
from headspring.text.sources.files import Files
from headspring.text.sources.hub import HuggingFaceDataset
from headspring.text.sources.python import Docstrings, StandardLibrary, Topics
from headspring.text.sources.synthetic import Synthetic
from headspring.text.sources.translations import Translations

Source = Annotated[
    StandardLibrary | Topics | Docstrings | Files | HuggingFaceDataset | Translations | Synthetic,
    Field(discriminator="kind"),
]

__all__ = [
    "Docstrings", "Files", "HuggingFaceDataset", "Profile", "Reading", "Source", "SourceConfig", "StandardLibrary",
    "Synthetic", "Topics", "Translations",
]  # fmt: skip
