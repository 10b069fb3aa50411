"""The decoder against transformers', its start, and its options."""

from dataclasses import asdict

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sltrain.config import ModelConfig, RopeScaling
from sltrain.layers import SLTrainLinear
from sltrain.layers.convert import replace_linears
from sltrain.models.llama import LlamaForCausalLM, is_projection
from sltrain.models.projections import project

VOCABULARY = 61


def make_config(**changes):
    shape = {
        "name": "test",
        "hidden_size": 32,
        "intermediate_size": 43,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
    }
    return ModelConfig(**{**shape, **changes})


def make_pair(**changes):
    """Our model, and transformers' holding the same weights; loaded strictly, first one way and then the other."""
    torch.manual_seed(0)
    config = make_config(**changes)
    rope = {"rope_type": "default"} if "rope_scaling" not in changes else asdict(config.rope_scaling)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads or config.num_attention_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={**rope, "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_word_embeddings,
            max_position_embeddings=config.max_position_embeddings,
        )
    ).eval()
    with torch.no_grad():  # norms other than 1, weights large enough to matter
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.dim() == 1))
    ours = LlamaForCausalLM(config)
    state = theirs.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]  # transformers' files have no such tensor either
    ours.load_state_dict(state, strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=not config.tie_word_embeddings)
    assert list(ours.state_dict()) == list(state)
    return ours, theirs


LLAMA3 = {
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "rope_theta": 50.0,
    "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 16),
}
SHAPES = [{}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1, "rope_theta": 500.0, "rms_norm_eps": 1e-3}, LLAMA3]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 19])
@torch.no_grad()
def test_logits_equal_transformers(changes, length):
    ours, theirs = make_pair(**changes)
    input_ids = torch.randint(VOCABULARY, (3, length))
    torch.testing.assert_close(ours(input_ids), theirs(input_ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_right_padding_needs_no_mask():
    ours, theirs = make_pair(num_key_value_heads=2)
    input_ids = torch.randint(VOCABULARY, (3, 12))
    mask = torch.arange(12) < torch.tensor([12, 7, 1])[:, None]
    expected = theirs(input_ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(ours(input_ids)[mask], expected[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 2}, LLAMA3], ids=str)
def test_loss_and_gradients_equal_transformers(changes):
    ours, theirs = make_pair(**changes)
    input_ids = torch.randint(VOCABULARY, (3, 12))
    labels = input_ids.masked_fill(torch.arange(12) >= torch.tensor([12, 7, 2])[:, None], -100)
    num_targets = (labels[:, 1:] != -100).sum()
    loss = ours(input_ids, labels)
    expected = theirs(input_ids, labels=labels).loss * num_targets
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)


LENGTHS = [(12, 7, 3), (12, 1, 2), (1, 1, 1), (2, 1, 1)]  # the last predicts one token, the one before none


def padded(lengths, positions=12):
    """Ids, labels and rows of sequences of these lengths; the rows counted by a loop."""
    input_ids = torch.randint(VOCABULARY, (len(lengths), positions), generator=torch.Generator().manual_seed(1))
    labels = input_ids.masked_fill(torch.arange(positions) >= torch.tensor(lengths)[:, None], -100)
    rows = [b * positions + t for b, length in enumerate(lengths) for t in range(length - 1)]
    return input_ids, labels, torch.tensor(rows, dtype=torch.int64)


def loss_and_gradients(model, *micro_batch):
    model.zero_grad()
    loss = model(*micro_batch)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("path", ["dense", "composed", "factored"])
@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}], ids=["", "checkpointing"])
def test_computing_only_the_rows_that_matter_changes_nothing(options, path, lengths):
    model = with_sltrain(make_config(num_key_value_heads=2), path=path, **options).double()
    model.init_weights(seed=1)
    for name, parameter in model.named_parameters():
        if name.endswith("B"):  # zero at the start, where it hides the gradient of A
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    input_ids, labels, rows = padded(lengths)
    expected = loss_and_gradients(model, input_ids, labels)
    assert (expected[0] > 0) == (len(rows) > 0)
    for ours, exact in zip(loss_and_gradients(model, input_ids, labels, rows), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_rows_without_labels_give_their_logits():
    ours, _ = make_pair(num_key_value_heads=2)
    input_ids, _, rows = padded((12, 7, 3))
    torch.testing.assert_close(ours(input_ids, rows=rows), ours(input_ids).flatten(0, 1)[rows], rtol=1e-5, atol=1e-5)


def kept_bytes(model, *micro_batch):
    """Memory that forward keeps for backward, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor) is None or tensor, lambda t: t
    ):
        loss = model(*micro_batch)
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)


def test_rows_that_are_left_out_cost_no_memory():
    model = LlamaForCausalLM(make_config(intermediate_size=96, vocab_size=8))
    ids = torch.zeros(4, 64, dtype=torch.int64)
    quarter = torch.arange(4 * 64)[::4]
    # Attention alone keeps its B T positions: q, k, v and y of D numbers, of 8 D + 2 F.
    assert kept_bytes(model, ids, ids, quarter) < 0.53 * kept_bytes(model, ids, ids)


class Seen:
    """A hook that notes the shapes of what is kept."""

    def __init__(self):
        self.shapes = []

    def __call__(self, tensor):
        self.shapes.append(tuple(tensor.shape))
        return tensor


def test_the_product_of_the_mlp_is_recomputed_in_backward():
    """Kept as gate and up only, two thirds of the MLP's memory, with the same gradients bit for bit."""
    model = LlamaForCausalLM(make_config(intermediate_size=960, vocab_size=8))
    ids = torch.randint(8, (4, 64))
    kept, gradients = {}, {}
    for keeps in (False, True):
        for layer in model.model.layers:
            layer.mlp.keeps_product = keeps
        with torch.autograd.graph.saved_tensors_hooks(see := Seen(), lambda tensor: tensor):
            model(ids, ids).backward()
        kept[keeps] = see.shapes.count((256, 960))
        gradients[keeps] = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients.values(), strict=True))
    # the hooks of `recomputed` are inside these: the product is seen only where it is kept
    assert kept[True] == kept[False] + len(model.model.layers)


def test_only_the_given_rows_are_multiplied():
    model = LlamaForCausalLM(make_config())
    sizes = []
    for name, module in model.named_modules():
        if is_projection(name, module):
            module.register_forward_hook(lambda module, args, y: sizes.append(y.shape[0]))
    input_ids, labels, rows = padded((12, 7, 3))
    model(input_ids, labels, rows)
    assert sizes == [11 + 6 + 2] * 7 * 3


def test_one_more_compilation_serves_every_number_of_rows():
    torch._dynamo.reset()
    model = with_sltrain(make_config(num_hidden_layers=1), path="factored")
    model.init_weights(seed=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    counts = []
    for lengths in [(12, 7, 3), (5, 5, 9), (12, 12, 4), (3, 9, 11), (2, 4, 2)]:
        micro_batch = padded(lengths)
        expected = loss_and_gradients(model, *micro_batch)
        for ours, exact in zip(loss_and_gradients(compiled, *micro_batch), expected, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts == [1, 2, 2, 2, 2]


class Doubler(nn.Linear):
    """A layer that can serve several of its kind at once."""

    served = 0

    @staticmethod
    def forward_together(x, layers):
        Doubler.served += len(layers)
        return [2 * layer(x) for layer in layers]


def test_layers_of_one_kind_that_can_read_x_together_do():
    x, kinds = torch.randn(3, 4), (Doubler(4, 5), Doubler(4, 6), nn.Linear(4, 5))
    y, z = project(x, *kinds[:2])
    assert torch.equal(y, 2 * kinds[0](x)) and torch.equal(z, 2 * kinds[1](x)) and Doubler.served == 2
    for mixed in (kinds[1:], kinds[:0:-1]):
        for y, layer in zip(project(x, *mixed), mixed, strict=True):
            assert torch.equal(y, layer(x))
    assert Doubler.served == 2


def test_rows_of_one_token_and_rows_without_targets_have_no_loss():
    ours, _ = make_pair()
    one = torch.randint(VOCABULARY, (2, 1))
    assert ours(one, one).item() == 0
    pads = torch.full((2, 5), -100)
    assert ours(pads.clamp(min=0), pads).item() == 0


@torch.no_grad()
def test_bfloat16_is_close_to_float32():
    ours, _ = make_pair()
    input_ids = torch.randint(VOCABULARY, (3, 19))
    exact, exact_loss = ours(input_ids), ours(input_ids, input_ids)
    ours.bfloat16()
    logits, loss = ours(input_ids), ours(input_ids, input_ids)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert (logits.float() - exact).norm() < 0.05 * exact.norm()
    assert loss.item() == pytest.approx(exact_loss.item(), rel=0.02)


def with_sltrain(config, path="composed", **options):
    """The model with replaced projections (path "dense": without), built on meta and then made real with every byte set
    to NaN or nonsense."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config, **options)
        if path != "dense":
            replace_linears(model, is_projection, lambda name, linear: sltrain_layer(linear, path))
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)
    return model


def sltrain_layer(linear, path="composed"):
    return SLTrainLinear(linear.in_features, linear.out_features, rank=4, sparsity=0.1, alpha=8, path=path)


def test_meta_replace_empty_init_leaves_nothing_unset():
    model = with_sltrain(make_config())
    model.init_weights(seed=1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.isfinite(tensor).all() if tensor.is_floating_point() else (tensor.long() >= 0).all(), name
    input_ids = torch.randint(VOCABULARY, (2, 9))
    loss = model(input_ids, input_ids)
    assert loss.item() / 16 == pytest.approx(torch.tensor(VOCABULARY).log().item(), rel=0.1)  # a uniform guess
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_the_start_depends_on_seed_and_name_alone():
    first = with_sltrain(make_config())
    first.init_weights(seed=1)
    torch.randn(100)  # moves torch's default generator

    second = LlamaForCausalLM(make_config())  # built on the CPU, replaced back to front, one layer fewer before
    torch.manual_seed(5)
    for kind in ("down_proj", "o_proj", "q_proj", "up_proj", "k_proj", "v_proj", "gate_proj"):
        replace_linears(
            second, lambda name, linear, kind=kind: kind in name, lambda name, linear: sltrain_layer(linear)
        )
    second.init_weights(seed=1)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name

    shallow = with_sltrain(make_config(num_hidden_layers=1))
    shallow.init_weights(seed=1)
    for name, tensor in shallow.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name]), name

    second.init_weights(seed=2)
    layers = first.model.layers
    supports = [layer.self_attn.q_proj.indices for layer in layers] + [layers[0].self_attn.k_proj.indices]
    supports.append(second.model.layers[0].self_attn.q_proj.indices)
    assert len({tuple(indices.tolist()) for indices in supports}) == len(supports)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)


def test_bfloat16_starts_at_the_rounded_float32_values():
    exact, rounded = with_sltrain(make_config()), with_sltrain(make_config()).bfloat16()
    exact.init_weights(seed=1)
    rounded.init_weights(seed=1)
    for name, tensor in rounded.state_dict().items():
        assert torch.equal(tensor, exact.state_dict()[name].to(tensor.dtype)), name


def test_dense_start_is_normal_and_norms_are_one():
    model = LlamaForCausalLM(make_config(hidden_size=64, vocab_size=500, initializer_range=0.05))
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.init_weights(seed=0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.05), name
            assert parameter.mean().item() == pytest.approx(0, abs=0.005), name


def test_every_seed_and_every_module_draws_numbers_of_its_own():
    drawn = set()
    for seed in range(3):
        model = LlamaForCausalLM(make_config())
        model.init_weights(seed)
        attention = [layer.self_attn for layer in model.model.layers[:2]]
        for module in (model.model.embed_tokens, model.lm_head, *(a.q_proj for a in attention), attention[0].o_proj):
            drawn.add(tuple(module.weight.detach().flatten()[:4].tolist()))
    assert len(drawn) == 3 * 5


def test_checkpointing_changes_memory_not_numbers():
    kept, recomputed = with_sltrain(make_config()), with_sltrain(make_config(), activation_checkpointing=True)
    input_ids = torch.randint(VOCABULARY, (2, 9))
    saved_bytes = []
    for model in (kept, recomputed):
        model.init_weights(seed=1)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, saved=saved: saved.append(tensor) or tensor, lambda t: t
        ):
            loss = model(input_ids, input_ids)
        loss.backward()
        saved_bytes.append(sum(tensor.nbytes for tensor in saved))
    assert torch.equal(kept(input_ids, input_ids), recomputed(input_ids, input_ids))
    for (name, parameter), other in zip(kept.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name
    assert saved_bytes[1] < 0.5 * saved_bytes[0]


def test_autocast_trains():
    model = with_sltrain(make_config())
    model.init_weights(seed=1)
    input_ids = torch.randint(VOCABULARY, (2, 9))
    exact = model(input_ids, input_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids, input_ids)
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_it_learns():
    model = with_sltrain(make_config(num_hidden_layers=2))
    model.init_weights(seed=1)
    input_ids = torch.randint(VOCABULARY, (4, 17), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(input_ids, input_ids) / 64
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 3.5 and losses[-1] < 0.3 * losses[0]


def test_projections_are_exactly_the_papers():
    model = LlamaForCausalLM(make_config(num_hidden_layers=1))
    chosen = [name.rpartition(".")[2] for name, module in model.named_modules() if is_projection(name, module)]
    assert chosen == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert not is_projection("lm_head", nn.Linear(2, 2)) and not is_projection("q_proj", nn.ReLU())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "model test has no vocabulary size"),
        ({"num_attention_heads": 5}, "hidden_size 32 must be an even multiple of num_attention_heads 5"),
        ({"num_attention_heads": 32}, "hidden_size 32 must be an even multiple of num_attention_heads 32"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 must divide num_attention_heads 4"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LlamaForCausalLM(make_config(**changes))
