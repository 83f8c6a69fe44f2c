"""A teacher with switched layers computes what an assembled student computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from relinear.distill.hybrid import Hybrid
from relinear.distill.modeling.cache import CACHE
from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import load_teacher


def plan(mixer: str, layers: range, **options: Any) -> dict[int, tuple[str, dict[str, Any]]]:
    return dict.fromkeys(layers, (mixer, options))


def inputs() -> dict[str, dict[str, torch.Tensor]]:
    ids = torch.randint(3, 300, (3, 40))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    mask[2, 33:] = 0
    packed = torch.cat([torch.arange(11), torch.arange(18), torch.arange(11)]).expand(3, -1)
    return {
        "plain": {"input_ids": ids},
        "padded": {"input_ids": ids, "attention_mask": mask},
        "packed": {"input_ids": ids, "position_ids": packed},
    }


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("mixer", ["gated_deltanet", "rwkv7"])
def test_it_is_the_assembled_student(make_teacher: Any, family: str, mixer: str) -> None:
    """Padding on either side, packed documents, and every layer restored in turn, the lowest too."""
    teacher = load_teacher(make_teacher(family))
    mixers, _ = transfer(teacher, plan(mixer, range(4)), seed=3)
    hybrid = Hybrid(teacher, mixers)
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    for converted in ([0, 1, 2, 3], [1, 2, 3], [0, 2], [3], []):
        student = assemble(teacher, hybrid.mixers_of(converted))
        for name, given in inputs().items():
            real = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
            with torch.no_grad(), hybrid.converting(converted) as model:
                made = model(**given).logits
            with torch.no_grad():
                wanted = student(**given, use_cache=False).logits
            torch.testing.assert_close(made[real], wanted[real], rtol=1e-5, atol=1e-5, msg=f"{converted} {name}")
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())


def test_the_teacher_is_itself_again_also_after_an_error(llama: Any) -> None:
    teacher = load_teacher(llama)
    mixers, _ = transfer(teacher, plan("gated_deltanet", range(4)))
    ids = torch.randint(3, 300, (1, 12))
    wanted = teacher.model(ids).logits
    hybrid = Hybrid(teacher, mixers)
    with pytest.raises(ZeroDivisionError), hybrid.converting([0, 2]) as model:
        assert not torch.allclose(model(ids).logits, wanted)
        raise ZeroDivisionError
    assert torch.equal(teacher.model(ids).logits, wanted)
    assert not any("forward" in vars(teacher.attention(layer)) for layer in range(4))


def test_the_lowest_layer_is_the_source_of_what_layers_share(llama: Any) -> None:
    """RWKV-7: with layer 0 restored, layer 1 has no value residual, and layers above read layer 1's values."""
    teacher = load_teacher(llama)
    mixers, _ = transfer(teacher, plan("rwkv7", range(4)))
    hybrid = Hybrid(teacher, mixers)
    made = hybrid.mixers_of([1, 2, 3])
    assert made[1].first and not hasattr(made[1], "v0") and made[2] is mixers[2]
    assert made[1].q_proj.weight.data_ptr() == mixers[1].q_proj.weight.data_ptr()
    assert hybrid.mixers_of([0, 1])[1] is mixers[1]
    fresh, _ = transfer(teacher, plan("rwkv7", range(1, 4)))
    assert made[1].state_dict().keys() == fresh[1].state_dict().keys()


def test_what_it_cannot_do_is_said(llama: Any) -> None:
    teacher = load_teacher(llama)
    mixers, _ = transfer(teacher, plan("gated_deltanet", range(3)))
    hybrid = Hybrid(teacher, mixers)
    with pytest.raises(ValueError, match="layer 3 has no mixer"):
        hybrid.mixers_of([3])
    ids = torch.randint(3, 300, (1, 6))
    with hybrid.converting([0]) as model:
        with pytest.raises(ValueError, match="mask of shape"):
            model(ids, attention_mask=torch.zeros(1, 1, 6, 6))
        cache = teacher.model(ids, use_cache=False)
        assert cache.get(CACHE) is None
        from transformers.cache_utils import DynamicCache

        with pytest.raises(ValueError, match="without a cache"):
            model(ids, **{CACHE: DynamicCache(config=teacher.config)})
