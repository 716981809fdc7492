"""Each loss on numbers worked by hand, and against another formulation in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmcompress import registry
from mmcompress.families.base import Outputs
from mmcompress.training.losses.affinity import Affinity
from mmcompress.training.losses.base import Loss, Projections
from mmcompress.training.losses.feature import Feature
from mmcompress.training.losses.interactive import START_SCALE, Interactive
from mmcompress.training.losses.logit import Logit
from mmcompress.training.losses.relational import Relational
from mmcompress.training.similarity import contrastive

SIZES = {"vision": 2, "text": 2}


def outputs(vision: list[list[float]], text: list[list[float]], scale: float) -> Outputs:
    return Outputs({"vision": torch.tensor(vision), "text": torch.tensor(text)}, torch.tensor(scale))


def random_pair(
    pictures: int = 7, texts: int = 3, sizes: tuple[int, int] = (5, 5)
) -> tuple[Outputs, Outputs, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    made = [
        Outputs(
            {
                "vision": torch.randn(pictures, size, generator=generator, requires_grad=True),
                "text": torch.randn(texts, size, generator=generator, requires_grad=True),
            },
            torch.tensor(scale),
        )
        for size, scale in zip(sizes, (6.0, 9.0), strict=True)
    ]
    return made[0], made[1], {"target": torch.arange(pictures) % texts}


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def logits(out: Outputs) -> np.ndarray:
    v, t = (out.embeds[k].detach().double().numpy() for k in ("vision", "text"))
    v, t = v / np.linalg.norm(v, axis=1, keepdims=True), t / np.linalg.norm(t, axis=1, keepdims=True)
    return np.asarray(float(out.logit_scale) * v @ t.T)


# The student tells two pictures apart with logits [[1, 0], [0, 1]]; the teacher with [[ln 3, 0], [0, ln 3]], so that its
# rows are (3/4, 1/4). The student's are (e, 1) / (e + 1), with the logarithms -ln(1 + 1/e) and -ln(1 + e).
STUDENT = outputs([[2.0, 0.0], [0.0, 5.0]], [[1.0, 0.0], [0.0, 1.0]], 1.0)
TEACHER = outputs([[1.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 1.0]], math.log(3))
BY_HAND = 0.75 * math.log(1 + 1 / math.e) + 0.25 * math.log(1 + math.e)
ENTROPY = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)


def test_affinity_by_hand() -> None:
    assert Affinity(SIZES, SIZES)(STUDENT, TEACHER, {}).item() == pytest.approx(BY_HAND, abs=1e-6)


def test_relational_by_hand_is_affinity_less_the_teachers_entropy() -> None:
    assert Relational(SIZES, SIZES)(STUDENT, TEACHER, {}).item() == pytest.approx(BY_HAND - ENTROPY, abs=1e-6)


def test_logit_by_hand() -> None:
    # At temperature 2 the teacher's rows are (sqrt 3, 1) / (sqrt 3 + 1), the student's (sqrt e, 1) / (sqrt e + 1).
    p, q = math.sqrt(3) / (math.sqrt(3) + 1), math.sqrt(math.e) / (math.sqrt(math.e) + 1)
    expected = 4 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    assert Logit(SIZES, SIZES)(STUDENT, TEACHER, {}).item() == pytest.approx(expected, abs=1e-6)


def test_feature_by_hand() -> None:
    # Pictures at right angles have squared distance 2, opposite ones 4: mean 3. One text is equal, one at 60 degrees: mean 1/2.
    student = outputs([[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [2.0, 0.0]], 1.0)
    teacher = outputs([[0.0, 3.0], [0.0, -1.0]], [[5.0, 0.0], [0.5, math.sqrt(0.75)]], 1.0)
    assert Feature(SIZES, SIZES)(student, teacher, {}).item() == pytest.approx(3.5, abs=1e-6)


def test_interactive_by_hand_with_two_pictures_of_one_text() -> None:
    # Pictures 0 and 1 belong to text 0, picture 2 to text 1; every similarity is 1 where they belong together, else 0.
    student = outputs([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], 50.0)
    s = START_SCALE
    to_text = math.log(1 + math.exp(-s))
    to_picture = (math.log(2 + math.exp(-s)) + math.log(1 + 2 * math.exp(-s))) / 2
    found = Interactive(SIZES, SIZES)(student, student, {"target": torch.tensor([0, 0, 1])})
    assert found.item() == pytest.approx((to_text + to_picture) / 2, rel=1e-5)


def test_interactive_pairs_the_student_with_the_teacher() -> None:
    student, teacher, batch = random_pair()
    crossed = [
        Outputs({"vision": student.embeds["vision"], "text": teacher.embeds["text"]}, torch.tensor(START_SCALE)),
        Outputs({"vision": teacher.embeds["vision"], "text": student.embeds["text"]}, torch.tensor(START_SCALE)),
    ]
    to_text, to_picture = softmax(logits(crossed[0])), softmax(logits(crossed[1]).T)
    target = batch["target"].numpy()
    a = -np.mean([np.log(to_text[i, t]) for i, t in enumerate(target)])
    b = -np.mean([np.log(to_picture[u, target == u]).mean() for u in range(3)])
    assert Interactive(SIZES, SIZES)(student, teacher, batch).item() == pytest.approx((a + b) / 2, rel=1e-5)


def test_a_text_without_pictures_is_no_query() -> None:
    with_spare = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.5]])
    right = torch.tensor([[True, True, False], [False, False, False]])
    expected = -np.log(softmax(with_spare[:1].numpy()))[0, :2].mean()
    assert contrastive(with_spare, right).item() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("kind", ["affinity", "relational", "logit"])
def test_against_numpy_with_more_pictures_than_texts(kind: str) -> None:
    student, teacher, batch = random_pair()
    p, q = logits(teacher), logits(student)
    kl = {
        tau: [
            float((softmax(a / tau) * np.log(softmax(a / tau) / softmax(b / tau))).sum(1).mean()) for a, b in ((p, q), (p.T, q.T))
        ]
        for tau in (1, 2)
    }
    entropy = [float(-(softmax(a) * np.log(softmax(a))).sum(1).mean()) for a in (p, p.T)]
    expected = {
        "affinity": (sum(kl[1]) + sum(entropy)) / 2,
        "relational": sum(kl[1]) / 2,
        "logit": 4 * kl[2][0],
    }
    loss: Loss = registry.find("losses", kind).LOSS({"vision": 5, "text": 5}, {"vision": 5, "text": 5})
    assert loss(student, teacher, batch).item() == pytest.approx(expected[kind], rel=1e-5)


def test_affinity_and_relational_have_the_same_gradient() -> None:
    student, teacher, batch = random_pair()
    grads = [
        torch.autograd.grad(kind(SIZES, SIZES)(student, teacher, batch), student.embeds["vision"])[0]
        for kind in (Affinity, Relational)
    ]
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("kind", ["relational", "logit", "feature"])
def test_zero_and_flat_when_the_student_is_the_teacher(kind: str) -> None:
    student, _, batch = random_pair()
    loss: Loss = registry.find("losses", kind).LOSS({"vision": 5, "text": 5}, {"vision": 5, "text": 5})
    value = loss(student, student_copy(student), batch)
    assert abs(value.item()) < 1e-6
    assert torch.autograd.grad(value, student.embeds["vision"])[0].abs().max() < 1e-5


def student_copy(student: Outputs) -> Outputs:
    return Outputs({k: v.detach().clone() for k, v in student.embeds.items()}, student.logit_scale)


def test_affinity_is_least_when_the_student_is_the_teacher() -> None:
    student, _, batch = random_pair()
    loss = Affinity(SIZES, SIZES)
    at_teacher = loss(student, student_copy(student), batch)
    assert torch.autograd.grad(at_teacher, student.embeds["vision"])[0].abs().max() < 1e-5
    moved = Outputs({k: v + 0.3 for k, v in student.embeds.items()}, student.logit_scale)
    assert loss(moved, student, batch) > at_teacher + 1e-3


def test_projection_only_where_widths_differ_and_it_learns() -> None:
    torch.manual_seed(0)
    student, teacher, batch = random_pair(sizes=(4, 6))
    sizes = {"vision": 4, "text": 4}, {"vision": 6, "text": 6}
    assert not list(Projections(SIZES, SIZES).parameters())
    for kind in (Feature, Interactive):
        loss = kind(*sizes)
        maps = [p for p in loss.parameters() if p.ndim == 2]
        assert [tuple(p.shape) for p in maps] == [(6, 4), (6, 4)]
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
        first = last = loss(student, teacher, batch)
        for _ in range(40):
            optimizer.zero_grad()
            last = loss(student, teacher, batch)
            last.backward()
            optimizer.step()
        assert last.item() < 0.8 * first.item()


def test_a_wider_projection_starts_without_bending_angles() -> None:
    torch.manual_seed(0)
    project = Projections({"vision": 4}, {"vision": 6})
    x = torch.randn(8, 4)
    y = project("vision", x)
    torch.testing.assert_close(y @ y.T, x @ x.T)


def test_every_loss_is_listed_with_a_line() -> None:
    for name in registry.names("losses"):
        assert len(registry.describe("losses", name)) > 20
        assert issubclass(registry.find("losses", name).LOSS, Loss)
    assert set(registry.names("losses")) >= {"affinity", "feature", "interactive", "logit", "relational"}


def test_bf16_embeddings_are_compared_in_float32() -> None:
    student, teacher, batch = random_pair()
    half = Outputs({k: v.bfloat16() for k, v in student.embeds.items()}, student.logit_scale)
    assert Affinity(SIZES, SIZES)(half, teacher, batch).dtype == torch.float32
