"""Images of each class for the evaluation: which options, numbers and guidance scales."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from em_generation.class_images import draw_class_images
from em_generation.families import find_family
from em_generation.loading import Model


@dataclass(frozen=True)
class Options:
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class GuidedOptions(Options):
    guidance_scale: float | None = None


def make_model(folder: Path, options: type, names) -> Model:
    id2label = None if names is None else {str(i): name for i, name in enumerate(names)}
    (folder / "model_index.json").write_text(json.dumps({"id2label": id2label}))
    family = replace(find_family("ldm"), options=options)
    return Model("source", "name", family, "ldm", folder, None)


def draw(model, options, known, num_images=100):
    calls = []

    def record(options, kind, number):
        calls.append((kind, options.classes, getattr(options, "guidance_scale", None), number))
        return kind

    found = draw_class_images(model, options, known, (1.0, 2.5), record, num_images)
    return found, calls


def test_images_of_the_classes_that_the_data_have(tmp_path):
    known = ("copper", "iron", "lead", "tin")
    names = ("tin", "iron", "zinc", "copper")
    ldm = make_model(tmp_path, GuidedOptions, names)
    assert ldm.class_names == names
    found, calls = draw(ldm, GuidedOptions(guidance_scale=1.5), known)
    assert found.names == ("tin", "iron", "copper")
    assert found.images == "classes"
    assert found.guided == {1.0: "classes-guidance-1", 2.5: "classes-guidance-2.5"}
    asked = ("tin", "iron", "copper")
    assert calls == [
        ("classes-guidance-1", asked, 1.0, 99),
        ("classes-guidance-2.5", asked, 2.5, 99),
        ("classes", asked, 1.5, 99),
    ]


def test_a_family_without_guidance_is_drawn_once(tmp_path):
    gan = make_model(tmp_path, Options, ("tin", "iron"))
    found, calls = draw(gan, Options(), ("iron", "tin"), num_images=1)
    assert found.guided == {}
    assert calls == [("classes", ("tin", "iron"), None, 2)]


def test_models_without_known_classes_are_not_asked(tmp_path):
    for names in (None, ("tin",), ("zinc", "lead")):
        assert draw(
            make_model(tmp_path, GuidedOptions, names), GuidedOptions(), ("iron", "tin")
        ) == (None, [])


def test_a_family_without_classes_is_not_asked(tmp_path):
    @dataclass(frozen=True)
    class Plain:
        eta: float = 0.0

    model = make_model(tmp_path, Plain, ("tin", "iron"))
    assert draw(model, Plain(), ("iron", "tin")) == (None, [])
