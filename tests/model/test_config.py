"""The configuration: what it counts, what it refuses, how it travels."""

from __future__ import annotations

import json

import pytest
import torch

import model
from model import ConfigError, UnifiedTransformer, UnifiedTransformerConfig
from tests.model.cases import tiny_config


def test_the_reference_configuration_counts_7_60_billion_on_the_meta_device() -> None:
    config = UnifiedTransformerConfig()
    with torch.device("meta"):
        model = UnifiedTransformer(config)
    assert model.num_parameters() == config.num_parameters() == 7_596_527_616
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("use_rope", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_num_parameters_equals_the_real_count(tied: bool, use_rope: bool, qk_norm: bool) -> None:
    config = tiny_config(tie_text_embeddings=tied, use_rope=use_rope, qk_norm=qk_norm)
    assert config.num_parameters() == UnifiedTransformer(config).num_parameters()


def test_flops_of_the_reference_configuration() -> None:
    config = UnifiedTransformerConfig()
    assert config.flops_per_token(4096) == pytest.approx(51.3e9, abs=0.05e9)
    assert config.flops_per_token(4096, "causal") == pytest.approx(47.7e9, abs=0.05e9)
    text_only = config.flops_per_token(4096, target_shares={"text": 1.0})
    blocks = 36 * (4 * 4096**2 + 2 * 4096 * 16384)
    assert text_only == 6 * (blocks + 50257 * 4096) + 12 * 36 * 4096 * 4096


def test_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config()
    model = UnifiedTransformer(config)
    ids = torch.randint(17, (1, 64))
    with FlopCounterMode(display=False) as counter:
        model.text_logits(model.hidden_states(ids, torch.zeros_like(ids))).sum().backward()
    # The counter sees no attention on the CPU, where it is one fused kernel, so it counts the matrices alone.
    matrices = config.flops_per_token(0, target_shares={"text": 1.0}) * 64
    assert counter.get_flop_counts()["Global"][torch.ops.aten.mm] == pytest.approx(matrices, rel=1e-12)


def test_a_configuration_survives_json() -> None:
    config = tiny_config(qk_norm=True, initializer_std=0.02)
    text = json.dumps(config.to_dict())
    assert "device" not in text
    assert UnifiedTransformerConfig.from_dict(json.loads(text) | {"device": "cpu"}) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0: it must be an integer of at least 1"),
        ({"num_layers": 2.0}, r"num_layers is 2\.0: it must be an integer"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5, which does not divide hidden_size 32"),
        ({"hidden_size": 36, "num_attention_heads": 4}, "is 9: rotary positions turn pairs"),
        ({"dropout": 1.0}, r"dropout is 1\.0: it is a probability"),
        ({"rope_theta": float("nan")}, "rope_theta is nan: it must be a finite number"),
        ({"layer_norm_eps": 0.0}, r"layer_norm_eps is 0\.0: it must be positive"),
        ({"initializer_std": -1.0}, r"initializer_std is -1\.0: it must be positive"),
        ({"z_loss_weight": -1.0}, r"z_loss_weight is -1\.0: it must not be negative"),
        (
            {"attention_backend": "flash"},
            "attention_backend is 'flash': choose one of auto, flash_attn_4, flash_attn, varlen, sdpa",
        ),
        ({"attention_backend": "varlen", "use_flash_attention": False}, "while use_flash_attention is false"),
        ({"qk_norm": "yes"}, "qk_norm is 'yes': it must be true or false"),
    ],
)
def test_what_cannot_work_is_refused_with_field_value_and_remedy(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


def test_an_unknown_field_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"'num_layer' \(value 3\) is no field .*did you mean 'num_layers'"):
        UnifiedTransformerConfig.from_dict({"num_layer": 3})


def test_every_public_name_of_the_package_is_there() -> None:
    for name in model.__all__:
        assert getattr(model, name, None) is not None, name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        model.nothing  # noqa: B018
