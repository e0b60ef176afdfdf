import pytest
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from tiny_clip import Untouched, make_clip, swap_token_order
from torch import Tensor, nn

from tir_kernels.adapters import PromptContext, add_lora
from tir_kernels.adapters.prompt_text import CutNameWarning, prompt_texts
from tir_kernels.towers import text_tower

NAMES = ["cat", "annual crop land", "melanocytic nevus", "dog"]
CONTEXT_LENGTH = 20
TOKENIZER = SimpleTokenizer(context_length=CONTEXT_LENGTH)
END_OF_TEXT = TOKENIZER.eot_token_id

VARIANTS = {
    "clip": {},
    "custom text": {"custom_text": True},
    "end of text by id": {"text": {"pool_type": "eos", "eos_id": END_OF_TEXT}},
    "not causal": {"text": {"no_causal_mask": True}, "custom_text": True},
    "first token": {"text": {"pool_type": "first"}},
    "last token": {"text": {"pool_type": "last"}},
    "projection with bias": {"text": {"proj_bias": True}},
    "class token": {"text": {"embed_cls": True}, "custom_text": True},
}


def make_text_clip(text: dict | None = None, **options: bool) -> nn.Module:
    """A model for the real vocabulary, with weights that float16 can hold."""
    vocabulary = {"vocab_size": TOKENIZER.vocab_size, "context_length": CONTEXT_LENGTH}
    return make_clip(text={**vocabulary, **(text or {})}, **options).half().float()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_vectors", [0, 4])
@torch.no_grad()
def test_starts_as_a_photo_of_a(variant: str, num_vectors: int) -> None:
    model = make_text_clip(**VARIANTS[variant])
    before = Untouched(model)
    prompt = PromptContext(model, TOKENIZER, NAMES, num_vectors)
    found, intermediate = prompt()
    expected = model.encode_text(TOKENIZER([f"a photo of a {name}." for name in NAMES]))
    assert found.shape == (4, 16)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, intermediate)
    before.check()


def without_start(texts: list[str]) -> Tensor:
    """Token ids without start-of-text, as SigLIP's tokenizers give them."""
    return F.pad(TOKENIZER(texts)[:, 1:], (0, 1))


@pytest.mark.parametrize("num_vectors", [0, 2, 4])
@torch.no_grad()
def test_a_tokenizer_without_start_of_text(num_vectors: int) -> None:
    """The vectors are in the place of the first words, and no part of a name is lost."""
    model = make_text_clip(**VARIANTS["not causal"])
    prompt = PromptContext(model, without_start, NAMES, num_vectors)
    assert prompt.first == 0
    words = "of a" if num_vectors == 2 else "a photo of a"
    expected = model.encode_text(without_start([f"{words} {name}." for name in NAMES]))
    torch.testing.assert_close(prompt()[0], expected)
    if num_vectors:
        prompt.vectors.copy_(model.text.token_embedding(TOKENIZER(["zebra"])[0, 1]))
        own = " ".join(["zebra"] * num_vectors)
        expected = model.encode_text(without_start([f"{own} {name}." for name in NAMES]))
        torch.testing.assert_close(prompt()[0], expected)


def test_a_tokenizer_that_knows_no_words_is_refused() -> None:
    with pytest.raises(ValueError, match="gives 'a' and 'photo' the same tokens"):
        PromptContext(
            make_text_clip(), lambda texts: torch.ones(len(texts), 20, dtype=torch.long), NAMES
        )


@torch.no_grad()
def test_four_vectors_are_the_default() -> None:
    model = make_text_clip()
    words = TOKENIZER(["a photo of a"])[:, 1:5]
    assert torch.equal(
        PromptContext(model, TOKENIZER, NAMES).vectors, model.token_embedding(words)[0]
    )


@torch.no_grad()
def test_fewer_vectors_are_the_last_words() -> None:
    model = make_text_clip()
    found, _ = PromptContext(model, TOKENIZER, NAMES, 2)()
    expected = model.encode_text(TOKENIZER([f"of a {name}." for name in NAMES]))
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_more_vectors_are_drawn_in_front_of_the_words() -> None:
    model = make_text_clip()
    torch.manual_seed(3)
    prompt = PromptContext(model, TOKENIZER, NAMES, 6)
    torch.manual_seed(3)
    again = PromptContext(model, TOKENIZER, NAMES, 6)
    assert torch.equal(prompt.vectors, again.vectors)
    words = model.token_embedding(TOKENIZER(["a photo of a"])[:, 1:5])[0]
    assert torch.equal(prompt.vectors[2:], words)
    assert 0 < prompt.vectors[:2].abs().max() < 0.02 * 5
    # Two words in front whose embeddings are the drawn vectors give the same class embeddings.
    front = TOKENIZER(["zebra quartz"])[0, 1:3]
    model.token_embedding.weight[front] = prompt.vectors[:2]
    expected = model.encode_text(TOKENIZER([f"zebra quartz a photo of a {n}." for n in NAMES]))
    torch.testing.assert_close(prompt()[0], expected)


@torch.no_grad()
def test_words_are_kept_in_half_precision() -> None:
    model = make_text_clip()
    model.token_embedding.weight.add_(1e-5 * torch.randn_like(model.token_embedding.weight))
    found, _ = PromptContext(model, TOKENIZER, NAMES)()
    model.token_embedding.half().float()
    expected = model.encode_text(TOKENIZER([f"a photo of a {name}." for name in NAMES]))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("variant", ["clip", "custom text"])
def test_cut_after_the_end_of_text_is_exact(variant: str) -> None:
    model = make_text_clip(**VARIANTS[variant]).double()
    cut = PromptContext(model, TOKENIZER, NAMES)
    full = PromptContext(model, TOKENIZER, NAMES)
    token_ids = TOKENIZER([f"a a a a {name}." for name in NAMES])
    full.embeddings = text_tower(model).embed(token_ids).detach()
    assert cut.embeddings.shape[1] == int((token_ids != 0).sum(1).max()) < CONTEXT_LENGTH
    gradients = []
    for prompt in (cut, full):
        found, intermediate = prompt(1)
        loss = found.square().sum() + intermediate.sum()
        gradients.append(torch.autograd.grad(loss, prompt.vectors)[0])
        torch.testing.assert_close(found, cut(1)[0])
        torch.testing.assert_close(intermediate, cut(1)[1])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("pool", ["not causal", "last token"])
def test_nothing_is_cut_where_it_matters(pool: str) -> None:
    prompt = PromptContext(make_text_clip(**VARIANTS[pool]), TOKENIZER, NAMES)
    assert prompt.embeddings.shape[1] == CONTEXT_LENGTH


def test_only_the_vectors_are_trained() -> None:
    model = make_text_clip()
    model.requires_grad_(False)
    prompt = PromptContext(model, TOKENIZER, NAMES)
    assert [name for name, _ in prompt.named_parameters()] == ["vectors"]
    assert list(prompt.state_dict()) == ["vectors"]
    final, _ = prompt()
    final[0].sum().backward()
    assert prompt.vectors.grad.any(1).all()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert prompt.num_blocks == 3


def test_gradient_is_the_slope() -> None:
    model = make_text_clip().double()
    prompt = PromptContext(model, TOKENIZER, NAMES).double()
    assert torch.autograd.gradcheck(
        lambda vectors: torch.func.functional_call(prompt, {"vectors": vectors}, (1,)),
        prompt.vectors[:, :],
        fast_mode=True,
    )


def test_lora_in_the_text_tower_takes_part() -> None:
    model = make_text_clip()
    prompt = PromptContext(model, TOKENIZER, NAMES)
    before, _ = prompt()
    with add_lora(model, dropout=0.0, towers=["text"]) as lora:
        for parameter in lora.parameters():
            nn.init.normal_(parameter, std=0.2)
        during, _ = prompt()
        assert not torch.allclose(during, before, atol=1e-3)
        during.square().sum().backward()
        assert all(p.grad.flatten(1).any(1).all() for p in lora.parameters())
    assert torch.equal(prompt()[0], before)


@torch.no_grad()
def test_tokens_first_in_memory_or_not() -> None:
    model = make_text_clip()
    expected = PromptContext(model, TOKENIZER, NAMES)(1)
    found = PromptContext(swap_token_order(model), TOKENIZER, NAMES)(1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("num_vectors", [0, 4, 6])
def test_names_fill_the_context_but_no_more(num_vectors: int) -> None:
    model = make_text_clip()
    room = CONTEXT_LENGTH - 3 - (num_vectors or 4)  # start, full stop and end of text
    prompt = PromptContext(model, TOKENIZER, ["cat", " ".join(["cat"] * room)], num_vectors)
    assert prompt.embeddings.shape[1] == CONTEXT_LENGTH
    long_name = " ".join(["cat"] * (room + 1))
    with pytest.warns(CutNameWarning, match="1 class name too long .* 20 tokens"):
        cut = PromptContext(model, TOKENIZER, ["dog", long_name], num_vectors)
    cut.vectors = prompt.vectors  # of which some are drawn
    with torch.no_grad():
        torch.testing.assert_close(cut()[0][1], prompt()[0][1])


HUNDRED = [f"{first} " + " ".join(f"word{at}" for at in range(99)) for first in ("cat", "dog")]


@pytest.mark.parametrize("num_vectors", [0, 4])
@pytest.mark.parametrize("template", [None, "itap of a {}, my pet."])
@pytest.mark.parametrize("context_length", [20, 32])
def test_long_names_are_cut_before_the_end_of_the_template(
    num_vectors: int, template: str | None, context_length: int
) -> None:
    tokenizer = SimpleTokenizer(context_length=context_length)
    names = [HUNDRED[0], "bird", HUNDRED[1], "electroencephalographically" * 30]
    num_vectors = num_vectors if template is None else 4 * (num_vectors > 0)
    if template is not None and num_vectors:
        template = "itap of a {}, my pet."  # 4 tokens in front
    texts = prompt_texts(tokenizer, names, num_vectors, template)
    end = tokenizer.encode((template or "{}.").partition("{}")[2])
    for at, row in enumerate(texts.token_ids.tolist()):
        tokens = row[: row.index(tokenizer.eot_token_id)]
        assert tokens[-len(end) :] == end
        assert (at in texts.cut) == (at != 1)
        if at in texts.cut:
            assert names[at].startswith(texts.cut[at])
            # Less than the tokens of another word are left over.
            assert context_length - 5 < len(tokens) + 1 <= context_length
    note = texts.note(["a", "b", "c", "d"])
    assert note.startswith(
        f"3 class names too long for the model's text context of {context_length}"
    )
    assert "cut in prompts: 'a' to 'cat word0" in note


def test_cut_names_that_become_the_same_are_refused() -> None:
    shared = " ".join(f"word{at}" for at in range(100))
    with pytest.raises(ValueError, match=r"class_names: 'word0 .*\.\.\..* left' and .* right' are"):
        PromptContext(make_text_clip(), TOKENIZER, [f"{shared} left", "cat", f"{shared} right"])
    # Nor may one that is whole be what is left of another.
    room = CONTEXT_LENGTH - 7
    whole = " ".join(["cat"] * room)
    with pytest.raises(ValueError, match=r"are the same prompt once cut to .* 20 tokens; shorten"):
        PromptContext(make_text_clip(), TOKENIZER, [whole, f"{whole} cat"])


def test_other_tokenizers_are_known_to_cut_too() -> None:
    """Functions of texts alone, and those of texts and a length without a method "encode"."""

    def of_texts(texts: list[str]) -> torch.Tensor:
        return TOKENIZER(texts)

    def with_length(texts: list[str], context_length: int = CONTEXT_LENGTH) -> torch.Tensor:
        return TOKENIZER(texts, context_length=context_length)

    names = [HUNDRED[0], "cat"]
    expected = prompt_texts(TOKENIZER, names, 4, None)
    assert torch.equal(prompt_texts(with_length, names, 4, None).token_ids, expected.token_ids)
    found = prompt_texts(of_texts, names, 4, None)
    assert found.cut.keys() == {0}
    assert END_OF_TEXT in found.token_ids[0]
    assert found.token_ids[0].tolist().index(END_OF_TEXT) < CONTEXT_LENGTH
    full_stop = TOKENIZER.encode(".")[0]
    assert full_stop in found.token_ids[0]


@pytest.mark.parametrize(
    ("names", "num_vectors", "kind", "message"),
    [
        ([], 4, ValueError, "class_names must hold at least one name"),
        ("cat", 4, TypeError, "class_names must be a sequence of strings; got str"),
        (NAMES, -1, ValueError, "num_vectors must be at least 0; got -1"),
        (NAMES, 2.0, TypeError, "num_vectors must be an int; got float"),
        (NAMES, 30, ValueError, "num_vectors=30 leaves no room .* context of 20 tokens"),
    ],
)
def test_wrong_arguments_are_refused(
    names: list[str], num_vectors: int, kind: type, message: str
) -> None:
    with pytest.raises(kind, match=message):
        PromptContext(make_text_clip(), TOKENIZER, names, num_vectors)


def test_a_text_layer_that_is_not_there_is_refused() -> None:
    prompt = PromptContext(make_text_clip(), TOKENIZER, NAMES)
    with pytest.raises(ValueError, match="layer must lie between 0 and 2; got 3"):
        prompt(3)


def test_unsuitable_text_towers_are_refused() -> None:
    with pytest.raises(ValueError, match="keeps every token"):
        PromptContext(make_text_clip({"pool_type": "none"}), TOKENIZER, NAMES)


def test_autocast() -> None:
    prompt = PromptContext(make_text_clip(), TOKENIZER, NAMES)
    exact, _ = prompt()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = prompt()
    assert torch.cosine_similarity(found.float(), exact, dim=1).min() > 0.999
    found.float().square().sum().backward()
    assert prompt.vectors.grad.any()


SATELLITE = "a centered satellite photo of {}."


@pytest.mark.parametrize(("template", "num_vectors"), [(SATELLITE, 0), (SATELLITE, 5), ("{}!", 0)])
@torch.no_grad()
def test_a_template_puts_its_words_around_the_names(template: str, num_vectors: int) -> None:
    model = make_text_clip()
    prompt = PromptContext(model, TOKENIZER, NAMES, num_vectors, template=template)
    expected = model.encode_text(TOKENIZER([template.replace("{}", name) for name in NAMES]))
    torch.testing.assert_close(prompt()[0], expected)
    assert prompt.vectors.shape[0] == num_vectors


@pytest.mark.parametrize("num_vectors", [0, 4])
@torch.no_grad()
def test_the_usual_words_as_a_template_change_nothing(num_vectors: int) -> None:
    model = make_text_clip()
    plain = PromptContext(model, TOKENIZER, NAMES, num_vectors)
    given = PromptContext(model, TOKENIZER, NAMES, num_vectors, template="a photo of a {}.")
    assert torch.equal(plain()[0], given()[0])
    assert torch.equal(plain.vectors, given.vectors)


def test_a_template_that_does_not_fit_is_refused() -> None:
    model = make_text_clip()
    with pytest.raises(ValueError, match=r"has 5 tokens .* context has 4; set context_tokens to 5"):
        PromptContext(model, TOKENIZER, NAMES, 4, template=SATELLITE)
    with pytest.raises(ValueError, match=r"template .* has 0 tokens in front"):
        PromptContext(model, TOKENIZER, NAMES, 4, template="{}, a pet.")
    for wrong in ("a photo", "{} and {}"):
        with pytest.raises(ValueError, match=r"template must hold one \{\}"):
            PromptContext(model, TOKENIZER, NAMES, 0, template=wrong)
