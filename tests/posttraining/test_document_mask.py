"""Trainers whose rows hold one document each refuse `document_mask`."""

import pytest
from pydantic import ValidationError

from headspring.posttraining.contrastive import ContrastiveConfig
from headspring.posttraining.multimodal import MultimodalConfig
from headspring.posttraining.preference import PreferenceConfig
from headspring.posttraining.sft import SFTConfig


@pytest.mark.parametrize("config", [ContrastiveConfig, MultimodalConfig, PreferenceConfig])
def test_it_is_refused_where_rows_hold_one_document(config):
    with pytest.raises(ValidationError, match="document_mask does not apply"):
        config(document_mask=True)


def test_it_is_taken_where_documents_are_packed():
    assert SFTConfig(document_mask=True).document_mask
