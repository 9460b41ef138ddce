from bench.shapes import SHAPES


def test_names_are_unique() -> None:
    names = [shape.name for shape in SHAPES]
    assert len(names) == len(set(names))


def test_every_promised_model_is_there() -> None:
    assert {"minilm", "bert-base", "vit-b", "llama-8b", "resnet-50"} <= {s.model for s in SHAPES}


def test_shapes_are_those_of_the_models() -> None:
    by_name = {shape.name: (shape.n, shape.k) for shape in SHAPES}
    # out_features, in_features as in the models' published configurations.
    assert by_name["minilm.up"] == (1536, 384)
    assert by_name["bert-base.down"] == (768, 3072)
    assert by_name["vit-b.qkv"] == (3 * 768, 768)
    assert by_name["llama-8b.qkv"] == (4096 + 2 * 8 * 128, 4096)
    assert by_name["llama-8b.up"] == (14336, 4096)
    assert by_name["resnet-50.layer4.conv3"] == (2048, 512)
