"""The scorer's prefix tree: each prefix encoded once, scores and gradients those of whole rows."""

import pytest
import torch
import transformers as tf

import tiny
from conftest import EOS, TINY, VOCAB, build
from loss import Scores
from training import checkpoint, models
from training import scorer as scorer_module
from training.scorer import Scorer, prefix_tree


def random_rows(B=40, T=11, vocabulary=3, seed=0):
    """Rows of few different tokens: many share prefixes, are equal, or begin another."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (B, T), generator=g)
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    return ids, lengths, torch.arange(T) < lengths[:, None]


@pytest.mark.parametrize("seed", range(5))
def test_the_tree_has_every_distinct_prefix_once_and_leads_back_to_every_row(seed, monkeypatch):
    monkeypatch.setattr(scorer_module, "STEM", 3)
    ids, lengths, _ = random_rows(seed=seed)
    ids[:, :seed], lengths = ids[0, :seed], lengths.clamp(min=seed)
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    tree = prefix_tree(ids, real)
    assert tree.stem == (seed if seed >= 3 else 0)
    rows = [tuple(row[:n]) for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
    prefixes = {row[: i + 1] for row in rows for i in range(len(row))}
    spelt = []
    for node in range(tree.ids.shape[1]):
        word, at = [], node
        for _ in range(int(tree.positions[0, node]) + 1):
            word.append(int(tree.ids[0, at]))
            at = int(tree.parent[at])
        spelt.append(tuple(word[::-1]))
    assert sorted(spelt) == sorted(prefixes)
    for b, row in enumerate(rows):
        found = [spelt[node] for node in tree.node[tree.row[b], : len(row)]]
        assert found == [row[: i + 1] for i in range(len(row))]
    beyond = tree.node[:, tree.stem :].flatten()[tree.place]
    assert torch.equal(beyond, torch.arange(tree.stem, len(spelt)))


def plain_scores(model, reference, ids, mask, temperature):
    """Row by row in one whole forward each, all logits at once."""
    logits = [m(input_ids=ids).logits[:, :-1].float() for m in (model, reference)]
    logp, ref = ((x / temperature).log_softmax(-1) for x in logits)
    taken = [x.gather(2, ids[:, 1:, None])[..., 0] for x in (logp, ref)]
    entropy = -(logp.exp() * logp).sum(-1)
    scores = (*taken, (logp.exp() * (logp - ref)).sum(-1), entropy)
    return Scores(*(torch.nn.functional.pad(x, (1, 0)) * mask for x in scores))


def test_a_stem_is_cut_off_only_where_that_leaves_attention_less_to_do(monkeypatch):
    def found(stem, T):
        ids = torch.zeros(2, T, dtype=torch.long)
        ids[1, stem] = 1
        return prefix_tree(ids, ids >= 0).stem

    assert [found(*sizes) for sizes in ((64, 250), (64, 270), (63, 70))] == [64, 0, 0]
    monkeypatch.setitem(scorer_module.MASKED, "cpu", 2.0)
    assert [found(*sizes) for sizes in ((64, 84), (64, 90), (640, 840))] == [64, 0, 640]


@pytest.mark.parametrize("stem, masked", [(0, 0.0), (6, 0.0), (6, 9.0)])  # 9: too dear
@pytest.mark.parametrize("name", TINY)
def test_scores_and_gradients_equal_those_of_whole_rows(name, stem, masked, monkeypatch):
    monkeypatch.setattr(scorer_module, "STEM", 3)
    monkeypatch.setitem(scorer_module.MASKED, "cpu", masked)
    config_class, options = TINY[name]
    refused = "final_logit_softcapping"  # by `load_model`
    options = {k: v for k, v in options.items() if k != refused}
    model, reference = (build(config_class, **options, initializer_range=r) for r in (0.2, 0.1))
    ids, lengths, real = random_rows(B=12, T=14, vocabulary=VOCAB if name == "llama_mha" else 3)
    ids[:, :stem], real[:, :stem] = ids[0, :stem], True  # what all rows begin with
    mask = real & (torch.arange(14) % 5 > 1)
    assert (prefix_tree(ids, real).stem >= 6) == (stem == 6 and not masked)
    weight = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1))
    results = []
    ways = [Scorer(model, reference, chunk=7, checkpointing=c) for c in (False, True)]
    for way in (lambda *x: plain_scores(model, reference, *x), *ways):
        model.zero_grad()
        scores = way(ids, mask, 0.8)
        ((scores.logprobs + scores.kl) * weight).sum().backward()
        results.append((scores, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (plain, expected), *ours = results
    for scores, gradient in ours:
        for a, b in zip(scores, plain, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
        assert (gradient - expected).abs().max() < 1e-4 * expected.abs().max()
    assert model.config._attn_implementation == "eager"


def test_a_shared_prefix_is_encoded_once_and_nothing_after_the_last_sampled_token():
    model, fed = build(tf.LlamaConfig), []
    hook = lambda m, args, inputs: fed.append(inputs["input_ids"].numel())  # noqa: E731
    model.model.register_forward_pre_hook(hook, with_kwargs=True)
    ids = torch.tensor([[5, 6, 7, 8, 2], [5, 6, 7, 9, 2], [5, 6, 7, 9, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0]]).bool()
    scores = Scorer(model)(ids, mask)
    assert fed == [5]  # 5, 6, 7 and then 8 or 9
    assert torch.equal(scores.logprobs[1], scores.logprobs[2])


def test_checkpointing_keeps_nothing_of_a_block_but_what_it_is_given():
    model, kept = build(tf.LlamaConfig, num_hidden_layers=8), []
    ids = torch.arange(40).view(2, 20) % VOCAB
    for checkpointing in (False, True):
        scorer, sizes = Scorer(model, checkpointing=checkpointing), []
        pack = lambda x, sizes=sizes: sizes.append(x.numel()) or x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            scorer(ids, torch.ones_like(ids).bool())
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 5
    assert "forward" not in vars(model.model.layers[0])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_token_that_pads_too_learns_as_if_it_did_not(name, tied, tmp_path):
    config_class, options = TINY[name]
    options = options | {"tie_word_embeddings": tied, "final_logit_softcapping": None}
    if name == "llama":
        del options["final_logit_softcapping"]
    ids = torch.tensor([[2, 3, EOS, 5, EOS, 7, 8, EOS]])
    mask = torch.arange(8)[None] > 4  # an earlier turn's end is read, a later turn is trained
    tokenizer, gradients, weights = tiny.build_tokenizer(), [], []
    for pad in (0, EOS):
        path = tmp_path / f"{pad}"
        model = build(config_class, **options, pad_token_id=0)  # whose own row begins as zeros
        model.config.pad_token_id = pad
        checkpoint.save_model(model, tokenizer, path)
        model, _ = models.load_model(str(path))
        assert model.config.pad_token_id == pad
        for again in (model, models.skeleton(model)):
            assert again.get_input_embeddings().padding_idx is None
        Scorer(model)(ids, mask).logprobs.sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
        weights.append(model.get_input_embeddings().weight.detach())
    assert torch.equal(*weights) and torch.equal(*gradients) and gradients[0][EOS].any()
