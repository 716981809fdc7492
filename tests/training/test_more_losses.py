"""CLIP-KD's further losses, the sigmoid form of all that look at similarities, and weights by tower."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.special import expit, xlogy

from mmcompress import registry
from mmcompress.families.base import Outputs
from mmcompress.families.clip import FAMILY
from mmcompress.passes.distill import Distill
from mmcompress.passes.qat import Qat
from mmcompress.tasks._contrastive import contrastive_loss
from mmcompress.training.losses.augmented_feature import AugmentedFeature
from mmcompress.training.losses.base import Loss, Shapes, TowerLoss
from mmcompress.training.losses.feature import Feature
from mmcompress.training.losses.gradient import Gradient
from mmcompress.training.losses.interactive import START_BIAS, START_SCALE, Interactive
from mmcompress.training.objective import weighed
from mmcompress.training.similarity import matching

SIZES = {"vision": 2, "text": 2}
TARGET = torch.tensor([0, 1, 2, 0, 1, 2, 0])
OVER_SIMILARITIES = ["affinity", "augmented-feature", "gradient", "interactive", "logit", "relational"]


def pair(bias: tuple[float, float] | None = None, size: int = 5) -> tuple[Outputs, Outputs]:
    """Seven pictures of three texts (a fourth has none); the student's embeddings take gradients, the teacher's would."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for number, scale in enumerate((6.0, 9.0)):
        embeds = {
            "vision": torch.randn(7, size, generator=generator).requires_grad_(),
            "text": torch.randn(4, size, generator=generator).requires_grad_(),
        }
        made.append(Outputs(embeds, torch.tensor(scale), logit_bias=None if bias is None else torch.tensor(bias[number])))
    return made[0], made[1]


def rows(out: Outputs, tower: str) -> np.ndarray:
    values = out.embeds[tower].detach().double().numpy()
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True))


def scores(out: Outputs) -> np.ndarray:
    bias = 0.0 if out.logit_bias is None else float(out.logit_bias)
    return float(out.logit_scale) * rows(out, "vision") @ rows(out, "text").T + bias


def build(name: str, size: int = 5) -> Loss:
    torch.manual_seed(0)
    shapes = Shapes("student", {"vision": size, "text": size})
    loss: Loss = registry.find("losses", name).LOSS.build(shapes, shapes)
    return loss


def test_gradient_by_hand() -> None:
    # Two pictures, two texts, all along the axes, scale s: logits are s times the identity, so with q = 1 / (1 + e^s) the
    # slopes of either cross-entropy are [[-q, q], [q, -q]] / 2, and so is their mean. A picture's gradient is s (-q, q) / 2.
    # Student and teacher differ by the factors s q only: the squared distance is 2 ((s q)_t - (s q)_s)^2 / 4 for each of them.
    eye = [[1.0, 0.0], [0.0, 1.0]]
    student, teacher = (
        Outputs({"vision": torch.tensor(eye), "text": torch.tensor(eye)}, torch.tensor(s)) for s in (1.0, math.log(3))
    )
    gap = math.log(3) / 4 - 1 / (1 + math.e)
    found = Gradient(SIZES, SIZES).shares(student, teacher, {"target": torch.tensor([0, 1])})
    assert {tower: value.item() for tower, value in found.items()} == pytest.approx(
        {"vision": gap**2 / 2, "text": gap**2 / 2}, abs=1e-7
    )


@pytest.mark.parametrize("bias", [None, (-2.0, -3.0)])
def test_gradient_is_that_of_the_tasks_own_loss(bias: tuple[float, float] | None) -> None:
    student, teacher = pair(bias)
    pulls = []
    for out in (student, teacher):
        # At unit embeddings, as the loss's own normalising would project the radial part away.
        units = {tower: torch.tensor(rows(out, tower)).requires_grad_() for tower in out.embeds}
        logits = out.logit_scale.double() * units["vision"] @ units["text"].T
        if out.logit_bias is not None:
            sign = 2.0 * torch.nn.functional.one_hot(TARGET, 4) - 1
            value = torch.nn.functional.softplus(-sign * (logits + out.logit_bias)).sum() / 7
        else:
            back = torch.stack([logits.T[u].log_softmax(-1)[u == TARGET].mean() for u in range(3)]).mean()
            value = (torch.nn.functional.cross_entropy(logits, TARGET) - back) / 2
        assert value.item() == pytest.approx(contrastive_loss(out, TARGET).item(), rel=1e-5)
        pulls.append(torch.autograd.grad(value, list(units.values())))
    expected = sum((a - b).square().sum(1).mean().item() for a, b in zip(*pulls, strict=True))
    assert build("gradient")(student, teacher, {"target": TARGET}).item() == pytest.approx(expected, rel=1e-4)


def test_augmented_feature_by_hand() -> None:
    # The fused embedding is the student's part alone, so that the loss is CLIP's of the student at scale 1 / 0.07.
    loss = AugmentedFeature(SIZES, SIZES)
    for layer in loss.fuse.values():
        layer.weight.data = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
        layer.bias.data.zero_()
    eye = torch.eye(2)
    student = Outputs({"vision": 3 * eye, "text": eye}, torch.tensor(1.0))
    teacher = Outputs({"vision": eye.flip(0), "text": eye}, torch.tensor(1.0))
    found = loss(student, teacher, {"target": torch.tensor([0, 1])})
    assert found.item() == pytest.approx(math.log(1 + math.exp(-START_SCALE)), abs=1e-6)
    # And the teacher's part alone: its two pictures are exchanged, so that every pair is the wrong one.
    for layer in loss.fuse.values():
        layer.weight.data = layer.weight.data.roll(2, dims=1)
    assert loss(student, teacher, {"target": torch.tensor([0, 1])}).item() == pytest.approx(START_SCALE, rel=1e-5)


def test_augmented_feature_against_numpy() -> None:
    student, teacher = pair()
    loss = build("augmented-feature")
    fused = {}
    for tower in ("vision", "text"):
        layer = loss.get_submodule(f"fuse.{tower}")
        weight, bias = (p.detach().double().numpy() for p in layer.parameters())
        values = np.concatenate([rows(student, tower), rows(teacher, tower)], axis=1) @ weight.T + bias
        fused[tower] = values / np.linalg.norm(values, axis=1, keepdims=True)
    z = START_SCALE * fused["vision"] @ fused["text"].T
    target = TARGET.numpy()
    logs = [z - np.log(np.exp(z).sum(1, keepdims=True)), z.T - np.log(np.exp(z.T).sum(1, keepdims=True))]
    to_text = -np.mean([logs[0][i, t] for i, t in enumerate(target)])
    to_picture = -np.mean([logs[1][u, target == u].mean() for u in range(3)])
    expected = (to_text + to_picture) / 2
    assert loss(student, teacher, {"target": TARGET}).item() == pytest.approx(float(expected), rel=1e-5)


def test_sigmoid_losses_by_hand() -> None:
    # One picture and two texts. The teacher's chances are 3/4 and 1/4, the student's 1/2 each.
    student = Outputs({"vision": torch.tensor([[1.0, 0.0]]), "text": torch.eye(2)}, torch.tensor(0.0), logit_bias=torch.zeros(()))
    log3 = math.log(3)
    teacher = Outputs(
        {"vision": torch.tensor([[1.0, 0.0]]), "text": torch.tensor([[1.0, 0.0], [-1.0, 0.0]])},
        torch.tensor(log3),
        logit_bias=torch.zeros(()),
    )
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    batch = {"target": torch.tensor([0])}
    for name, expected in (("affinity", 2 * math.log(2)), ("relational", 2 * (math.log(2) - entropy))):
        assert build(name, 2)(student, teacher, batch).item() == pytest.approx(expected, abs=1e-6)
    # Wrong by 1 - 1/2 and 1 - 3/4; the gradient of the picture is s (p - y) T: 0 for the student, whose scale is 0.
    pull = log3 * (-0.25 - 0.25)
    found = Gradient(SIZES, SIZES).shares(student, teacher, batch)
    assert found["vision"].item() == pytest.approx(pull**2, abs=1e-6)
    logits = torch.tensor([[2.0, -1.0]])
    expected = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))
    assert matching(logits, torch.tensor([[True, False]])).item() == pytest.approx(expected, abs=1e-6)


def test_sigmoid_losses_against_scipy() -> None:
    student, teacher = pair((-2.0, -3.0))
    p, q = scores(teacher), scores(student)

    def kl(tau: float) -> float:
        a, b = expit(p / tau), expit(q / tau)
        return float((xlogy(a, a / b) + xlogy(1 - a, (1 - a) / (1 - b))).sum(1).mean())

    cross = float(-(xlogy(expit(p), expit(q)) + xlogy(expit(-p), expit(-q))).sum(1).mean())
    sign = 2 * np.eye(4)[TARGET.numpy()] - 1
    to_text = START_SCALE * rows(student, "vision") @ rows(teacher, "text").T + START_BIAS
    to_picture = START_SCALE * rows(student, "text") @ rows(teacher, "vision").T + START_BIAS
    ways = -np.log(expit(sign * to_text)).sum(1).mean() - np.log(expit(sign.T * to_picture)).sum(1).mean()
    expected = {"affinity": cross, "relational": kl(1), "logit": 4 * kl(2), "interactive": float(ways) / 2}
    found = {name: build(name)(student, teacher, {"target": TARGET}).item() for name in expected}
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bias", [None, (-2.0, -3.0)])
@pytest.mark.parametrize("name", OVER_SIMILARITIES)
def test_bias_decides_the_form_and_the_gradient_reaches_the_student(name: str, bias: tuple[float, float] | None) -> None:
    student, teacher = pair(bias)
    held = Outputs({k: v.detach() for k, v in teacher.embeds.items()}, teacher.logit_scale, logit_bias=teacher.logit_bias)
    loss = build(name)
    value = loss(student, held, {"target": TARGET})
    value.backward()
    assert all(embeds.grad is not None and embeds.grad.abs().max() > 0 for embeds in student.embeds.values())
    assert all(embeds.grad is None for embeds in teacher.embeds.values())
    softmax = loss(*pair(), {"target": TARGET})
    assert (abs(softmax.item() - value.item()) < 1e-6) == (bias is None)


def test_a_tower_weighs_its_own_part() -> None:
    student, teacher = pair()
    batch = {"target": TARGET}
    for name in ("feature", "interactive", "gradient"):
        loss = build(name)
        assert isinstance(loss, TowerLoss)
        parts = loss.shares(student, teacher, batch)
        assert set(parts) == {"vision", "text"}
        found = weighed(loss, {"vision": 4, "text": 1}, student, teacher, batch)
        assert found.item() == pytest.approx(4 * parts["vision"].item() + parts["text"].item(), rel=1e-6)
        alone = weighed(loss, {"vision": 2}, student, teacher, batch)
        assert alone.item() == pytest.approx(2 * parts["vision"].item(), rel=1e-6)
        assert weighed(loss, 3.0, student, teacher, batch).item() == pytest.approx(3 * loss(student, teacher, batch).item())


def test_interactives_parts_train_a_tower_each() -> None:
    student, teacher = pair()
    parts = Interactive(SIZES, SIZES).shares(student, teacher, {"target": TARGET})
    for tower, other in (("vision", "text"), ("text", "vision")):
        found = torch.autograd.grad(parts[tower], [student.embeds[tower], student.embeds[other]], allow_unused=True)
        assert found[0].abs().max() > 0
        assert found[1] is None


def test_weights_by_tower_are_checked() -> None:
    assert Distill(losses={"feature": {"vision": 4, "text": 1}}).check_against(FAMILY, {}) == []
    (said,) = Distill(losses={"feature": {"visoin": 4}}).check_against(FAMILY, {})
    assert "losses: feature: unknown tower 'visoin'" in said
    assert "did you mean 'vision'" in said
    for kind in (Distill, Qat):
        (said,) = kind(losses={"affinity": {"vision": 4}}).check_against(FAMILY, {})
        assert "affinity is no sum over towers" in said
    with pytest.raises(ValidationError, match="task: the task's own loss is one for all towers"):
        Distill(losses={"task": {"vision": 1}, "feature": 1})
    with pytest.raises(ValidationError, match="no distillation loss has a weight above 0"):
        Distill(losses={"feature": {"vision": 0, "text": 0}})
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        Distill(losses={"feature": {"vision": -1}})
    assert issubclass(Feature, TowerLoss)
